"""`mrpo refs`: what the references are, and how many of the pairs each has scored.

Reads configurations, model cards and the store; weights are never opened. A model that can't be
found gets a line that says so, and the others are listed all the same.
"""

from __future__ import annotations

from pathlib import Path

from rich.filesize import decimal as readable_size

from ..data.references import (
    MODEL_CONFIG,
    WEIGHT_FILES,
    ReferenceSpec,
    from_pretrained,
    load_refs,
    select_refs,
)
from ..data.rendering import PLACES
from ..data.shards import MANIFEST, PairShards
from ..data.store import NotScored, Store, open_store
from ..errors import UserError
from ..settings import command
from ..terminal import print_table
from .config import RefsConfig
from .identity import hub_config, response_place

UNKNOWN = "?"


@command(RefsConfig)
def refs(config: RefsConfig) -> None:
    """Print a line per reference. Raises `UserError` as `load_refs` and `PairShards` do."""
    specs = load_refs(config.refs_config)
    chosen = list(specs.values()) if config.refs is None else select_refs(specs, config.refs)
    pairs = None
    if config.pairs is not None or (Path("pairs") / MANIFEST).is_file():
        pairs = PairShards(config.pairs or "pairs")
    store = open_store(config.store)
    rows = [("alias", "model", "size", "context", "license", "scored")]
    notes = []
    for spec in chosen:
        try:
            facts = _model_facts(spec)
        except UserError as error:
            facts = (UNKNOWN, UNKNOWN, UNKNOWN)
            notes.append(f"{spec.alias}: {error}")
        else:
            notes += rendering_notes(spec)
        name = spec.model + (f"@{spec.revision[:12]}" if spec.revision else "")
        name += f" + {spec.adapter}" if spec.adapter else ""
        rows.append((spec.alias, name, *facts, _scored(spec, store, pairs)))
    print_table(rows, justify="left")
    for note in notes:
        print(note)
    data = "no pairs here" if pairs is None else f"{pairs.num_pairs:,} pairs in {pairs.path}"
    print(f"\n{data}; scores in {store.root}; references in {config.refs_config}")


def rendering_notes(spec: ReferenceSpec) -> list[str]:
    """What is special about how a reference's pairs are rendered, a line each."""
    notes = []
    if response_place(spec) == "sentinel":
        notes.append(f"{spec.alias}: {PLACES['sentinel']}")
    if spec.system_role == "fold":
        notes.append(f"{spec.alias}: system messages go in front of the first user turn")
    return notes


def _model_facts(spec: ReferenceSpec) -> tuple[str, str, str]:
    """Size of the weights, context and license of a model, from its folder or the Hub.

    Raises `UserError` where the model's configuration can't be read.
    """
    from huggingface_hub.utils import filter_repo_objects

    folder = spec.model_path
    if folder is None:
        config = hub_config(spec.model, spec.revision)
        sizes, license_ = _on_hub(spec)
    else:
        from transformers import AutoConfig

        try:
            config = from_pretrained(AutoConfig, folder).to_dict()
        except UserError:
            raise
        except (OSError, ValueError, KeyError):
            raise UserError(f"{folder} has no {MODEL_CONFIG} that transformers reads") from None
        files = [folder] if folder.is_file() else folder.iterdir()
        sizes = {path.name: path.stat().st_size for path in files if path.is_file()}
        license_ = _card_license(folder / "README.md")
    # Of several forms of the same weights, the one that a loader takes.
    forms = (list(filter_repo_objects(sizes, allow_patterns=form)) for form in WEIGHT_FILES)
    num_bytes = sum(sizes[name] for name in next(filter(None, forms), []))
    length = "max_position_embeddings"
    context = config.get(length) or (config.get("text_config") or {}).get(length)
    return (
        readable_size(num_bytes) if num_bytes else UNKNOWN,
        f"{context:,}" if context else UNKNOWN,
        license_ or UNKNOWN,
    )


def _on_hub(spec: ReferenceSpec) -> tuple[dict[str, int], str | None]:
    """The bytes of a Hub model's files by name, and its license; nothing where it is offline."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        info = HfApi().model_info(spec.model, revision=spec.revision, files_metadata=True)
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled):
        return {}, None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return sizes, info.card_data.license if info.card_data else None


def _card_license(card: Path) -> str | None:
    from huggingface_hub import ModelCard

    try:
        return ModelCard.load(card).data.license
    except (OSError, ValueError):
        return None


def _scored(spec: ReferenceSpec, store: Store, pairs: PairShards | None) -> str:
    try:
        record = store.resolve(spec.alias, {spec.alias: spec})
    except NotScored:
        return "nothing"
    except UserError:  # several identities, which nothing here can tell apart
        return UNKNOWN
    scores = store.scores(record.identity)
    if pairs is None:
        return f"{len(scores.response_ids()):,} responses"
    missing = sum(
        int(scores.missing_pairs(pairs.response_ids(shard), refresh=shard == 0).sum())
        for shard in range(len(pairs.names))
    )
    return f"{pairs.num_pairs - missing:,} of {pairs.num_pairs:,}" if missing else "all"
