"""The report's sections on runs: what a comparison concludes, and curves of training.

Curves come from `log.jsonl`: of each single run, and of each method of a comparison the mean over
its seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from itertools import chain
from pathlib import Path
from statistics import fmean

from ...settings import comma_separated
from ...train.run_folder import read_log
from ..compare.compare import RESULT, SETTINGS
from ..compare.results import Comparison, Result, accuracy_rows, percent, read_comparison
from ..config import ReportConfig
from .charts import Chart, Curve, Lines, Range, Ranges, Section, Table

POINTS = 60  # of a curve; longer logs are averaged down to these
CURVES = {
    "loss": ("Loss", "nats"),
    "rewards/accuracies": ("Training pairs whose chosen response has the higher reward", "share"),
    "rewards/margins": ("Reward margin of training pairs", "reward"),
    "eval_rewards/accuracies": (
        "Held-out pairs whose chosen response has the higher reward",
        "share",
    ),
}
WEIGHT, CLIPPED = "refs/weight/", "refs/clipped/"  # of a log's keys; an alias follows

Log = Sequence[Mapping[str, float | None]]


def run_sections(config: ReportConfig) -> list[Section]:
    """What each comparison concludes, and curves of all runs; none where there is no run.

    Of a comparison, runs on the largest fraction have curves. Their folders are looked up below
    the comparison's own, wherever it has been moved.
    """
    sections: list[Section] = []
    logs: dict[str, list[Log]] = {}
    for folder in map(Path, comma_separated(config.folders)):
        if not (folder / SETTINGS).is_file():
            logs.setdefault(folder.resolve().name, []).append(read_log(folder))
            continue
        comparison = read_comparison(folder / RESULT)
        sections.append(_comparison(comparison))
        for run in comparison.runs:
            if run.fraction == comparison.fractions[-1]:
                found = folder.joinpath(*Path(run.folder).parts[-4:])
                logs.setdefault(run.method, []).append(read_log(found))
    if logs:
        charts = [_training_chart(logs, name, *words) for name, words in CURVES.items()]
        known = [chart for chart in charts if any(len(curve.x) > 1 for curve in chart.curves)]
        sections.append(Section(title="Training", tables=[_weights(logs)], charts=known))
    return sections


# Training


def _training_chart(logs: Mapping[str, Sequence[Log]], name: str, title: str, unit: str) -> Lines:
    """A logged value over the steps, a curve for each group of runs that logged it."""
    curves = [_curve(label, runs, name) for label, runs in logs.items()]
    return Lines(
        title=title,
        x_label="optimizer step",
        y_label=unit,
        curves=[curve for curve in curves if curve.x],
        percent=unit == "share",
        rule=0.5 if unit == "share" else None,
        note="Rewards and losses are each method's own, relative to its own references.",
    )


def _curve(label: str, logs: Sequence[Log], name: str) -> Curve:
    """The mean of the runs at each step that any of them logged, thinned."""
    values: dict[float, list[float]] = {}
    for line in chain.from_iterable(logs):
        value = line.get(name)
        if value is not None and math.isfinite(value):
            values.setdefault(float(line["step"] or 0), []).append(value)
    steps = sorted(values)
    x, y = thinned(steps, [fmean(values[step]) for step in steps], POINTS)
    return Curve(name=label, x=x, y=y)


def thinned(x: Sequence[float], y: Sequence[float], points: int) -> tuple[list[float], list[float]]:
    """A curve as means of neighbors, at most `points` of them, each at its last neighbor's x."""
    size = max(math.ceil(len(x) / points), 1)
    groups = [slice(start, start + size) for start in range(0, len(x), size)]
    return [x[group][-1] for group in groups], [sum(y[group]) / len(y[group]) for group in groups]


def _weights(logs: Mapping[str, Sequence[Log]]) -> Table:
    """Each reference's weight in training, and how often it was clipped: means."""
    rows = [("run", "reference", "mean weight", "clipped")]
    for label, runs in logs.items():
        lines = list(chain.from_iterable(runs))
        keys = dict.fromkeys(key for line in lines for key in line if key.startswith(WEIGHT))
        for name in (key.removeprefix(WEIGHT) for key in keys):
            clipped = _mean(lines, CLIPPED + name)
            shown = "" if math.isnan(clipped) else f"{clipped:.0%}"
            rows.append((label, name, f"{_mean(lines, WEIGHT + name):.3f}", shown))
    return Table(title="Weight of each reference", rows=rows)


def _mean(lines: Log, name: str) -> float:
    values = [value for line in lines if (value := line.get(name)) is not None]
    return fmean(values) if values else float("nan")


# Comparison


def _comparison(comparison: Comparison) -> Section:
    tables = [
        Table(
            title=f"Accuracy in %, trained on {percent(fraction)} of the pairs",
            rows=[["method", *heading[1:]], *rows],
            note=f"{comparison.pairs:,} held-out pairs of {comparison.prompts:,} prompts, "
            f"{len(comparison.seeds)} seeds, with 95 % intervals over both; rewards measured from "
            f"{comparison.base}. Gains over the best single reference hold together at 95 %.",
        )
        for fraction in reversed(comparison.fractions)
        for heading, *rows in [accuracy_rows(comparison, fraction)]
    ]
    costs = [
        (cost.alias, f"{cost.pairs:,}", f"{cost.tokens:,}", f"{cost.seconds:,.0f}")
        for cost in comparison.scoring
        if not math.isnan(cost.seconds)
    ]
    heading = ("reference", "pairs", "tokens", "seconds")
    tables.append(Table(title="Scoring, paid once for all runs", rows=[heading, *costs]))
    charts: list[Chart] = [_accuracies(comparison), *_gains(comparison), *_learning(comparison)]
    return Section(title="Comparison", words=comparison.verdict, tables=tables, charts=charts)


def _final(comparison: Comparison) -> list[Result]:
    """By the deciding metric on the largest fraction, the best first."""
    results = [
        result
        for result in comparison.results
        if result.fraction == comparison.fractions[-1] and result.metric == comparison.metric
    ]
    return sorted(results, key=lambda result: -result.accuracy.value)


def _accuracies(comparison: Comparison) -> Ranges:
    groups = {
        method: "one reference" if len(references) == 1 else "several references"
        for method, references in comparison.references.items()
    }
    return Ranges(
        title=f"Held-out accuracy by {_metric(comparison)}",
        x_label="share of pairs, with 95 % intervals",
        rows=[
            Range(name=result.method, value=result.accuracy, group=groups[result.method])
            for result in _final(comparison)
        ],
        percent=True,
        note="Methods saw the same pairs: whether one beats another is in the gains, not in "
        "whether these intervals overlap.",
    )


def _gains(comparison: Comparison) -> list[Ranges]:
    chart = Ranges(
        title="Gain of several references over the best one",
        x_label="share of pairs, with intervals that hold together at 95 %",
        rows=[
            Range(name=f"{result.method} over {result.over}", value=result.gain)
            for result in _final(comparison)
            if result.gain is not None
        ],
        percent=True,
        rule=0.0,
        note="An interval right of the line: several references are worth it here.",
    )
    return [chart] if chart.rows else []


def _learning(comparison: Comparison) -> list[Lines]:
    if len(comparison.fractions) < 2:
        return []
    accuracy = {
        (result.method, result.fraction): astuple(result.accuracy)
        for result in comparison.results
        if result.metric == comparison.metric
    }
    curves = []
    for method in comparison.methods:
        y, low, high = zip(*(accuracy[method, fraction] for fraction in comparison.fractions))
        curves.append(Curve(name=method, x=comparison.fractions, y=y, low=low, high=high))
    return [
        Lines(
            title="Learning curves over the size of the training data",
            x_label="share of the training pairs",
            y_label="accuracy",
            curves=curves,
            log_x=True,
            percent=True,
            note=f"By {_metric(comparison)}, mean of {len(comparison.seeds)} seeds.",
        )
    ]


def _metric(comparison: Comparison) -> str:
    return comparison.metrics[comparison.metric].replace("the base", comparison.base)
