"""`mrpo refs`: what the references are, and how many of the pairs each has scored.

Reads configurations, model cards and the store; weights are never opened. A model that can't be
found gets a line that says so, and the others are listed all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal as readable_size

from ..data.references import ReferenceSpec, load_refs, select_refs
from ..data.shards import MANIFEST, PairShards
from ..data.store import Store, open_store
from ..errors import UserError
from ..settings import command
from ..terminal import print_table
from .config import RefsConfig
from .identity import MODEL_CONFIG, WEIGHT_FILES, hub_config

UNKNOWN = "?"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model without loading it; None for what is unknown."""

    num_bytes: int | None  # of its weight files
    context: int | None  # tokens
    license: str | None  # as its model card says


@command(RefsConfig)
def refs(config: RefsConfig) -> None:
    """Print a line per reference. Raises `UserError` as `load_refs` and `PairShards` do."""
    specs = load_refs(config.refs_config)
    chosen = list(specs.values()) if config.refs is None else select_refs(specs, config.refs)
    pairs = _pairs(config.pairs)
    store = open_store(config.store)
    rows = [("alias", "model", "size", "context", "license", "scored")]
    notes = []
    for spec in chosen:
        try:
            facts = model_facts(spec)
        except UserError as error:
            facts = ModelFacts(None, None, None)
            notes.append(f"{spec.alias}: {error}")
        scored = _scored(spec, specs, store, pairs)
        rows.append((spec.alias, _name(spec), *_shown(facts), scored))
    print_table(rows, justify="left")
    for note in notes:
        print(note)
    data = "no pairs here" if pairs is None else f"{pairs.num_pairs:,} pairs in {pairs.path}"
    print(f"\n{data}; scores in {store.root}; references in {config.refs_config}")


def model_facts(spec: ReferenceSpec) -> ModelFacts:
    """Size, context and license of a reference's model, from its folder or the Hub.

    Raises `UserError` where the model's configuration can't be read.
    """
    folder = spec.model_folder
    if folder is None:
        config = hub_config(spec.model, spec.revision)
        size, license_ = _hub_size_and_license(spec)
        return ModelFacts(size, _context(config), license_)
    from transformers import AutoConfig

    try:
        loaded = AutoConfig.from_pretrained(folder).to_dict()
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder} has no {MODEL_CONFIG} that transformers reads") from None
    sizes = [[path.stat().st_size for path in folder.glob(pattern)] for pattern in WEIGHT_FILES]
    weights = next((files for files in sizes if files), [])
    return ModelFacts(sum(weights) or None, _context(loaded), _card_license(folder / "README.md"))


def _hub_size_and_license(spec: ReferenceSpec) -> tuple[int | None, str | None]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import filter_repo_objects

    try:
        info = HfApi().model_info(spec.model, revision=spec.revision, files_metadata=True)
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled):
        return None, None
    files = {file.rfilename: file.size or 0 for file in info.siblings or []}
    matching: list[list[str]] = [
        list(filter_repo_objects(files, allow_patterns=pattern)) for pattern in WEIGHT_FILES
    ]
    weights = next((names for names in matching if names), [])
    license_ = info.card_data.license if info.card_data else None
    return sum(files[name] for name in weights) or None, license_


def _card_license(card: Path) -> str | None:
    from huggingface_hub import ModelCard

    try:
        return ModelCard.load(card).data.license
    except (OSError, ValueError):
        return None


def _context(config: dict[str, Any]) -> int | None:
    nested = config.get("text_config") or {}
    return config.get("max_position_embeddings") or nested.get("max_position_embeddings")


def _pairs(given: str | None) -> PairShards | None:
    if given is None and not (Path("pairs") / MANIFEST).is_file():
        return None
    return PairShards(given or "pairs")


def _scored(
    spec: ReferenceSpec,
    specs: dict[str, ReferenceSpec],
    store: Store,
    pairs: PairShards | None,
) -> str:
    try:
        record = store.resolve(spec.alias, specs)
    except UserError:
        return "nothing"
    scores = store.scores(record.identity)
    if pairs is None:
        return f"{len(scores.pair_ids()):,} pairs"
    missing = sum(
        int(scores.missing(pairs.pair_ids(shard)).sum()) for shard in range(len(pairs.names))
    )
    done = pairs.num_pairs - missing
    return f"{done:,} of {pairs.num_pairs:,}" if missing else "all"


def _name(spec: ReferenceSpec) -> str:
    revision = f"@{spec.revision[:12]}" if spec.revision else ""
    return f"{spec.model}{revision}" + (f" + {spec.adapter}" if spec.adapter else "")


def _shown(facts: ModelFacts) -> tuple[str, str, str]:
    size = UNKNOWN if facts.num_bytes is None else readable_size(facts.num_bytes)
    context = UNKNOWN if facts.context is None else f"{facts.context:,}"
    return size, context, facts.license or UNKNOWN
