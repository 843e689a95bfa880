"""A comparison as text: what `mrpo compare` prints. The sentences come last, next to the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from math import isnan
from statistics import fmean
from typing import TYPE_CHECKING

from .judgement import YARDSTICKS
from .results import columns
from .verdict import percent, points

if TYPE_CHECKING:
    from .compare_results import Comparison, Result

HEADS = {"reward": "by reward", "sum": "summed", "token": "per token", "byte": "per byte"}


def describe(comparison: Comparison) -> Iterator[str]:
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
    """Cells of the table at one fraction, the best method by the deciding yardstick first."""
    by_method: dict[str, dict[str, Result]] = {}
    for result in comparison.results:
        if result.fraction == fraction:
            by_method.setdefault(result.method, {})[result.yardstick] = result
    deciding = comparison.yardstick
    known = {name: results[deciding].accuracy.value for name, results in by_method.items()}
    order = sorted(known, key=lambda name: -known[name] if not isnan(known[name]) else 0.0)
    rows = [["", *HEADS.values(), "gain", "training", "pairs/s"]]
    base = comparison.base_accuracy
    cells = [base[name].percent() if name in base else "–" for name in YARDSTICKS]
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
        cells = [results[name].accuracy.percent() for name in YARDSTICKS]
        rows.append([method, *cells, points(gain) if gain else "", *cost])
    return rows
