"""The report on the references: what doctor says, agreement, margins, weights, saturation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...method.arrays import NORMALIZATIONS
from ...method.weightings import arwc_weights
from ..doctor.doctor import Diagnosis
from ..figures import UNITS, agreement, saturation
from ..intervals import Interval
from ..score_table import ScoreTable, margins
from .charts import Chart, Curve, Heatmap, Lines, Range, Ranges, Section, Table

EPSILONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
BINS = 60  # of the margins' distribution
SHOWN = (0.005, 0.995)  # quantiles between which margins are drawn
QUARTILES = (0.5, 0.25, 0.75)


def references_section(table: ScoreTable, diagnosis: Diagnosis) -> Section:
    """Everything that scores alone can show."""
    charts: list[Chart] = [
        _accuracy(diagnosis),
        _agreement(table, diagnosis),
        _margins(table),
        *_weights(table, diagnosis),
        _saturation(table),
    ]
    return Section(
        title="References",
        words=_advice(diagnosis),
        tables=[_verdicts(diagnosis), _numbers(diagnosis)],
        charts=charts,
    )


def _advice(diagnosis: Diagnosis) -> list[str]:
    advice = diagnosis.advice
    lines = [f"Train with --normalize {advice.normalize}: {advice.reason}."]
    if advice.drop:
        lines.append(f"May add nothing, its fitted weight reaches 0: {', '.join(advice.drop)}.")
    return lines


def _verdicts(diagnosis: Diagnosis) -> Table:
    heading = ("reference", "verdict", "why", "what to do")
    lines = [(one.alias, one.state, one.reason, one.suggestion) for one in diagnosis.verdicts]
    return Table(title="What doctor says", rows=[heading, *lines])


def _numbers(diagnosis: Diagnosis) -> Table:
    heading = (
        "reference", "pairs", "missing", "bits per byte, chosen", "rejected", "mean margin, nats",
        "its spread", "length explains",
    )  # fmt: skip
    lines = [
        (
            one.alias,
            f"{one.pairs:,}",
            f"{sum(one.missing.values()):,}",
            f"{one.chosen_bits_per_byte:.2f}",
            f"{one.rejected_bits_per_byte:.2f}",
            f"{one.margin:.1f}",
            f"{one.margin_scale:.1f}",
            f"{one.length_bias:.0%}",
        )
        for one in diagnosis.references
    ]
    return Table(title="In numbers", rows=[heading, *lines])


def _accuracy(diagnosis: Diagnosis) -> Ranges:
    rows = [
        Range(name=f"{one.alias}, {UNITS[unit]}", value=one.accuracy[unit], group=UNITS[unit])
        for one in diagnosis.references
        for unit in NORMALIZATIONS
    ]
    return Ranges(
        title="How often a reference prefers the chosen response",
        x_label="share of pairs, with 95 % intervals",
        rows=rows,
        percent=True,
        rule=0.5,
        note="A reference below one half prefers what people rejected.",
    )


def _agreement(table: ScoreTable, diagnosis: Diagnosis) -> Heatmap:
    values = [
        [agreement(one, other) for other in table.references]
        + [diagnosis.references[row].accuracy["none"].value]
        for row, one in enumerate(table.references)
    ]
    return Heatmap(
        title="On how many pairs two references prefer the same response, in percent",
        rows=table.aliases,
        columns=[*table.aliases, "label"],
        values=values,
        floor=0.5,
        note="50 is chance. References that agree on everything add nothing to one another.",
    )


def _margins(table: ScoreTable) -> Lines:
    nats = margins(table)
    low, high = np.nanquantile(nats, SHOWN) if np.isfinite(nats).any() else (-1.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    middles = ((edges[:-1] + edges[1:]) / 2).tolist()
    curves = []
    for alias, values in zip(table.aliases, nats.T):
        known = values[np.isfinite(values)]
        shares = np.histogram(known, edges)[0] / max(len(known), 1)
        curves.append(Curve(name=alias, x=middles, y=shares.tolist()))
    return Lines(
        title="Margins: log-prob of the chosen minus that of the rejected response",
        x_label="nats",
        y_label="share of pairs",
        curves=curves,
        upright=0.0,
        percent=True,
        note="Right of the line a reference prefers the chosen response. A wider curve weighs "
        "more in every method that adds up log-probs.",
    )


def _weights(table: ScoreTable, diagnosis: Diagnosis) -> list[Chart]:
    scores = table.pair_scores()
    weights = arwc_weights(scores.ref_chosen_logps, scores.ref_rejected_logps)
    adaptive = [
        Range(name=alias, value=Interval(*_quantiles(column)), group=alias)
        for alias, column in zip(table.aliases, weights.T)
    ]
    charts: list[Chart] = [
        Ranges(
            title="Adaptive weights (ARWC): median pair and the middle half of the pairs",
            x_label="weight",
            rows=adaptive,
            rule=1 / len(table.aliases),
            note="The line is the uniform weight.",
        )
    ]
    if diagnosis.advice.weights:
        learned = [
            Range(name=alias, value=value, group=alias)
            for alias, value in diagnosis.advice.weights.items()
        ]
        charts.append(
            Ranges(
                title="Weights that predict the labels best (fitted)",
                x_label="weight, with intervals that hold together at 95 %",
                rows=learned,
                palette=table.aliases,
                rule=0.0,
                note="A reference whose interval reaches 0 may be dropped.",
            )
        )
    return charts


def _saturation(table: ScoreTable) -> Lines:
    scores = table.pair_scores()
    shares = np.array([saturation(scores, epsilon, "none") for epsilon in EPSILONS])
    curves = [
        Curve(name=alias, x=EPSILONS, y=shares[:, k].tolist())
        for k, alias in enumerate(table.aliases)
        if k > 0
    ]
    return Lines(
        title=f"Responses that clipping (CTRO) moves to its bound around {table.aliases[0]}",
        x_label="epsilon",
        y_label="share of responses",
        curves=curves,
        palette=table.aliases,
        log_x=True,
        percent=True,
        upright=0.1,
        note="Where nearly all are moved, MRPO is DPO with the base and a term of length.",
    )


def _quantiles(values: np.ndarray) -> Sequence[float]:
    """Median, first and third quartile of what is known."""
    known = values[np.isfinite(values)]
    if len(known) == 0:
        return [float("nan")] * 3
    return [float(value) for value in np.quantile(known, QUARTILES)]
