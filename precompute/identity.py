"""What makes a reference's scores, and with it the reference's name in the store.

Weights (the Hub's commit, or a digest of local files), adapter, tokenizer files, chat template and
its arguments, precision, quantization, rendering version: a change of any is another reference.
Engine, library versions, machine, folder and data set are not part of it.

    reference = resolve_reference(spec, store.kept_commits(spec))
    scores = store.scores(reference.identity)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.digests import digest_of, identity_of
from ..data.references import DTYPES, ReferenceSpec
from ..data.rendering import RENDERING_VERSION
from ..errors import UserError
from .file_digests import files_digest
from .hub import hub_commit, hub_config

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


def resolve_reference(
    spec: ReferenceSpec, kept: Mapping[str, str] | None = None, *, update: bool = False
) -> ResolvedReference:
    """Find out which weights a reference means, and name them.

    `kept` are the commits that the alias resolved to before (`Store.kept_commits`); they hold
    unless `update`. Where the Hub can't be reached, what its cache knows is taken.

    Raises `UserError` where a model is missing, gated or incomplete.
    """
    kept = {} if update else dict(kept or {})
    commits: dict[str, str] = {}
    moved: dict[str, str] = {}
    if spec.model_folder is None:
        commits["model"] = _commit(spec.model, spec.revision, MODEL_CONFIG, "model", kept, moved)
    if spec.adapter is not None and spec.adapter_folder is None:
        commits["adapter"] = _commit(spec.adapter, None, ADAPTER_CONFIG, "adapter", kept, moved)
    return ResolvedReference(
        spec=spec,
        model=str(spec.model_folder or spec.model),
        revision=commits.get("model"),
        adapter=spec.adapter and str(spec.adapter_folder or spec.adapter),
        adapter_revision=commits.get("adapter"),
        dtype=_dtype(spec, commits.get("model")),
        inputs=identity_inputs(spec, commits),
        moved=moved,
    )


def identity_inputs(spec: ReferenceSpec, commits: Mapping[str, str]) -> dict[str, Any]:
    """Everything that makes the scores, as JSON; `commits` of what is on the Hub."""
    inputs: dict[str, Any] = {
        "dtype": _dtype(spec, commits.get("model")),
        "quantization": spec.quantization,
        "rendering_version": RENDERING_VERSION,
        "chat_template": spec.chat_template and digest_of(spec.chat_template.encode()),
        # As text: null is an argument too, and canonical JSON would drop it.
        "chat_template_kwargs": spec.chat_template_kwargs
        and json.dumps(dict(spec.chat_template_kwargs), sort_keys=True),
    }
    folder = spec.model_folder
    if folder is None:
        inputs["model"] = {"commit": commits["model"]}  # a commit has its tokenizer's files too
    else:
        inputs["model"] = _local_part(spec.alias, folder, MODEL_CONFIG, WEIGHT_FILES)
        names = _existing(folder, *TOKENIZER_FILES)
        if not names:
            raise UserError(
                f"reference {spec.alias}: {folder} has no tokenizer; save one beside the model "
                "(`tokenizer.save_pretrained`)"
            )
        inputs["tokenizer"] = {"files": files_digest(folder, names)}
    if spec.adapter_folder is not None:
        inputs["adapter"] = _local_part(
            spec.alias, spec.adapter_folder, ADAPTER_CONFIG, ADAPTER_FILES
        )
    elif spec.adapter is not None:
        inputs["adapter"] = {"commit": commits["adapter"]}
    return {key: value for key, value in inputs.items() if value}


def _commit(
    name: str,
    revision: str | None,
    config: str,
    part: str,
    kept: Mapping[str, str],
    moved: dict[str, str],
) -> str:
    """The commit to use; where the Hub has moved on from a kept one, `moved` says so."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    if part not in kept:
        return hub_commit(name, revision, config)
    try:
        newest = hub_commit(name, revision, config)
    except UserError:  # kept scores need no Hub
        return kept[part]
    if newest != kept[part]:
        moved[part] = newest
    return kept[part]


def _dtype(spec: ReferenceSpec, commit: str | None) -> str:
    """The precision to load: that of refs.yaml, else of the model's configuration."""
    if spec.dtype != "auto":
        return spec.dtype
    folder = spec.model_folder
    if folder is None:
        config = hub_config(spec.model, commit)
    else:
        config = _json(spec.alias, folder / MODEL_CONFIG)
    nested = config.get("text_config") or {}
    value = next(
        (
            part[key]
            for part in (config, nested)
            for key in ("dtype", "torch_dtype")
            if part.get(key)
        ),
        "float32",
    )
    dtype = str(value).removeprefix("torch.")
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
    names = next((found for pattern in patterns if (found := _existing(folder, pattern))), [])
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(_json(alias, index).get("weight_map", {}).values())
        if absent := sorted(shards - set(_existing(folder, "*.safetensors"))):
            raise UserError(f"reference {alias}: {folder} lacks {absent[0]}; copy it completely")
    if not names:
        raise UserError(
            f"reference {alias}: {folder} has no weights ({', '.join(patterns)}); name the folder "
            "that `save_pretrained` wrote"
        )
    return {"weights": files_digest(folder, names), "config": identity_of(notes)}


def _existing(folder: Path, *patterns: str) -> list[str]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _json(alias: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"reference {alias}: {path.parent} has no {path.name}; name a folder that "
            "`save_pretrained` wrote"
        ) from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"reference {alias}: {path} is not a JSON object; restore it")
    return content
