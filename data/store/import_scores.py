"""`mrpo store import`: scores computed elsewhere, stored under an alias of their own.

A row is a pair in any format that `mrpo prepare` reads, or a pair's id, with two log-probs beside
it. How they were computed can't be checked here, so their identity is the user's description of
them, and the record is marked as imported. Everything else treats them like any reference's scores.

A stored score never changes. Scores that differ from it are refused, or with --replace become an
identity of their own, which the alias means from then on.
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
from ..ids import IdIndex, digest_of, ids_to_numpy
from ..layouts import RowReader
from ..pairs import parse_id
from ..references import check_alias
from ..sources import Source, SourceColumns, open_sources
from .scores import SCORE_SCHEMA, to_bytes
from .store import ReferenceRecord, Store, open_store

BATCH_ROWS = 8192  # rows that become one score file
ABOVE_ZERO = 1e-3  # nats by which rounding may lift a certain response's log-prob above 0
ID_COLUMN = "pair_id"
VALUES = ("chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens")
# Why a row is left out, besides the reasons for which a pair can't be used.
NO_SCORE, ALREADY_THERE = "no score", "already there"


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
    rows = _first_rows(pa.concat_tables(tables), config.source, left)
    stored = store.scores(record.identity).read()
    new, changed = _places(stored, rows) < 0, _changed(rows, stored, record, config)
    left[ALREADY_THERE] += len(rows) - int(new.sum()) - changed
    if changed:
        print(f"replaced {changed:,} scores of {record.title}, where they stay as they are")
        record, rows = _replacement(record, rows, stored)
    scores = store.scores(record.identity)
    rows = rows.filter(pa.array(scores.missing(ids_to_numpy(rows[ID_COLUMN]))))
    for start in range(0, len(rows), BATCH_ROWS):
        scores.add(rows.slice(start, BATCH_ROWS))
    record = store.record(record)
    print(f"imported {new.sum():,} pairs; left out: {by_reason(left)}")
    print(f"reference {record.title}, marked as imported: {config.model}")
    print(f"store   {store.root}")
    return record


def _tables(source: Source, config: ImportConfig, left: Counter[str]) -> Iterator[pa.Table]:
    """The rows with a score, in tables of the store's columns; `left` counts the others."""
    rows = _rows(source, config, left)
    while batch := list(islice(rows, BATCH_ROWS)):
        # A column that the rows lack becomes null.
        yield pa.Table.from_pylist(batch, SCORE_SCHEMA)


def _rows(
    source: Source, config: ImportConfig, left: Counter[str]
) -> Iterator[dict[str, bytes | float | int | None]]:
    pairs = PairReader(source.name)
    logps = {
        "chosen_logp": config.chosen_logps_column,
        "rejected_logp": config.rejected_logps_column,
    }
    tokens = {
        "chosen_tokens": config.chosen_tokens_column,
        "rejected_tokens": config.rejected_tokens_column,
    }
    scored = SourceColumns(
        [*([ID_COLUMN] if config.by_id else []), *logps.values()],
        [*tokens.values()],
        "name columns with --chosen-column, --chosen-logps-column and so on",
    )
    rows: Iterator[tuple[int, Mapping[str, Any], RawPair | str | None]]
    if config.by_id:
        rows = ((number, row, None) for number, row in source.rows(scored))
    else:
        rows = RowReader(config, beside=scored).examples(source)
    for number, row, example in rows:
        try:
            scores = {name: _logp(column, row[column]) for name, column in logps.items()}
            counts = {name: _token_count(column, row) for name, column in tokens.items()}
            if isinstance(example, RawPair):
                identity: bytes | None = pairs.read(example)[1]
            else:
                identity = parse_id(row[ID_COLUMN])
            if identity is None:
                raise Broken(
                    ID_COLUMN,
                    f"is {row[ID_COLUMN]!r}; an id has 32 hex digits, as `mrpo inspect` shows",
                )
        except Broken as error:
            raise UserError(f"{source.given}, {source.unit} {number}, {error}") from None
        except Unusable as error:
            left[error.reason] += 1
        else:
            if None in scores.values():
                left[NO_SCORE] += 1
            else:
                yield {ID_COLUMN: identity, **scores, **counts}
    if config.chat and not pairs.wrapped:
        print(f"{source.given}: {CHAT_UNUSED}")


def _present(store: Store, config: ImportConfig) -> ReferenceRecord:
    """The reference that the alias and the model already name, else a new one."""
    entry = {"imported": config.model}
    run = {"engine": "imported", "source": config.source}
    for record in reversed(store.references()):
        if record.alias == config.alias and record.entry == entry:
            return replace(record, runs=(*record.runs, run))
    inputs = {"imported": {"alias": config.alias, "model": config.model}}
    return ReferenceRecord(alias=config.alias, entry=entry, inputs=inputs, runs=(run,))


def _first_rows(table: pa.Table, source: str, left: Counter[str]) -> pa.Table:
    """The rows without repetitions, which `left` counts; `UserError` where these differ."""
    places = _places(table, table)
    first = table.take(pa.array(places))
    different = _different(table, first)
    if different.any():
        raise UserError(
            f"{source}: {different.sum():,} rows repeat a pair with other scores; "
            f"{_difference(table, first, different)}; keep a single row of each pair"
        )
    firsts = places == np.arange(len(table))
    left[ALREADY_THERE] += int((~firsts).sum())
    return table.filter(pa.array(firsts))


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
            f"{config.source}: {different.sum():,} pairs have other scores than {record.title}; "
            f"{_difference(known, before, different)}; --replace makes them a new identity that "
            f"{config.alias} then means, another --alias a reference beside it"
        )
    return int(different.sum())


def _places(table: pa.Table, rows: pa.Table) -> np.ndarray:
    """[n] where in the table the pair of each row is; -1 where it is not."""
    return IdIndex(ids_to_numpy(table[ID_COLUMN])).find(ids_to_numpy(rows[ID_COLUMN]))


def _different(rows: pa.Table, others: pa.Table, names: Sequence[str] = VALUES) -> np.ndarray:
    """[n] whether a given value of a row differs from that of its counterpart."""
    different = np.zeros(len(rows), dtype=bool)
    for name in names:
        given = rows[name].is_valid().to_numpy()
        different |= given & (rows[name].to_numpy() != others[name].to_numpy())
    return different


def _difference(rows: pa.Table, others: pa.Table, different: np.ndarray) -> str:
    """The first pair whose values differ, and how."""
    place = int(np.flatnonzero(different)[0])
    row, other = rows.slice(place, 1), others.slice(place, 1)
    name = next(name for name in VALUES if _different(row, other, [name]).any())
    given, stored = row[name][0].as_py(), other[name][0].as_py()
    return f"pair {row[ID_COLUMN][0].as_py().hex()}: {name} is {given}, before it was {stored}"


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
