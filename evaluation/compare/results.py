"""What compare.json holds: written, read again, and printed as tables and sentences."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

from ...errors import UserError
from ...files import fits
from ...terminal import table_lines
from ..config import Metric
from ..evaluate import HEADS, METRICS
from ..intervals import Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A method trained on a fraction, by one metric, over all seeds."""

    method: str
    fraction: float
    metric: Metric
    accuracy: Interval
    seed_spread: float  # standard deviation over seeds; NaN for fewer than two
    gain: Interval | None  # over the best single reference; None for a single one
    over: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """One run: its accuracies as `mrpo evaluate` has them, and the cost of its training."""

    method: str
    fraction: float
    seed: int
    folder: str
    identity: str  # of its scores in the store
    accuracy: dict[Metric, float]
    pairs: float  # trained on, repeats counted
    seconds: float  # of optimizer steps
    pairs_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringCost:
    """What scoring a reference cost, once for all runs; NaN where it was not recorded."""

    alias: str
    pairs: int
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
    methods: list[str]
    references: dict[str, list[str]]
    fractions: list[float]
    seeds: list[int]
    base_accuracy: dict[Metric, Interval]  # of the base itself, untrained; its reward is 0
    results: list[Result]
    growth: dict[str, Interval]  # from the last fraction but one to the last
    runs: list[RunResult]
    missing: list[str]  # runs that are not finished
    scoring: list[ScoringCost]
    verdict: list[str]

    @property
    def exit_code(self) -> int:
        """1 where a run failed."""
        return int(bool(self.missing))

    def results_at(self, fraction: float, metric: Metric) -> dict[str, Result]:
        """By method, the best first; those without a finished run come last."""
        results = {
            result.method: result
            for result in self.results
            if (result.fraction, result.metric) == (fraction, metric)
        }
        values = {method: result.accuracy.value for method, result in results.items()}
        order = sorted(values, key=lambda method: 0.0 if isnan(values[method]) else -values[method])
        return {method: results[method] for method in order}

    def words(self, metric: Metric) -> str:
        """What a metric is, with the name of the base."""
        return self.metrics[metric].replace("the base", self.base)


def read_comparison(path: Path) -> Comparison:
    """Read compare.json. Raises `UserError` where it is missing, damaged or of another version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=_restored)
        content["results"] = [Result(**entry) for entry in content["results"]]
        content["runs"] = [RunResult(**entry) for entry in content["runs"]]
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
    for fraction in reversed(comparison.fractions):
        yield ""
        if len(comparison.fractions) > 1:
            yield f"trained on {percent(fraction)} of the pairs"
        yield from table_lines(accuracy_rows(comparison, fraction))
    yield ""
    for scoring in comparison.scoring:
        if not isnan(scoring.seconds):
            yield (
                f"scored once for all runs: {scoring.alias}, {scoring.pairs:,} pairs in "
                f"{scoring.seconds:,.0f} s"
            )
    yield ""
    yield from comparison.verdict
    yield ""


def accuracy_rows(comparison: Comparison, fraction: float) -> list[list[str]]:
    """The table at one fraction, the best method by the deciding metric first."""
    rows = [["", *HEADS.values(), "gain", "training", "pairs/s"]]
    base = comparison.base_accuracy
    cells = [base[metric].percent() if metric in base else "–" for metric in METRICS]
    rows.append([f"base {comparison.base}, untrained", *cells, "", "", ""])
    by_metric = {metric: comparison.results_at(fraction, metric) for metric in METRICS}
    for method, result in by_metric[comparison.metric].items():
        runs = [
            run
            for run in comparison.runs
            if (run.method, run.fraction) == (method, fraction) and run.seconds
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
