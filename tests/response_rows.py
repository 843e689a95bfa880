"""Rows of the store for tests that have scores of their own: a row a response, or a row a pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mrpo.data.ids import (
    IdArray,
    IdIndex,
    ResponseIds,
    ids_from_bytes,
    ids_to_arrow,
    ids_to_numpy,
)
from mrpo.data.pairs import Pair
from mrpo.data.store import SCORE_SCHEMA

BRANCHES = ("chosen", "rejected")
OF_A_BRANCH = ("logp", "end_logp", "tokens", "boundary", "checksum")
OF_BOTH = ("prompt_tokens", "reason")


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
    arrays = {field.name: _array(values[field.name], field.type) for field in SCORE_SCHEMA}
    for name in ("logp", "end_logp"):
        arrays[name] = pc.if_else(arrays["reason"].is_valid(), None, arrays[name])
    return pa.table(arrays, schema=SCORE_SCHEMA)


def rows_of_pairs(ids: ResponseIds, **columns: Any) -> pa.Table:
    """Rows of both responses of n pairs, each once.

    Columns are given as chosen_logp, rejected_logp, …, those of both as prompt_tokens and reason.
    """
    parts = []
    for number, branch in enumerate(BRANCHES):
        given = {name: columns[name] for name in OF_BOTH if name in columns}
        named = ((name, f"{branch}_{name}") for name in OF_A_BRANCH)
        given |= {name: columns[key] for name, key in named if key in columns}
        responses = (ids.chosen, ids.rejected)[number]
        given.setdefault("checksum", np.arange(len(responses)) * 2 + 1 + number)
        parts.append(response_rows(responses, ids.prompts, **given))
    table = pa.concat_tables(parts)
    return table.take(IdIndex(ids_to_numpy(table["response_id"])).firsts())


def columns_of_pairs(rows: pa.Table, ids: ResponseIds) -> pa.Table:
    """What `rows_of_pairs` takes, in the order of the pairs."""
    index = IdIndex(ids_to_numpy(rows["response_id"]))
    chosen, rejected = (rows.take(index.find(part)) for part in (ids.chosen, ids.rejected))
    columns = {
        f"{branch}_{name}": part[name]
        for branch, part in zip(BRANCHES, (chosen, rejected))
        for name in OF_A_BRANCH
    }
    columns["prompt_tokens"] = chosen["prompt_tokens"]
    columns["reason"] = pc.coalesce(chosen["reason"], rejected["reason"])
    return pa.table(columns)


def ids_of_pairs(pairs: Sequence[Pair]) -> ResponseIds:
    """The ids of the pairs' prompts and responses."""
    return ResponseIds(
        *(ids_from_bytes(list(ids)) for ids in zip(*(pair.response_ids for pair in pairs)))
    )


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, kind)
