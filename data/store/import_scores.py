"""`mrpo store import`: scores computed elsewhere, stored under an alias of their own.

A row is a pair in any format that `mrpo prepare` reads, or a pair's id, with two log-probs beside
it. How they were computed can't be checked here, so their identity is the user's description of
them, and the record is marked as imported. Everything else treats them like any reference's scores.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import pyarrow as pa

from ...errors import UserError
from ...settings import command
from ..config import ImportConfig
from ..formats import Broken, PairReader, RawPair, Unusable, by_reason
from ..ids import IdIndex, ids_to_numpy
from ..layouts import RowReader
from ..pairs import parse_id
from ..references import check_alias
from ..sources import Source, SourceColumns, open_sources
from .scores import SCORE_SCHEMA, ScoreFiles
from .store import ReferenceRecord, open_store

BATCH_ROWS = 8192  # rows that become one score file
ABOVE_ZERO = 1e-3  # nats by which rounding may lift a certain response's log-prob above 0
ID_COLUMN = "pair_id"
# Why a row is left out, besides the reasons for which a pair can't be used.
NO_SCORE, ALREADY_THERE = "no score", "already there"


@command(ImportConfig)
def import_scores(config: ImportConfig) -> ReferenceRecord:
    """Store the scores of every row that has them; returns the reference that they became.

    Raises `UserError` at an invalid row, and then nothing is stored.
    """
    check_alias(config.alias, "--alias")
    sources = open_sources(config.source)
    store = open_store(config.store)
    record = ReferenceRecord(
        alias=config.alias,
        entry={"imported": config.model},
        inputs={"imported": {"alias": config.alias, "model": config.model}},
        runs=({"engine": "imported", "source": config.source},),
    )
    scores, left = store.scores(record.identity), Counter[str]()
    # Everything is read before anything is stored: an invalid row leaves the store as it was.
    tables = [table for source in sources for table in _tables(source, config, left)]
    kept = sum(_add(scores, table, left) for table in tables)
    if not kept and not left[ALREADY_THERE]:
        raise UserError(
            f"{config.source}: no row has a score ({by_reason(left)}); nothing imported"
        )
    record = store.record(record)
    print(f"imported {kept:,} pairs; left out: {by_reason(left)}")
    print(f"reference {record.alias}@{record.identity[:12]}, marked as imported: {config.model}")
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


def _add(scores: ScoreFiles, table: pa.Table, left: Counter[str]) -> int:
    """Store the rows that are new and count them; a pair's first row counts, as in the store."""
    ids = ids_to_numpy(table[ID_COLUMN])
    firsts = IdIndex(ids).firsts()
    new = firsts[scores.missing(ids)[firsts]]
    left[ALREADY_THERE] += len(ids) - len(new)
    if len(new):
        scores.add(table.take(pa.array(new)))
    return len(new)


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
