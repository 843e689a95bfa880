"""The scores of named references for a whole data set, or the line that makes them.

What `audit` and `report` begin with: aliases to records, records to the table of `score_table.py`,
and no further where a pair has not been scored yet.
"""

from __future__ import annotations

import numpy as np

from ..data.join import precompute_line
from ..data.references import load_refs
from ..data.shards import PairShards
from ..data.store import NotScored, Store
from ..errors import UserError
from .score_table import NOT_SCORED, ScoreTable, load_scores


def load_scored(pairs: PairShards, store: Store, refs: str, refs_config: str) -> ScoreTable:
    """Every pair under the references of a comma-separated list, the base first.

    Raises `UserError` with the line to run where a pair is not yet scored.
    """
    aliases = [alias.strip() for alias in refs.split(",") if alias.strip()]
    if not aliases:
        raise UserError(f"--refs {refs!r} names no reference")
    specs = load_refs(refs_config)
    line = precompute_line(pairs, store, aliases, refs_config)
    try:
        records = [store.resolve(alias, specs) for alias in aliases]
    except NotScored:
        raise UserError(f"pairs not yet scored in {store.root}; run: {line}") from None
    table = load_scores(pairs, store, records)
    unscored = [one.alias for one in table.references if (one.reasons == NOT_SCORED).any()]
    if unscored:
        raise UserError(
            f"pairs not yet scored in {store.root} by {', '.join(unscored)}; run: {line}"
        )
    return table


def margins(table: ScoreTable) -> np.ndarray:
    """[N, K] D_k = log pi_k(chosen) − log pi_k(rejected), nats; NaN where missing."""
    return np.stack([reference.margins for reference in table.references], axis=1)


def byte_margins(table: ScoreTable) -> np.ndarray:
    """[N, K] the same per UTF-8 byte of each response: one unit for all references."""
    rates = [reference.logps / table.response_bytes for reference in table.references]
    return np.stack([rate[:, 0] - rate[:, 1] for rate in rates], axis=1)
