"""Sections to one self-contained HTML page: no script, no request, every text escaped.

The template is `report.html` beside this file; its policy for content forbids a browser to load
or run anything.


`mrpo report`: references, runs and comparisons on one page, and the same figures as JSON.

folders, store -> sections (report_compare, report_runs, report_references) -> page.py -> HTML
                                                                           -> JSON
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...data.shards import PairShards
from ...data.store import open_store
from ...errors import UserError
from ...method.grammar import aliases_of
from ...settings import build, write_resolved
from ...train.config import TrainConfig
from ...train.run_folder import read_log
from ..audit.audit import REASONS
from ..compare.cells import methods_of
from ..compare.compare import RESULT, SETTINGS, aliases_over
from ..compare.results import read_comparison
from ..config import CompareConfig, DoctorConfig, ReportConfig
from ..doctor.doctor import diagnose
from ..policies import RESOLVED
from ..results import write_json
from ..score_table import load_score_table
from .charts import Chart, Section, Table, legend, to_svg
from .references_section import references_section
from .runs_section import Log, compare_section, logs_by_method, training_section

TEMPLATE = Path(__file__).with_name("page.html")


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


PAGE = "report.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportInputs:
    """The references that a page is about, and where their scores are."""

    refs: str
    pairs: str
    refs_config: str
    store: str | None


def report(config: ReportConfig) -> Path:
    """Write the page and the figures; returns the page's path."""
    folders = [Path(part.strip()) for part in (config.folders or "").split(",") if part.strip()]
    out = _out(config, folders)
    scores = _scores(config, folders)
    sections, logs = _comparisons(folders)
    if logs:
        sections.append(training_section(logs))
    facts = [("made from", ", ".join(map(str, folders)))] if folders else []
    facts += [
        ("references", ", ".join(scores.refs.split(","))),
        ("pairs", scores.pairs),
        ("store", open_store(scores.store).root),
    ]
    try:
        sections.append(_references(scores))
    except UserError as error:
        if config.refs:
            raise
        facts.append(("left out", f"the references: {error}"))
        print(f"WARNING: the page leaves out the references: {error}")
    if config.audit:
        sections.append(_audit(Path(config.audit)))
    title = f"{', '.join(folder.name for folder in folders) or scores.refs}: mrpo report"
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(to_html(title, facts, sections), encoding="utf-8")
    partial.rename(out)
    write_json(out.with_suffix(".json"), {"title": title, "facts": facts, "sections": sections})
    write_resolved(config, out.with_suffix(".yaml"))
    print(f"figures    {out.with_suffix('.json')}")
    print(out)
    return out


def _comparisons(folders: Sequence[Path]) -> tuple[list[Section], dict[str, list[Log]]]:
    """A section for each comparison, and the logs to draw: of its methods, and of single runs."""
    sections: list[Section] = []
    logs: dict[str, list[Log]] = {}
    for folder in folders:
        if (folder / SETTINGS).is_file():
            comparison = read_comparison(folder / RESULT)
            sections.append(compare_section(comparison))
            for method, runs in logs_by_method(comparison, folder).items():
                logs.setdefault(method, []).extend(runs)
        else:
            logs.setdefault(folder.resolve().name, []).append(read_log(folder))
    return sections, logs


def _references(scores: ReportInputs) -> Section:
    doctor = DoctorConfig(
        refs=scores.refs, pairs=scores.pairs, refs_config=scores.refs_config, store=scores.store
    )
    diagnosis = diagnose(doctor)
    pairs, store = PairShards(scores.pairs), open_store(scores.store)
    records = [store.names_of(one.identity)[0] for one in diagnosis.references]
    return references_section(
        load_score_table(pairs, store, records, sample=doctor.sample), diagnosis
    )


def _audit(table: Path) -> Section:
    """What audit wrote beside its table."""
    path = table.with_suffix(".json")
    try:
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"--audit {table}: {path} is not there or damaged; run `mrpo audit`"
        ) from None
    rows = [("source", "pairs", *REASONS)]
    rows += [
        (name, *(f"{count:,}" for count in counts.values()))
        for name, counts in figures["sources"].items()
    ]
    note = f"Counted as against the label: below {figures['unlikely_below']:.0%} by the references."
    return Section(
        title="Labels to look at", tables=[Table(title="Pairs by source", rows=rows, note=note)]
    )


def _scores(config: ReportConfig, folders: Sequence[Path]) -> ReportInputs:
    """As given, else as the first folder's run had them."""
    first = _settings(folders[0]) if folders else None
    if first is None:
        return ReportInputs(
            refs=config.refs or "",
            pairs=config.pairs or "pairs",
            refs_config=config.refs_config or "configs/refs.yaml",
            store=config.store,
        )
    return ReportInputs(
        refs=config.refs or ",".join(_aliases(first)),
        pairs=config.pairs or first.pairs or "pairs",
        refs_config=config.refs_config or first.refs_config,
        store=config.store or first.store,
    )


def _settings(folder: Path) -> TrainConfig:
    """Of a comparison or a run; `UserError` where the folder is neither."""
    for name, kind in ((SETTINGS, CompareConfig), (RESOLVED, TrainConfig)):
        if (folder / name).is_file():
            return build(kind, {}, str(folder / name))
    raise UserError(
        f"{folder}: neither a comparison ({SETTINGS}) nor a run ({RESOLVED}); name folders that "
        "`mrpo compare` or `mrpo train` made"
    )


def _aliases(settings: TrainConfig) -> list[str]:
    if isinstance(settings, CompareConfig):
        return aliases_over(settings.refs, methods_of(settings.methods))
    return aliases_of(settings.refs, settings.method)


def _out(config: ReportConfig, folders: Sequence[Path]) -> Path:
    out = Path(config.out) if config.out else (folders[0] if folders else Path()) / PAGE
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: {out.parent} is no folder; make it, or name another")
    return out
