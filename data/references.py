"""References as `refs.yaml` names them: an alias, a model, and what else makes its scores.

    llama:
      model: meta-llama/Llama-3.2-3B-Instruct
      revision: main

This module only reads and checks: no model is loaded. `precompute/identity.py` turns a
`ReferenceSpec` into the identity under which the store keeps its scores; the part of it that local
files make is here, so that every reader of scores can tell whether a folder is still what was
scored. Digests of local files are kept between runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from importlib.metadata import version as package_version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_json, read_yaml, to_json, write_json
from ..settings import comma_separated
from .ids import digest_of, identity_of

ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
DEFAULT_REFS = Path("configs/refs.yaml")
PACKAGED_REFS = Path(__file__).resolve().parents[1] / DEFAULT_REFS
GGUF = ".gguf"  # ends the name of a model in one file, as llama.cpp has them
DTYPES = ("auto", "float32", "bfloat16", "float16")
SYSTEM_ROLES = ("fold",)
PARTS = ("model", "adapter")  # of a reference: each is a local folder or on the Hub
MODEL_CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
# Of several forms of the same weights a loader takes the first that is there.
WEIGHT_FILES = ("model*.safetensors", "*.safetensors", "pytorch_model*.bin", "*.gguf")
ADAPTER_FILES = ("adapter_model*.safetensors", "adapter_model*.bin")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.*",
    "additional_chat_templates/*",
)
# Notes of where a model came from and what wrote it: the same model saved elsewhere differs here.
CONFIG_NOTES = ("_name_or_path", "transformers_version", "_commit_hash", "base_model_name_or_path")
BLOCK = 16 * 2**20  # bytes hashed at a time by one thread
STAT = ("size", "mtime_ns", "ctime_ns", "ino", "dev")
SETTLED = 2 * 10**9  # nanoseconds after which a file's time stamps are trusted


@dataclass(frozen=True, slots=True)
class ReferenceSpec:
    """One entry of refs.yaml. Every field but `tensor_parallel_size` determines the scores."""

    alias: str
    model: str
    revision: str | None = None
    dtype: str = "auto"  # auto: as in the model's config.json
    quantization: str | None = None
    adapter: str | None = None
    chat_template: str | None = None  # the template's text, read from its file if it was a path
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system_role: str | None = None  # fold: a system message goes before the first user turn
    tensor_parallel_size: int = 1
    folder: Path = field(default=Path(), compare=False)  # of refs.yaml: local paths start there

    def entry(self) -> dict[str, Any]:
        """What determines the scores, as written and without defaults, to recognize an alias by.

        Local paths stay as written, so that an alias is recognized when its model folder is gone.
        """
        defaults = ReferenceSpec(self.alias, self.model)
        return {
            name: to_json(getattr(self, name))
            for name in ENTRY_KEYS
            if name == "model" or getattr(self, name) != getattr(defaults, name)
        }

    @property
    def model_path(self) -> Path | None:
        """The local folder or GGUF file that `model` names; None where it names a Hub model."""
        return self._local(self.model)

    @property
    def adapter_folder(self) -> Path | None:
        """The local folder that `adapter` names; None where there is none or it is on the Hub."""
        return None if self.adapter is None else self._local(self.adapter)

    def local_paths(self) -> dict[str, str]:
        """The folder or file of each part (`PARTS`) that is local."""
        paths = {"model": self.model_path, "adapter": self.adapter_folder}
        return {part: str(path) for part, path in paths.items() if path is not None}

    def possible_paths(self, part: str) -> list[str]:
        """Where a part is if it is local, whether it is there now or not."""
        name = getattr(self, part)
        return [] if name is None else [str(path.resolve()) for path in self._paths(name)]

    def _paths(self, name: str) -> list[Path]:
        return [base / os.path.expanduser(name) for base in (self.folder, Path())]

    def _local(self, name: str) -> Path | None:
        for path in self._paths(name):
            if path.is_dir() or (path.suffix == GGUF and path.is_file()):
                return path.resolve()
        if HUB_ID.fullmatch(name) and not name.endswith(GGUF):
            return None
        raise UserError(
            f"reference {self.alias}: {name!r} is neither a folder or GGUF file here nor a Hub id "
            "(org/name); check its path in refs.yaml"
        )


KEYS = tuple(f.name for f in fields(ReferenceSpec) if f.name not in ("alias", "folder"))
ENTRY_KEYS = tuple(key for key in KEYS if key != "tensor_parallel_size")


def load_refs(source: str | Path | Mapping[str, Any]) -> dict[str, ReferenceSpec]:
    """Every reference of a refs.yaml, or of a mapping as one holds it, by alias, in order.

    The default `configs/refs.yaml` means the packaged file where the working folder has none.
    Local paths start at the file's folder, those of a mapping at the working folder. Raises
    `UserError` with the file and the key where the file can't be read, an alias or a key is not
    allowed, or a value has the wrong type.
    """
    if isinstance(source, Mapping):
        entries, name, folder = source, "references", Path()
    else:
        path = Path(source)
        if path == DEFAULT_REFS and not path.exists():
            path = PACKAGED_REFS
        entries, name, folder = _read_yaml(path), str(path), path.parent
    if not isinstance(entries, Mapping) or not entries:
        raise UserError(f"{name}: must map aliases to references, like 'llama: {{model: …}}'")
    folder = folder.resolve()
    return {str(alias): _spec(name, folder, str(alias), entry) for alias, entry in entries.items()}


def select_refs(specs: Mapping[str, ReferenceSpec], aliases: str) -> list[ReferenceSpec]:
    """The references that a comma-separated list names, in its order; the first is the base."""
    names = comma_separated(aliases, "--refs")
    if not names:
        raise UserError(f"--refs {aliases!r} names no reference; known: {', '.join(specs)}")
    for name in names:
        if name not in specs:
            raise UserError(f"--refs: unknown reference {name!r}; known: {', '.join(specs)}")
    return [specs[name] for name in names]


def local_inputs(spec: ReferenceSpec) -> dict[str, Any]:
    """What of an identity local files make: digests under "model", "tokenizer" and "adapter".

    Raises `UserError` where a folder is not there or not complete.
    """
    return _model_inputs(spec) | _adapter_inputs(spec)


def inputs_here(spec: ReferenceSpec) -> dict[str, Any]:
    """`local_inputs` of the parts that are on this machine, complete; nothing of the others."""
    inputs: dict[str, Any] = {}
    for read in (_model_inputs, _adapter_inputs):
        with contextlib.suppress(UserError, OSError):
            inputs |= read(spec)
    return inputs


def from_pretrained(
    auto: Any, model: str | Path, revision: str | None = None, **options: Any
) -> Any:
    """What an Auto class of transformers loads for a Hub id, a model folder or a GGUF file.

    Code that comes with a model is never run, and nobody is asked whether it may be. Raises
    `UserError` where it can't be loaded: for a model that needs code of its own, for an
    architecture that transformers does not have, for damaged files.
    """
    path = Path(model)
    options["trust_remote_code"] = False
    if path.suffix != GGUF:
        with files_of(model):
            try:
                return auto.from_pretrained(str(model), revision=revision, **options)
            except ValueError as error:
                reason = " ".join(str(error).split())
                if "trust_remote_code" in reason:
                    raise UserError(
                        f"model {model} needs code of its own, and code that comes with a model is "
                        "not run here; name a model whose architecture transformers has"
                    ) from None
                if "does not recognize this architecture" in reason:
                    kind = re.search(r"model type `([^`]*)`", reason)
                    raise UserError(
                        f"model {model}: its architecture {kind[1] if kind else ''!r} is unknown "
                        f"to transformers {package_version('transformers')}; install a newer "
                        "transformers (`pip install -U transformers`), or name another model"
                    ) from None
                raise
    if find_spec("gguf") is None:
        raise UserError(f"{model}: GGUF files need the package gguf; `pip install 'mrpo[gguf]'`")
    with files_of(model, "not a GGUF file that transformers reads"):
        return auto.from_pretrained(str(path.parent), gguf_file=path.name, **options)


@contextlib.contextmanager
def files_of(
    model: str | Path,
    problem: str = "can't be loaded",
    way_out: str = "restore it, or name another",
) -> Iterator[None]:
    """Makes any error of reading a model's files a `UserError`; a device without memory's rises.

    Damaged files lead the libraries that read them to nearly any error.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError | MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{model}: {problem} ({reason}); {way_out}") from error


def check_alias(alias: str, where: str = "--refs") -> str:
    """The alias itself, or `UserError`: it becomes part of file names and method names."""
    if not ALIAS.fullmatch(alias):
        raise UserError(
            f"{where}: alias {alias!r} is not allowed; use up to 64 letters, digits, '.', '_' "
            "or '-', beginning with a letter or digit"
        )
    return alias


def file_digest(path: Path) -> str:
    """The digest of a file's content, 64 hex digits: SHA-256 over the SHA-256 of its blocks.

    It is kept in `$MRPO_CACHE`, else in the user's cache folder, until the file's stat changes. A
    file written moments ago is hashed again next time, because a second write could leave the same
    time stamps. Raises `UserError` for a file that changes meanwhile.
    """
    before = _stat(path)
    cache = os.environ.get("MRPO_CACHE")
    cache = cache or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mrpo")
    digests = Path(cache).expanduser() / "digests"
    cached = digests / f"{digest_of(str(path.resolve()).encode())}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # absent or damaged
        known = json.loads(cached.read_bytes())
        if known["stat"] == before:
            return str(known["digest"])
    started = time.time_ns()
    digest = _hash(path, before["size"])
    if _stat(path) != before:
        raise UserError(f"{path}: changed while it was read; run again when it is complete")
    if started - max(before["mtime_ns"], before["ctime_ns"]) > SETTLED:
        # Where the home can't be written, the next run hashes again.
        with contextlib.suppress(OSError):
            write_json(cached, {"path": str(path.resolve()), "stat": before, "digest": digest})
    return digest


def _read_yaml(path: Path) -> Any:
    try:
        return read_yaml(path)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; name an existing file with --refs-config"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _spec(file: str, folder: Path, alias: str, entry: Any) -> ReferenceSpec:
    check_alias(alias, file)
    where = f"{file}: {alias}"
    if isinstance(entry, str):
        entry = {"model": entry}
    if not isinstance(entry, Mapping) or "model" not in entry:
        raise UserError(f"{where}: needs a 'model': a Hub id, a folder or a GGUF file")
    if unknown := [str(key) for key in entry if key not in KEYS]:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(KEYS)}")
    values = {key: value for key, value in entry.items() if value is not None}
    for key, value in values.items():
        _check_value(f"{where}.{key}", key, value)
    if "chat_template" in values:
        text = _template(f"{where}.chat_template", folder, values["chat_template"])
        values["chat_template"] = text
    return ReferenceSpec(alias=alias, folder=folder, **values)


def _check_value(where: str, key: str, value: Any) -> None:
    if key == "tensor_parallel_size":
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where} is {value!r}; it must be a whole number from 1")
    elif key == "chat_template_kwargs":
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise UserError(f"{where} is {value!r}; it must map names to values")
    elif not isinstance(value, str) or not value.strip():
        raise UserError(f"{where} is {value!r}; it must be text (quote it in YAML)")
    if key in ("model", "adapter") and "://" in value:
        # A URL could carry a token, and would end up in the store's manifests.
        raise UserError(f"{where} is a URL; name a Hub id (org/name) or a folder")
    if key == "dtype" and value not in DTYPES:
        raise UserError(f"{where} is {value!r}; it must be one of {', '.join(DTYPES)}")
    if key == "system_role" and value not in SYSTEM_ROLES:
        raise UserError(
            f"{where} is {value!r}; it must be {' or '.join(SYSTEM_ROLES)}, or left out to "
            "render system messages as the chat template does"
        )


def _template(where: str, folder: Path, value: str) -> str:
    """The template's text: a value without a brace shows no conversation, so it names a file."""
    if "{" in value:
        return value
    try:
        return (folder / os.path.expanduser(value)).read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise UserError(
            f"{where}: {value!r} has no brace, so it is not a template but the name of a file, and "
            f"that can't be read; its path is relative to {folder}"
        ) from None


def _model_inputs(spec: ReferenceSpec) -> dict[str, Any]:
    path = spec.model_path
    if path is None:
        return {}
    if path.is_file():
        return {"model": {"file": file_digest(path)}}  # it has its tokenizer and template inside
    model = _local_part(spec.alias, path, MODEL_CONFIG, WEIGHT_FILES)
    names = _existing(path, *TOKENIZER_FILES)
    if not names:
        raise UserError(
            f"reference {spec.alias}: {path} has no tokenizer; save one beside the model "
            "(`tokenizer.save_pretrained`)"
        )
    return {"model": model, "tokenizer": {"files": _files_digest(path, names)}}


def _adapter_inputs(spec: ReferenceSpec) -> dict[str, Any]:
    folder = spec.adapter_folder
    if folder is None:
        return {}
    return {"adapter": _local_part(spec.alias, folder, ADAPTER_CONFIG, ADAPTER_FILES)}


def _local_part(alias: str, folder: Path, config: str, patterns: tuple[str, ...]) -> dict[str, Any]:
    """Digests of a local model's or adapter's weights and configuration."""
    content = json_file(alias, folder / config)
    notes = {key: value for key, value in content.items() if key not in CONFIG_NOTES}
    names = next((files for pattern in patterns if (files := _existing(folder, pattern))), [])
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(json_file(alias, index).get("weight_map", {}).values())
        if absent := sorted(shards - set(_existing(folder, "*.safetensors"))):
            raise UserError(f"reference {alias}: {folder} lacks {absent[0]}; copy it completely")
    if not names:
        raise UserError(
            f"reference {alias}: {folder} has no weights ({', '.join(patterns)}); name the folder "
            "that `save_pretrained` wrote"
        )
    return {"weights": _files_digest(folder, names), "config": identity_of(notes)}


def _existing(folder: Path, *patterns: str) -> list[str]:
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def json_file(alias: str, path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = read_json(path, {}, f"restore it for reference {alias}")
    except FileNotFoundError:
        raise UserError(
            f"reference {alias}: {path.parent} has no {path.name}; name a folder that "
            "`save_pretrained` wrote"
        ) from None
    return content


def _files_digest(folder: Path, names: Iterable[str]) -> str:
    """One digest of several files of a folder, by name and content; 32 hex digits."""
    return identity_of({name: file_digest(folder / name) for name in names})


def _hash(path: Path, size: int) -> str:
    """In blocks, so that a single large file keeps every core busy."""
    with path.open("rb") as file, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:

        def block(start: int) -> bytes:
            return hashlib.sha256(os.pread(file.fileno(), BLOCK, start)).digest()

        blocks = pool.map(block, range(0, max(size, 1), BLOCK))
        return hashlib.sha256(b"".join(blocks)).hexdigest()


def _stat(path: Path) -> dict[str, int]:
    """What changes when a file does, whether it is rewritten, replaced or restored by a copy."""
    stat = os.stat(path)
    return {name: getattr(stat, f"st_{name}") for name in STAT}
