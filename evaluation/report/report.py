"""`mrpo report`: references, runs and comparisons on one page, and the same figures as JSON.

    settings of the folders -> sections (tables, charts) -> report.html, report.html.json

The page (`page.html`) is self-contained: no script, no request, every text escaped; its content
policy forbids a browser to load or run anything. A new section is a function from settings to
sections in a file of its own, and one line in `SECTIONS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...data.store import open_store
from ...errors import UserError
from ...files import output_file, read_json, write_json, write_text
from ...method.grammar import aliases_of
from ...settings import build, comma_separated, command, write_resolved
from ...train.config import TrainConfig
from ...train.run_folder import RunFolder
from ..audit.audit import REASONS
from ..compare.cells import aliases_over, methods_of
from ..compare.compare import SETTINGS
from ..config import CompareConfig, ReportConfig
from .charts import Section, Table, legend, to_svg
from .references_section import references_section
from .runs_section import run_sections
from .tasks_section import task_sections

PAGE = "report.html"
TEMPLATE = Path(__file__).with_name("page.html")


@command(ReportConfig)
def report(config: ReportConfig) -> Path:
    """Write the page and the figures; returns the page's path."""
    folders = list(map(Path, comma_separated(config.folders)))
    out = output_file(config.out or (folders[0] if folders else Path()) / PAGE)
    settings = with_defaults(config, folders)
    facts = [("made from", ", ".join(map(str, folders)))] if folders else []
    facts += [
        ("references", ", ".join(comma_separated(settings.refs))),
        ("pairs", str(settings.pairs)),
        ("store", open_store(settings.store).root),
    ]
    sections: list[Section] = []
    for make in SECTIONS:
        try:
            sections += make(settings)
        except UserError as error:
            if make is not references_section or config.refs:
                raise
            facts.append(("left out", f"the references: {error}"))
            print(f"WARNING: the page leaves out the references: {error}")
    title = f"{', '.join(folder.name for folder in folders) or settings.refs}: mrpo report"
    write_text(out, to_html(title, facts, sections))
    figures = Path(f"{out}.json")
    write_json(figures, {"title": title, "facts": facts, "sections": sections})
    write_resolved(config, Path(f"{out}.yaml"))
    print(f"figures    {figures}")
    print(out)
    return out


def to_html(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The page; `facts` are what it was made from, in its head."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE.name).render(
        title=title,
        facts=facts,
        sections=sections,
        legend=legend,
        drawing=lambda chart: Markup(to_svg(chart)),  # an element tree has escaped its texts
    )


def with_defaults(config: ReportConfig, folders: Sequence[Path]) -> ReportConfig:
    """What the user did not give is taken from the first folder."""
    run = _settings(folders[0]) if folders else TrainConfig(output_dir="")
    return dataclasses.replace(
        config,
        refs=config.refs or ",".join(_aliases(run)),
        pairs=config.pairs or run.pairs or "pairs",
        refs_config=config.refs_config or run.refs_config,
        store=config.store or run.store,
    )


def audit_section(config: ReportConfig) -> list[Section]:
    """The figures that `mrpo audit` wrote beside its table; none without --audit."""
    if config.audit is None:
        return []
    path = Path(f"{config.audit}.json")
    shape = {"sources": dict[str, dict[str, int]], "unlikely_below": float}
    try:
        figures: dict[str, Any] = read_json(path, shape, "run `mrpo audit` again")
    except OSError:
        raise UserError(f"--audit {config.audit}: {path} is missing; run `mrpo audit`") from None
    rows = [("source", "pairs", *REASONS)]
    rows += [
        (name, *(f"{count:,}" for count in counts.values()))
        for name, counts in figures["sources"].items()
    ]
    note = f"Counted as against the label: below {figures['unlikely_below']:.0%} by the references."
    table = Table(title="Pairs by source", rows=rows, note=note)
    return [Section(title="Labels to look at", tables=[table])]


# In the order of the page. Each takes the settings with their defaults filled in.
SECTIONS = (run_sections, task_sections, references_section, audit_section)


def _settings(folder: Path) -> TrainConfig:
    """Of a comparison or a run; `UserError` where the folder is neither."""
    comparison, run = folder / SETTINGS, RunFolder(folder).settings
    if comparison.is_file():
        return build(CompareConfig, {}, str(comparison))
    if run.is_file():
        return build(TrainConfig, {}, str(run))
    raise UserError(
        f"{folder}: neither a comparison ({comparison.name}) nor a run ({run.name}); name folders "
        "that `mrpo compare` or `mrpo train` made"
    )


def _aliases(run: TrainConfig) -> list[str]:
    if isinstance(run, CompareConfig):
        return aliases_over(run.refs, methods_of(run.methods))
    return aliases_of(run.refs, run.method)
