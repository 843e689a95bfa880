"""What compare.json holds: written, read again, and printed as tables and sentences."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

from ...errors import UserError
from ...terminal import table_lines
from ..config import Metric
from ..evaluate import HEADS, METRICS
from ..intervals import Interval
from .verdict import percent, points


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


def read_comparison(path: Path) -> Comparison:
    """Read compare.json. Raises `UserError` where it is missing, damaged or of another version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["base_accuracy"] = _intervals(content["base_accuracy"])
        content["growth"] = _intervals(content["growth"])
        content["results"] = [_result(entry) for entry in content["results"]]
        content["runs"] = [RunResult(**_known(entry)) for entry in content["runs"]]
        content["scoring"] = [ScoringCost(**_known(entry)) for entry in content["scoring"]]
        return Comparison(**content)
    except FileNotFoundError:
        raise UserError(f"{path} is not there yet; finish the comparison first") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is damaged, or of another version; run `mrpo compare` again"
        ) from None


def _result(entry: dict[str, Any]) -> Result:
    accuracy, gain = Interval(**_known(entry.pop("accuracy"))), entry.pop("gain")
    over = entry.pop("over")
    return Result(
        accuracy=accuracy,
        gain=Interval(**_known(gain)) if gain else None,
        over=over,
        **_known(entry),
    )


def _intervals(entries: Mapping[str, Any]) -> dict[Any, Interval]:
    return {name: Interval(**_known(entry)) for name, entry in entries.items()}


def _known(entry: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has null for NaN."""
    return {name: float("nan") if value is None else value for name, value in entry.items()}


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
    by_method: dict[str, dict[str, Result]] = {}
    for result in comparison.results:
        if result.fraction == fraction:
            by_method.setdefault(result.method, {})[result.metric] = result
    deciding = comparison.metric
    values = {name: results[deciding].accuracy.value for name, results in by_method.items()}
    order = sorted(values, key=lambda name: 0.0 if isnan(values[name]) else -values[name])
    rows = [["", *HEADS.values(), "gain", "training", "pairs/s"]]
    base = comparison.base_accuracy
    cells = [base[name].percent() if name in base else "–" for name in METRICS]
    rows.append([f"base {comparison.base}, untrained", *cells, "", "", ""])
    for method in order:
        results = by_method[method]
        gain = results[deciding].gain
        runs = [
            run
            for run in comparison.runs
            if run.method == method and run.fraction == fraction and run.seconds
        ]
        cost = ["", ""]
        if runs:
            seconds = fmean(run.seconds for run in runs)
            rate = fmean(run.pairs_per_second for run in runs)
            cost = [f"{seconds:,.0f} s", f"{rate:,.1f}"]
        cells = [results[name].accuracy.percent() for name in METRICS]
        rows.append([method, *cells, points(gain) if gain else "", *cost])
    return rows
