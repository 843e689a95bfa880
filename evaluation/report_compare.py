"""The report on a comparison: what follows, the table, gains, learning curves, training curves."""

from __future__ import annotations

from pathlib import Path

from .charts import Chart, Curve, Lines, Range, Ranges, Section, Table
from .compare_results import Comparison, Result
from .compare_table import accuracy_rows
from .report_runs import Log, read_log
from .verdict import percent

ONE, SEVERAL = "one reference", "several references"


def compare_section(comparison: Comparison) -> Section:
    """Everything in compare.json."""
    tables = [
        Table(
            title=f"Accuracy in %, trained on {percent(fraction)} of the pairs",
            rows=[["method", *rows[0][1:]], *rows[1:]],
            note=f"{comparison.pairs:,} held-out pairs of {comparison.prompts:,} prompts, "
            f"{len(comparison.seeds)} seeds, with 95 % intervals over both; rewards measured from "
            f"{comparison.base}. Gains over the best single reference hold together at 95 %.",
        )
        for fraction in reversed(comparison.fractions)
        for rows in [accuracy_rows(comparison, fraction)]
    ]
    charts = [_accuracies(comparison), *_gains(comparison), *_learning(comparison)]
    tables.append(_scoring(comparison))
    return Section(title="Comparison", words=comparison.verdict, tables=tables, charts=charts)


def logs_by_method(comparison: Comparison, root: Path) -> dict[str, list[Log]]:
    """The logs of each method's runs on the largest fraction.

    Folders are found below the comparison's own, wherever it has been moved.
    """
    largest = comparison.fractions[-1]
    logs: dict[str, list[Log]] = {}
    for run in comparison.runs:
        if run.fraction == largest:
            folder = root.joinpath(*Path(run.folder).parts[-4:])
            logs.setdefault(run.method, []).append(read_log(folder))
    return logs


def _final(comparison: Comparison) -> list[Result]:
    """By the deciding yardstick on the largest fraction, the best first."""
    results = [
        result
        for result in comparison.results
        if result.fraction == comparison.fractions[-1] and result.yardstick == comparison.yardstick
    ]
    return sorted(results, key=lambda result: -result.accuracy.value)


def _accuracies(comparison: Comparison) -> Ranges:
    rows = [
        Range(
            name=result.method,
            value=result.accuracy,
            group=ONE if len(comparison.references[result.method]) == 1 else SEVERAL,
        )
        for result in _final(comparison)
    ]
    return Ranges(
        title=f"Held-out accuracy by {_yardstick(comparison)}",
        x_label="share of pairs, with 95 % intervals",
        rows=rows,
        percent=True,
        note="Methods saw the same pairs: whether one beats another is in the gains, not in "
        "whether these intervals overlap.",
    )


def _gains(comparison: Comparison) -> list[Chart]:
    gains = [result for result in _final(comparison) if result.gain is not None]
    rows = [
        Range(name=f"{result.method} over {result.over}", value=result.gain)
        for result in gains
        if result.gain is not None
    ]
    chart = Ranges(
        title="Gain of several references over the best one",
        x_label="share of pairs, with intervals that hold together at 95 %",
        rows=rows,
        percent=True,
        rule=0.0,
        note="An interval right of the line: several references are worth it here.",
    )
    return [chart] if rows else []


def _learning(comparison: Comparison) -> list[Chart]:
    if len(comparison.fractions) < 2:
        return []
    curves = []
    for method in comparison.methods:
        results = {
            result.fraction: result.accuracy
            for result in comparison.results
            if result.method == method and result.yardstick == comparison.yardstick
        }
        values = [results[fraction] for fraction in comparison.fractions]
        curves.append(
            Curve(
                name=method,
                x=comparison.fractions,
                y=[value.value for value in values],
                low=[value.low for value in values],
                high=[value.high for value in values],
            )
        )
    return [
        Lines(
            title="Learning curves over the size of the training data",
            x_label="share of the training pairs",
            y_label="accuracy",
            curves=curves,
            log_x=True,
            percent=True,
            note=f"By {_yardstick(comparison)}, mean of {len(comparison.seeds)} seeds.",
        )
    ]


def _scoring(comparison: Comparison) -> Table:
    heading = ("reference", "pairs", "tokens", "seconds")
    lines = [
        (one.alias, f"{one.pairs:,}", f"{one.tokens:,}", f"{one.seconds:,.0f}")
        for one in comparison.scoring
        if one.seconds == one.seconds
    ]
    return Table(title="Scoring, paid once for all runs", rows=[heading, *lines])


def _yardstick(comparison: Comparison) -> str:
    words = comparison.yardsticks[comparison.yardstick]
    return words.replace("the base", comparison.base)
