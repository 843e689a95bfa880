"""What a check of `mrpo doctor` is given, and what it returns.

A check is a function of a `Subject` that returns a `Finding` or None; `checks.py` lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..figures import ReferenceFigures
from ..score_table import ReferenceColumns, ScoreTable

FEWEST = 20  # scored pairs below which nothing is judged


@dataclass(frozen=True, slots=True)
class Finding:
    """One observation. With a fault the scores are wrong, with a suspect they may be."""

    level: Literal["fault", "suspect"]
    code: str  # "swapped", "truncated", …: the same for the same fault, whatever showed it
    evidence: str
    cause: str
    shown_by: Literal["scores", "probe"] = "scores"


@dataclass(slots=True)
class Subject:
    """The k-th reference of a table, as a check sees it."""

    table: ScoreTable
    all_figures: Sequence[ReferenceFigures]  # of the table's references
    k: int
    vocabulary: int | None = None  # tokens of its vocabulary, where known
    sound: Sequence[int] = ()  # the other references in which no check by itself found anything
    findings: list[Finding] = field(default_factory=list)  # so far

    @property
    def reference(self) -> ReferenceColumns:
        return self.table.references[self.k]

    @property
    def figures(self) -> ReferenceFigures:
        return self.all_figures[self.k]

    @property
    def others(self) -> list[ReferenceColumns]:
        return [other for j, other in enumerate(self.table.references) if j != self.k]


Check = Callable[[Subject], Finding | None]
