"""A shard's missing pairs to rows of the store: render, leave out what can't be scored, score.

A row is a score, or the permanent reason why there is none. A pair that a limit of this run leaves
out gets no row and is tried again by the next run; a score that is not finite is never a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ..data.ids import IdArray
from ..data.rendering import Refusal, RenderedPair, RenderedSequence
from ..data.store_schema import SCORE_SCHEMA, TOKEN_COLUMNS
from ..model.packing import packed_tokens, padded_tokens
from .engines.base import Engine, Logps, Progress, ScoredPair

BEYOND_CONTEXT = "beyond_context"


@dataclass(slots=True)
class RenderedRows:
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
class ScoredRows:
    """What a shard's scoring gave: rows to keep, and the pairs whose score was not finite."""

    table: pa.Table
    not_finite: list[tuple[bytes, str]] = field(default_factory=list)  # pair id, branch


def sort_out(
    ids: IdArray,
    rendered: Sequence[RenderedPair | Refusal],
    context: int | None,
    limit: int | None,
) -> RenderedRows:
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
    return RenderedRows(ids[kept], pairs, refused, over_limit)


def score_rows(
    rows: RenderedRows, engine: Engine | None, *, keep_token_logps: bool, progress: Progress
) -> ScoredRows:
    """Score the pairs; the rows of the store, refusals included."""
    scored: list[ScoredPair] = []
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
    return ScoredRows(to_table(kept, keep_token_logps), not_finite)


def to_table(rows: Sequence[Mapping[str, Any]], keep_token_logps: bool) -> pa.Table:
    """Rows by column name as a table of the store; an absent column is null."""
    schema = SCORE_SCHEMA
    if keep_token_logps:
        for name in TOKEN_COLUMNS:
            schema = schema.append(pa.field(name, pa.list_(pa.float32())))
    columns = {name: [row.get(name) for row in rows] for name in schema.names}
    return pa.table(columns, schema=schema)


def _row(pair_id: bytes, pair: RenderedPair, score: ScoredPair) -> dict[str, Any]:
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
