"""The plan that preflight makes and prints: for each reference what there is, what is missing, what
it costs.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.shards import PairShards
from ..data.store import ReferenceRecord, Store
from ..errors import UserError
from .config import PrecomputeConfig
from .engines.base import EngineName
from .identity import ResolvedReference
from .preflight import (
    Survey,
    estimated_bytes,
    estimated_seconds,
    model_context,
    renderer_of,
    survey,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one reference is and what it has to do."""

    reference: ResolvedReference
    record: ReferenceRecord  # as the store will keep it
    context: int | None  # tokens of the longest sequence the model itself takes
    survey: Survey
    damaged: tuple[str, ...]  # score files set aside (or, in a dry run, to be)
    seconds: float | None  # estimated
    bytes: int  # estimated, of score files


def make_plans(
    references: Sequence[ResolvedReference],
    pairs: PairShards,
    store: Store,
    config: PrecomputeConfig,
    engine: EngineName,
) -> list[Plan]:
    """Preflight. Sets damaged score files aside unless it is a dry run; changes nothing else."""
    scores = [store.scores(reference.identity) for reference in references]
    damaged = [tuple(s.damaged() if config.dry_run else s.check()) for s in scores]
    contexts = [model_context(reference) for reference in references]
    surveys = survey(references, contexts, scores, pairs, config.max_model_len)
    plans = []
    for reference, context, found, bad in zip(references, contexts, surveys, damaged):
        seconds = None
        if found.todo:
            runs = _earlier_runs(store, reference.identity)
            seconds = estimated_seconds(reference, found.tokens, runs, engine)
        record = ReferenceRecord(
            alias=reference.alias,
            entry=reference.spec.entry(),
            inputs=reference.inputs,
            resolved_commit=reference.revision,
        )
        size = estimated_bytes(found, config.keep_token_logps)
        plans.append(Plan(reference, record, context, found, bad, seconds, size))
    _check_disk(store, sum(plan.bytes for plan in plans))
    return plans


def print_plans(plans: Sequence[Plan], pairs: PairShards, store: Store, engine: EngineName) -> None:
    """What was derived, on stdout."""
    print(f"{pairs.num_pairs:,} pairs of {pairs.path}, engine {engine}, store {store.root}")
    for plan in plans:
        reference = plan.reference
        revision = f" at {reference.revision[:8]}" if reference.revision else ""
        adapter = f" with adapter {reference.adapter}" if reference.adapter else ""
        print(
            f"{reference.alias}: {reference.model}{revision}{adapter}, {reference.dtype}, "
            f"identity {reference.identity[:12]}"
        )
        if reference.moved:
            newest = ", ".join(
                f"{part} at {commit[:8]}" for part, commit in reference.moved.items()
            )
            print(f"  the Hub has moved on ({newest}); --update-refs takes that")
        for name in plan.damaged:
            print(f"  damaged, set aside, its pairs are scored again: {name}")
        if pairs.kind == "text" and renderer_of(reference).has_chat_template:
            print("  warning: the pairs are plain text and this model has a chat template;")
            print("  `mrpo prepare --chat` makes them messages")
        print("  " + "; ".join(_parts(plan, pairs.num_pairs)))


def duration(seconds: float) -> str:
    """Rounded as an estimate deserves."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _parts(plan: Plan, num_pairs: int) -> list[str]:
    found = plan.survey
    parts = [f"{num_pairs - found.missing:,} pairs in the store", f"{found.todo:,} to score"]
    if found.todo:
        about = "time unknown" if plan.seconds is None else f"about {duration(plan.seconds)}"
        parts[-1] += (
            f" ({found.tokens:,} tokens, the longest sequence {found.longest:,}, {about}, "
            f"{plan.bytes / 1e6:.1f} MB)"
        )
    if found.refused:
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in found.refused.most_common())
        parts.append(f"{found.refused.total():,} that can't be ({reasons})")
    if found.over_limit:
        parts.append(f"{found.over_limit:,} left out by --max-model-len")
    return parts


def _earlier_runs(store: Store, identity: str) -> Sequence[dict[str, object]]:
    for record in store.references():
        if record.identity == identity:
            return [dict(run) for run in record.runs]
    return []


def _check_disk(store: Store, needed: int) -> None:
    if not store.files.is_local:
        return
    folder = Path(store.root).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"--store {store.root}: about {needed / 1e9:.1f} GB of scores, but only "
            f"{free / 1e9:.1f} GB free; make room or use another store"
        )
