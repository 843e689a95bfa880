"""Pairs as an Arrow table: the columns of a shard, and both conversions.

Messages are a list of structs `role`, `content`, `extra`; `extra` is canonical JSON of the other
fields of a message, so that any template's fields survive in a fixed schema that DuckDB, Polars and
pandas read. Both conversions go through flat columns, several times faster than Arrow's own
conversion of nested Python values, because training streams through here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from .pairs import ID_BYTES, Message, Pair, Turns, canonical_json, response_bytes

Kind = Literal["messages", "text"]

TURNS = ("prompt", "chosen", "rejected")
RESPONSE_IDS = ("prompt_id", "chosen_id", "rejected_id")
PAIR_COLUMNS = [*TURNS, "tools", "chat_template_kwargs", "source", "split"]

_MESSAGE = pa.struct(
    [
        pa.field("role", pa.string(), nullable=False),
        pa.field("content", pa.string()),
        pa.field("extra", pa.string()),
    ]
)
_MESSAGES = pa.list_(pa.field("element", _MESSAGE, nullable=False))


def pair_schema(kind: Kind, *, with_response_ids: bool = True) -> pa.Schema:
    """The columns of a shard; only the type of the turns depends on the kind of data set."""
    turns = _MESSAGES if kind == "messages" else pa.string()
    ids = ["pair_id", *(RESPONSE_IDS if with_response_ids else ())]
    return pa.schema(
        [
            *(pa.field(name, pa.binary(ID_BYTES), nullable=False) for name in ids),
            *(pa.field(name, turns, nullable=False) for name in TURNS),
            pa.field("tools", pa.string()),
            pa.field("chat_template_kwargs", pa.string()),
            pa.field("split", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("chosen_bytes", pa.int64(), nullable=False),
            pa.field("rejected_bytes", pa.int64(), nullable=False),
        ]
    )


def pairs_to_table(pairs: Sequence[Pair], ids: Sequence[bytes], kind: Kind) -> pa.Table:
    """The rows of a shard. All pairs must be of the kind."""
    turns = _messages_to_arrow if kind == "messages" else pa.array
    columns = {name: turns([getattr(pair, name) for pair in pairs]) for name in TURNS}
    columns |= dict(zip(RESPONSE_IDS, zip(*(pair.response_ids for pair in pairs))))
    columns |= {
        "pair_id": list(ids),
        "tools": [_to_json(pair.tools) for pair in pairs],
        "chat_template_kwargs": [_to_json(pair.chat_template_kwargs) for pair in pairs],
        "split": [pair.split for pair in pairs],
        "source": [pair.source for pair in pairs],
        "chosen_bytes": [response_bytes(pair.chosen) for pair in pairs],
        "rejected_bytes": [response_bytes(pair.rejected) for pair in pairs],
    }
    return pa.table(columns, schema=pair_schema(kind))


def from_table(table: pa.Table) -> list[Pair]:
    """The pairs of a table that has at least `PAIR_COLUMNS`."""
    prompts, chosen, rejected = (_turns_from_arrow(table.column(name)) for name in TURNS)
    tools, kwargs = (
        [None if text is None else json.loads(text) for text in table.column(name).to_pylist()]
        for name in ("tools", "chat_template_kwargs")
    )
    sources, splits = (table.column(name).to_pylist() for name in ("source", "split"))
    return [Pair(*row) for row in zip(prompts, chosen, rejected, tools, kwargs, sources, splits)]


def _messages_to_arrow(column: Sequence[list[Message]]) -> pa.Array:
    offsets, roles, contents, extras = [0], [], [], []
    for turns in column:
        for message in turns:
            roles.append(message["role"])
            contents.append(message.get("content"))
            extra = {k: v for k, v in message.items() if k not in ("role", "content")}
            extras.append(canonical_json(extra) if extra else None)
        offsets.append(len(roles))
    messages = pa.StructArray.from_arrays(
        [pa.array(values, pa.string()) for values in (roles, contents, extras)],
        fields=list(_MESSAGE),
    )
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), messages, type=_MESSAGES)


def _turns_from_arrow(column: pa.ChunkedArray) -> list[Turns]:
    if pa.types.is_string(column.type):
        return column.to_pylist()
    lengths = pc.list_value_length(column).to_pylist()
    flat = pc.list_flatten(column)
    roles, contents, extras = (
        pc.struct_field(flat, name).to_pylist() for name in ("role", "content", "extra")
    )
    messages = (_message(*fields) for fields in zip(roles, contents, extras))
    return [list(islice(messages, length)) for length in lengths]


def _message(role: str, content: str | None, extra: str | None) -> Message:
    message: Message = {"role": role}
    if content is not None:
        message["content"] = content
    if extra is not None:
        message.update(json.loads(extra))
    return message


def _to_json(value: Any) -> str | None:
    return None if value is None else canonical_json(value)
