"""The loop over a reference's missing responses: shard after shard, render, score, store.

The missing responses of a shard of pairs become one file in the store, complete or absent, so a
killed run loses at most the shard in progress. All of a prompt go to the engine together, which
computes the prompt once. Several processes share a reference through leases; each works on the
shards that no other holds, then waits for those, in case a holder dies. Object storage has no
leases: there each worker of a run has shards of its own.

A row of the store is a score, or the permanent reason why there is none. A response that only a
limit of this run leaves out is listed, but gets no row, so that the next run tries it again; a
score that is not finite is never stored.
"""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..data.ids import IdArray, IdIndex, IdSet, ResponseIds, unit_of
from ..data.pairs import Prompt, Turns
from ..data.rendering import Refusal, RenderedPrompt, RenderedSequence, Renderer
from ..data.shards import PairShards, ShardWriter
from ..data.store import SCORE_SCHEMA, TOKEN_COLUMN, ScoreFiles, Store
from ..errors import UserError
from ..model.packing import packed_tokens
from .engines import EngineName
from .engines.protocol import Engine, EngineSettings, Logps, Progress
from .process import Report

RENDERERS = 16  # kept in a process at most
POLL_SECONDS = 1.0  # between two looks at shards that other processes hold

Rendered = Sequence[Sequence[RenderedSequence | Refusal]]  # prompt by prompt


@dataclass(frozen=True, slots=True, eq=False)
class ResponseSet:
    """Some responses of a shard's pairs, each once, those of a prompt in a row."""

    ids: IdArray  # [n]
    prompt_ids: IdArray  # [n]
    rows: np.ndarray  # [n] int64, of a pair in which the response stands, within the shard
    rejected: np.ndarray  # [n] bool, in which place it stands there

    def __len__(self) -> int:
        return len(self.ids)

    def asked(self, pairs: PairShards, shard: int) -> list[tuple[Prompt, list[Turns]]]:
        """Every prompt with its responses, in order."""
        rows, place = np.unique(self.rows, return_inverse=True)
        texts = pairs.pairs(shard, rows.tolist()) if len(self) else []
        asked = []
        numbers = zip(self.prompt_ids, place.tolist(), self.rejected.tolist())
        for _, group in groupby(numbers, key=lambda entry: entry[0].tobytes()):
            of_prompt = [(texts[row], rejected) for _, row, rejected in group]
            responses = [pair.rejected if rejected else pair.chosen for pair, rejected in of_prompt]
            asked.append((Prompt.of(of_prompt[0][0]), responses))
        return asked


@dataclass(frozen=True)
class PairSelection:
    """The pairs that a run scores: a whole folder of pairs, or those of one split."""

    pairs: PairShards
    split: str | None = None

    @cached_property
    def num_pairs(self) -> int:
        return sum(len(self.rows(shard)) for shard in self.shards)

    @cached_property
    def num_responses(self) -> int:
        """Different responses of all the pairs."""
        seen = IdSet()
        return sum(int(seen.add(self.response_ids(shard).both).sum()) for shard in self.shards)

    @property
    def shards(self) -> range:
        return range(len(self.pairs.names))

    def rows(self, shard: int) -> np.ndarray:
        """[n] row numbers within a shard."""
        if self.split is None:
            return np.arange(self.pairs.rows[shard])
        splits = self.pairs.table(shard, ["split"])["split"].to_numpy(zero_copy_only=False)
        return np.flatnonzero(splits == self.split)

    def response_ids(self, shard: int) -> ResponseIds:
        """The ids of the selected pairs of a shard."""
        return self.pairs.response_ids(shard).take(self.rows(shard))

    def missing(self, shard: int, scores: ScoreFiles, *, refresh: bool = True) -> np.ndarray:
        """Which responses of the selected pairs of a shard the store lacks, each marked once.

        [n, 2] bool: pairs; chosen, rejected.
        """
        lacking = scores.missing(self._both(shard), refresh=refresh)
        lacking[lacking] = IdSet().add(self._both(shard)[lacking])
        return lacking.reshape(-1, 2)

    def all_missing(self, scores: ScoreFiles) -> Iterator[tuple[int, np.ndarray]]:
        """The same shard by shard, each response once, though it stands in several shards."""
        seen = IdSet()
        for shard in self.shards:
            lacking = self.missing(shard, scores, refresh=shard == 0).reshape(-1)
            lacking[lacking] = seen.add(self._both(shard)[lacking])
            if lacking.any():
                yield shard, lacking.reshape(-1, 2)

    def responses(self, shard: int, marked: np.ndarray) -> ResponseSet:
        """Responses of the selected pairs of a shard, marked as by `missing`, prompt by prompt."""
        places = np.flatnonzero(marked)
        # A prompt's responses come where its first one is.
        prompts = self.response_ids(shard).prompts[places // 2]
        order = np.argsort(IdIndex(prompts).find(prompts), kind="stable")
        places, rows = places[order], self.rows(shard)
        return ResponseSet(
            self._both(shard)[places], prompts[order], rows[places // 2], places % 2 == 1
        )

    def _both(self, shard: int) -> IdArray:
        """[2n] the ids of the responses, pair by pair."""
        ids = self.response_ids(shard)
        return np.stack([ids.chosen, ids.rejected], axis=1).reshape(-1)


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
    """Missing responses of a shard as one reference sees them."""

    ids: IdArray  # [n] of the responses that can be scored, prompt by prompt
    prompt_ids: IdArray  # [n]
    prompts: list[RenderedPrompt]  # with n responses in all
    refused: list[dict[str, Any]]  # rows with a permanent reason
    left_out: IdArray  # of the responses that only a limit of this run leaves out

    @property
    def tokens(self) -> int:
        """Tokens to compute, a prompt once for all of its responses."""
        return sum(map(packed_tokens, self.prompts))


@dataclass(slots=True)
class ShardResult:
    """A shard's rows to store, and the responses whose score was not finite."""

    table: pa.Table
    not_finite: list[bytes]  # ids


class ReferenceScorer:
    """Scores every response of the selected pairs that the store lacks under one reference."""

    def __init__(self, job: Job, engine: Engine | None, report: Report) -> None:
        """`engine` is None where preflight saw no response that can be scored."""
        self._job, self._engine, self._report = job, engine, report
        self._renderer = renderer_for(job)
        self._selection = PairSelection(PairShards(job.pairs), job.split)
        self._scores = Store(job.store).scores(job.identity)
        limits = [job.limit, engine.limit if engine else None]
        self._limit = min((limit for limit in limits if limit is not None), default=None)
        self._left_out = IdSet()

    def run(self, shards: Sequence[int] | None = None) -> None:
        """Score shard after shard, by default of this worker's share, until none is left to it or
        another process.

        Raises `UserError` at the first shard with a score that is not finite; the shard's other
        rows are stored.
        """
        own = self._selection.shards[self._job.worker :: self._job.workers]
        todo = own if shards is None else shards
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

            def render_next() -> Future[tuple[int, ResponseSet, Rendered]] | None:
                number = next(numbers, None)
                return None if number is None else pool.submit(self._render, number)

            future = render_next()
            while future is not None:
                number, missing, rendered = future.result()
                if not len(missing):
                    future = render_next()
                    continue
                with self._scores.lease(unit_of(missing.ids)) as ours:
                    # Some may be scored by now: in another shard, or by another process.
                    still_missing = self._scores.missing(missing.ids) if ours else None
                    future = render_next()
                    if still_missing is None:
                        again.append(number)
                    elif still_missing.any():
                        self._score(number, missing, rendered, still_missing)
        return again

    def _render(self, number: int) -> tuple[int, ResponseSet, Rendered]:
        """A shard's number, its missing responses, and these rendered prompt by prompt."""
        selection = self._selection
        missing = selection.responses(number, selection.missing(number, self._scores))
        asked = missing.asked(self._selection.pairs, number)
        return number, missing, self._renderer.render_responses(asked)

    def _score(
        self, number: int, missing: ResponseSet, rendered: Rendered, kept: np.ndarray
    ) -> None:
        shard = sort_out(missing, rendered, self._job.context, self._limit, kept)
        result = score_rows(
            shard,
            self._engine,
            keep_token_logps=self._job.keep_token_logps,
            progress=lambda count: self._report({"event": "progress", "responses": count}),
        )
        if len(result.table):
            self._scores.add(result.table)
        self._scores.leave_out(shard.left_out)
        newly_left_out = int(self._left_out.add(shard.left_out).sum())  # not in an earlier shard
        self._report(
            {
                "event": "shard",
                "shard": number,
                "responses": len(shard.ids) - len(result.not_finite),
                "tokens": shard.tokens,
                "refused": len(shard.refused),
                "over_limit": newly_left_out,
            }
        )
        if result.not_finite:
            raise UserError(
                f"reference {self._job.settings.alias}: the log-prob of response "
                f"{result.not_finite[0].hex()} is not finite ({len(result.not_finite)} such "
                "responses in this shard); nothing is stored for them; set dtype to bfloat16 or "
                "float32 in refs.yaml, or check the weights"
            )


def write_sample(
    pairs: PairShards, count: int, folder: Path, among: IdArray | None = None
) -> PairShards | None:
    """Up to `count` random pairs, of those whose responses are `among`; None without any.

    They are written as a folder of pairs, because a worker process reads its pairs from one.
    """
    index = None if among is None else IdIndex(among)
    places: list[tuple[int, int]] = []
    for shard, rows in enumerate(pairs.rows):
        known = np.ones(rows, bool)
        if index is not None:
            chosen, rejected = np.split(index.find(pairs.response_ids(shard).both) >= 0, 2)
            known = chosen & rejected
        places += [(shard, int(row)) for row in np.flatnonzero(known)]
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
    missing: ResponseSet,
    rendered: Rendered,
    context: int | None,
    limit: int | None,
    kept: np.ndarray | None = None,
) -> ShardWork:
    """Separate the responses that can be scored from those that never can, or not in this run.

    Args:
        rendered: prompt by prompt, in the order of `missing`.
        context: tokens of the longest sequence of the model itself; `limit` those of this run.
        kept: [n] bool, which of the responses are meant; all where it is None.
    """
    places: list[int] = []
    prompts: list[RenderedPrompt] = []
    refused: list[dict[str, Any]] = []
    left_out: list[int] = []
    starts = accumulate(map(len, rendered), initial=0)
    for start, responses in zip(starts, rendered):
        together: list[RenderedSequence] = []
        for place, response in enumerate(responses, start):
            if kept is not None and not kept[place]:
                continue
            row = _ids_of(missing.prompt_ids[place], missing.ids[place])
            if isinstance(response, Refusal):
                refused.append({**row, "reason": response.reason})
            elif context is not None and len(response.token_ids) > context:
                refused.append({**row, "reason": "beyond_context", **_rendered_facts(response)})
            elif limit is not None and len(response.token_ids) > limit:
                left_out.append(place)
            else:
                places.append(place)
                together.append(response)
        if together:
            prompts.append(RenderedPrompt.of(together))
    ids, prompt_ids = missing.ids, missing.prompt_ids
    return ShardWork(ids[places], prompt_ids[places], prompts, refused, ids[left_out])


def score_rows(
    work: ShardWork, engine: Engine | None, *, keep_token_logps: bool, progress: Progress
) -> ShardResult:
    """Score a shard's responses and build the rows to store, refusals included."""
    scored: list[tuple[Logps, ...]] = []
    if work.prompts:
        assert engine is not None, "preflight saw no response to score"
        scored = engine.score(work.prompts, progress)
    rows = list(work.refused)
    not_finite: list[bytes] = []
    responses = [response for prompt in work.prompts for response in prompt.responses]
    logps = [values for of_prompt in scored for values in of_prompt]
    for prompt_id, response_id, response, values in zip(
        work.prompt_ids, work.ids, responses, logps, strict=True
    ):
        row = _ids_of(prompt_id, response_id) | _rendered_facts(response) | _sums(response, values)
        if not np.isfinite(row["logp"]):
            not_finite.append(row["response_id"])
            continue
        rows.append(row | {TOKEN_COLUMN: values} if keep_token_logps else row)
    schema = SCORE_SCHEMA
    if keep_token_logps:
        schema = schema.append(pa.field(TOKEN_COLUMN, pa.list_(pa.float32())))
    return ShardResult(pa.Table.from_pylist(rows, schema), not_finite)


def _ids_of(prompt_id: np.void, response_id: np.void) -> dict[str, Any]:
    return {"prompt_id": prompt_id.tobytes(), "response_id": response_id.tobytes()}


def _sums(response: RenderedSequence, logps: Logps) -> dict[str, float]:
    """Nats of the response and of its end of turn, summed in float64."""
    assert len(logps) == response.num_scored
    end = logps[len(logps) - (len(response.token_ids) - response.end_start) :]
    return {
        "logp": float(logps.astype(np.float64).sum()),
        "end_logp": float(end.astype(np.float64).sum()),
    }


def _rendered_facts(response: RenderedSequence) -> dict[str, Any]:
    return {
        "tokens": response.num_scored,
        "prompt_tokens": response.start,
        "boundary": response.boundary,
        "checksum": zlib.crc32(np.array(response.token_ids, "<i4").tobytes()),
    }
