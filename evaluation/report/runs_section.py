"""The report on training: curves from `log.jsonl`, one a run or the mean of a method's seeds.

The report on a comparison: what follows, the table, gains, learning curves, training curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...train.run_folder import read_log
from ..compare.results import Comparison, Result, accuracy_rows
from ..compare.verdict import percent
from .charts import Chart, Curve, Lines, Range, Ranges, Section, Table, thinned

POINTS = 60  # of a curve; what a run logged more is averaged
CURVES = {
    "loss": ("Loss", "nats"),
    "rewards/accuracies": ("Training pairs whose chosen response has the higher reward", "share"),
    "rewards/margins": ("Reward margin of training pairs", "reward"),
    "eval_rewards/accuracies": ("The same of held-out pairs", "share"),
}

Log = Sequence[Mapping[str, float | None]]


def training_section(groups: Mapping[str, Sequence[Log]]) -> Section:
    """Curves of named groups of runs; a group's curve is the mean over its runs."""
    charts = []
    for name, (title, unit) in CURVES.items():
        curves = [_curve(label, logs, name) for label, logs in groups.items()]
        chart = Lines(
            title=title,
            x_label="optimizer step",
            y_label=unit,
            curves=[curve for curve in curves if curve.x],
            percent=unit == "share",
            rule=0.5 if unit == "share" else None,
            note="Rewards and losses are each method's own: against its own references.",
        )
        if any(len(curve.x) > 1 for curve in chart.curves):
            charts.append(chart)
    tables = [_weights(groups)]
    return Section(title="Training", tables=tables, charts=charts)


def _curve(label: str, logs: Sequence[Log], name: str) -> Curve:
    """The mean of the runs at each step that any of them logged."""
    values: dict[float, list[float]] = {}
    for log in logs:
        for line in log:
            value = line.get(name)
            if value is not None and math.isfinite(value):
                values.setdefault(float(line["step"] or 0), []).append(value)
    steps = sorted(values)
    x, y = thinned(steps, [sum(values[at]) / len(values[at]) for at in steps], POINTS)
    return Curve(name=label, x=x, y=y)


def _weights(groups: Mapping[str, Sequence[Log]]) -> Table:
    """How much each reference counted in training, and how often it was clipped: means."""
    rows = [("run", "reference", "mean weight", "clipped")]
    for label, logs in groups.items():
        names = dict.fromkeys(
            key.removeprefix("refs/weight/")
            for log in logs
            for line in log
            for key in line
            if key.startswith("refs/weight/")
        )
        for name in names:
            weight = _mean(logs, f"refs/weight/{name}")
            clipped = _mean(logs, f"refs/clipped/{name}")
            shown = "" if math.isnan(clipped) else f"{clipped:.0%}"
            rows.append((label, name, f"{weight:.3f}", shown))
    return Table(title="What each reference counted", rows=rows)


def _mean(logs: Sequence[Log], name: str) -> float:
    values = [value for log in logs for line in log if (value := line.get(name)) is not None]
    return sum(values) / len(values) if values else float("nan")


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
    """By the deciding metric on the largest fraction, the best first."""
    results = [
        result
        for result in comparison.results
        if result.fraction == comparison.fractions[-1] and result.metric == comparison.metric
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
            if result.method == method and result.metric == comparison.metric
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
    return Table(title="ScoringCost, paid once for all runs", rows=[heading, *lines])


def _yardstick(comparison: Comparison) -> str:
    words = comparison.metrics[comparison.metric]
    return words.replace("the base", comparison.base)
