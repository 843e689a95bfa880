"""Where preference data comes from: files, folders and globs of them, and Hub data sets.

A `Source` streams raw rows as dicts from JSON Lines, JSON arrays, CSV, Parquet or a Hub data set;
`layouts.py` finds the pairs in them. A row's number is what an editor or a table viewer shows: the
line where a JSON object begins, else the row counted from 1.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from ..files import JSON, KeyTwiceError
from ..settings import comma_separated

Row = tuple[int, dict[str, Any]]


class Columns(Protocol):
    """Decides which columns of a source are read."""

    def choose(self, place: str, existing: Sequence[str]) -> list[str]:
        """The columns to read of those that exist, once for a table, for each row of JSON.

        `place` begins a message: the file with "column", or the file and line with "field". Raises
        `UserError` where a column that is needed is missing.
        """


@dataclass(frozen=True, slots=True)
class SourceColumns:
    """The columns to read: those that every row must have, and those that it may have."""

    required: list[str]
    optional: list[str]
    flags: str  # how the user names them, for messages

    def choose(self, place: str, existing: Sequence[str]) -> list[str]:
        for name in self.required:
            if name not in existing:
                raise missing_column(place, name, existing, self.flags)
        return [*self.required, *(name for name in self.optional if name in existing)]


def missing_column(place: str, name: str, existing: Sequence[str], way_out: str) -> UserError:
    there = ", ".join(existing) or "none"
    return UserError(f"{place} {name!r} is missing; there are {there}; {way_out}")


Reader = Callable[[str, Columns], Iterator[Row]]

BATCH_ROWS = 1024
CHUNK = 1 << 20  # characters of a JSON array to read at a time, at least
COMPRESSED = (".gz", ".zst", ".zstd")
KINDS = ".jsonl, .json or .csv (each also with .gz or .zst), or .parquet"

_HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(/(?P<config>[\w.-]+))?:(?P<split>[^/]+)")


@dataclass(frozen=True, slots=True)
class Source:
    """One file or data set: as the user gave it, and its short name for the source column."""

    given: str
    name: str
    unit: str  # what a row's number counts, for messages: "line" or "row"
    reader: Reader

    def rows(self, columns: Columns) -> Iterator[Row]:
        """Row numbers and fields; of tables only the columns that matter. Raises `UserError`."""
        return self.reader(self.given, columns)


def open_sources(given: str) -> list[Source]:
    """The sources of a comma-separated list; raises `UserError` for one that cannot exist."""
    names = comma_separated(given)
    if not names:
        raise UserError(f"source {given!r} names nothing; give files or org/name:split")
    return [source for name in names for source in _expand(name)]


def unread_files(given: str) -> list[str]:
    """The files in the folders of a comma-separated list that are no data, and are not read."""
    folders = [Path(name) for name in comma_separated(given) if Path(name).is_dir()]
    return [str(path) for folder in folders for path in _files(folder) if _reader(path) is None]


def _expand(given: str) -> list[Source]:
    """The sources that a file, a folder, a glob or the name of a data set stands for."""
    path = Path(given)
    if path.is_file():
        if _reader(path) is None:
            raise UserError(f"{given}: unknown kind of file; it must end in {KINDS}")
        return [_file(path, given)]
    if path.is_dir():
        files = [file for file in _files(path) if _reader(file) is not None]
        if not files:
            raise UserError(f"{given} is a folder without data; its files must end in {KINDS}")
        return [_file(file, str(file), path.resolve().name) for file in files]
    match = _HUB.fullmatch(given)
    if match and _reader(path) is None:
        return [Source(given, match["name"], "row", _read_hub)]
    if glob.has_magic(given):
        found = [file for file in sorted(glob.glob(given, recursive=True)) if Path(file).is_file()]
        if not found:
            raise UserError(f"{given} matches no file; quote a pattern that the shell must not see")
        return [source for file in found for source in _expand(file)]
    raise UserError(
        f"{given}: no such file; a data set on the Hub is named org/name:split, "
        "as in trl-lib/ultrafeedback_binarized:train"
    )


def _file(path: Path, given: str, name: str | None = None) -> Source:
    reader = _reader(path)
    assert reader is not None
    unit = "line" if reader in (_read_jsonl, _read_json) else "row"
    return Source(given, name or _bare(path).stem, unit, reader)


def _files(folder: Path) -> list[Path]:
    """All files below a folder in the order of their names, without hidden ones."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _bare(path: Path) -> Path:
    """The path without the suffix of its compression."""
    return path.with_suffix("") if path.suffix in COMPRESSED else path


def _reader(path: Path) -> Reader | None:
    reader = _READERS.get(_bare(path).suffix)
    return None if path.suffix in COMPRESSED and reader is _read_parquet else reader


def _read_json(given: str, columns: Columns) -> Iterator[Row]:
    """A file that ends in .json: one array of objects, indented or not, else JSON Lines."""
    read = _read_array if next(_chunks(given), "").lstrip().startswith("[") else _read_jsonl
    yield from read(given, columns)


def _read_jsonl(given: str, columns: Columns) -> Iterator[Row]:
    for number, line in enumerate(_lines(given), 1):
        if not line.strip():
            continue
        where = f"{given}, line {number}"
        try:
            row = JSON.decode(line)
        except KeyTwiceError as error:
            raise UserError(f"{where}: {error}") from None
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where} is not JSON: {error.msg} at column {error.pos + 1}; "
                "each line must be one object"
            ) from None
        except (RecursionError, ValueError):
            raise UserError(f"{where} is JSON too deep or too large to read") from None
        yield number, _object(row, where, columns)


def _object(row: Any, where: str, columns: Columns) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where} must be one JSON object, not {type(row).__name__}")
    columns.choose(f"{where}, field", list(row))
    return row


def _read_array(given: str, columns: Columns) -> Iterator[Row]:
    """The objects of a JSON array, one after the other; a part of the text is in memory."""
    text = _JsonText(given)
    text.skip("[")
    while not text.skip("]"):
        number, row = text.value()
        yield number, _object(row, f"{given}, line {number}", columns)
        if not text.skip(",") and text.peek() != "]":
            raise text.fault("there must be ',' or ']' after an object")
    if text.peek():
        raise text.fault("there is text behind the array's end")


class _JsonText:
    """The text of a JSON file, read in chunks and decoded value by value."""

    def __init__(self, given: str) -> None:
        self._given = given
        self._chunks = _chunks(given)
        self._text, self._at = "", 0
        self._line, self._counted = 1, 0  # the line of the place up to which lines were counted
        self._ended = False

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def skip(self, char: str) -> bool:
        """Pass the character if it is the next one."""
        if self.peek() != char:
            return False
        self._at += 1
        return True

    def value(self) -> Row:
        """The next value, and the line where it begins."""
        self.peek()
        while True:
            try:
                value, end = JSON.raw_decode(self._text, self._at)
            except KeyTwiceError as error:
                number = self._number(self._at)
                raise UserError(f"{self._given}, line {number}: {error}") from None
            except json.JSONDecodeError as error:
                # Near the end of the text the value may go on in the next chunk.
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - 12
                if not (cut and self._more()):
                    raise self.fault(error.msg, error.pos) from None
            except (RecursionError, ValueError):
                raise self.fault("it is too deep or too large to read") from None
            else:
                number = self._number(self._at)
                self._at = end
                return number, value

    def fault(self, message: str, at: int | None = None) -> UserError:
        number = self._number(self._at if at is None else at)
        return UserError(
            f"{self._given}, line {number} is not JSON: {message}; "
            "the file must be an array of objects, or one object a line"
        )

    def _number(self, at: int) -> int:
        self._line += self._text.count("\n", self._counted, at)
        self._counted = at
        return self._line

    def _more(self) -> bool:
        """Read on, as much as is in the buffer already, so that long values cost linear time."""
        if self._ended:
            return False
        self._number(self._at)
        parts, size = [self._text[self._at :]], 0
        least = max(CHUNK, len(parts[0]))
        while size < least and not self._ended:
            chunk = next(self._chunks, None)
            self._ended = chunk is None
            parts.append(chunk or "")
            size += len(parts[-1])
        self._text, self._at, self._counted = "".join(parts), 0, 0
        return size > 0


def _read_csv(given: str, columns: Columns) -> Iterator[Row]:
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
    except KeyTwiceError as error:
        raise UserError(f"{given}, row {number}: {error}") from None
    except csv.Error as error:
        raise UserError(f"{given}, row {number} is not CSV: {error}") from None


def _read_parquet(given: str, columns: Columns) -> Iterator[Row]:
    try:
        with pq.ParquetFile(given) as file:
            names = _present(given, columns, file.schema_arrow.names)
            batches = file.iter_batches(batch_size=BATCH_ROWS, columns=names)
            yield from _numbered(batch.to_pydict() for batch in batches)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{given} cannot be read as Parquet: {_one_line(error)}") from None


def _read_hub(given: str, columns: Columns) -> Iterator[Row]:
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
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _present(given: str, columns: Columns, existing: list[str]) -> list[str]:
    """The columns of a table to read; raises `UserError` where one is missing or there twice."""
    names = columns.choose(f"{given}: column", existing)
    for name in names:
        if existing.count(name) > 1:
            raise UserError(f"{given}: column {name!r} occurs {existing.count(name)} times")
    return names


def _numbered(batches: Any) -> Iterator[Row]:
    """Rows of batches that map a column's name to its values."""
    number = 0
    for batch in batches:
        for values in zip(*batch.values()):
            number += 1
            yield number, dict(zip(batch, values))


def _open(given: str) -> IO[bytes]:
    """A file's bytes, decompressed according to its suffix."""
    suffix = Path(given).suffix
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(given))
    if suffix in COMPRESSED:
        stream = pa.CompressedInputStream(pa.OSFile(given, "rb"), "zstd")
        return io.BufferedReader(stream)
    return open(given, "rb")


def _lines(given: str) -> Iterator[str]:
    """The lines of a text file, plain or compressed; only a line feed ends one."""
    number = 0
    try:
        with _open(given) as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{given}, line {number} is not UTF-8 at byte {error.start + 1}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{given} cannot be read after line {number}: {error}") from None


def _chunks(given: str) -> Iterator[str]:
    """The text of a file, plain or compressed, in parts: a JSON array may be one long line."""
    size = 0
    try:
        with _open(given) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
            while chunk := text.read(CHUNK):
                size += len(chunk)
                yield chunk
    except UnicodeDecodeError:
        raise UserError(f"{given} is not UTF-8 after character {size:,}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{given} cannot be read after character {size:,}: {error}") from None


def _cell(text: str) -> Any:
    """A CSV cell: text, or messages as JSON, the only way CSV can hold them."""
    if text.startswith(("[{", "{")):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        items = value if isinstance(value, list) else [value]
        if all(isinstance(item, dict) and ("role" in item or "from" in item) for item in items):
            return JSON.decode(text)  # as messages it is refused where a key is there twice
    return text


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
