"""Sections to one self-contained HTML page: no script, no request, every text escaped.

The template is `report.html` beside this file; its policy for content forbids a browser to load
or run anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .charts import Chart, Section
from .svg import legend, to_svg

TEMPLATE = Path(__file__).with_name("report.html")


def to_html(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The page; `facts` are what it was made from, in its head."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template(TEMPLATE.name)
    return template.render(
        title=title, facts=facts, sections=sections, legend=legend, drawing=_drawing
    )


def _drawing(chart: Chart) -> Markup:
    return Markup(to_svg(chart))  # an element tree has escaped its texts
