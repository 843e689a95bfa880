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
from ..compare.results import (
    CALIBRATION,
    PARTS,
    Comparison,
    Condition,
    Result,
    accuracy_rows,
    calibration_rows,
    noise_rows,
    part_rows,
    percent,
    read_comparison,
)
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

    Of a comparison, runs on the largest fraction at least noise have curves. Their folders are
    looked up below the comparison's own, wherever it has been moved.
    """
    sections: list[Section] = []
    logs: dict[str, list[Log]] = {}
    for folder in map(Path, comma_separated(config.folders)):
        if not (folder / SETTINGS).is_file():
            logs.setdefault(folder.resolve().name, []).append(read_log(folder))
            continue
        comparison = read_comparison(folder / RESULT)
        sections.append(_comparison(comparison))
        for run in comparison.runs:  # soups and merges have no log, their parts may have
            if not run.parts and (run.fraction, run.label_noise) == comparison.conditions[-1]:
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
            title=f"Accuracy in %, trained on {condition}",
            rows=[["method", *heading[1:]], *rows],
            note=f"{comparison.pairs:,} held-out pairs of {comparison.prompts:,} prompts, "
            f"{len(comparison.seeds)} seeds, with 95 % intervals over both; rewards measured from "
            f"{comparison.base}. Gains over the best single reference hold together at 95 %.",
        )
        for condition in reversed(comparison.conditions)
        for heading, *rows in [accuracy_rows(comparison, condition)]
    ]
    tables += [
        Table(
            title=f"Accuracy in % against label noise, trained on {Condition(fraction)}",
            rows=[["method", *heading[1:]], *rows],
            note=f"By {_metric(comparison)}. Columns: the share of training labels turned round; "
            "gains are over the best single reference at the same noise.",
        )
        for fraction in reversed(comparison.fractions if _noisy(comparison) else [])
        for heading, *rows in [noise_rows(comparison, fraction)]
    ]
    if comparison.calibration:
        head, *calibrated = calibration_rows(comparison)
        words = CALIBRATION.replace("BASE", comparison.base)
        tables.append(
            Table(
                title="Each method's own reward, and the reward as a preference model, trained on "
                f"{comparison.conditions[-1]}",
                rows=[["method", *head[1:]], *calibrated],
                note=f"{words[0].upper()}{words[1:]}. Knowing nothing is 0.693 and 0.25.",
            )
        )
    if parts := part_rows(comparison):
        tables.append(
            Table(
                title=f"Means of weights, trained on {comparison.conditions[-1]}",
                rows=[["mean", *parts[0][1:]], *parts[1:]],
                note=f"{PARTS[0].upper()}{PARTS[1:]}. Means over seeds.",
            )
        )
    costs = [
        (cost.alias, f"{cost.responses:,}", f"{cost.tokens:,}", f"{cost.seconds:,.0f}")
        for cost in comparison.scoring
        if not math.isnan(cost.seconds)
    ]
    heading = ("reference", "responses", "tokens", "seconds")
    tables.append(Table(title="Scoring, paid once for all runs", rows=[heading, *costs]))
    charts: list[Chart] = [_accuracies(comparison), *_gains(comparison)]
    charts += [*_noise(comparison), *_noise_gains(comparison), *_learning(comparison)]
    charts += _reliability(comparison)
    return Section(title="Comparison", words=comparison.verdict, tables=tables, charts=charts)


def _final(comparison: Comparison) -> list[Result]:
    """By the deciding metric on the largest fraction at least noise, the best first."""
    return list(comparison.results_at(comparison.conditions[-1], comparison.metric).values())


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


def _noisy(comparison: Comparison) -> bool:
    return len(comparison.label_noises) > 1


def _noise(comparison: Comparison) -> list[Lines]:
    """Accuracy against label noise, a chart for each fraction, the largest first."""
    noises = comparison.label_noises
    return [
        Lines(
            title=f"Accuracy against label noise, trained on {Condition(fraction)}",
            x_label="share of the training labels turned round",
            y_label="accuracy",
            curves=_curves(comparison, noises, [Condition(fraction, noise) for noise in noises]),
            percent=True,
            note=f"{_by(comparison)} Held-out labels are as they are.",
        )
        for fraction in reversed(comparison.fractions if _noisy(comparison) else [])
    ]


def _noise_gains(comparison: Comparison) -> list[Lines]:
    """The gain over the best single reference against label noise, on the largest fraction."""
    noises, fraction = comparison.label_noises, comparison.fractions[-1]
    results = [comparison.results_at(Condition(fraction, n), comparison.metric) for n in noises]
    curves = []
    for method in comparison.methods:
        gains = [(n, at[method].gain) for n, at in zip(noises, results) if at[method].gain]
        if gains:
            y, low, high = zip(*(astuple(gain) for _, gain in gains if gain))
            x = [noise for noise, _ in gains]
            curves.append(Curve(name=method, x=x, y=y, low=low, high=high))
    chart = Lines(
        title="Gain of several references over the best one against label noise, trained on "
        f"{Condition(fraction)}",
        x_label="share of the training labels turned round",
        y_label="share of pairs",
        curves=curves,
        percent=True,
        rule=0.0,
        note="Above the line: several references are worth it at this noise. The best single "
        "reference may be another at each level; intervals of a level hold together at 95 %.",
        palette=comparison.methods,
    )
    return [chart] if curves and _noisy(comparison) else []


def _learning(comparison: Comparison) -> list[Lines]:
    """Accuracy against the size of the data, a chart for each noise level, the least first."""
    fractions = comparison.fractions
    return [
        Lines(
            title="Learning curves over the size of the training data"
            + (f", {percent(noise)} of the labels turned round" if _noisy(comparison) else ""),
            x_label="share of the training pairs",
            y_label="accuracy",
            curves=_curves(comparison, fractions, [Condition(f, noise) for f in fractions]),
            log_x=True,
            percent=True,
            note=_by(comparison),
        )
        for noise in (comparison.label_noises if len(fractions) > 1 else [])
    ]


def _reliability(comparison: Comparison) -> list[Lines]:
    """How often the reward is right where it is this sure, at the last condition."""
    entries = comparison.calibration_at(comparison.conditions[-1])
    curves = [Curve(name=e.method, x=e.confidence, y=e.accuracy) for e in entries]
    chart = Lines(
        title="How right the reward is where it is this sure, trained on "
        f"{comparison.conditions[-1]}",
        x_label="probability that the reward gives the response it prefers",
        y_label="share right",
        curves=[*curves, Curve(name="as right as sure", x=[0.5, 1.0], y=[0.5, 1.0])],
        percent=True,
        note=f"Reward from {comparison.base}, times beta, as a preference model. Below the "
        "straight line it is surer than it is right.",
        palette=comparison.methods,
    )
    return [chart] if curves else []


def _curves(
    comparison: Comparison, x: Sequence[float], conditions: Sequence[Condition]
) -> list[Curve]:
    """The accuracy of each method over x, by the deciding metric, with intervals."""
    results = [comparison.results_at(condition, comparison.metric) for condition in conditions]
    curves = []
    for method in comparison.methods:
        y, low, high = zip(*(astuple(at[method].accuracy) for at in results))
        curves.append(Curve(name=method, x=x, y=y, low=low, high=high))
    return curves


def _by(comparison: Comparison) -> str:
    return f"By {_metric(comparison)}, mean of {len(comparison.seeds)} seeds."


def _metric(comparison: Comparison) -> str:
    return comparison.metrics[comparison.metric].replace("the base", comparison.base)
