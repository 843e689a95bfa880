"""What compare.json holds, and reading it again.

A comparison as text: what `mrpo compare` prints. The sentences come last, next to the prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ..evaluate import METRICS, Metric
from ..intervals import Interval
from ..results import columns
from .verdict import percent, points

if TYPE_CHECKING:
    pass


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
    """One run: what evaluate says of it, and what training it took."""

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
    """What stage one took for a reference, once and for all runs; NaN where it was not recorded."""

    alias: str
    pairs: int
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All that compare.json holds."""

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


def read_comparison(path: Path) -> Comparison:
    """What `mrpo compare` wrote. Raises `UserError` where it is not there or not whole."""
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
    gain = entry.pop("gain")
    accuracy = Interval(**_known(entry.pop("accuracy")))
    whole = Interval(**_known(gain)) if gain else None
    over = entry.pop("over")
    return Result(accuracy=accuracy, gain=whole, over=over, **_known(entry))


def _intervals(entries: Mapping[str, Any]) -> dict[Any, Interval]:
    return {name: Interval(**_known(entry)) for name, entry in entries.items()}


def _known(entry: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has null for NaN."""
    return {name: float("nan") if value is None else value for name, value in entry.items()}


HEADS = {"reward": "by reward", "sum": "summed", "token": "per token", "byte": "per byte"}


def comparison_lines(comparison: Comparison) -> Iterator[str]:
    """Line by line."""
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
        yield from columns(accuracy_rows(comparison, fraction))
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
    """Cells of the table at one fraction, the best method by the deciding metric first."""
    by_method: dict[str, dict[str, Result]] = {}
    for result in comparison.results:
        if result.fraction == fraction:
            by_method.setdefault(result.method, {})[result.metric] = result
    deciding = comparison.metric
    known = {name: results[deciding].accuracy.value for name, results in by_method.items()}
    order = sorted(known, key=lambda name: -known[name] if not isnan(known[name]) else 0.0)
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
        cost = (
            [
                f"{fmean(r.seconds for r in runs):,.0f} s",
                f"{fmean(r.pairs_per_second for r in runs):,.1f}",
            ]
            if runs
            else ["", ""]
        )
        cells = [results[name].accuracy.percent() for name in METRICS]
        rows.append([method, *cells, points(gain) if gain else "", *cost])
    return rows
