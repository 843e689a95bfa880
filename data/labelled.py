"""Labelled responses (KTO) to pairs: each waits until one of the other label has its prompt.

`layouts.py` reads the rows; they wait in a temporary file, so that rows of one prompt may stand
anywhere in their source.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from typing import Any

from .fields import Row
from .formats import Broken
from .ids import digest_of
from .pairs import canonical_json


class Waiting:
    """Labelled responses that wait for one of the other label, in a temporary file.

    The n-th good response to a prompt meets its n-th bad one.
    """

    def __init__(self) -> None:
        self._base = sqlite3.connect("", isolation_level=None)  # on disk, gone when closed
        self._base.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN;"
            "CREATE TABLE waiting (prompt TEXT, good INTEGER, row INTEGER, response TEXT);"
            "CREATE INDEX by_prompt ON waiting (prompt, good, row)"
        )

    def meet(self, number: int, values: Row, good: bool, response: Any) -> list[Any] | None:
        """The response that waited longest for this one, and its split; None where none does."""
        apart = ("source", "group", "split")
        about = {name: value for name, value in values.items() if name not in apart}
        try:
            prompt = digest_of(canonical_json(about).encode(errors="surrogatepass"))
            text = json.dumps([response, values.get("split")])
        except (TypeError, ValueError, RecursionError):
            raise Broken("completion", "or its prompt holds a value that JSON cannot") from None
        waiting = self._base.execute(
            "SELECT rowid, response FROM waiting WHERE prompt = ? AND good = ? "
            "ORDER BY row LIMIT 1",
            (prompt, not good),
        ).fetchone()
        if waiting is None:
            self._base.execute(
                "INSERT INTO waiting VALUES (?, ?, ?, ?)", (prompt, good, number, text)
            )
            return None
        self._base.execute("DELETE FROM waiting WHERE rowid = ?", waiting[:1])
        return json.loads(waiting[1])

    def rest(self) -> Iterator[int]:
        """The numbers of the rows that still wait."""
        for (number,) in self._base.execute("SELECT row FROM waiting ORDER BY row"):
            yield number
