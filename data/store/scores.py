"""The scores of one reference: a schema, and immutable Parquet files named by rows and bytes.

A row is a response under its prompt, whatever pair it stands in. The files are
`<store>/<identity>/scores/<unit>-<digest>.parquet`: the unit is a digest of the response ids, the
other of the file's bytes. A file that exists is complete. Where two files have a row for the same
response, the one that sorts first by name counts, for every reader. A row has a finite score, or
the reason why there is none. docs/store.md describes the columns for readers outside this package.

`<store>/<identity>/left-out/<unit>.json` has the responses that only a limit of a run left out.
They have no row, so a later run tries them again; until then training counts them as missing.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import UserError
from ...files import TEMPORARY
from ..ids import (
    ID_DTYPE,
    ID_TYPE,
    IdArray,
    IdIndex,
    IdSet,
    ResponseIds,
    digest_of,
    ids_from_bytes,
    ids_to_numpy,
    unit_of,
)
from .files import Files

SCHEMA_VERSION = b"2"

SCORE_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", ID_TYPE, nullable=False),
        pa.field("response_id", ID_TYPE, nullable=False),  # of the response under its prompt
        pa.field("logp", pa.float64()),  # nats, summed over the response; null with a reason
        pa.field("end_logp", pa.float64()),  # the part of it that the end of turn makes
        pa.field("tokens", pa.int32()),  # scored tokens, end of turn included
        pa.field("prompt_tokens", pa.int32()),  # tokens before the first scored one
        pa.field("boundary", pa.bool_()),  # the first scored token starts inside the prompt
        pa.field("checksum", pa.uint32()),  # CRC-32 of all token ids: equal where these are
        pa.field("reason", pa.string()),  # why there is no score; null where there is one
    ],
    metadata={b"mrpo.scores": SCHEMA_VERSION},
)
EARLIER_COLUMNS = {"pair_id", "chosen_logp", "rejected_logp"}  # some of those of version 1
TOKEN_COLUMN = "token_logps"  # with --keep-token-logps
TOKEN_TYPE = pa.list_(pa.float32())

SCORE_FILE = re.compile(r"[0-9a-f]{32}-([0-9a-f]{32})\.parquet")
LEFT_OUT = "left-out"
KEPT_ASIDE = "kept-aside"  # rows of an earlier layout whose pairs `mrpo store upgrade` did not find
OVER_LIMIT = "over_limit"  # the reason of a response that only a limit of a run left out
BAD = ".bad"  # ends the name of a damaged file that was set aside
READERS = 8  # files read at a time
IDS_AT_ONCE = 64  # files whose ids are in memory twice for a moment

Value = TypeVar("Value")


class EarlierLayout(UserError):
    """A store whose rows are pairs, as earlier versions wrote it."""

    def __init__(self, root: str) -> None:
        super().__init__(
            f"--store {root}: written by an earlier version of mrpo, which scored pairs, not "
            f"responses; `mrpo store upgrade --store {root}` moves its scores over"
        )


class ScoreFiles:
    """What the store holds under one identity. Each call lists the folder again."""

    def __init__(self, files: Files, identity: str) -> None:
        self._files = files
        self._identity = identity
        self._folder = f"{identity}/scores"
        self._read_names: set[str] = set()  # of the files whose ids are in `_known`
        self._known = IdSet()

    def names(self) -> list[str]:
        """The score files in the order that decides between two rows for a response."""
        return sorted(filter(SCORE_FILE.fullmatch, self._files.names(self._folder)))

    def units(self) -> frozenset[str]:
        """The units of the files: equal sets of units have equal responses."""
        return frozenset(name.partition("-")[0] for name in self.names())

    def set_aside(self) -> list[str]:
        """Names of damaged files that `check` has renamed."""
        return [name for name in self._files.names(self._folder) if name.endswith(BAD)]

    def kept_aside(self) -> list[str]:
        """Names of files whose rows `mrpo store upgrade` could not move yet, sorted."""
        names = self._files.names(f"{self._identity}/{KEPT_ASIDE}")
        return sorted(filter(SCORE_FILE.fullmatch, names))

    def num_bytes(self) -> int:
        sizes = self._files.sizes(self._folder)
        return sum(size for name, size in sizes.items() if SCORE_FILE.fullmatch(name))

    def num_rows(self) -> int:
        """Rows by the files' footers; a row that two racing writers added counts twice."""

        def rows(name: str) -> int:
            with self._opened(name) as file:
                return int(file.metadata.num_rows)

        return sum(_parallel(rows, self.names()))

    def response_ids(self) -> IdArray:
        """Every response with a row, scored or permanently missing, once: [n] of 16 bytes."""
        ids = np.concatenate([np.empty(0, ID_DTYPE), *_parallel(self.ids_of, self.names())])
        return ids[IdIndex(ids).firsts()]

    def missing(self, ids: IdArray, *, refresh: bool = True) -> np.ndarray:
        """Which of the responses have no row yet, [n] bool.

        `refresh` looks for files that appeared since the last call; each is read once.
        """
        if refresh:
            names = [name for name in self.names() if name not in self._read_names]
            for start in range(0, len(names), IDS_AT_ONCE):
                some = names[start : start + IDS_AT_ONCE]
                self._known.add(np.concatenate(_parallel(self.ids_of, some)))
                self._read_names.update(some)
        return ~self._known.contains(ids)

    def missing_pairs(self, ids: ResponseIds, *, refresh: bool = True) -> np.ndarray:
        """Which of the pairs have a response without a row, [n] bool; `refresh` as in `missing`."""
        chosen, rejected = np.split(self.missing(ids.both, refresh=refresh), 2)
        return chosen | rejected

    def leave_out(self, ids: IdArray) -> None:
        """Remember responses that only a limit of a run left without a score."""
        if len(ids):
            responses = [response_id.tobytes().hex() for response_id in ids]
            content = {"reason": OVER_LIMIT, "responses": responses}
            name = f"{self._identity}/{LEFT_OUT}/{unit_of(ids)}.json"
            self._files.write(name, json.dumps(content).encode())

    def left_out(self) -> IdSet:
        """The responses that runs so far left out for a limit; some may be scored since."""
        known, folder = IdSet(), f"{self._identity}/{LEFT_OUT}"
        for name in self._files.names(folder):
            if name.endswith(".json") and not name.startswith(TEMPORARY):
                responses = json.loads(self._files.read(f"{folder}/{name}"))["responses"]
                known.add(ids_from_bytes([bytes.fromhex(response) for response in responses]))
        return known

    def add(self, table: pa.Table) -> str:
        """Store rows of `SCORE_SCHEMA` permanently; returns the file's name.

        Complete and on disk when this returns; on an error nothing of it remains. Raises
        `UserError` for a score that is not finite and has no reason.
        """
        table = checked(table)
        data = to_bytes(table)
        name = f"{unit_of(ids_to_numpy(table['response_id']))}-{digest_of(data)}.parquet"
        self._files.write(f"{self._folder}/{name}", data)
        return name

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """One row for each response, in the order of the files."""
        names = list(SCORE_SCHEMA.names if columns is None else columns)
        parts = list(self.tables(list(dict.fromkeys(["response_id", *names]))))
        if not parts:
            return SCORE_SCHEMA.empty_table().select(names)
        table = pa.concat_tables(parts)
        firsts = IdIndex(ids_to_numpy(table["response_id"])).firsts()
        if len(firsts) < len(table):
            table = table.take(firsts)
        return table.select(names)

    def tables(
        self, columns: Sequence[str], names: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        """The rows of the files (or of those named), each file's digest checked first.

        In the order of `names()`, which decides between two rows. Per-token log-probs are null for
        files that keep none. Raises `UserError` at a damaged file.
        """
        for name in self.names() if names is None else names:
            data = self.read_file(name)
            if not intact(name, data):
                raise UserError(self._damage(name))
            with self._parsed(name, pa.BufferReader(data)) as file:
                table = file.read(columns=list(columns))
            if TOKEN_COLUMN in columns and TOKEN_COLUMN not in table.column_names:
                table = table.append_column(TOKEN_COLUMN, pa.nulls(len(table), TOKEN_TYPE))
            yield table.select(list(columns))

    def read_file(self, name: str) -> bytes:
        """A score file as it is, unchecked."""
        return self._files.read(f"{self._folder}/{name}")

    def damaged(self) -> list[str]:
        """Files whose bytes do not match the digest in their name; changes nothing."""
        names = self.names()

        def damaged(name: str) -> bool:
            try:
                return not intact(name, self.read_file(name))
            except OSError as error:
                # A bad sector is damage like a flipped bit; a failing network is not.
                if not (self._files.is_local and error.errno == errno.EIO):
                    raise
                return True

        return [name for name, bad in zip(names, _parallel(damaged, names)) if bad]

    def check(self) -> list[str]:
        """Set damaged files aside as `….bad`, so that their rows are scored again; their names."""
        names = self.damaged()
        for name in names:
            self._files.rename(f"{self._folder}/{name}", f"{self._folder}/{name}{BAD}")
        self._read_names, self._known = set(), IdSet()
        return names

    def lease(self, unit: str) -> contextlib.AbstractContextManager[bool]:
        """Claim a unit of work against other processes on this machine: yields whether it is ours.

        The lease ends with its process. It only saves double work: a race costs a second row.
        """
        assert re.fullmatch(r"[0-9a-f]{32}", unit), unit
        return self._files.lease(f"{self._identity}/leases/{unit}")

    def ids_of(self, name: str) -> IdArray:
        """The responses of one file. Raises `UserError` where it can't be read as Parquet."""
        with self._opened(name) as file:
            return ids_to_numpy(file.read(columns=["response_id"])["response_id"])

    def _opened(self, name: str) -> contextlib.AbstractContextManager[pq.ParquetFile]:
        return self._parsed(name, self._files.open(f"{self._folder}/{name}"))

    @contextlib.contextmanager
    def _parsed(self, name: str, source: pa.NativeFile) -> Iterator[pq.ParquetFile]:
        """A score file to read; raises `UserError` where it is none, also while it is read."""
        try:
            with pq.ParquetFile(source) as file:
                there = [(field.name, field.type, field.nullable) for field in file.schema_arrow]
                expected = {(field.name, field.type, field.nullable) for field in SCORE_SCHEMA}
                if {name for name, *_ in there} >= EARLIER_COLUMNS:
                    raise EarlierLayout(self._files.root)
                if len({name for name, *_ in there}) < len(there) or not expected <= set(there):
                    raise UserError(
                        f"{self._files.root}/{self._folder}/{name}: its columns are not those of "
                        "scores; remove it, and `mrpo precompute` scores its rows again"
                    )
                yield file
        except (pa.ArrowException, OSError) as error:
            # Without a number it is Arrow's, for a page that it cannot decode.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UserError(self._damage(name)) from None

    def _damage(self, name: str) -> str:
        return (
            f"{self._files.root}/{self._folder}/{name}: damaged (its bytes do not match "
            "its name); `mrpo precompute` sets it aside and scores its rows again"
        )


def checked(table: pa.Table) -> pa.Table:
    """The rows in the schema's order and types.

    Raises `UserError` for a score that is not finite, that is missing without a reason, or that
    comes with one. Wrong columns and repeated ids are faults of the caller: `AssertionError`.
    """
    schema = SCORE_SCHEMA
    if TOKEN_COLUMN in table.column_names:
        schema = schema.append(pa.field(TOKEN_COLUMN, TOKEN_TYPE))
    assert set(table.column_names) == set(schema.names), table.column_names
    table = table.select(schema.names).cast(schema)
    ids = ids_to_numpy(table["response_id"])
    assert len(IdIndex(ids).firsts()) == len(ids), "a unit holds a response twice"
    missing = table["reason"].is_valid().to_numpy()
    for name in ("logp", "end_logp"):
        values = table[name].to_numpy()  # null becomes NaN
        absent = table[name].is_null().to_numpy()
        required = ~missing if name == "logp" else ~missing & ~absent
        _refuse(table, name, required & ~np.isfinite(values), values)
        _refuse(table, name, missing & ~absent, values)
    return table


def to_bytes(table: pa.Table) -> bytes:
    """The rows as one Parquet file: the same rows give the same bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=["reason"])
    return sink.getvalue()


def _refuse(table: pa.Table, name: str, bad: np.ndarray, values: np.ndarray) -> None:
    if not bad.any():
        return
    row = int(np.flatnonzero(bad)[0])
    response, reason = table["response_id"][row].as_py().hex(), table["reason"][row].as_py()
    raise UserError(
        f"response {response}: {name} is {values[row]} with reason {reason!r}; a score must be "
        f"finite, or missing with a reason ({int(bad.sum())} such rows; check the reference's "
        "weights)"
    )


def intact(name: str, data: bytes) -> bool:
    """Whether a score file's bytes match the digest in its name."""
    match = SCORE_FILE.fullmatch(name)
    return match is not None and match[1] == digest_of(data)


def _parallel(function: Callable[[str], Value], names: list[str]) -> list[Value]:
    """The function of every name, by threads: reading and hashing release the interpreter's lock.

    There are more threads than cores, because uncached and remote files have to be waited for.
    """
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(function, names))
