"""Charts as plain data, and their drawing as inline SVG.

    Lines    curves over a common x, with intervals where there are some
    Ranges   values with intervals, one row each: accuracies, gains, weights
    Heatmap  a table of shares as shades: agreement

The page and its JSON hold the same objects; numbers that are not finite are null in JSON and a gap
in the drawing. The SVG is written here and not by matplotlib, whose output would have to be
rewritten for what the page needs: colors from its CSS (light and dark), tooltips, text as text.
Drawings are 400 units wide, so that their text stays readable on a phone; `page.html` styles the
classes `axis`, `grid`, `rule`, `c0` to `c7`, `dashed`. An element tree escapes every text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal
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
    colors = {} if isinstance(chart, Heatmap) else _colors(chart)
    return [(color, name) for name, color in colors.items()] if len(colors) > 1 else []


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
    if not xs or not ys:
        return _nothing(svg)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    levels = [] if chart.rule is None else [chart.rule]
    low, high = _wide(ys + levels, 0.05)
    room = 0.06 if any(curve.low for curve in chart.curves) else 0.0  # intervals stand side by side
    x = _scale(*_wide(xs, room, chart.log_x), LEFT, right, chart.log_x)
    y = _scale(low, high, bottom, TOP)
    for mark in ticks(low, high):
        _line(svg, "grid", LEFT, y(mark), right, y(mark))
        _text(svg, "tick", LEFT - 6, y(mark) + 4, _number(mark, chart.percent), "end")
    _x_axis(svg, chart, _x_ticks(xs, chart.log_x), x, bottom)
    middle = (TOP + bottom) / 2
    _text(svg, "label", 12, middle, chart.y_label, transform=f"rotate(-90 12.0 {middle:.1f})")
    for level in levels:
        _line(svg, "rule", LEFT, y(level), right, y(level))
    colors = _colors(chart)
    for at, curve in enumerate(chart.curves):
        color = colors[curve.name]
        apart = (at - (len(chart.curves) - 1) / 2) * APART if curve.low else 0.0
        for place, *ends in zip(curve.x, curve.low, curve.high):
            if all(map(math.isfinite, ends)):
                left = x(place) + apart
                _line(svg, f"whisker {color}", left, y(ends[0]), left, y(ends[1]))
        points = [point for point in zip(curve.x, curve.y) if math.isfinite(point[1])]
        if len(points) > 1:
            path = "L".join(f"{x(place) + apart:.1f} {y(value):.1f}" for place, value in points)
            _add(svg, "path", f"curve {color}", d=f"M{path}")
        for place, value in points if len(points) <= MOST_MARKED else ():
            tip = f"{curve.name}: {_number(value, chart.percent)} at {_number(place)}"
            _add(svg, "circle", f"dot {color}", tip, cx=x(place) + apart, cy=y(value), r=3)
    return svg


def _ranges(chart: Ranges) -> ET.Element:
    bottom = TOP + ROW * len(chart.rows)
    svg = _svg(chart.title, bottom + BOTTOM)
    values = _known(v for row in chart.rows for v in astuple(row.value))
    if not values:
        return _nothing(svg)
    low, high = _wide(values if chart.rule is None else [*values, chart.rule], 0.05)
    x = _scale(low, high, RIGHT, WIDTH - RIGHT)
    _x_axis(svg, chart, ticks(low, high), x, bottom)
    colors = _colors(chart)
    for at, row in enumerate(chart.rows):
        top, value, color = TOP + ROW * at, row.value, colors[row.group]
        _text(svg, "name", RIGHT, top + 13, row.name, "start")
        if not math.isfinite(value.value):
            continue
        if math.isfinite(value.low) and math.isfinite(value.high):
            _line(svg, f"interval {color}", x(value.low), top + 25, x(value.high), top + 25)
        shown, least, most = (_number(v, chart.percent) for v in astuple(value))
        tip = f"{row.name}: {shown} ({least}, {most})"
        _add(svg, "circle", f"dot {color}", tip, cx=x(value.value), cy=top + 25, r=4.5)
    return svg


def _heatmap(chart: Heatmap) -> ET.Element:
    width = min((WIDTH - LABELS) / max(len(chart.columns), 1), 64.0)
    height = width * 0.62
    svg = _svg(chart.title, HEAD + height * len(chart.rows) + 6)
    for column, name in enumerate(chart.columns):
        _text(svg, "tick", LABELS + width * (column + 0.5), 20, _short(name, width), tip=name)
    for row, name in enumerate(chart.rows):
        top = HEAD + height * row
        baseline = top + height / 2 + 4
        _text(svg, "name", LABELS - 6, baseline, _short(name, 84), "end", tip=name)
        for column, value in enumerate(chart.values[row]):
            if not math.isfinite(value):
                continue
            shade = min(max((value - chart.floor) / (1 - chart.floor), 0.0), 1.0)
            left = LABELS + width * column
            size: dict[str, Any] = {"width": width - 2, "height": height - 2, "rx": "3"}
            size["fill_opacity"] = f"{0.08 + 0.52 * shade:.3f}"
            _add(svg, "rect", "cell", x=left + 1, y=top + 1, **size)
            tip = f"{name}, {chart.columns[column]}: {_number(value, True)}"
            _text(svg, "value", left + width / 2, baseline, f"{100 * value:.0f}", tip=tip)
    return svg


# Parts of a drawing


def _svg(title: str, height: float) -> ET.Element:
    view = f"0 0 {WIDTH} {height:.0f}"
    return ET.Element("svg", {"viewBox": view, "role": "img", "aria-label": title})


def _nothing(svg: ET.Element) -> ET.Element:
    _text(svg, "label", WIDTH / 2, 40, "nothing to show")
    return svg


def _add(
    svg: ET.Element, tag: str, kind: str, tip: str = "", text: str = "", **look: float | str
) -> None:
    """A shape of a CSS class, with a tooltip; places in tenths of a unit."""
    attributes = {
        name.replace("_", "-"): value if isinstance(value, str) else f"{value:.1f}"
        for name, value in look.items()
    }
    shape = ET.SubElement(svg, tag, attributes | {"class": kind})
    shape.text = text
    if tip:
        ET.SubElement(shape, "title").text = tip


def _line(svg: ET.Element, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
    _add(svg, "line", kind, x1=x1, y1=y1, x2=x2, y2=y2)


def _text(
    svg: ET.Element, kind: str, x: float, y: float, text: str, anchor: str = "middle", **more: str
) -> None:
    _add(svg, "text", kind, text=text, x=x, y=y, text_anchor=anchor, **more)


def _x_axis(
    svg: ET.Element, chart: Lines | Ranges, marks: Sequence[float], x: Scale, bottom: float
) -> None:
    """With the marks and what stands upright on it: the rule, of ranges also the grid."""
    lines = isinstance(chart, Lines)
    rule = chart.upright if isinstance(chart, Lines) else chart.rule
    for mark in () if lines else marks:
        _line(svg, "grid", x(mark), TOP, x(mark), bottom)
    if rule is not None:
        _line(svg, "rule", x(rule), TOP, x(rule), bottom)
    _line(svg, "axis", LEFT if lines else RIGHT, bottom, WIDTH - RIGHT, bottom)
    for mark in marks:
        _line(svg, "axis", x(mark), bottom, x(mark), bottom + 4)
        anchor = "end" if x(mark) > WIDTH - RIGHT - 10 else "middle"
        shown = _number(mark, chart.percent and not lines)
        _text(svg, "tick", min(x(mark), WIDTH - 2), bottom + 17, shown, anchor)
    _text(svg, "label", WIDTH / 2, bottom + 34, chart.x_label)


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


def _wide(values: Sequence[float], margin: float, log: bool = False) -> tuple[float, float]:
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


def _colors(chart: Lines | Ranges) -> dict[str, str]:
    """The class of each name's color, where colors distinguish curves or groups of rows.

    Where there are more names than colors, those after the last color are dashed.
    """
    if isinstance(chart, Lines):
        names = [curve.name for curve in chart.curves]
    else:
        names = [row.group for row in chart.rows]
    order = list(dict.fromkeys([*chart.palette, *names]))
    dashed = {name: " dashed" if order.index(name) >= COLORS else "" for name in names}
    return {name: f"c{order.index(name) % COLORS}{dashed[name]}" for name in names}
