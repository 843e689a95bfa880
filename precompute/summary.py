"""What a run of `mrpo precompute` ends with: its entry in the store's records, and the summary."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from ..data.ids import IdIndex, ids_to_numpy
from ..data.shards import PairShards
from ..data.store import ReferenceScores, Store
from .plan import Plan, duration
from .reference_run import Outcome


def record_run(store: Store, plan: Plan, outcome: Outcome, pairs: PairShards) -> None:
    """Keep how the scores were made beside them: engine, versions, machine, speed, date.

    And where the pairs are, for `mrpo store verify --rescore`.
    """
    if not outcome.pairs:
        return
    run = {
        **outcome.facts,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "pairs": outcome.pairs,
        "pairs_folder": str(pairs.path.resolve()),
        "tokens": outcome.tokens,
        "tokens_per_second": outcome.tokens_per_second,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    store.record(replace(plan.record, runs=(run,)))


def print_summary(
    plans: Sequence[Plan], outcomes: Sequence[Outcome], pairs: PairShards, store: Store
) -> list[int]:
    """A line per reference on stdout; returns how many pairs each lacks that it could have."""
    unscored = []
    for plan, outcome in zip(plans, outcomes):
        scores = store.scores(plan.reference.identity)
        lacking, reasons = _state(scores, pairs)
        left_out = min(lacking, max(plan.survey.over_limit, outcome.over_limit))
        unscored.append(lacking - left_out)
        parts = [
            f"{outcome.pairs:,} pairs scored",
            f"{pairs.num_pairs - plan.survey.missing:,} from the store",
        ]
        if outcome.tokens_per_second is not None:
            parts[0] += (
                f" ({outcome.tokens:,} tokens in {duration(outcome.seconds)}, "
                f"{outcome.tokens_per_second:,.0f} tokens/s)"
            )
        parts += [f"{count:,} {reason}" for reason, count in reasons.most_common()]
        if left_out:
            parts.append(f"{left_out:,} left out as too long for this run")
        if unscored[-1]:
            parts.append(f"{unscored[-1]:,} NOT SCORED")
        print(f"{plan.reference.alias}: " + "; ".join(parts))
    print(f"scores in {store.root}")
    return unscored


def _state(scores: ReferenceScores, pairs: PairShards) -> tuple[int, Counter[str]]:
    """Of the pairs: how many have no row, and the permanent reasons of those without a score."""
    table = scores.read(["pair_id", "reason"])
    refused = table.filter(table["reason"].is_valid())
    index, reasons = IdIndex(ids_to_numpy(refused["pair_id"])), refused["reason"].to_pylist()
    lacking, counts = 0, Counter[str]()
    for shard in range(len(pairs.names)):
        ids = pairs.pair_ids(shard)
        lacking += int(scores.missing(ids, refresh=shard == 0).sum())
        counts.update(reasons[place] for place in index.find(ids) if place >= 0)
    return lacking, counts
