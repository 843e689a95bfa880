"""What makes a reference's scores, and with it the reference's name in the store.

The identity is a digest of the weights (a Hub commit, or digests of local files), adapter,
tokenizer files, chat template and its arguments, precision, quantization and rendering version, and
where they are used, folded system messages and sentinels that find a response: a change of any
makes another reference. Engine, library versions, machine, folder and data set are
not part of it.

    reference = resolve_reference(spec, store.kept_commits(spec))

Digests of local files are kept between runs; the Hub is asked through its cache, which answers
where it can't be reached.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.ids import digest_of, identity_of
from ..data.references import DTYPES, ReferenceSpec
from ..data.rendering import RENDERING_VERSION, Renderer
from ..data.store import ReferenceRecord
from ..errors import UserError
from ..files import read_json, write_json

COMMIT = re.compile(r"[0-9a-f]{40}")
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
class ResolvedReference:
    """A reference with everything that an engine needs to load exactly it."""

    spec: ReferenceSpec
    model: str  # a folder or a Hub id
    revision: str | None  # the commit of a Hub model
    adapter: str | None
    adapter_revision: str | None
    dtype: str  # never "auto"
    inputs: Mapping[str, Any]  # what the identity is a digest of
    moved: Mapping[str, str] = field(default_factory=dict)  # newer commits: "model", "adapter"

    @property
    def alias(self) -> str:
        return self.spec.alias

    @property
    def identity(self) -> str:
        return identity_of(self.inputs)

    def record(self, *runs: Mapping[str, Any]) -> ReferenceRecord:
        """The reference as the store names it; `runs` say what computed its scores."""
        return ReferenceRecord(
            alias=self.alias,
            entry=self.spec.entry(),
            inputs=self.inputs,
            resolved_commit=self.revision,
            runs=runs,
        )


def resolve_reference(
    spec: ReferenceSpec, kept: Mapping[str, str] | None = None, *, update: bool = False
) -> ResolvedReference:
    """Find the weights that a reference means, and what its identity is made of.

    `kept` are the commits that the alias resolved to before (`Store.kept_commits`); they are used
    again unless `update`.

    Raises `UserError` where a model is missing, gated or incomplete.
    """
    on_hub: dict[str, tuple[str, str | None, str]] = {}
    if spec.model_path is None:
        on_hub["model"] = (spec.model, spec.revision, MODEL_CONFIG)
    if spec.adapter is not None and spec.adapter_folder is None:
        on_hub["adapter"] = (spec.adapter, None, ADAPTER_CONFIG)
    commits, moved = {}, {}
    for part, (name, revision, config) in on_hub.items():
        kept_commit = None if update or not kept else kept.get(part)
        commits[part], newest = _commits(name, revision, config, kept_commit)
        if newest != commits[part]:
            moved[part] = newest
    inputs = _inputs(spec, commits)
    return ResolvedReference(
        spec=spec,
        model=str(spec.model_path or spec.model),
        revision=commits.get("model"),
        adapter=spec.adapter and str(spec.adapter_folder or spec.adapter),
        adapter_revision=commits.get("adapter"),
        dtype=inputs["dtype"],
        inputs=inputs,
        moved=moved,
    )


def _commits(name: str, revision: str | None, config: str, kept: str | None) -> tuple[str, str]:
    """The commit to use, and the newest one where the Hub can be asked."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision, revision
    try:
        newest = hub_commit(name, revision, config)
    except UserError:
        if kept is None:
            raise
        return kept, kept  # kept scores need no Hub
    return kept or newest, newest


def _inputs(spec: ReferenceSpec, commits: Mapping[str, str]) -> dict[str, Any]:
    """Everything that makes the scores, as JSON; `commits` of what is on the Hub."""
    inputs: dict[str, Any] = {
        "dtype": _dtype(spec, commits.get("model")),
        "quantization": spec.quantization,
        "rendering_version": RENDERING_VERSION,
        "chat_template": spec.chat_template and digest_of(spec.chat_template.encode()),
        # As text: null is an argument too, and canonical JSON would drop it.
        "chat_template_kwargs": spec.chat_template_kwargs
        and json.dumps(dict(spec.chat_template_kwargs), sort_keys=True),
        "system_role": spec.system_role,
        "response_place": response_place(spec, commits.get("model")),
    }
    folder = spec.model_path
    if folder is None:
        inputs["model"] = {"commit": commits["model"]}  # a commit has its tokenizer's files too
    elif folder.is_file():
        inputs["model"] = {"file": file_digest(folder)}  # which holds its tokenizer and template
    else:
        inputs["model"] = _local_part(spec.alias, folder, MODEL_CONFIG, WEIGHT_FILES)
        names = _existing(folder, *TOKENIZER_FILES)
        if not names:
            raise UserError(
                f"reference {spec.alias}: {folder} has no tokenizer; save one beside the model "
                "(`tokenizer.save_pretrained`)"
            )
        inputs["tokenizer"] = {"files": _files_digest(folder, names)}
    folder = spec.adapter_folder
    if folder is not None:
        inputs["adapter"] = _local_part(spec.alias, folder, ADAPTER_CONFIG, ADAPTER_FILES)
    elif spec.adapter is not None:
        inputs["adapter"] = {"commit": commits["adapter"]}
    return {key: value for key, value in inputs.items() if value}


def response_place(spec: ReferenceSpec, commit: str | None = None) -> str | None:
    """ "sentinel" where a reference's template shows a response's place in that way alone.

    None where the generation prompt leads to it, and where there is no tokenizer to load: scoring
    stops there, and says why.
    """
    with contextlib.suppress(UserError):
        renderer = Renderer.load(
            spec.model_path or spec.model,
            revision=commit or spec.revision,
            chat_template=spec.chat_template,
            chat_template_kwargs=spec.chat_template_kwargs,
        )
        return None if renderer.template.place == "prefix" else renderer.template.place
    return None


def _dtype(spec: ReferenceSpec, commit: str | None) -> str:
    """The precision to load: that of refs.yaml, else of the model's configuration."""
    if spec.dtype != "auto":
        return spec.dtype
    folder = spec.model_path
    if folder is not None and folder.is_file():
        return "float32"  # a GGUF file's weights are dequantized, and it names no precision
    config = _json(spec.alias, folder / MODEL_CONFIG) if folder else hub_config(spec.model, commit)
    parts = (config, config.get("text_config") or {})
    named = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
    dtype = str(next(filter(None, named), "float32")).removeprefix("torch.")
    if dtype not in DTYPES:
        raise UserError(
            f"reference {spec.alias}: its config.json says dtype {dtype!r}; set dtype in refs.yaml "
            f"to one of {', '.join(DTYPES[1:])}"
        )
    return dtype


def _local_part(alias: str, folder: Path, config: str, patterns: tuple[str, ...]) -> dict[str, Any]:
    """Digests of a local model's or adapter's weights and configuration."""
    content = _json(alias, folder / config)
    notes = {key: value for key, value in content.items() if key not in CONFIG_NOTES}
    names = next((files for pattern in patterns if (files := _existing(folder, pattern))), [])
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(_json(alias, index).get("weight_map", {}).values())
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


def _json(alias: str, path: Path) -> dict[str, Any]:
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


def hub_commit(name: str, revision: str | None, file: str) -> str:
    """The commit that a branch, tag or commit of a Hub model now stands for, 40 hex digits."""
    # The cache's path of any file is …/snapshots/<commit>/<file>.
    return _download(name, revision, file).parent.name


def hub_config(name: str, revision: str | None) -> dict[str, Any]:
    """The configuration of a Hub model."""
    content = json.loads(_download(name, revision, MODEL_CONFIG).read_text(encoding="utf-8"))
    assert isinstance(content, dict), content
    return content


def _download(name: str, revision: str | None, file: str) -> Path:
    """Raises `UserError` where the model is unknown, gated, or neither reachable nor cached."""
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except errors.GatedRepoError:
        problem = "gated on the Hub; accept its terms on its page and run `hf auth login`"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        problem = (
            "no such model on the Hub, or a private one; check the name in refs.yaml, or run "
            "`hf auth login`"
        )
    except errors.RevisionNotFoundError:
        problem = f"the Hub has no revision {revision!r}; check refs.yaml"
    except errors.LocalEntryNotFoundError:
        problem = (
            "not in the Hub's cache, and the Hub can't be reached; connect, or name a local folder "
            "in refs.yaml"
        )
    except errors.EntryNotFoundError:
        problem = f"has no {file}; is it a model that transformers loads?"
    raise UserError(f"{name}: {problem}")
