"""Charts as plain data, and their drawing as inline SVG.

    Lines    curves over a common x, with intervals where there are some
    Ranges   values with intervals, one row each: accuracies, gains, weights
    Heatmap  a table of shares as shades: agreement

The page and its JSON hold the same objects; numbers that are not finite are null in JSON and a gap
in the drawing. The SVG is written here and not by matplotlib, whose output would have to be
rewritten for what the page needs: colors from its CSS (light and dark), tooltips, text as text.
Drawings are 400 units wide, so that their text stays readable on a phone; `page.html` styles the
classes `axis`, `grid`, `rule`, `c0` to `c7`. An element tree escapes every text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree as ET

from ..intervals import Interval

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 42
ROW = 36  # height of a row of ranges: its name above its interval
LABELS, HEAD = 90, 30  # of a heatmap: width of the row names, height of the column names
COLORS = 8
MOST_MARKED = 25  # points of a curve that still get a marker each
APART = 4.0  # between curves with intervals, which would cover one another

Scale = Callable[[float], float]


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
class Heatmap:
    """Shares in rows and columns; `floor` is where the shade begins."""

    kind: Literal["grid"] = "grid"
    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    note: str = ""
    floor: float = 0.0


Chart = Lines | Ranges | Heatmap


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
    """A curve as means of neighbors, at most `points` of them, each at its last neighbor's x."""
    size = max(math.ceil(len(x) / points), 1)
    last, means = [], []
    for start in range(0, len(x), size):
        group = slice(start, start + size)
        if known := _known(y[group]):
            last.append(x[group][-1])
            means.append(sum(known) / len(known))
    return last, means


def to_svg(chart: Chart) -> str:
    """The drawing, without its title and legend, which the page sets as text."""
    if isinstance(chart, Lines):
        drawing = _lines(chart)
    elif isinstance(chart, Ranges):
        drawing = _ranges(chart)
    else:
        drawing = _heatmap(chart)
    return ET.tostring(drawing, encoding="unicode")


def legend(chart: Chart) -> list[tuple[str, str]]:
    """(class of the color, name), where colors need names."""
    if isinstance(chart, Heatmap):
        return []
    names = _names(chart)
    return [(_color(chart, name), name) for name in names] if len(names) > 1 else []


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high, about `count` of them.

    >>> ticks(0.0, 1.0), ticks(-3.0, 12.0)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 5.0, 10.0])
    """
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * times for times in (1, 2, 5, 10) if size * times >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(at * step, 12) for at in range(first, last + 1)]


def _lines(chart: Lines) -> ET.Element:
    svg = _svg(chart.title, HEIGHT)
    xs = _known(x for curve in chart.curves for x in curve.x)
    ys = _known(y for c in chart.curves for y in (*c.y, *c.low, *c.high))
    ys += [chart.rule] if chart.rule is not None and ys else []
    if not xs or not ys:
        return _nothing(svg)
    x = _scale(*_wide(xs, chart.log_x, 0.0), LEFT, WIDTH - RIGHT, chart.log_x)
    low, high = _wide(ys, False, 0.05)
    y = _scale(low, high, HEIGHT - BOTTOM, TOP)
    _y_axis(svg, ticks(low, high), y, chart.percent)
    _x_axis(svg, _x_ticks(xs, chart.log_x), x, chart.x_label, HEIGHT - BOTTOM)
    _text(svg, 12, TOP + (HEIGHT - TOP - BOTTOM) / 2, chart.y_label, "label", turn=True)
    if chart.rule is not None:
        _line(svg, LEFT, y(chart.rule), WIDTH - RIGHT, y(chart.rule), "rule")
    if chart.upright is not None:
        _line(svg, x(chart.upright), TOP, x(chart.upright), HEIGHT - BOTTOM, "rule")
    for at, curve in enumerate(chart.curves):
        apart = (at - (len(chart.curves) - 1) / 2) * APART if curve.low else 0.0
        _curve(svg, curve, x, y, _color(chart, curve.name), chart.percent, apart)
    return svg


def _curve(
    svg: ET.Element, curve: Curve, x: Scale, y: Scale, color: str, percent: bool, apart: float
) -> None:
    for at, low, high in zip(curve.x, curve.low, curve.high):
        if math.isfinite(low) and math.isfinite(high):
            _line(svg, x(at) + apart, y(low), x(at) + apart, y(high), f"whisker {color}")
    points = [(at, value) for at, value in zip(curve.x, curve.y) if math.isfinite(value)]
    if len(points) > 1:
        path = "L".join(f"{x(at) + apart:.1f} {y(value):.1f}" for at, value in points)
        ET.SubElement(svg, "path", {"d": f"M{path}", "class": f"curve {color}"})
    for at, value in points if len(points) <= MOST_MARKED else ():
        tip = f"{curve.name}: {_number(value, percent)} at {_number(at)}"
        _dot(svg, x(at) + apart, y(value), color, tip)


def _ranges(chart: Ranges) -> ET.Element:
    height = TOP + ROW * len(chart.rows) + BOTTOM
    svg = _svg(chart.title, height)
    values = _known(
        v for row in chart.rows for v in (row.value.value, row.value.low, row.value.high)
    )
    values += [chart.rule] if chart.rule is not None and values else []
    if not values:
        return _nothing(svg)
    low, high = _wide(values, False, 0.05)
    x = _scale(low, high, RIGHT, WIDTH - RIGHT)
    marks = ticks(low, high)
    for mark in marks:
        _line(svg, x(mark), TOP, x(mark), height - BOTTOM, "grid")
    _x_axis(svg, marks, x, chart.x_label, height - BOTTOM, chart.percent, RIGHT)
    if chart.rule is not None:
        _line(svg, x(chart.rule), TOP, x(chart.rule), height - BOTTOM, "rule")
    for at, row in enumerate(chart.rows):
        top, value = TOP + ROW * at, row.value
        color = _color(chart, row.group)
        _text(svg, RIGHT, top + 13, row.name, "name", anchor="start")
        if not math.isfinite(value.value):
            continue
        if math.isfinite(value.low) and math.isfinite(value.high):
            _line(svg, x(value.low), top + 25, x(value.high), top + 25, f"interval {color}")
        low_high = ", ".join(_number(v, chart.percent) for v in (value.low, value.high))
        tip = f"{row.name}: {_number(value.value, chart.percent)} ({low_high})"
        _dot(svg, x(value.value), top + 25, color, tip, radius=4.5)
    return svg


def _heatmap(chart: Heatmap) -> ET.Element:
    width = min((WIDTH - LABELS) / max(len(chart.columns), 1), 64.0)
    height = width * 0.62
    svg = _svg(chart.title, HEAD + height * len(chart.rows) + 6)
    for column, name in enumerate(chart.columns):
        _text(svg, LABELS + width * (column + 0.5), 20, _short(name, width), "tick", tip=name)
    for row, name in enumerate(chart.rows):
        top = HEAD + height * row
        baseline = top + height / 2 + 4
        _text(svg, LABELS - 6, baseline, _short(name, 84), "name", anchor="end", tip=name)
        for column, value in enumerate(chart.values[row]):
            if not math.isfinite(value):
                continue
            shade = min(max((value - chart.floor) / (1 - chart.floor), 0.0), 1.0)
            left = LABELS + width * column
            cell = {"x": left + 1, "y": top + 1, "width": width - 2, "height": height - 2}
            look = {"rx": "3", "class": "cell", "fill-opacity": f"{0.08 + 0.52 * shade:.3f}"}
            ET.SubElement(svg, "rect", _units(cell) | look)
            tip = f"{name}, {chart.columns[column]}: {_number(value, True)}"
            _text(svg, left + width / 2, baseline, f"{100 * value:.0f}", "value", tip=tip)
    return svg


# Parts of a drawing


def _svg(title: str, height: float) -> ET.Element:
    view = f"0 0 {WIDTH} {height:.0f}"
    return ET.Element("svg", {"viewBox": view, "role": "img", "aria-label": title})


def _nothing(svg: ET.Element) -> ET.Element:
    _text(svg, WIDTH / 2, 40, "nothing to show", "label")
    return svg


def _line(svg: ET.Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
    ends = _units({"x1": x1, "y1": y1, "x2": x2, "y2": y2})
    ET.SubElement(svg, "line", ends | {"class": kind})


def _dot(svg: ET.Element, x: float, y: float, color: str, tip: str, radius: float = 3.0) -> None:
    look = {"r": f"{radius}", "class": f"dot {color}"}
    circle = ET.SubElement(svg, "circle", _units({"cx": x, "cy": y}) | look)
    ET.SubElement(circle, "title").text = tip


def _text(
    svg: ET.Element,
    x: float,
    y: float,
    text: str,
    kind: str,
    anchor: str = "middle",
    turn: bool = False,
    tip: str = "",
) -> None:
    look = {"class": kind, "text-anchor": anchor}
    if turn:
        look["transform"] = f"rotate(-90 {x:.1f} {y:.1f})"
    element = ET.SubElement(svg, "text", _units({"x": x, "y": y}) | look)
    element.text = text
    if tip:
        ET.SubElement(element, "title").text = tip


def _units(values: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.1f}" for name, value in values.items()}


def _y_axis(svg: ET.Element, marks: Sequence[float], y: Scale, percent: bool) -> None:
    for mark in marks:
        _line(svg, LEFT, y(mark), WIDTH - RIGHT, y(mark), "grid")
        _text(svg, LEFT - 6, y(mark) + 4, _number(mark, percent), "tick", anchor="end")


def _x_axis(
    svg: ET.Element,
    marks: Sequence[float],
    x: Scale,
    label: str,
    bottom: float,
    percent: bool = False,
    start: float = LEFT,
) -> None:
    _line(svg, start, bottom, WIDTH - RIGHT, bottom, "axis")
    for mark in marks:
        _line(svg, x(mark), bottom, x(mark), bottom + 4, "axis")
        anchor = "end" if x(mark) > WIDTH - RIGHT - 10 else "middle"
        _text(svg, min(x(mark), WIDTH - 2), bottom + 17, _number(mark, percent), "tick", anchor)
    _text(svg, WIDTH / 2, bottom + 34, label, "label")


def _x_ticks(xs: Sequence[float], log: bool) -> list[float]:
    distinct = sorted(set(xs))
    if log and len(distinct) <= 6:
        return distinct
    if log:
        powers = range(math.floor(math.log10(distinct[0])), math.ceil(math.log10(distinct[-1])) + 1)
        return [10.0**power for power in powers if distinct[0] <= 10.0**power <= distinct[-1]]
    return ticks(distinct[0], distinct[-1]) if len(distinct) > 1 else distinct


def _scale(low: float, high: float, start: float, end: float, log: bool = False) -> Scale:
    to = math.log if log else float
    first, last = to(low), to(high)
    return lambda value: start + (to(value) - first) / (last - first) * (end - start)


def _wide(values: Sequence[float], log: bool, margin: float) -> tuple[float, float]:
    """The range of the values with some room; never of no width."""
    low, high = min(values), max(values)
    if log:
        room = (high / low) ** 0.04 if high > low else 1.1
        return low / room, high * room
    room = (high - low) * margin or (abs(high) * 0.1 or 1.0) * (low == high)
    return low - room, high + room


def _known(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _number(value: float, percent: bool = False) -> str:
    if not math.isfinite(value):
        return "unknown"
    return (f"{100 * value:.4g}%" if percent else f"{value:.4g}").replace("-", "−")


def _short(text: str, width: float) -> str:
    most = max(int(width / 6.5), 3)
    return text if len(text) <= most else text[: most - 1] + "…"


def _names(chart: Lines | Ranges) -> list[str]:
    """What colors distinguish, without repeats."""
    if isinstance(chart, Lines):
        return [curve.name for curve in chart.curves]
    return list(dict.fromkeys(row.group for row in chart.rows))


def _color(chart: Lines | Ranges, name: str) -> str:
    order = list(dict.fromkeys([*chart.palette, *_names(chart)]))
    return f"c{order.index(name) % COLORS}"
