"""What makes a reference's scores, and with it the reference's name in the store.

The identity is a digest of the weights (a Hub commit, or digests of local files), adapter,
tokenizer files, chat template and its arguments, precision, quantization and rendering version, and
where they are used, folded system messages and sentinels that find a response: a change of any
makes another reference. Engine, library versions, machine, folder and data set are
not part of it.

    reference = resolve_reference(spec, store.kept_commits(spec))

What local files make of it is `data/references.py`'s; the Hub is asked through its cache, which
answers where it can't be reached.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.ids import digest_of, identity_of
from ..data.references import (
    ADAPTER_CONFIG,
    DTYPES,
    MODEL_CONFIG,
    ReferenceSpec,
    json_file,
    local_inputs,
)
from ..data.rendering import RENDERING_VERSION, Renderer
from ..data.store import ReferenceRecord
from ..errors import UserError

COMMIT = re.compile(r"[0-9a-f]{40}")


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
            folders=self.spec.local_paths(),
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
    # A commit has its tokenizer's files too.
    inputs |= {part: {"commit": commit} for part, commit in commits.items()}
    inputs |= local_inputs(spec)
    return {key: value for key, value in inputs.items() if value}


def response_place(spec: ReferenceSpec, commit: str | None = None) -> str | None:
    """ "sentinel" where a reference's template shows a response's place in that way alone.

    None where the generation prompt leads to it, and where there is no tokenizer to load: scoring
    stops there, and says why.
    """
    with contextlib.suppress(UserError):
        place = Renderer.of_reference(spec, commit).template.place
        return None if place == "prefix" else place
    return None


def _dtype(spec: ReferenceSpec, commit: str | None) -> str:
    """The precision to load: that of refs.yaml, else of the model's configuration."""
    if spec.dtype != "auto":
        return spec.dtype
    folder = spec.model_path
    if folder is not None and folder.is_file():
        return "float32"  # a GGUF file's weights are dequantized, and it names no precision
    config = (
        json_file(spec.alias, folder / MODEL_CONFIG) if folder else hub_config(spec.model, commit)
    )
    parts = (config, config.get("text_config") or {})
    named = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
    dtype = str(next(filter(None, named), "float32")).removeprefix("torch.")
    if dtype not in DTYPES:
        raise UserError(
            f"reference {spec.alias}: its config.json says dtype {dtype!r}; set dtype in refs.yaml "
            f"to one of {', '.join(DTYPES[1:])}"
        )
    return dtype


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
