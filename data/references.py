"""References as `refs.yaml` names them: an alias, a model, and what else makes its scores.

    llama:
      model: meta-llama/Llama-3.2-3B-Instruct
      revision: main

This module only reads and checks: no model is loaded. `precompute/identity.py` turns a
`ReferenceSpec` into the identity under which the store keeps its scores.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_yaml, to_json
from ..settings import comma_separated

ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
DEFAULT_REFS = Path("configs/refs.yaml")
PACKAGED_REFS = Path(__file__).resolve().parents[1] / DEFAULT_REFS
GGUF = ".gguf"  # ends the name of a model in one file, as llama.cpp has them
DTYPES = ("auto", "float32", "bfloat16", "float16")
SYSTEM_ROLES = ("fold",)


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

    def _local(self, name: str) -> Path | None:
        for base in (self.folder, Path()):
            path = base / Path(name).expanduser()
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


def from_pretrained(
    auto: Any, model: str | Path, revision: str | None = None, **options: Any
) -> Any:
    """What an Auto class of transformers loads for a Hub id, a model folder or a GGUF file.

    Raises `UserError` where it can't be loaded.
    """
    path = Path(model)
    if path.suffix != GGUF:
        with files_of(model):
            return auto.from_pretrained(str(model), revision=revision, **options)
    if find_spec("gguf") is None:
        raise UserError(f"{model}: GGUF files need the package gguf; `pip install 'mrpo[gguf]'`")
    with files_of(model, "not a GGUF file that transformers reads"):
        return auto.from_pretrained(str(path.parent), gguf_file=path.name, **options)


@contextmanager
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
    """The template's text: a value that ends in .jinja is a file relative to the folder."""
    if "\n" in value or "{" in value or not value.endswith(".jinja"):
        return value
    try:
        return (folder / Path(value).expanduser()).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"{where}: {value!r} can't be read as text; its path is relative to {folder}"
        ) from None
