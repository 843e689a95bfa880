"""The columns of a score file, and what a row must be: a finite score, or the reason for none.

docs/store.md describes them for readers outside this package.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from .ids import ID_TYPE, IdIndex, ids_to_numpy

SCHEMA_VERSION = b"1"

SCORE_SCHEMA = pa.schema(
    [
        pa.field("pair_id", ID_TYPE, nullable=False),
        pa.field("chosen_logp", pa.float64()),  # nats, summed over the response; null with a reason
        pa.field("rejected_logp", pa.float64()),
        pa.field("chosen_end_logp", pa.float64()),  # the end-of-turn part of chosen_logp
        pa.field("rejected_end_logp", pa.float64()),
        pa.field("chosen_tokens", pa.int32()),  # scored tokens, end of turn included
        pa.field("rejected_tokens", pa.int32()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("chosen_boundary", pa.bool_()),  # first scored token starts inside the prompt
        pa.field("rejected_boundary", pa.bool_()),
        pa.field("reason", pa.string()),  # why there is no score; null where there is one
    ],
    metadata={b"mrpo.scores": SCHEMA_VERSION},
)
TOKEN_COLUMNS = ("chosen_token_logps", "rejected_token_logps")  # with --keep-token-logps
TOKEN_TYPE = pa.list_(pa.float32())
_LOGPS = ("chosen_logp", "rejected_logp", "chosen_end_logp", "rejected_end_logp")


def checked(table: pa.Table) -> pa.Table:
    """The rows in the schema's order and types.

    Raises `UserError` for a score that is not finite, or missing without a reason, or there
    beside one. Wrong columns and repeated ids are faults of the caller: `AssertionError`.
    """
    extra = [name for name in TOKEN_COLUMNS if name in table.column_names]
    schema = SCORE_SCHEMA
    for name in extra:
        schema = schema.append(pa.field(name, TOKEN_TYPE))
    assert set(table.column_names) == set(schema.names), table.column_names
    table = table.select(schema.names).cast(schema)
    ids = ids_to_numpy(table["pair_id"])
    assert len(IdIndex(ids).firsts()) == len(ids), "a pair stands twice in one unit"
    missing = table["reason"].is_valid().to_numpy()
    for name in _LOGPS:
        values = table[name].to_numpy()  # null becomes NaN
        absent = table[name].is_null().to_numpy()
        required = ~missing if name in _LOGPS[:2] else ~missing & ~absent
        _refuse(table, name, required & ~np.isfinite(values), values)
        _refuse(table, name, missing & ~absent, values)
    return table


def to_bytes(table: pa.Table) -> bytes:
    """The rows as one Parquet file: the same rows give the same bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=["reason"])
    return sink.getvalue()


def read_columns(source: pa.NativeFile, columns: Sequence[str]) -> pa.Table:
    """Columns of a score file; per-token log-probs are null in files that keep none."""
    with pq.ParquetFile(source) as file:
        table = file.read(columns=list(columns))
    for name in TOKEN_COLUMNS:
        if name in columns and name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), TOKEN_TYPE))
    return table.select(list(columns))


def _refuse(table: pa.Table, name: str, bad: np.ndarray, values: np.ndarray) -> None:
    if not bad.any():
        return
    row = int(np.flatnonzero(bad)[0])
    pair, reason = table["pair_id"][row].as_py().hex(), table["reason"][row].as_py()
    raise UserError(
        f"pair {pair}: {name} is {values[row]} with reason {reason!r}; a score must be finite, "
        f"or missing with a reason ({int(bad.sum())} such rows; check the reference's weights)"
    )
