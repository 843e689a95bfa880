"""Rows of the store for tests that have scores of their own: a row a response."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from mrpo.data.ids import IdArray, IdIndex, ResponseIds, ids_to_arrow, ids_to_numpy
from mrpo.data.store import SCORE_SCHEMA

OF_A_BRANCH = ("logp", "end_logp", "tokens", "boundary", "checksum", "reason")


def response_rows(ids: IdArray, prompt_ids: IdArray | None = None, **columns: Any) -> pa.Table:
    """Rows of the given responses; columns that are not given are plausible."""
    n = len(ids)
    values: dict[str, Any] = {
        "prompt_id": ids_to_arrow(ids if prompt_ids is None else prompt_ids),
        "response_id": ids_to_arrow(ids),
        "logp": -1.0 - np.arange(n),
        "end_logp": np.full(n, -0.1),
        "tokens": np.full(n, 7),
        "prompt_tokens": np.full(n, 11),
        "boundary": [False] * n,
        "checksum": np.arange(1, n + 1),
        "reason": [None] * n,
    } | columns
    if any(reason is not None for reason in values["reason"]):
        lost = np.array([reason is not None for reason in values["reason"]])
        for name in ("logp", "end_logp"):
            values[name] = pa.array(np.array(values[name], float), mask=lost)
    arrays = [pa.array(values[name], SCORE_SCHEMA.field(name).type) for name in SCORE_SCHEMA.names]
    return pa.table(arrays, schema=SCORE_SCHEMA)


def rows_of_pairs(ids: ResponseIds, **columns: Any) -> pa.Table:
    """Rows of both responses of n pairs, each once.

    Columns are given as chosen_logp, rejected_logp, …, those of both as prompt_tokens and reason.
    """
    parts = []
    for number, branch in enumerate(("chosen", "rejected")):
        given = {name: columns[name] for name in ("prompt_tokens", "reason") if name in columns}
        named = ((name, f"{branch}_{name}") for name in OF_A_BRANCH)
        given |= {name: columns[key] for name, key in named if key in columns}
        responses = (ids.chosen, ids.rejected)[number]
        given.setdefault("checksum", np.arange(len(responses)) * 2 + 1 + number)
        parts.append(response_rows(responses, ids.prompts, **given))
    table = pa.concat_tables(parts)
    return table.take(IdIndex(ids_to_numpy(table["response_id"])).firsts())
