"""Pairs and the scores that the store has of them under several references, in memory.

    table = load_score_table(PairShards("pairs"), store, records, sample=20_000)

For commands that look at scores rather than texts: doctor, evaluate, compare, audit, report.
Arrays are [N, 2] (pairs; chosen, rejected) for each reference, NaN where a value is unknown. A
sample bounds the memory for any size of data set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.ids import IdArray, IdIndex, ResponseIds, ids_to_numpy
from ..data.join import RENDER_EQUAL, alike_rendered, precompute_line
from ..data.pairs import Pair, prompt_number, response_bytes
from ..data.references import load_refs
from ..data.shards import PairShards
from ..data.store import OVER_LIMIT, SCORE_SCHEMA, NotScored, ReferenceRecord, Store
from ..data.tables import PAIR_COLUMNS, from_table
from ..errors import UserError
from ..method.objective import ReferenceLogps
from ..settings import comma_separated

NOT_SCORED = "not_scored"  # the reason of a pair that the store has no row of
BRANCHES = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReferenceColumns:
    """The scores of N pairs under one reference: the store's rows of their responses as arrays."""

    record: ReferenceRecord
    logps: np.ndarray  # [N, 2] nats, summed over the response
    end_logps: np.ndarray  # [N, 2] nats, the part of `logps` that the end of turn makes
    tokens: np.ndarray  # [N, 2] scored tokens
    prompt_tokens: np.ndarray  # [N] before the chosen response's first scored token
    boundary: np.ndarray  # [N, 2] 1 where the first scored token begins inside the prompt, else 0
    reasons: np.ndarray  # [N] why there is no score; "" where there is one

    @property
    def alias(self) -> str:
        return self.record.alias

    @property
    def scored(self) -> np.ndarray:
        """[N] bool."""
        return ~np.isnan(self.logps).any(axis=1)

    @property
    def margins(self) -> np.ndarray:
        """[N] log pi(chosen) − log pi(rejected), nats."""
        return self.logps[:, 0] - self.logps[:, 1]

    @property
    def missing(self) -> dict[str, int]:
        """Pairs without a score by reason, the most frequent first."""
        return dict(Counter(reason for reason in self.reasons if reason).most_common())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoreTable:
    """N pairs, and their scores under each reference."""

    places: np.ndarray  # [N, 2] shard and row within the shard
    ids: IdArray  # [N]
    sources: np.ndarray  # [N] text
    prompts: np.ndarray  # [N] integers, equal for equal prompts
    prompt_bytes: np.ndarray  # [N] UTF-8 bytes of the prompt's contents
    response_bytes: np.ndarray  # [N, 2]
    references: list[ReferenceColumns]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def aliases(self) -> list[str]:
        return [reference.alias for reference in self.references]

    def pair_scores(self) -> ReferenceLogps:
        """The log-probs and lengths as a method takes them, arrays [N, K]."""
        logps = np.stack([reference.logps for reference in self.references], axis=2)
        tokens = np.stack([reference.tokens for reference in self.references], axis=2)
        return ReferenceLogps(
            ref_chosen_logps=logps[:, 0],
            ref_rejected_logps=logps[:, 1],
            ref_chosen_tokens=tokens[:, 0],
            ref_rejected_tokens=tokens[:, 1],
            chosen_bytes=self.response_bytes[:, 0],
            rejected_bytes=self.response_bytes[:, 1],
            prompts=self.prompts,
        )


def load_score_table(
    pairs: PairShards,
    store: Store,
    records: Sequence[ReferenceRecord],
    *,
    policies: Sequence[ReferenceRecord] = (),
    split: str | None = None,
    sample: int | None = None,
    seed: int = 0,
) -> ScoreTable:
    """The pairs of a split (by default all), or a random sample of them, with their scores.

    `policies` come behind the references; their scores are read from `store.policies`.
    """
    table, places = _read_pairs(pairs, split, sample, seed)
    texts = from_table(table)
    responses = _response_ids(pairs, places)
    references = [_read_scores(store, record, responses) for record in records]
    references += [_read_scores(store.policies, record, responses) for record in policies]
    return ScoreTable(
        places=places,
        ids=ids_to_numpy(table["pair_id"]),
        sources=table["source"].to_numpy(zero_copy_only=False),
        prompts=np.array([prompt_number(pair.prompt) for pair in texts], np.int64),
        prompt_bytes=np.array([response_bytes(pair.prompt) for pair in texts], np.float64),
        response_bytes=np.stack([_numbers(table, f"{name}_bytes") for name in BRANCHES], axis=1),
        references=references,
    )


def load_complete_score_table(
    pairs: PairShards, store: Store, refs: str, refs_config: str
) -> ScoreTable:
    """Every pair under the references of a comma-separated list, the base first.

    Raises `UserError` with the command to run where a pair is not yet scored.
    """
    aliases = comma_separated(refs, "--refs")
    if not aliases:
        raise UserError(f"--refs {refs!r} names no reference")
    return load_score_table(pairs, store, scored_records(pairs, store, aliases, refs_config))


def scored_records(
    pairs: PairShards,
    store: Store,
    aliases: Sequence[str],
    refs_config: str,
    *,
    split: str | None = None,
) -> list[ReferenceRecord]:
    """The records of references that have scored every pair of a split (by default all pairs).

    Raises `UserError` with the command to run where one of them has not.
    """
    specs = load_refs(refs_config)
    records, incomplete, reasons = [], [], []
    for alias in aliases:
        try:
            record = store.resolve(alias, specs)
        except NotScored as error:
            incomplete.append(alias)
            reasons.append(f" ({error})")
            continue
        records.append(record)
        scores = store.scores(record.identity)
        left_out = scores.left_out()
        for shard in range(len(pairs.names)):
            ids = pairs.response_ids(shard).take(_rows_of(pairs, shard, split)).both
            if (scores.missing(ids, refresh=shard == 0) & ~left_out.contains(ids)).any():
                incomplete.append(alias)
                break
    if incomplete:
        line = precompute_line(pairs, store, incomplete, refs_config)
        raise UserError(
            f"{pairs.path}: pairs not yet scored in {store.root} by {', '.join(incomplete)}"
            f"{''.join(reasons)}; run: {line}"
        )
    return records


def margins(table: ScoreTable) -> np.ndarray:
    """[N, K] D_k = log pi_k(chosen) − log pi_k(rejected), nats; NaN where missing."""
    return np.stack([reference.margins for reference in table.references], axis=1)


def byte_margins(table: ScoreTable) -> np.ndarray:
    """[N, K] the same with each log-prob divided by its response's UTF-8 bytes, nats per byte."""
    rates = [reference.logps / table.response_bytes for reference in table.references]
    return np.stack([rate[:, 0] - rate[:, 1] for rate in rates], axis=1)


def pairs_at(pairs: PairShards, places: np.ndarray) -> list[Pair]:
    """The pairs at the given places [n, 2] (shard, row), in that order; reads a shard once."""
    texts: dict[tuple[int, int], Pair] = {}
    for shard in np.unique(places[:, 0]).tolist():
        rows = np.unique(places[places[:, 0] == shard, 1]).tolist()
        texts |= {(shard, row): pair for row, pair in zip(rows, pairs.pairs(shard, rows))}
    return [texts[shard, row] for shard, row in places.tolist()]


def _read_pairs(
    pairs: PairShards, split: str | None, sample: int | None, seed: int
) -> tuple[pa.Table, np.ndarray]:
    """Rows of the shards in their order, and their places [N, 2]."""
    rows = [_rows_of(pairs, shard, split) for shard in range(len(pairs.names))]
    places = np.concatenate([np.stack([np.full_like(r, i), r], 1) for i, r in enumerate(rows)])
    if sample is not None and sample < len(places):
        drawn = np.random.default_rng(seed).choice(len(places), sample, replace=False)
        places = places[np.sort(drawn)]
    columns = list(dict.fromkeys(["pair_id", *PAIR_COLUMNS, "chosen_bytes", "rejected_bytes"]))
    parts: list[pa.Table] = []
    for shard in range(len(pairs.names)):
        kept = places[places[:, 0] == shard, 1]
        if len(kept) or not parts:
            parts.append(pairs.table(shard, columns).take(pa.array(kept)))
    return pa.concat_tables(parts), places


def _rows_of(pairs: PairShards, shard: int, split: str | None) -> np.ndarray:
    splits = pairs.table(shard, ["split"])["split"].to_numpy(zero_copy_only=False)
    return np.flatnonzero((splits == split) | (split is None))


def _response_ids(pairs: PairShards, places: np.ndarray) -> ResponseIds:
    """Those of the pairs at the given places [N, 2], which are in the order of the shards."""
    parts = [
        pairs.response_ids(shard).take(places[places[:, 0] == shard, 1])
        for shard in np.unique(places[:, 0]).tolist() or [0]
    ]
    return ResponseIds(*map(np.concatenate, zip(*parts)))


def _read_scores(store: Store, record: ReferenceRecord, ids: ResponseIds) -> ReferenceColumns:
    """A reference's scores of the given pairs; of two rows for a response the first counts."""
    wanted = IdIndex(ids.both)
    parts = [
        table.filter(pa.array(wanted.find(ids_to_numpy(table["response_id"])) >= 0))
        for table in store.scores(record.identity).tables(SCORE_SCHEMA.names)
    ]
    rows = pa.concat_tables(parts or [SCORE_SCHEMA.empty_table()])
    source = IdIndex(ids_to_numpy(rows["response_id"])).find(ids.both)
    scores = rows.take(pa.array(source, mask=source < 0))
    columns = {
        name: _numbers(scores, name).reshape(2, -1).T
        for name in ("logp", "end_logp", "tokens", "prompt_tokens", "boundary", "checksum")
    }
    stored = pc.fill_null(scores["reason"], "").to_numpy(zero_copy_only=False)
    left_out = store.scores(record.identity).left_out().contains(ids.both)
    absent = np.where(left_out, OVER_LIMIT, NOT_SCORED)
    chosen, rejected = np.where(source < 0, absent, stored).reshape(2, -1)
    reasons = np.where(chosen == "", rejected, chosen)
    alike = alike_rendered(*columns["checksum"].T, *columns["tokens"].T)
    reasons = np.where(
        alike & (ids.chosen != ids.rejected) & (reasons == ""), RENDER_EQUAL, reasons
    )
    # A pair whose one response has no score has none.
    for name in ("logp", "end_logp"):
        columns[name][reasons != ""] = np.nan
    return ReferenceColumns(
        record=record,
        logps=columns["logp"],
        end_logps=columns["end_logp"],
        tokens=columns["tokens"],
        prompt_tokens=columns["prompt_tokens"][:, 0],
        boundary=columns["boundary"],
        reasons=reasons,
    )


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column as float64, NaN where null."""
    return pc.cast(table[name], pa.float64()).to_numpy().astype(np.float64)
