"""A shard's missing pairs to rows of the store: render, leave out what can't be scored, score.

A row is a score, or the permanent reason why there is none. A pair that a limit of this run leaves
out gets no row and is tried again by the next run; a score that is not finite is never a row.


The loop over what is missing: shard after shard, render, score, store.

A shard's missing pairs are one file in the store, there as a whole or not at all: what is done is
skipped, and a killed run loses at most the shard in hand. Several processes share a reference by
leases; each works on what no other holds and, at the end, waits for the others' shards, so that
it leaves nothing undone that another one dropped.

The next shard is rendered while the engine scores this one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ..data.ids import IdArray, unit_of
from ..data.rendering import Refusal, RenderedPair, RenderedSequence, Renderer
from ..data.shards import PairShards
from ..data.store import SCORE_SCHEMA, TOKEN_COLUMNS, ScoreFiles
from ..errors import UserError
from ..model.packing import packed_tokens, padded_tokens
from .engines.protocol import Engine, Logps, PairTokenLogps, Progress
from .process import Report

BEYOND_CONTEXT = "beyond_context"


@dataclass(slots=True)
class ShardWork:
    """Missing pairs of a shard as one reference sees them."""

    ids: IdArray  # [n] of the pairs that can be scored
    pairs: list[RenderedPair]
    refused: list[dict[str, Any]]  # rows with a permanent reason
    over_limit: int  # pairs that only a limit of this run leaves out

    @property
    def tokens(self) -> int:
        """Tokens to compute, a prompt once for both responses."""
        return sum(map(packed_tokens, self.pairs))


@dataclass(slots=True)
class ShardResult:
    """What a shard's scoring gave: rows to keep, and the pairs whose score was not finite."""

    table: pa.Table
    not_finite: list[tuple[bytes, str]] = field(default_factory=list)  # pair id, branch


def sort_out(
    ids: IdArray,
    rendered: Sequence[RenderedPair | Refusal],
    context: int | None,
    limit: int | None,
) -> ShardWork:
    """Separate what can be scored from what can't be, for good or in this run.

    `context` is the longest sequence (tokens) of the model itself, `limit` that of this run.
    """
    kept: list[int] = []
    pairs: list[RenderedPair] = []
    refused: list[dict[str, Any]] = []
    over_limit = 0
    for place, pair in enumerate(rendered):
        pair_id = ids[place].tobytes()
        if isinstance(pair, Refusal):
            refused.append({"pair_id": pair_id, "reason": pair.reason})
        elif context is not None and padded_tokens(pair) > context:
            refused.append({"pair_id": pair_id, "reason": BEYOND_CONTEXT, **_counts(pair)})
        elif limit is not None and padded_tokens(pair) > limit:
            over_limit += 1
        else:
            kept.append(place)
            pairs.append(pair)
    return ShardWork(ids[kept], pairs, refused, over_limit)


def score_rows(
    rows: ShardWork, engine: Engine | None, *, keep_token_logps: bool, progress: Progress
) -> ShardResult:
    """Score the pairs; the rows of the store, refusals included."""
    scored: list[PairTokenLogps] = []
    if rows.pairs:
        assert engine is not None, "preflight saw no pair to score"
        scored = engine.score(rows.pairs, progress)
    assert len(scored) == len(rows.pairs)
    kept = list(rows.refused)
    not_finite: list[tuple[bytes, str]] = []
    for pair_id, pair, score in zip(rows.ids, rows.pairs, scored):
        row = _row(pair_id.tobytes(), pair, score)
        bad = [name for name in ("chosen", "rejected") if not np.isfinite(row[f"{name}_logp"])]
        if bad:
            not_finite.append((pair_id.tobytes(), bad[0]))
            continue
        if keep_token_logps:
            row |= dict(zip(TOKEN_COLUMNS, (score.chosen, score.rejected)))
        kept.append(row)
    return ShardResult(scores_to_table(kept, keep_token_logps), not_finite)


def scores_to_table(rows: Sequence[Mapping[str, Any]], keep_token_logps: bool) -> pa.Table:
    """Rows by column name as a table of the store; an absent column is null."""
    schema = SCORE_SCHEMA
    if keep_token_logps:
        for name in TOKEN_COLUMNS:
            schema = schema.append(pa.field(name, pa.list_(pa.float32())))
    columns = {name: [row.get(name) for row in rows] for name in schema.names}
    return pa.table(columns, schema=schema)


def _row(pair_id: bytes, pair: RenderedPair, score: PairTokenLogps) -> dict[str, Any]:
    chosen, rejected = pair.chosen, pair.rejected
    return {
        "pair_id": pair_id,
        "chosen_logp": _sum(score.chosen, 0, chosen),
        "rejected_logp": _sum(score.rejected, 0, rejected),
        "chosen_end_logp": _sum(score.chosen, chosen.end_start - chosen.start, chosen),
        "rejected_end_logp": _sum(score.rejected, rejected.end_start - rejected.start, rejected),
        **_counts(pair),
    }


def _sum(logps: Logps, first: int, sequence: RenderedSequence) -> float:
    """Nats from the `first` scored token on, added up in float64; 0 for no token."""
    assert len(logps) == len(sequence.token_ids) - sequence.start
    return float(logps[first:].astype(np.float64).sum())


def _counts(pair: RenderedPair) -> dict[str, Any]:
    return {
        "chosen_tokens": len(pair.chosen.token_ids) - pair.chosen.start,
        "rejected_tokens": len(pair.rejected.token_ids) - pair.rejected.start,
        "prompt_tokens": pair.chosen.start,
        "chosen_boundary": pair.chosen.boundary,
        "rejected_boundary": pair.rejected.boundary,
    }


POLL = 1.0  # seconds between two looks at shards that other processes hold
TELL = 0.2  # seconds between two reports of progress inside a shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One reference over one folder of pairs."""

    alias: str
    pairs: PairShards
    scores: ScoreFiles
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
    rows: ShardWork


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
