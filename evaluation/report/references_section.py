"""The report's section on the references: verdicts, agreement, margins, weights, saturation."""

from __future__ import annotations

import numpy as np

from ...method.weightings import arwc_weights
from ...settings import build
from ..config import DoctorConfig, ReportConfig
from ..doctor.doctor import (
    MARGINS,
    Diagnosis,
    diagnose,
    likelihood_rows,
    load_references,
    margin_rows,
)
from ..doctor.forecast_words import NOTE, TITLE, forecast_rows
from ..figures import UNITS, agreement, saturation
from ..intervals import Interval
from ..score_table import ScoreTable, margins
from .charts import Chart, Curve, Heatmap, Lines, Range, Ranges, Section, Table

EPSILONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
BINS = 60  # of the margins' distribution
SHOWN = (0.005, 0.995)  # quantiles between which margins are drawn
QUARTILES = (0.5, 0.25, 0.75)


def references_section(config: ReportConfig) -> list[Section]:
    """Everything that scores alone can show. Raises `UserError` where there are no scores."""
    shared = ("refs", "pairs", "refs_config", "store")
    doctor = build(DoctorConfig, {name: getattr(config, name) for name in shared})
    table = load_references(doctor)
    diagnosis = diagnose(doctor, table)
    advice, references = diagnosis.advice, diagnosis.references
    words = [f"Train with --normalize {advice.normalize}: {advice.reason}."]
    if advice.drop:
        words.append(f"May add nothing, the fitted weight reaches 0: {', '.join(advice.drop)}.")
    words += [f"{line[:1].upper()}{line[1:]}." for line in diagnosis.conclusions]
    verdicts = [("reference", "verdict", "why", "what to do")]
    verdicts += [(v.alias, v.state, v.reason, v.suggestion) for v in diagnosis.verdicts]
    charts = [
        _accuracy(diagnosis),
        _agreement(table, diagnosis),
        _margins(table),
        *_weights(table, diagnosis),
        _saturation(table),
    ]
    tables = [
        Table(title="What doctor says", rows=verdicts),
        Table(title="Likelihood and accuracy", rows=likelihood_rows(references)),
        Table(title=MARGINS.capitalize(), rows=margin_rows(references)),
    ]
    if diagnosis.forecast is not None and diagnosis.forecast.rows:
        title = f"{TITLE.capitalize()} ({NOTE})"
        tables.append(Table(title=title, rows=forecast_rows(diagnosis.forecast)))
    return [Section(title="References", words=words, tables=tables, charts=charts)]


def _accuracy(diagnosis: Diagnosis) -> Ranges:
    rows = [
        Range(name=f"{reference.alias}, {words}", value=reference.accuracy[unit], group=words)
        for reference in diagnosis.references
        for unit, words in UNITS.items()
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
        [agreement(reference, other) for other in table.references]
        + [figures.accuracy["none"].value]
        for reference, figures in zip(table.references, diagnosis.references)
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
    low, high = np.nanquantile(nats, SHOWN)
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    middles = ((edges[:-1] + edges[1:]) / 2).tolist()
    curves = []
    for alias, values in zip(table.aliases, nats.T):
        known = values[~np.isnan(values)]
        shares = np.histogram(known, edges)[0] / len(known)
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
    quartiles = np.nanquantile(weights, QUARTILES, axis=0).T.tolist()
    adaptive = Ranges(
        title="Adaptive weights (ARWC): median pair and the middle half of the pairs",
        x_label="weight",
        rows=[
            Range(name=alias, value=Interval(*three), group=alias)
            for alias, three in zip(table.aliases, quartiles)
        ],
        rule=1 / len(table.aliases),
        note="The line is the uniform weight.",
    )
    fitted = Ranges(
        title="Weights that predict the labels best (fitted)",
        x_label="weight, with intervals that hold together at 95 %",
        rows=[
            Range(name=alias, value=value, group=alias)
            for alias, value in diagnosis.advice.weights.items()
        ],
        palette=table.aliases,
        rule=0.0,
        note="A reference whose interval reaches 0 may be dropped.",
    )
    return [adaptive, fitted] if fitted.rows else [adaptive]


def _saturation(table: ScoreTable) -> Lines:
    scores = table.pair_scores()
    shares = np.array([saturation(scores, epsilon, "none") for epsilon in EPSILONS])
    curves = [
        Curve(name=alias, x=EPSILONS, y=column.tolist())
        for alias, column in zip(table.aliases[1:], shares.T[1:])
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
