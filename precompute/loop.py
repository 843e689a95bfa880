"""The loop over what is missing: shard after shard, render, score, store.

A shard's missing pairs are one file in the store, there as a whole or not at all: what is done is
skipped, and a killed run loses at most the shard in hand. Several processes share a reference by
leases; each works on what no other holds and, at the end, waits for the others' shards, so that
it leaves nothing undone that another one dropped.

The next shard is rendered while the engine scores this one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.digests import unit_of
from ..data.ids import IdArray
from ..data.rendering import Renderer
from ..data.shards import PairShards
from ..data.store_scores import ReferenceScores
from ..errors import UserError
from .engines.base import Engine
from .scoring import RenderedRows, score_rows, sort_out

Report = Callable[[dict[str, Any]], None]
POLL = 1.0  # seconds between two looks at shards that other processes hold
TELL = 0.2  # seconds between two reports of progress inside a shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One reference over one folder of pairs."""

    alias: str
    pairs: PairShards
    scores: ReferenceScores
    renderer: Renderer
    engine: Engine | None  # None where no pair is to be scored
    context: int | None  # tokens of the longest sequence the model itself takes
    limit: int | None  # the same of this run
    keep_token_logps: bool
    report: Report


@dataclass(frozen=True, slots=True)
class _Shard:
    number: int
    missing: IdArray
    rows: RenderedRows


def score_missing(work: Work) -> None:
    """Score every pair that the store lacks.

    Raises `UserError` at the first shard with a score that is not finite; the shard's other rows
    are stored.
    """
    todo: Sequence[int] = range(len(work.pairs.names))
    while todo := _pass_over(work, todo):
        work.report({"event": "waiting", "shards": len(todo)})
        time.sleep(POLL)


def _pass_over(work: Work, shards: Iterable[int]) -> list[int]:
    """Work on the shards that no other process holds; returns those to look at again."""
    again: list[int] = []
    numbers = iter(shards)
    with ThreadPoolExecutor(1) as pool:

        def ahead() -> Future[_Shard] | None:
            number = next(numbers, None)
            return None if number is None else pool.submit(_render, work, number)

        future = ahead()
        while future is not None:
            shard = future.result()
            if len(shard.missing) == 0:
                future = ahead()
                continue
            with work.scores.lease(unit_of(shard.missing)) as ours:
                # Another process may have finished between our look and our lease.
                fresh = ours and bool(work.scores.missing(shard.missing).all())
                future = ahead()
                if fresh:
                    _score(work, shard)
                else:
                    again.append(shard.number)
    return again


def _render(work: Work, number: int) -> _Shard:
    ids = work.pairs.pair_ids(number)
    places = np.flatnonzero(work.scores.missing(ids))
    missing = ids[places]
    pairs = work.pairs.pairs(number, places.tolist()) if len(places) else []
    rendered = work.renderer.render_many(pairs)
    return _Shard(number, missing, sort_out(missing, rendered, work.context, work.limit))


def _score(work: Work, shard: _Shard) -> None:
    rows = shard.rows
    scored = score_rows(
        rows,
        work.engine,
        keep_token_logps=work.keep_token_logps,
        progress=_throttled(work.report),
    )
    if len(scored.table):
        work.scores.add(scored.table)
    work.report(
        {
            "event": "shard",
            "shard": shard.number,
            "pairs": len(rows.pairs) - len(scored.not_finite),
            "tokens": rows.tokens,
            "refused": len(rows.refused),
            "over_limit": rows.over_limit,
        }
    )
    if scored.not_finite:
        pair_id, branch = scored.not_finite[0]
        raise UserError(
            f"reference {work.alias}: pair {pair_id.hex()}: the log-prob of its {branch} response "
            f"is not finite ({len(scored.not_finite)} such pairs in this shard); nothing is stored "
            "for them; set dtype to bfloat16 or float32 in refs.yaml, or check the weights"
        )


def _throttled(report: Report) -> Callable[[int], None]:
    """Reports finished pairs at most every `TELL` seconds; the shard's own report has the rest."""
    finished, told = 0, time.monotonic()

    def progress(pairs: int) -> None:
        nonlocal finished, told
        finished += pairs
        if finished and time.monotonic() - told >= TELL:
            report({"event": "progress", "pairs": finished})
            finished, told = 0, time.monotonic()

    return progress
