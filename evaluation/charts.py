"""Charts as plain data: what the report draws (`svg.py`) and writes as JSON is the same object.

    Lines    curves over a common x, with a band of uncertainty where there is one
    Ranges   values with intervals, one row each: accuracies, gains, weights
    Grid     a table of shares as shades: agreement

Numbers that are not finite become null in JSON (`results.py`) and leave a gap in the drawing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .intervals import Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One line; `low` and `high` as long as `y`, or empty."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Lines:
    kind: Literal["lines"] = "lines"
    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    note: str = ""  # what to see in it, below the chart
    log_x: bool = False
    percent: bool = False  # y is a share
    rule: float | None = None  # a level to compare with, as chance
    upright: float | None = None  # the same on x
    palette: Sequence[str] = ()  # names whose order gives the colors; by default the curves'


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """One row: a value of a group's member."""

    name: str
    value: Interval
    group: str = ""  # rows of a group have one color


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranges:
    kind: Literal["ranges"] = "ranges"
    title: str
    x_label: str
    rows: Sequence[Range]
    note: str = ""
    percent: bool = False
    rule: float | None = None
    palette: Sequence[str] = ()  # of the groups, as in `Lines`


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Shares in rows and columns; `floor` is where the shade begins."""

    kind: Literal["grid"] = "grid"
    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    note: str = ""
    floor: float = 0.0


Chart = Lines | Ranges | Grid


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Cells as they are shown; the first row is the heading."""

    title: str
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the report: words, tables, charts."""

    title: str
    words: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()


def thinned(x: Sequence[float], y: Sequence[float], points: int) -> tuple[list[float], list[float]]:
    """A curve as means of neighbors, at most so many; x as the neighbors' last."""
    size = max(math.ceil(len(x) / points), 1)
    groups = [range(start, min(start + size, len(x))) for start in range(0, len(x), size)]
    means = [[y[at] for at in group if math.isfinite(y[at])] for group in groups]
    kept = [(x[group[-1]], sum(v) / len(v)) for group, v in zip(groups, means) if v]
    return [one for one, _ in kept], [other for _, other in kept]
