"""The loop over a reference's missing pairs: shard after shard, render, score, store.

The missing pairs of a shard become one file in the store, complete or absent, so a killed run loses
at most the shard in progress. Several processes share a reference through leases; each works on the
shards that no other holds, then waits for those, in case a holder dies. Object storage has no
leases: there each worker of a run has shards of its own.

A row of the store is a score, or the permanent reason why there is none. A pair that only a limit
of this run leaves out is listed, but gets no row, so that the next run tries it again; a score that
is not finite is never stored.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..data.ids import IdArray, IdIndex, unit_of
from ..data.rendering import Refusal, RenderedPrompt, Renderer
from ..data.shards import PairShards, ShardWriter
from ..data.store import SCORE_SCHEMA, TOKEN_COLUMNS, ScoreFiles, Store
from ..errors import UserError
from ..model.packing import packed_tokens, padded_tokens
from .engines import EngineName
from .engines.protocol import Engine, EngineSettings, Logps, Progress
from .process import Report

RENDERERS = 16  # kept in a process at most
POLL_SECONDS = 1.0  # between two looks at shards that other processes hold


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
class Job:
    """All that a worker has to know of one reference and the pairs to score, as plain values."""

    engine: EngineName
    settings: EngineSettings
    pairs: str
    split: str | None = None  # None: all pairs
    store: str
    identity: str
    chat_template: str | None
    chat_template_kwargs: dict[str, Any]
    system_role: str | None = None
    context: int | None  # tokens of the longest sequence the model itself takes
    limit: int | None  # the same of this run
    keep_token_logps: bool
    worker: int = 0  # of `workers`, which have every `workers`-th shard each
    workers: int = 1  # 1: any shard, claimed by leases


@dataclass(slots=True)
class ShardWork:
    """Missing pairs of a shard as one reference sees them."""

    ids: IdArray  # [n] of the pairs that can be scored
    pairs: list[RenderedPrompt]  # each a prompt with its chosen and its rejected response
    refused: list[dict[str, Any]]  # rows with a permanent reason
    left_out: IdArray  # [n] of the pairs that only a limit of this run leaves out

    @property
    def tokens(self) -> int:
        """Tokens to compute, a prompt once for both responses."""
        return sum(map(packed_tokens, self.pairs))


@dataclass(slots=True)
class ShardResult:
    """A shard's rows to store, and the pairs whose score was not finite."""

    table: pa.Table
    not_finite: list[tuple[bytes, str]]  # pair id, branch


class ReferenceScorer:
    """Scores every selected pair that the store lacks under one reference."""

    def __init__(self, job: Job, engine: Engine | None, report: Report) -> None:
        """`engine` is None where preflight saw no pair that can be scored."""
        self._job, self._engine, self._report = job, engine, report
        self._renderer = renderer_for(job)
        self._selection = PairSelection(PairShards(job.pairs), job.split)
        self._scores = Store(job.store).scores(job.identity)
        limits = [job.limit, engine.limit if engine else None]
        self._limit = min((limit for limit in limits if limit is not None), default=None)

    def run(self) -> None:
        """Score shard after shard of this worker's, until none is left to it or another process.

        Raises `UserError` at the first shard with a score that is not finite; the shard's other
        rows are stored.
        """
        todo: Sequence[int] = self._selection.shards[self._job.worker :: self._job.workers]
        while todo := self._pass_over(todo):
            self._report({"event": "waiting", "shards": len(todo)})
            time.sleep(POLL_SECONDS)

    def _pass_over(self, shards: Iterable[int]) -> list[int]:
        """Work on the shards that no other process holds; returns those to look at again.

        The next shard is rendered while the engine scores this one.
        """
        again: list[int] = []
        numbers = iter(shards)
        with ThreadPoolExecutor(1) as pool:

            def render_next() -> Future[tuple[int, IdArray, ShardWork]] | None:
                number = next(numbers, None)
                return None if number is None else pool.submit(self._render, number)

            future = render_next()
            while future is not None:
                number, missing, shard = future.result()
                if len(missing) == 0:
                    future = render_next()
                    continue
                with self._scores.lease(unit_of(missing)) as ours:
                    # Another process may have finished it before we got the lease.
                    still_missing = ours and bool(self._scores.missing(missing).all())
                    future = render_next()
                    if still_missing:
                        self._score(number, shard)
                    else:
                        again.append(number)
        return again

    def _render(self, number: int) -> tuple[int, IdArray, ShardWork]:
        """A shard's number, the ids of its missing pairs, and these rendered."""
        rows, ids = self._selection.missing(number, self._scores)
        pairs = self._selection.pairs.pairs(number, rows) if rows else []
        rendered = self._renderer.render_many(pairs)
        return number, ids, sort_out(ids, rendered, self._job.context, self._limit)

    def _score(self, number: int, shard: ShardWork) -> None:
        result = score_rows(
            shard,
            self._engine,
            keep_token_logps=self._job.keep_token_logps,
            # The engine counts responses, of which a pair has two.
            progress=lambda count: self._report({"event": "progress", "pairs": count / 2}),
        )
        if len(result.table):
            self._scores.add(result.table)
        self._scores.leave_out(shard.left_out)
        self._report(
            {
                "event": "shard",
                "shard": number,
                "pairs": len(shard.pairs) - len(result.not_finite),
                "tokens": shard.tokens,
                "refused": len(shard.refused),
                "over_limit": len(shard.left_out),
            }
        )
        if result.not_finite:
            pair_id, branch = result.not_finite[0]
            raise UserError(
                f"reference {self._job.settings.alias}: pair {pair_id.hex()}: the log-prob of its "
                f"{branch} response is not finite ({len(result.not_finite)} such pairs in this "
                "shard); nothing is stored for them; set dtype to bfloat16 or float32 in "
                "refs.yaml, or check the weights"
            )


def write_sample(
    pairs: PairShards, count: int, folder: Path, among: IdArray | None = None
) -> PairShards | None:
    """Up to `count` random pairs, of those whose ids are `among`; None where there are none.

    They are written as a folder of pairs, because a worker process reads its pairs from one.
    """
    index = None if among is None else IdIndex(among)
    places = [
        (shard, int(row))
        for shard in range(len(pairs.names))
        for row in (
            range(pairs.rows[shard])
            if index is None
            else np.flatnonzero(index.find(pairs.pair_ids(shard)) >= 0)
        )
    ]
    if not places:
        return None
    folder.mkdir()
    writer = ShardWriter(folder, count)
    for shard, row in sorted(random.sample(places, min(count, len(places)))):
        (pair,) = pairs.pairs(shard, [row])
        writer.add(pair, pair.id)
    writer.finish({})
    return PairShards(folder)


_renderers: dict[str, Renderer] = {}  # by identity


def renderer_for(job: Job) -> Renderer:
    """The reference's renderer, loaded once in this process."""
    if job.identity not in _renderers:
        if len(_renderers) == RENDERERS:
            del _renderers[next(iter(_renderers))]
        _renderers[job.identity] = Renderer.load(
            job.settings.model,
            revision=job.settings.revision,
            chat_template=job.chat_template,
            chat_template_kwargs=job.chat_template_kwargs,
            system_role=job.system_role,
        )
    return _renderers[job.identity]


def sort_out(
    ids: IdArray,
    rendered: Sequence[RenderedPrompt | Refusal],
    context: int | None,
    limit: int | None,
) -> ShardWork:
    """Separate the pairs that can be scored from those that never can, or not in this run.

    `context` is the longest sequence (tokens) of the model itself, `limit` that of this run.
    """
    kept: list[int] = []
    pairs: list[RenderedPrompt] = []
    refused: list[dict[str, Any]] = []
    left_out: list[int] = []
    for row, pair in enumerate(rendered):
        pair_id = ids[row].tobytes()
        if isinstance(pair, Refusal):
            refused.append({"pair_id": pair_id, "reason": pair.reason})
        elif context is not None and padded_tokens(pair) > context:
            refused.append({"pair_id": pair_id, "reason": "beyond_context", **_token_counts(pair)})
        elif limit is not None and padded_tokens(pair) > limit:
            left_out.append(row)
        else:
            kept.append(row)
            pairs.append(pair)
    return ShardWork(ids[kept], pairs, refused, ids[left_out])


def score_rows(
    work: ShardWork, engine: Engine | None, *, keep_token_logps: bool, progress: Progress
) -> ShardResult:
    """Score a shard's pairs and build the rows to store, refusals included."""
    scored: list[tuple[Logps, ...]] = []
    if work.pairs:
        assert engine is not None, "preflight saw no pair to score"
        scored = engine.score(work.pairs, progress)
    rows = list(work.refused)
    not_finite: list[tuple[bytes, str]] = []
    for pair_id, pair, logps in zip(work.ids, work.pairs, scored, strict=True):
        row = {"pair_id": pair_id.tobytes(), **_token_counts(pair), **_sums(pair, logps)}
        bad = [name for name in ("chosen", "rejected") if not np.isfinite(row[f"{name}_logp"])]
        if bad:
            not_finite.append((row["pair_id"], bad[0]))
            continue
        if keep_token_logps:
            row |= dict(zip(TOKEN_COLUMNS, logps))
        rows.append(row)
    schema = SCORE_SCHEMA
    for name in TOKEN_COLUMNS if keep_token_logps else ():
        schema = schema.append(pa.field(name, pa.list_(pa.float32())))
    return ShardResult(pa.Table.from_pylist(rows, schema), not_finite)


def _sums(pair: RenderedPrompt, logps: Sequence[Logps]) -> dict[str, float]:
    """Nats of each response and of its end of turn, summed in float64."""
    sums = {}
    for name, sequence, values in zip(("chosen", "rejected"), pair.responses, logps):
        assert len(values) == sequence.num_scored
        end = values[len(values) - (len(sequence.token_ids) - sequence.end_start) :]
        sums[f"{name}_logp"] = float(values.astype(np.float64).sum())
        sums[f"{name}_end_logp"] = float(end.astype(np.float64).sum())
    return sums


def _token_counts(pair: RenderedPrompt) -> dict[str, Any]:
    chosen, rejected = pair.responses
    return {
        "chosen_tokens": chosen.num_scored,
        "rejected_tokens": rejected.num_scored,
        "prompt_tokens": chosen.start,
        "chosen_boundary": chosen.boundary,
        "rejected_boundary": rejected.boundary,
    }
