"""A reviewer's decisions about single pairs: which to exclude, which to flip.

`mrpo audit` writes a table of pairs with an empty `decision` column; a reviewer fills in keep,
exclude or flip, and `mrpo prepare --exclude audit.csv --flip audit.csv` reads it back. Any table of
pair ids works: in one without that column, all rows are meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..errors import UserError
from .pairs import ID_BYTES, Pair, parse_id
from .sources import SourceColumns, open_sources

ID, DECISION = "pair_id", "decision"
DECISIONS = ("keep", "exclude", "flip")

COLUMNS = SourceColumns(
    [ID], [DECISION], f"a reviewed table has {ID!r}, and {DECISION!r} where not all rows are meant"
)


class Review:
    """Decisions by pair id, and which of these pairs were in the data so far."""

    def __init__(self, exclude: str | None, flip: str | None) -> None:
        """Comma-separated files or None. Raises `UserError` for an invalid or contradicting row."""
        self._decided: dict[bytes, tuple[str, str]] = {}  # exclude or flip; the file
        self._in_data: set[bytes] = set()
        for pair_id, _, file in _read("exclude", exclude):
            self._decided.setdefault(pair_id, ("exclude", file))
        for pair_id, place, file in _read("flip", flip):
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


def _read(decision: str, files: str | None) -> Iterator[tuple[bytes, str, str]]:
    """(pair id, place for messages, file) of every row that asks for the decision."""
    for source in open_sources(files) if files else ():
        for number, row in source.rows(COLUMNS):
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
