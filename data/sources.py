"""Where preference data comes from: JSONL, CSV and Parquet files, and Hub data sets.

A `Source` streams raw rows as dicts; `formats.py` makes pairs of them. A row's number is what an
editor or a table viewer shows: the line of a JSONL file, else the row counted from 1.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from ..settings import comma_separated

Row = tuple[int, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class SourceColumns:
    """The columns to read: those that every row must have, and those that it may have."""

    required: list[str]
    optional: list[str]
    flags: str  # how the user names them, for messages


Reader = Callable[[str, SourceColumns], Iterator[Row]]

BATCH_ROWS = 1024

_HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(/(?P<config>[\w.-]+))?:(?P<split>[^/]+)")


@dataclass(frozen=True, slots=True)
class Source:
    """One file or data set: as the user gave it, and its short name for the source column."""

    given: str
    name: str
    unit: str  # what a row's number counts, for messages: "line" or "row"
    reader: Reader

    def rows(self, columns: SourceColumns) -> Iterator[Row]:
        """Row numbers and fields; of tables only the columns that matter. Raises `UserError`."""
        return self.reader(self.given, columns)


def open_sources(given: str) -> list[Source]:
    """The sources of a comma-separated list; raises `UserError` for one that cannot exist."""
    names = comma_separated(given)
    if not names:
        raise UserError(f"source {given!r} names nothing; give files or org/name:split")
    return [_open_source(name) for name in names]


def _open_source(given: str) -> Source:
    path = Path(given)
    bare = path.with_suffix("") if path.suffix == ".gz" else path
    reader = _READERS.get(bare.suffix)
    if path.is_file():
        if reader is None or (path.suffix == ".gz" and reader is _read_parquet):
            raise UserError(
                f"{given}: unknown kind of file; it must end in .jsonl, .json or .csv "
                "(each also with .gz), or .parquet"
            )
        return Source(given, bare.stem, "line" if reader is _read_jsonl else "row", reader)
    match = _HUB.fullmatch(given)
    if match and reader is None:
        return Source(given, match["name"], "row", _read_hub)
    if path.is_dir():
        raise UserError(f"{given} is a folder; name its files, separated by commas")
    raise UserError(
        f"{given}: no such file; a data set on the Hub is named org/name:split, "
        "as in trl-lib/ultrafeedback_binarized:train"
    )


def _read_jsonl(given: str, columns: SourceColumns) -> Iterator[Row]:
    for number, line in enumerate(_lines(given), 1):
        if not line.strip():
            continue
        where = f"{given}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where} is not JSON: {error.msg} at column {error.pos + 1}; "
                "each line must be one object"
            ) from None
        except (RecursionError, ValueError):
            raise UserError(f"{where} is JSON too deep or too large to read") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} must be one JSON object, not {type(row).__name__}")
        for name in columns.required:
            if name not in row:
                raise UserError(
                    f"{where}, field {name!r} is missing; there are {', '.join(row) or 'none'}; "
                    f"{columns.flags}"
                )
        yield number, row


def _read_csv(given: str, columns: SourceColumns) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    rows = filter(None, csv.reader(_lines(given), strict=True))  # a blank line is no row
    number = 0
    try:
        header = next(rows, [])
        names = {header.index(name): name for name in _present(given, columns, header)}
        number = 1
        for cells in rows:
            if len(cells) != len(header):
                raise UserError(
                    f"{given}, row {number} has {len(cells)} fields, the header has {len(header)}"
                )
            yield number, {name: _cell(cells[index]) for index, name in names.items()}
            number += 1
    except csv.Error as error:
        raise UserError(f"{given}, row {number} is not CSV: {error}") from None


def _read_parquet(given: str, columns: SourceColumns) -> Iterator[Row]:
    try:
        with pq.ParquetFile(given) as file:
            names = _present(given, columns, file.schema_arrow.names)
            batches = file.iter_batches(batch_size=BATCH_ROWS, columns=names)
            yield from _numbered(batch.to_pydict() for batch in batches)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{given} cannot be read as Parquet: {_one_line(error)}") from None


def _read_hub(given: str, columns: SourceColumns) -> Iterator[Row]:
    import datasets

    match = _HUB.fullmatch(given)
    assert match is not None
    try:
        data = datasets.load_dataset(match["name"], match["config"], split=match["split"])
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{given} cannot be loaded from the Hub: {_one_line(error)}") from None
    names = _present(given, columns, data.column_names)
    yield from _numbered(data.select_columns(names).iter(batch_size=BATCH_ROWS))


_READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _present(given: str, columns: SourceColumns, existing: list[str]) -> list[str]:
    """The columns to read; raises `UserError` where a required one is missing."""
    for name in columns.required:
        if name not in existing:
            raise UserError(
                f"{given}: column {name!r} is missing; there are {', '.join(existing) or 'none'}; "
                f"{columns.flags}"
            )
        if existing.count(name) > 1:
            raise UserError(f"{given}: column {name!r} occurs {existing.count(name)} times")
    return [*columns.required, *(name for name in columns.optional if name in existing)]


def _numbered(batches: Any) -> Iterator[Row]:
    """Rows of batches that map a column's name to its values."""
    number = 0
    for batch in batches:
        for values in zip(*batch.values()):
            number += 1
            yield number, dict(zip(batch, values))


def _lines(given: str) -> Iterator[str]:
    """The lines of a text file, plain or gzipped; only a line feed ends one."""
    number = 0
    try:
        with gzip.open(given) if given.endswith(".gz") else open(given, "rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{given}, line {number} is not UTF-8 at byte {error.start + 1}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{given} cannot be read after line {number}: {error}") from None


def _cell(text: str) -> Any:
    """A CSV cell: text, or a message list as JSON, the only way CSV can hold one."""
    if text.startswith("[{"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if all(isinstance(item, dict) and "role" in item for item in value):
            return value
    return text


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
