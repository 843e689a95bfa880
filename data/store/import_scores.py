"""`mrpo store import`: scores computed elsewhere, stored under an alias of their own.

A row is a pair in any format that `mrpo prepare` reads, or the id of one that it prepared, with two
log-probs beside it. How they were computed can't be checked here, so their identity is the user's
description of them, and the record is marked as imported. Everything else treats them like any
reference's scores.

A stored score never changes. Scores that differ from it are refused, or with --replace become an
identity of their own, which the alias means from then on. Within the data a response may stand in
several pairs with scores that rounding tells apart: the first counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import UserError
from ...settings import command
from ..config import ImportConfig
from ..formats import CHAT_UNUSED, Broken, PairReader, RawPair, Unusable, by_reason
from ..ids import IdIndex, ResponseIds, digest_of, ids_from_bytes, ids_to_numpy
from ..layouts import RowReader
from ..pairs import parse_id
from ..references import check_alias
from ..shards import PairShards
from ..sources import Source, SourceColumns, open_sources
from .scores import SCORE_SCHEMA, to_bytes
from .store import ReferenceRecord, Store, open_store

BATCH_ROWS = 8192  # pairs read at a time, and rows that become one score file
ABOVE_ZERO = 1e-3  # nats by which rounding may lift a certain response's log-prob above 0
ROUNDING = 0.01  # of a log-prob: in 16 bits another batch may make so much of a difference
ID_COLUMN = "pair_id"
VALUES = ("logp", "tokens")
# Why a row is left out, besides the reasons for which a pair can't be used.
NO_SCORE, UNKNOWN = "no score", "not in the folder of pairs"

Responses = Sequence[bytes]  # the ids of a pair's prompt, chosen and rejected response


@command(ImportConfig)
def import_scores(config: ImportConfig) -> ReferenceRecord:
    """Store the scores of every row that has them; returns the reference that they became.

    Raises `UserError` at an invalid row, and at scores that differ from stored ones or from each
    other, and then nothing is stored.
    """
    check_alias(config.alias, "--alias")
    sources = open_sources(config.source)
    store, left = open_store(config.store), Counter[str]()
    record = _present(store, config)
    # Everything is read before anything is stored: an invalid row leaves the store as it was.
    tables = [table for source in sources for table in _tables(source, config, left)]
    if not tables:
        raise UserError(
            f"{config.source}: no row has a score ({by_reason(left)}); nothing imported"
        )
    rows = _first_rows(pa.concat_tables(tables), config.source)
    stored = store.scores(record.identity).read()
    new, changed = _places(stored, rows) < 0, _changed(rows, stored, record, config)
    there = len(rows) - int(new.sum()) - changed
    if changed:
        print(f"replaced {changed:,} scores of {record.title}, where they stay as they are")
        record, rows = _replacement(record, rows, stored)
    scores = store.scores(record.identity)
    rows = rows.filter(pa.array(scores.missing(ids_to_numpy(rows["response_id"]))))
    for start in range(0, len(rows), BATCH_ROWS):
        scores.add(rows.slice(start, BATCH_ROWS))
    record = store.record(record)
    known = f"; {there:,} were there already" if there else ""
    print(f"imported {new.sum():,} responses{known}; pairs left out: {by_reason(left)}")
    print(f"reference {record.title}, marked as imported: {config.model}")
    print(f"store   {store.root}")
    return record


def _tables(source: Source, config: ImportConfig, left: Counter[str]) -> Iterator[pa.Table]:
    """The rows with a score, in tables of the store's columns; `left` counts the others."""
    rows = _rows(source, config, left)
    while batch := list(islice(rows, 2 * BATCH_ROWS)):
        # A column that the rows lack becomes null.
        yield pa.Table.from_pylist(batch, SCORE_SCHEMA)


def _rows(
    source: Source, config: ImportConfig, left: Counter[str]
) -> Iterator[dict[str, bytes | float | int | None]]:
    """A row for each response of a pair with two scores."""
    reader = PairReader(source.name)
    prepared = _PreparedIds(PairShards(config.pairs or "pairs")) if config.by_id else None
    logps = (config.chosen_logps_column, config.rejected_logps_column)
    tokens = (config.chosen_tokens_column, config.rejected_tokens_column)
    scored = SourceColumns(
        [*([ID_COLUMN] if config.by_id else []), *logps],
        [*tokens],
        "name columns with --chosen-column, --chosen-logps-column and so on",
    )
    rows: Iterator[tuple[int, Mapping[str, Any], RawPair | str | None]]
    if config.by_id:
        rows = ((number, row, None) for number, row in source.rows(scored))
    else:
        rows = RowReader(config, beside=scored).examples(source)
    for number, row, example in rows:
        try:
            scores = [_logp(column, row[column]) for column in logps]
            counts = [_token_count(column, row) for column in tokens]
            if isinstance(example, RawPair):
                prompt, *responses = reader.read(example)[0].response_ids
            else:
                assert prepared is not None
                known = prepared.find(row[ID_COLUMN])
                if known is None:
                    left[UNKNOWN] += 1
                    continue
                prompt, *responses = known
        except Broken as error:
            raise UserError(f"{source.given}, {source.unit} {number}, {error}") from None
        except Unusable as error:
            left[error.reason] += 1
        else:
            if None in scores:
                left[NO_SCORE] += 1
                continue
            for response, logp, count in zip(responses, scores, counts):
                ids = {"prompt_id": prompt, "response_id": response}
                yield {**ids, "logp": logp, "tokens": count}
    if config.chat and not reader.wrapped:
        print(f"{source.given}: {CHAT_UNUSED}")


class _PreparedIds:
    """The ids of the prompts and responses of prepared pairs, by pair id."""

    def __init__(self, pairs: PairShards) -> None:
        self._pairs = pairs
        self._index = IdIndex(pairs.pair_ids(shard) for shard in range(len(pairs.names)))
        parts = (pairs.response_ids(shard) for shard in range(len(pairs.names)))
        self._ids = ResponseIds(*map(np.concatenate, zip(*parts)))

    def find(self, value: Any) -> Responses | None:
        """Those of a pair, None where it is not there; raises `Broken` where the value is no id."""
        pair_id = parse_id(value)
        if pair_id is None:
            raise Broken(
                ID_COLUMN, f"is {value!r}; an id has 32 hex digits, as `mrpo inspect` shows"
            )
        (place,) = self._index.find(ids_from_bytes([pair_id])).tolist()
        return None if place < 0 else [ids[place].tobytes() for ids in self._ids]


def _present(store: Store, config: ImportConfig) -> ReferenceRecord:
    """The reference that the alias and the model already name, else a new one."""
    entry = {"imported": config.model}
    run = {"engine": "imported", "source": config.source}
    for record in reversed(store.references()):
        if record.alias == config.alias and record.entry == entry:
            return replace(record, runs=(*record.runs, run))
    inputs = {"imported": {"alias": config.alias, "model": config.model}}
    return ReferenceRecord(alias=config.alias, entry=entry, inputs=inputs, runs=(run,))


def _first_rows(table: pa.Table, source: str) -> pa.Table:
    """The first row of each response; `UserError` where others differ by more than rounding."""
    places = _places(table, table)
    first = table.take(pa.array(places))
    different = _different(table, first, rounding=ROUNDING)
    if different.any():
        raise UserError(
            f"{source}: {different.sum():,} times a response comes again with another score; "
            f"{_difference(table, first, different)}; keep one score of each response"
        )
    return table.filter(pa.array(places == np.arange(len(table))))


def _changed(
    rows: pa.Table, stored: pa.Table, record: ReferenceRecord, config: ImportConfig
) -> int:
    """How many stored scores the rows would replace; `UserError` where they may not."""
    places = _places(stored, rows)
    known = rows.filter(pa.array(places >= 0))
    before = stored.take(pa.array(places[places >= 0]))
    different = _different(known, before)
    if different.any() and not config.replace:
        raise UserError(
            f"{config.source}: {different.sum():,} responses have other scores than "
            f"{record.title}; "
            f"{_difference(known, before, different)}; --replace makes them a new identity that "
            f"{config.alias} then means, another --alias a reference beside it"
        )
    return int(different.sum())


def _places(table: pa.Table, rows: pa.Table) -> np.ndarray:
    """[n] where in the table the response of each row is; -1 where it is not."""
    index = IdIndex(ids_to_numpy(table["response_id"]))
    return index.find(ids_to_numpy(rows["response_id"]))


def _different(
    rows: pa.Table, others: pa.Table, names: Sequence[str] = VALUES, rounding: float = 0.0
) -> np.ndarray:
    """[n] whether a given value of a row differs from that of its counterpart.

    Log-probs may differ by the share `rounding`.
    """
    different = np.zeros(len(rows), dtype=bool)
    for name in names:
        given, other = rows[name].to_numpy(), others[name].to_numpy()
        allowed = rounding * np.abs(other) if name == "logp" else 0
        different |= rows[name].is_valid().to_numpy() & ~(np.abs(given - other) <= allowed)
    return different


def _difference(rows: pa.Table, others: pa.Table, different: np.ndarray) -> str:
    """The first response whose values differ, and how."""
    place = int(np.flatnonzero(different)[0])
    row, other = rows.slice(place, 1), others.slice(place, 1)
    name = next(name for name in VALUES if _different(row, other, [name]).any())
    given, stored = row[name][0].as_py(), other[name][0].as_py()
    response = row["response_id"][0].as_py().hex()
    return f"response {response}: {name} is {given}, before it was {stored}"


def _replacement(
    record: ReferenceRecord, rows: pa.Table, stored: pa.Table
) -> tuple[ReferenceRecord, pa.Table]:
    """A new identity of the same name, and its rows: those given, and the other stored ones.

    A token count that is not given stays as it was stored.
    """
    places = _places(stored, rows)
    before = stored.take(pa.array(places, mask=places < 0))
    for name in VALUES:
        column = pc.coalesce(rows[name].combine_chunks(), before[name].combine_chunks())
        rows = rows.set_column(rows.schema.get_field_index(name), SCORE_SCHEMA.field(name), column)
    others = np.ones(len(stored), dtype=bool)
    others[places[places >= 0]] = False
    table = pa.concat_tables([rows, stored.filter(pa.array(others))]).combine_chunks()
    imported = record.inputs["imported"] | {"scores": digest_of(to_bytes(table))}
    return replace(record, inputs={"imported": imported}, runs=record.runs[-1:]), table


def _logp(name: str, value: Any) -> float | None:
    """The log-prob; None where the cell is empty or not a number (NaN)."""
    if value is None or value == "":
        return None
    try:
        logp = float(value)
    except (TypeError, ValueError, OverflowError):
        raise Broken(name, f"is {value!r}; a log-prob is a number") from None
    if math.isnan(logp):
        return None
    if not -math.inf < logp <= ABOVE_ZERO:
        raise Broken(
            name,
            f"is {value!r}; a log-prob is finite and at most 0: natural log, summed over the "
            "response's tokens, not negated",
        )
    return logp


def _token_count(name: str, row: Mapping[str, Any]) -> int | None:
    value = row.get(name)
    if value is None or value == "" or value != value:
        return None
    try:
        count = int(value)
    except (TypeError, ValueError, OverflowError):
        count = -1
    if not 1 <= count < 2**31 or count != float(value):
        raise Broken(name, f"is {value!r}; a count of tokens is a whole number from 1")
    return count
