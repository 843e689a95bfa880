"""What compare.json holds: written, read again, and printed as tables and sentences."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ...errors import UserError
from ...files import fits
from ...terminal import table_lines
from ..config import Metric
from ..evaluate import HEADS, METRICS
from ..intervals import Interval

CALIBRATION = (
    "accuracy in % by each method's own reward, measured from its own virtual reference; log-loss "
    "in nats and Brier score of the reward from BASE, times beta, as a preference model"
)
PARTS = "the parts of each mean of weights, their share in it and their own accuracy in %"


class Condition(NamedTuple):
    """What methods are trained on: a share of the pairs, with a share of labels turned round."""

    fraction: float
    label_noise: float = 0.0

    def __str__(self) -> str:
        noise = f", {percent(self.label_noise)} of their labels turned round"
        return f"{percent(self.fraction)} of the pairs{noise if self.label_noise else ''}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A method trained on a fraction, by one metric, over all seeds."""

    method: str
    fraction: float
    label_noise: float = 0.0
    metric: Metric
    accuracy: Interval
    seed_spread: float  # standard deviation over seeds; NaN for fewer than two
    gain: Interval | None  # over the best single reference; None for a single one
    over: str | None


@dataclass(frozen=True, slots=True)
class Part:
    """A model that a soup or a merge is a mean of."""

    name: str  # a method of a soup, an alias of a merge
    identity: str  # of its scores in the store
    weight: float  # all of a mean sum to 1
    accuracy: dict[Metric, float] = field(default_factory=dict)  # as a run's; empty for references


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """One run: its accuracies as `mrpo evaluate` has them, and the cost of its training."""

    method: str
    fraction: float
    label_noise: float = 0.0
    seed: int
    folder: str
    identity: str  # of its scores in the store
    accuracy: dict[Metric, float]
    own_accuracy: float = float("nan")  # by the reward against the method's own virtual reference
    pairs: float  # trained on, repeats counted
    seconds: float  # of optimizer steps
    pairs_per_second: float
    parts: list[Part] = field(default_factory=list)  # of a soup or a merge


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """How sure a method's reward against the base is of the held-out labels, and how right.

    The reward as a preference model: the chosen response wins with probability sigmoid(beta times
    the reward margin). The lists are of tenths of the pairs, from the least sure to the surest.
    """

    method: str
    fraction: float
    label_noise: float
    log_loss: Interval  # nats; ln 2 = 0.693 is that of knowing nothing
    brier: Interval  # mean of (1 − probability)²; 0.25 is that of knowing nothing
    confidence: list[float]  # mean probability of the response that the reward prefers
    accuracy: list[float]  # how often that is the chosen one


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskAccuracy:
    """A method's figure on a task, over all seeds."""

    method: str
    fraction: float
    label_noise: float
    task: str  # with the filter of its answers, as "gsm8k strict"
    accuracy: Interval  # share of the questions; truthfulqa_mc2: the correct answers' probability


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringCost:
    """What scoring a reference cost, once for all runs; NaN where it was not recorded."""

    alias: str
    responses: int
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A comparison, as compare.json holds it."""

    base: str
    pairs: int  # held-out
    prompts: int
    metric: Metric
    metrics: dict[Metric, str]
    methods: list[str]  # as the user wrote them, with what --betas and --epsilons add
    references: dict[str, list[str]]
    fractions: list[float]  # rising
    label_noises: list[float] = field(default_factory=lambda: [0.0])  # rising
    seeds: list[int]
    base_accuracy: dict[Metric, Interval]  # of the base itself, untrained; its reward is 0
    results: list[Result]
    growth: dict[str, Interval]  # from the last fraction but one to the last, at least noise
    noise_cost: dict[str, Interval] = field(default_factory=dict)  # from least noise to most
    calibration: list[Calibration] = field(default_factory=list)
    task_settings: list[str] = field(default_factory=list)  # of --tasks, a line for each
    tasks: list[TaskAccuracy] = field(default_factory=list)
    runs: list[RunResult]
    missing: list[str]  # runs that are not finished
    scoring: list[ScoringCost]
    verdict: list[str]

    @property
    def exit_code(self) -> int:
        """1 where a run failed."""
        return int(bool(self.missing))

    @property
    def conditions(self) -> list[Condition]:
        """What the methods were trained on; the last decides: all pairs, labels as they are."""
        return conditions_of(self.fractions, self.label_noises)

    def results_at(self, condition: Condition, metric: Metric) -> dict[str, Result]:
        """By method, the best first; those without a finished run come last."""
        results = {
            result.method: result
            for result in self.results
            if (result.fraction, result.label_noise, result.metric) == (*condition, metric)
        }
        values = {method: result.accuracy.value for method, result in results.items()}
        order = sorted(values, key=lambda method: 0.0 if isnan(values[method]) else -values[method])
        return {method: results[method] for method in order}

    def calibration_at(self, condition: Condition) -> list[Calibration]:
        """Of the methods that have a finished run there, in their order."""
        return [
            entry for entry in self.calibration if (entry.fraction, entry.label_noise) == condition
        ]

    def words(self, metric: Metric) -> str:
        """What a metric is, with the name of the base."""
        return self.metrics[metric].replace("the base", self.base)


def conditions_of(fractions: Sequence[float], label_noises: Sequence[float]) -> list[Condition]:
    """Every combination of two rising lists: most noise first, at each level fractions rising."""
    return [Condition(f, noise) for noise in reversed(label_noises) for f in fractions]


def read_comparison(path: Path) -> Comparison:
    """Read compare.json. Raises `UserError` where it is missing, damaged or of another version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=_restored)
        content["results"] = [Result(**entry) for entry in content["results"]]
        for entry in content["runs"]:
            parts = [Part(**part) for part in entry.get("parts", [])]
            entry |= {"parts": parts}
        content["runs"] = [RunResult(**entry) for entry in content["runs"]]
        content["calibration"] = [Calibration(**c) for c in content.get("calibration", [])]
        content["tasks"] = [TaskAccuracy(**entry) for entry in content.get("tasks", [])]
        content["scoring"] = [ScoringCost(**entry) for entry in content["scoring"]]
        comparison = Comparison(**content)
        if not fits(comparison, Comparison):
            raise TypeError
        return comparison
    except FileNotFoundError:
        raise UserError(f"{path} is not there yet; finish the comparison first") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path} is damaged, or of another version; run `mrpo compare` again"
        ) from None


def _restored(entry: dict[str, Any]) -> Any:
    """An object of compare.json: intervals as such, and NaN for null, except where a gain is."""
    known = {
        name: float("nan") if value is None and name not in ("gain", "over") else value
        for name, value in entry.items()
    }
    return Interval(**known) if "low" in known else known


def comparison_lines(comparison: Comparison) -> Iterator[str]:
    """The printed comparison, line by line; the sentences come last."""
    base = comparison.base
    yield ""
    yield (
        f"accuracy in % on {comparison.pairs:,} held-out pairs, with 95 % intervals over prompts "
        f"and seeds; rewards measured from {base}"
    )
    for condition in reversed(comparison.conditions):
        yield ""
        if len(comparison.conditions) > 1:
            yield f"trained on {condition}"
        yield from table_lines(accuracy_rows(comparison, condition))
    for fraction in reversed(comparison.fractions) if len(comparison.label_noises) > 1 else ():
        yield ""
        yield (
            f"trained on {Condition(fraction)}, by {comparison.words(comparison.metric)}, against "
            "the share of labels turned round"
        )
        yield from table_lines(noise_rows(comparison, fraction))
    if comparison.calibration:
        yield ""
        yield f"trained on {comparison.conditions[-1]}: {CALIBRATION.replace('BASE', base)}"
        yield from table_lines(calibration_rows(comparison))
    if parts := part_rows(comparison):
        yield ""
        yield f"trained on {comparison.conditions[-1]}: {PARTS}"
        yield from table_lines(parts)
    for condition in reversed(comparison.conditions) if comparison.tasks else ():
        yield ""
        yield f"trained on {condition}: tasks, in %, with 95 % intervals over questions and seeds"
        yield from table_lines(task_accuracy_rows(comparison, condition))
    yield from comparison.task_settings
    yield ""
    for scoring in comparison.scoring:
        if not isnan(scoring.seconds):
            yield (
                f"scored once for all runs: {scoring.alias}, {scoring.responses:,} responses in "
                f"{scoring.seconds:,.0f} s"
            )
    yield ""
    yield from comparison.verdict
    yield ""


def noise_rows(comparison: Comparison, fraction: float) -> list[list[str]]:
    """Accuracy and gain of each method at each noise level; the best at least noise first."""
    noises = comparison.label_noises
    results = {
        noise: comparison.results_at(Condition(fraction, noise), comparison.metric)
        for noise in noises
    }
    rows = [["", *map(percent, noises), *(f"gain at {percent(noise)}" for noise in noises)]]
    for method in results[noises[0]]:
        of_method = [results[noise][method] for noise in noises]
        gains = [points(result.gain) if result.gain else "" for result in of_method]
        rows.append([method, *(result.accuracy.percent() for result in of_method), *gains])
    return rows


def calibration_rows(comparison: Comparison) -> list[list[str]]:
    """Own reward's accuracy, log-loss and Brier score at the last condition, least loss first."""
    last = comparison.conditions[-1]
    rows = [["", "own reward", "log-loss", "Brier"]]
    for entry in sorted(comparison.calibration_at(last), key=lambda entry: entry.log_loss.value):
        own = [
            run.own_accuracy
            for run in comparison.runs
            if (run.method, run.fraction, run.label_noise) == (entry.method, *last)
            and not isnan(run.own_accuracy)
        ]
        shown = f"{100 * fmean(own):.1f}" if own else ""
        rows.append([entry.method, shown, str(entry.log_loss), str(entry.brier)])
    return rows


def part_rows(comparison: Comparison) -> list[list[str]]:
    """The parts of soups and merges at the last condition, means over seeds; empty without any."""
    last, found = comparison.conditions[-1], defaultdict(list)
    for run in comparison.runs:
        for part in run.parts if (run.fraction, run.label_noise) == last else ():
            found[run.method, part.name].append(part)
    rows = [["", "part", "weight", *HEADS.values()]]
    for (method, name), parts in found.items():
        weight = fmean(part.weight for part in parts)
        values = [[part.accuracy[m] for part in parts if m in part.accuracy] for m in METRICS]
        shown = [f"{100 * fmean(of_metric):.1f}" if of_metric else "" for of_metric in values]
        rows.append([method, name, f"{weight:.3f}", *shown])
    return rows if found else []


def task_accuracy_rows(comparison: Comparison, condition: Condition) -> list[list[str]]:
    """A row for each method that has a finished run there, a column for each task."""
    columns = list(dict.fromkeys(entry.task for entry in comparison.tasks))
    rows = [["", *columns]]
    for method in comparison.methods:
        figures = {
            entry.task: entry.accuracy.percent()
            for entry in comparison.tasks
            if (entry.method, entry.fraction, entry.label_noise) == (method, *condition)
        }
        if figures:
            rows.append([method, *(figures.get(column, "–") for column in columns)])
    return rows


def accuracy_rows(comparison: Comparison, condition: Condition) -> list[list[str]]:
    """The table at one condition, the best method by the deciding metric first."""
    rows = [["", *HEADS.values(), "gain", "training", "pairs/s"]]
    base = comparison.base_accuracy
    cells = [base[metric].percent() if metric in base else "–" for metric in METRICS]
    rows.append([f"base {comparison.base}, untrained", *cells, "", "", ""])
    by_metric = {metric: comparison.results_at(condition, metric) for metric in METRICS}
    for method, result in by_metric[comparison.metric].items():
        runs = [
            run
            for run in comparison.runs
            if (run.method, run.fraction, run.label_noise) == (method, *condition) and run.seconds
        ]
        cost = ["", ""]
        if runs:
            seconds = fmean(run.seconds for run in runs)
            rate = fmean(run.pairs_per_second for run in runs)
            cost = [f"{seconds:,.0f} s", f"{rate:,.1f}"]
        cells = [by_metric[metric][method].accuracy.percent() for metric in METRICS]
        rows.append([method, *cells, points(result.gain) if result.gain else "", *cost])
    return rows


def percent(fraction: float) -> str:
    """A share of the training pairs, as 20 %."""
    return f"{100 * fraction:.3g} %"


def points(value: Interval) -> str:
    """A difference of shares.

    >>> points(Interval(0.0125, -0.004, 0.029))
    '+1.2 points (−0.4 to +2.9)'
    """
    words = f"{100 * value.value:+.1f} points ({100 * value.low:+.1f} to {100 * value.high:+.1f})"
    return words.replace("-", "−")
