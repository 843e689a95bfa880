"""Ids as numpy arrays, an index and a set of millions of them, and the store's digests.

An id is 16 raw bytes, the head of a SHA-256, so its first 8 bytes nearly always decide a
comparison. Sorted columns of uint64 take 16 bytes an id; Python or Arrow hash tables of the same
ids take several times that (measured: 2.0 GB against 0.5 GB for 10 million).

Digests name identities, units of responses and the bytes of files by their content, whatever wrote
it. All are heads of SHA-256, printed as hex.

A reviewed table holds a reviewer's decisions about single pairs: `mrpo audit` writes one with an
empty `decision` column, to be filled in with keep, exclude or flip. Any table of pair ids works: in
one without that column, all rows are meant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..errors import UserError
from .pairs import ID_BYTES, Pair, canonical_json, parse_id
from .sources import SourceColumns, open_sources

ID_DTYPE = np.dtype("V16")
ID_TYPE = pa.binary(ID_BYTES)
LARGEST_BUCKET = 64  # ids with the same first bits; more of them are no digests, and are bisected
ID, DECISION = "pair_id", "decision"  # columns of a reviewed table
DECISIONS = ("keep", "exclude", "flip")
REVIEW_COLUMNS = SourceColumns(
    [ID], [DECISION], f"a reviewed table has {ID!r}, and {DECISION!r} where not all rows are meant"
)

IdArray = np.ndarray[Any, np.dtype[np.void]]  # [n], dtype V16
Uint64s = np.ndarray[Any, np.dtype[np.uint64]]
Positions = np.ndarray[Any, np.dtype[np.int64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


def ids_to_numpy(column: pa.ChunkedArray | pa.Array) -> IdArray:
    """A Parquet column of ids as an array [n] of 16 bytes each."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    assert array.type == ID_TYPE, array.type
    if not len(array):
        return np.empty(0, ID_DTYPE)
    start = array.offset * ID_BYTES
    return np.frombuffer(array.buffers()[1], ID_DTYPE, len(array), start).copy()


def ids_to_arrow(ids: IdArray) -> pa.Array:
    """An array [n] of ids as an Arrow column."""
    buffer = pa.py_buffer(np.ascontiguousarray(ids).tobytes())
    return pa.Array.from_buffers(ID_TYPE, len(ids), [None, buffer])


def ids_from_bytes(ids: list[bytes]) -> IdArray:
    """An array [n] from single ids of 16 bytes."""
    assert all(len(single) == ID_BYTES for single in ids)
    return np.frombuffer(b"".join(ids), dtype=ID_DTYPE)


class ResponseIds(NamedTuple):
    """The ids of n pairs' prompts and responses, [n] of 16 raw bytes each."""

    prompts: IdArray
    chosen: IdArray
    rejected: IdArray

    @property
    def both(self) -> IdArray:
        """[2n] the ids of the chosen responses, then of the rejected ones."""
        return np.concatenate([self.chosen, self.rejected])

    def take(self, rows: np.ndarray) -> ResponseIds:
        """Those of some pairs, by row number or [n] bool."""
        return ResponseIds(*(ids[rows] for ids in self))


class IdIndex:
    """Finds ids among many; of an id that occurs twice, the first place counts.

    About 25 bytes an id. Measured among 10 million: 0.1 µs an id, against 0.6 µs by bisection.
    """

    def __init__(self, ids: IdArray | Iterable[IdArray]) -> None:
        """One array, or several one after the other, which are never in memory as one."""
        parts = [_columns(part) for part in ([ids] if isinstance(ids, np.ndarray) else ids)]
        highs, lows = [high for high, _ in parts], [low for _, low in parts]
        del parts
        high = np.concatenate([*highs, np.empty(0, np.uint64)])
        del highs
        low = np.concatenate([*lows, np.empty(0, np.uint64)])
        del lows
        self._order = _order(high)
        # One column after the other, so that few of them are in memory at a time.
        high = high[self._order]
        low = low[self._order]
        self._sorted = _SortedIds(high, low)

    @property
    def size(self) -> int:
        """How many ids there are, repeated ones included."""
        return len(self._order)

    def find(self, ids: IdArray) -> Positions:
        """Where each id first occurs, [n] int64; -1 where it does not."""
        places = self._sorted.find(ids)
        known = places >= 0
        places[known] = self._order[places[known]]
        return places

    def firsts(self) -> Positions:
        """The places that count, ascending: one for each different id."""
        repeats = _repeats(self._sorted.high, self._sorted.low)
        if not repeats.any():
            return np.arange(len(repeats), dtype=np.int64)
        return np.sort(self._order[~repeats]).astype(np.int64)


class IdSet:
    """A growing set of ids, 18 to 20 bytes each, in sorted runs.

    Runs merge as the digits of a binary counter do, so that each id is moved a logarithmic number
    of times and few runs have to be searched, for 10 million ids as for ten.
    """

    def __init__(self) -> None:
        self._runs: list[_SortedIds] = []  # the longest first

    def contains(self, ids: IdArray) -> Mask:
        """Which of the ids, [n], are in the set."""
        known = np.zeros(len(ids), dtype=bool)
        for run in self._runs:
            known |= run.find(ids) >= 0
        return known

    def add(self, ids: IdArray) -> Mask:
        """Put the ids, [n], into the set; which of them are new, of equal ones the first."""
        high, low = _columns(ids)
        order = _order(high)
        high = high[order]
        low = low[order]
        kept = ~_repeats(high, low)
        if self._runs:
            kept &= ~self.contains(ids)[order]
        new = np.empty(len(ids), dtype=bool)
        new[order] = kept
        del order
        if not kept.all():
            high, low = high[kept], low[kept]
        while self._runs and len(self._runs[-1]) <= 2 * len(high):
            run = self._runs.pop()
            high = np.concatenate([run.high, high])
            order = _order(high)  # a stable sort merges two sorted runs
            high = high[order]
            low = np.concatenate([run.low, low])[order]
            del run, order
        if len(high):
            self._runs.append(_SortedIds(high, low))
        return new


class _SortedIds:
    """Ids sorted by their first 8 bytes, as two columns [n] (first 8 bytes, last 8 bytes).

    Ids are spread like digests, so that their first bits nearly give the place.
    """

    def __init__(self, high: Uint64s, low: Uint64s) -> None:
        self.high, self.low = high, low
        bits = max(len(high).bit_length() - 1, 1)
        self._shift = np.uint64(64 - bits)
        sizes = np.bincount((high >> self._shift).astype(np.int64), minlength=2**bits)
        self._starts = (np.cumsum(sizes) - sizes).astype(np.int32)
        self._spread = bool(sizes.max() <= LARGEST_BUCKET)

    def __len__(self) -> int:
        return len(self.high)

    def find(self, ids: IdArray) -> Positions:
        """The first place of each id in the sorted order, [n] int64; -1 where it has none."""
        places = np.full(len(ids), -1, dtype=np.int64)
        high, low = _columns(ids)
        rows = np.arange(len(ids))
        # A place at or before the first id with the same 8 bytes; from there on step by step.
        if self._spread:
            at = self._starts[(high >> self._shift).astype(np.int64)].astype(np.int64)
        else:
            at = np.searchsorted(self.high, high)
        while len(rows):
            inside = at < len(self)
            rows, high, low, at = rows[inside], high[inside], low[inside], at[inside]
            here = self.high[at]
            same = (here == high) & (self.low[at] == low)
            places[rows[same]] = at[same]
            on = (here <= high) & ~same
            rows, high, low, at = rows[on], high[on], low[on], at[on] + 1
        return places


class Review:
    """Decisions by pair id, and which of these pairs were in the data so far."""

    def __init__(self, exclude: str | None, flip: str | None) -> None:
        """Comma-separated files or None. Raises `UserError` for an invalid or contradicting row."""
        self._decided: dict[bytes, tuple[str, str]] = {}  # exclude or flip; the file
        self._in_data: set[bytes] = set()
        for pair_id, _, file in _read_decisions("exclude", exclude):
            self._decided.setdefault(pair_id, ("exclude", file))
        for pair_id, place, file in _read_decisions("flip", flip):
            if self._decided.setdefault(pair_id, ("flip", file))[0] == "exclude":
                raise UserError(
                    f"{place}: pair {pair_id.hex()} is to be flipped and is in --exclude too; "
                    "keep one of the two decisions"
                )

    def apply(self, pair: Pair, pair_id: bytes) -> tuple[Pair, bytes] | None:
        """The pair with its id, flipped where that was decided; None where it is excluded.

        A flipped pair has a new id, and by that one it can be excluded.
        """
        if self._decision(pair_id) == "flip":
            pair = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
            pair_id = pair.id
        return None if self._decision(pair_id) == "exclude" else (pair, pair_id)

    @property
    def flipped(self) -> int:
        """Pairs flipped so far; one that the data holds twice counts once."""
        return sum(self._decided[pair_id][0] == "flip" for pair_id in self._in_data)

    def unknown(self) -> dict[str, list[str]]:
        """For each file the ids, as hex, whose pair was not in the data."""
        ids: dict[str, list[str]] = {}
        for pair_id, (_, file) in self._decided.items():
            if pair_id not in self._in_data:
                ids.setdefault(file, []).append(pair_id.hex())
        return ids

    def _decision(self, pair_id: bytes) -> str | None:
        if pair_id not in self._decided:
            return None
        self._in_data.add(pair_id)
        return self._decided[pair_id][0]


def _read_decisions(decision: str, files: str | None) -> Iterator[tuple[bytes, str, str]]:
    """(pair id, place for messages, file) of every row that asks for the decision."""
    for source in open_sources(files) if files else ():
        for number, row in source.rows(REVIEW_COLUMNS):
            place = f"{source.given}, {source.unit} {number}"
            given = str(row.get(DECISION, decision) or "").strip().lower()
            if given not in ("", *DECISIONS):
                raise UserError(
                    f"{place}: {DECISION} is {given!r}; it must be {', '.join(DECISIONS)}, "
                    "or empty, which keeps the pair"
                )
            if given != decision:
                continue
            pair_id = parse_id(row[ID])
            if pair_id is None:
                raise UserError(
                    f"{place}: {ID} is {row[ID]!r}; it must be {2 * ID_BYTES} hexadecimal digits, "
                    "as `mrpo audit` writes them"
                )
            yield pair_id, place, source.given


def digest_of(data: bytes | memoryview) -> str:
    """32 hex digits (128 bits) of SHA-256: enough to name content and to notice any flipped bit."""
    return hashlib.sha256(data).hexdigest()[:32]


def identity_of(inputs: Any) -> str:
    """The name of what makes a reference's scores: a digest of the inputs as canonical JSON."""
    return digest_of(canonical_json(inputs).encode())


def unit_of(ids: IdArray) -> str:
    """The name of a set of responses: the same for any order of the same ids."""
    high, low = _columns(ids)
    order = np.lexsort((low, high))
    return digest_of(np.ascontiguousarray(ids[order]).tobytes())


def _columns(ids: IdArray) -> tuple[Uint64s, Uint64s]:
    """The ids as two uint64 columns (first 8 bytes, last 8 bytes) that sort like the bytes."""
    columns = np.ascontiguousarray(ids).view(">u8").reshape(-1, 2)
    return columns[:, 0].astype(np.uint64), columns[:, 1].astype(np.uint64)


def _order(high: Uint64s) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.argsort(high, kind="stable").astype(np.int32)


def _repeats(high: Uint64s, low: Uint64s) -> Mask:
    """Which ids of sorted columns occurred before; of equal ones the first did not.

    The columns are sorted stably by `high` alone: ids that share it may come in any order.
    """
    repeats = np.zeros(len(high), dtype=bool)
    if (high[1:] == high[:-1]).any():
        order = np.lexsort((low, high))  # stable, so that the first of equal ids stays the first
        high, low = high[order], low[order]
        repeats[order[1:]] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    return repeats
