"""The loop over a reference's missing pairs: shard after shard, render, score, store.

The missing pairs of a shard become one file in the store, complete or absent: what is done is
skipped, and a killed run loses at most the shard in progress. Several processes share a reference
through leases; each works on the shards that no other holds, then waits for those, so that none is
left undone if its holder died. The next shard is rendered while the engine scores this one.

A row of the store is a score, or the permanent reason why there is none. A pair that only a limit
of this run leaves out gets no row, so the next run tries it again; a score that is not finite is
never stored.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
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
POLL_SECONDS = 1.0  # between two looks at shards that other processes hold
REPORT_SECONDS = 0.2  # between two reports of progress within a shard


@dataclass(frozen=True)
class PairSelection:
    """The pairs that a run scores: a whole folder of pairs, or those of one split."""

    pairs: PairShards
    split: str | None = None

    @cached_property
    def num_pairs(self) -> int:
        return sum(len(self.rows(shard)) for shard in self.shards)

    @property
    def shards(self) -> range:
        return range(len(self.pairs.names))

    def rows(self, shard: int) -> np.ndarray:
        """[n] row numbers within a shard."""
        if self.split is None:
            return np.arange(self.pairs.rows[shard])
        splits = self.pairs.table(shard, ["split"])["split"].to_numpy(zero_copy_only=False)
        return np.flatnonzero(splits == self.split)

    def ids(self, shard: int) -> IdArray:
        """[n] ids of the selected pairs of a shard."""
        return self.pairs.pair_ids(shard)[self.rows(shard)]

    def missing(
        self, shard: int, scores: ScoreFiles, *, refresh: bool = True
    ) -> tuple[list[int], IdArray]:
        """Row numbers and ids [n] of the selected pairs of a shard that the store lacks."""
        rows = self.rows(shard)
        ids = self.pairs.pair_ids(shard)[rows]
        lacking = scores.missing(ids, refresh=refresh)
        return rows[lacking].tolist(), ids[lacking]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceWork:
    """One reference and the pairs to score under it."""

    alias: str
    selection: PairSelection
    scores: ScoreFiles
    renderer: Renderer
    engine: Engine | None  # None where no pair is to be scored
    context: int | None  # tokens of the longest sequence the model itself takes
    limit: int | None  # the same of this run
    keep_token_logps: bool
    report: Report


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
    """A shard's rows to store, and the pairs whose score was not finite."""

    table: pa.Table
    not_finite: list[tuple[bytes, str]] = field(default_factory=list)  # pair id, branch


def score_missing(work: ReferenceWork) -> None:
    """Score every selected pair that the store lacks.

    Raises `UserError` at the first shard with a score that is not finite; the shard's other rows
    are stored.
    """
    todo: Sequence[int] = work.selection.shards
    while todo := _pass_over(work, todo):
        work.report({"event": "waiting", "shards": len(todo)})
        time.sleep(POLL_SECONDS)


@lru_cache(16)
def renderer_for(
    identity: str,
    model: str,
    revision: str | None,
    chat_template: str | None,
    chat_template_kwargs: str,
) -> Renderer:
    """A reference's renderer, loaded once in this process; `chat_template_kwargs` as JSON.

    The identity is part of the key because a local folder's tokenizer may change.
    """
    return Renderer.load(
        model,
        revision=revision,
        chat_template=chat_template,
        chat_template_kwargs=json.loads(chat_template_kwargs),
    )


def sort_out(
    ids: IdArray,
    rendered: Sequence[RenderedPair | Refusal],
    context: int | None,
    limit: int | None,
) -> ShardWork:
    """Separate the pairs that can be scored from those that never can, or not in this run.

    `context` is the longest sequence (tokens) of the model itself, `limit` that of this run.
    """
    kept: list[int] = []
    pairs: list[RenderedPair] = []
    refused: list[dict[str, Any]] = []
    over_limit = 0
    for row, pair in enumerate(rendered):
        pair_id = ids[row].tobytes()
        if isinstance(pair, Refusal):
            refused.append({"pair_id": pair_id, "reason": pair.reason})
        elif context is not None and padded_tokens(pair) > context:
            refused.append({"pair_id": pair_id, "reason": BEYOND_CONTEXT, **_token_counts(pair)})
        elif limit is not None and padded_tokens(pair) > limit:
            over_limit += 1
        else:
            kept.append(row)
            pairs.append(pair)
    return ShardWork(ids[kept], pairs, refused, over_limit)


def score_rows(
    work: ShardWork, engine: Engine | None, *, keep_token_logps: bool, progress: Progress
) -> ShardResult:
    """Score a shard's pairs and build the rows to store, refusals included."""
    scored: list[PairTokenLogps] = []
    if work.pairs:
        assert engine is not None, "preflight saw no pair to score"
        scored = engine.score(work.pairs, progress)
    assert len(scored) == len(work.pairs)
    rows = list(work.refused)
    not_finite: list[tuple[bytes, str]] = []
    for pair_id, pair, logps in zip(work.ids, work.pairs, scored):
        row = _row(pair_id.tobytes(), pair, logps)
        bad = [name for name in ("chosen", "rejected") if not np.isfinite(row[f"{name}_logp"])]
        if bad:
            not_finite.append((pair_id.tobytes(), bad[0]))
            continue
        if keep_token_logps:
            row |= dict(zip(TOKEN_COLUMNS, (logps.chosen, logps.rejected)))
        rows.append(row)
    return ShardResult(scores_to_table(rows, keep_token_logps), not_finite)


def scores_to_table(rows: Sequence[Mapping[str, Any]], keep_token_logps: bool) -> pa.Table:
    """Rows by column name as a table of the store; an absent column is null."""
    schema = SCORE_SCHEMA
    if keep_token_logps:
        for name in TOKEN_COLUMNS:
            schema = schema.append(pa.field(name, pa.list_(pa.float32())))
    columns = {name: [row.get(name) for row in rows] for name in schema.names}
    return pa.table(columns, schema=schema)


def _row(pair_id: bytes, pair: RenderedPair, logps: PairTokenLogps) -> dict[str, Any]:
    chosen, rejected = pair.chosen, pair.rejected
    return {
        "pair_id": pair_id,
        "chosen_logp": _sum(logps.chosen, 0, chosen),
        "rejected_logp": _sum(logps.rejected, 0, rejected),
        "chosen_end_logp": _sum(logps.chosen, chosen.end_start - chosen.start, chosen),
        "rejected_end_logp": _sum(logps.rejected, rejected.end_start - rejected.start, rejected),
        **_token_counts(pair),
    }


def _sum(logps: Logps, first: int, sequence: RenderedSequence) -> float:
    """Nats from the `first` scored token on, summed in float64; 0 where there is no such token."""
    assert len(logps) == len(sequence.token_ids) - sequence.start
    return float(logps[first:].astype(np.float64).sum())


def _token_counts(pair: RenderedPair) -> dict[str, Any]:
    return {
        "chosen_tokens": len(pair.chosen.token_ids) - pair.chosen.start,
        "rejected_tokens": len(pair.rejected.token_ids) - pair.rejected.start,
        "prompt_tokens": pair.chosen.start,
        "chosen_boundary": pair.chosen.boundary,
        "rejected_boundary": pair.rejected.boundary,
    }


@dataclass(frozen=True, slots=True)
class _Shard:
    number: int
    missing: IdArray
    work: ShardWork


def _pass_over(work: ReferenceWork, shards: Iterable[int]) -> list[int]:
    """Work on the shards that no other process holds; returns those to look at again."""
    again: list[int] = []
    numbers = iter(shards)
    with ThreadPoolExecutor(1) as pool:

        def render_next() -> Future[_Shard] | None:
            number = next(numbers, None)
            return None if number is None else pool.submit(_render, work, number)

        future = render_next()
        while future is not None:
            shard = future.result()
            if len(shard.missing) == 0:
                future = render_next()
                continue
            with work.scores.lease(unit_of(shard.missing)) as ours:
                # Another process may have finished it before we got the lease.
                still_missing = ours and bool(work.scores.missing(shard.missing).all())
                future = render_next()
                if still_missing:
                    _score(work, shard)
                else:
                    again.append(shard.number)
    return again


def _render(work: ReferenceWork, number: int) -> _Shard:
    rows, ids = work.selection.missing(number, work.scores)
    pairs = work.selection.pairs.pairs(number, rows) if rows else []
    rendered = work.renderer.render_many(pairs)
    return _Shard(number, ids, sort_out(ids, rendered, work.context, work.limit))


def _score(work: ReferenceWork, shard: _Shard) -> None:
    result = score_rows(
        shard.work,
        work.engine,
        keep_token_logps=work.keep_token_logps,
        progress=_throttled(work.report),
    )
    if len(result.table):
        work.scores.add(result.table)
    work.report(
        {
            "event": "shard",
            "shard": shard.number,
            "pairs": len(shard.work.pairs) - len(result.not_finite),
            "tokens": shard.work.tokens,
            "refused": len(shard.work.refused),
            "over_limit": shard.work.over_limit,
        }
    )
    if result.not_finite:
        pair_id, branch = result.not_finite[0]
        raise UserError(
            f"reference {work.alias}: pair {pair_id.hex()}: the log-prob of its {branch} response "
            f"is not finite ({len(result.not_finite)} such pairs in this shard); nothing is stored "
            "for them; set dtype to bfloat16 or float32 in refs.yaml, or check the weights"
        )


def _throttled(report: Report) -> Callable[[int], None]:
    """Reports finished pairs every `REPORT_SECONDS`; the shard's own report has the rest."""
    finished, reported = 0, time.monotonic()

    def progress(pairs: int) -> None:
        nonlocal finished, reported
        finished += pairs
        if finished and time.monotonic() - reported >= REPORT_SECONDS:
            report({"event": "progress", "pairs": finished})
            finished, reported = 0, time.monotonic()

    return progress
