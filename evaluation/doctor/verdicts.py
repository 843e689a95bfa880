"""Findings, the verdict on a reference that they lead to, and advice for all references together.

A check is a function of a `Subject` that returns a `Finding` or None; `checks.py` lists them all.
Whether a reference can be trusted is the findings' question; what it adds is another, which the
weights that predict the labels (`method/fitted.py`) and their intervals answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ...method.fitted import fit_weights
from ..figures import UNITS, ReferenceFigures
from ..intervals import Interval
from ..score_table import ReferenceColumns, ScoreTable

FEWEST = 20  # scored pairs below which nothing is judged
TOO_MUCH = 0.5  # of the margins' variance explained by length, or of responses moved by CTRO
LESS = 0.8  # times the saturation of summed log-probs that per-byte ones must not exceed
BOOTSTRAP = 100

State = Literal["healthy", "suspect", "broken"]
TO_DO = {
    "swapped": "exchange the columns and import the scores again",
    "duplicate": "drop one of the two",
    "uniform": "drop it, or repair the model that refs.yaml names and rescore",
    "guessing": "drop it, or repair the model or tokenizer that refs.yaml names and rescore",
    "missing": "see the reasons; `mrpo precompute` scores what is not yet scored",
    "template": "correct chat_template in refs.yaml and rescore",
    "odd": "rescore if --probe 16 finds it wrong",
    "unverified": "see that --probe 16 agrees, or score where its weights are, and so verify it",
    "unlikely": "rescore if --probe 16 finds it wrong, else drop it",
}
RESCORE = "rescore: remove {folder} and run `mrpo precompute`"


@dataclass(frozen=True, slots=True)
class Finding:
    """One observation. With a fault the scores are wrong, with a suspect they may be."""

    level: Literal["fault", "suspect"]
    code: str  # "swapped", "truncated", …: the same for the same fault, whatever showed it
    evidence: str
    cause: str
    shown_by: Literal["scores", "probe"] = "scores"


@dataclass(slots=True)
class Subject:
    """The k-th reference of a table, as a check sees it."""

    table: ScoreTable
    all_figures: Sequence[ReferenceFigures]  # of the table's references
    k: int
    vocabulary: int | None = None  # tokens of its vocabulary, where known
    sound: Sequence[int] = ()  # the other references in which no check by itself found anything
    findings: list[Finding] = field(default_factory=list)  # so far

    @property
    def reference(self) -> ReferenceColumns:
        return self.table.references[self.k]

    @property
    def figures(self) -> ReferenceFigures:
        return self.all_figures[self.k]

    @property
    def others(self) -> list[ReferenceColumns]:
        return [other for j, other in enumerate(self.table.references) if j != self.k]


Check = Callable[[Subject], Finding | None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to think of a reference, and what to do about it."""

    alias: str
    state: State
    reason: str  # evidence and likely cause; for a healthy one its accuracy and likelihood
    suggestion: str
    weight: Interval | None  # fitted, among the references that are not broken


@dataclass(frozen=True, slots=True)
class Advice:
    """What follows for training with these references."""

    normalize: Literal["none", "byte"]
    reason: str
    weights: dict[str, Interval]  # fitted, of the references that are not broken
    drop: list[str]  # of these, the ones whose weight may be 0


def advise(
    table: ScoreTable,
    figures: Sequence[ReferenceFigures],
    findings: Mapping[str, Sequence[Finding]],
) -> Advice:
    """Normalization by length bias and saturation, weights by a fit to the labels."""
    levels = [{finding.level for finding in findings[alias]} for alias in table.aliases]
    sound = [k for k, found in enumerate(levels) if "fault" not in found]
    normalize, reason = _normalization([figures[k] for k in sound])
    weights, drop = _fitted(table, sound, normalize)
    return Advice(normalize, reason, weights, drop)


def verdict_on(
    figures: ReferenceFigures, findings: Sequence[Finding], advice: Advice, store: str
) -> Verdict:
    """What findings and advice say about a reference; `store` is the store's root."""
    alias, weight = figures.alias, advice.weights.get(figures.alias)
    if not findings:
        accuracy = figures.accuracy[advice.normalize]
        reason = (
            f"{UNITS[advice.normalize]} it prefers the chosen response in {accuracy.percent()} % "
            f"of the pairs, {figures.chosen_bits_per_byte:.2f} bits per byte"
        )
        return Verdict(alias, "healthy", reason, _worth(alias, advice), weight)
    # Faults before suspicions; among equals the probe's first, whose cause is the more certain.
    worst = min(findings, key=lambda found: (found.level != "fault", found.shown_by != "probe"))
    state: State = "broken" if worst.level == "fault" else "suspect"
    suggestion = TO_DO.get(worst.code, RESCORE.format(folder=f"{store}/{figures.identity}"))
    return Verdict(alias, state, f"{worst.evidence}: {worst.cause}", suggestion, weight)


def _worth(alias: str, advice: Advice) -> str:
    """Whether a healthy reference adds to the others, as far as the labels tell."""
    if alias not in advice.drop:
        return "keep"
    if len(advice.drop) == len(advice.weights):
        return "keep: these pairs are too few, or the references too alike, to weigh them"
    return f"optional: its fitted weight is {advice.weights[alias]}, and may be 0"


def _normalization(figures: Sequence[ReferenceFigures]) -> tuple[Literal["none", "byte"], str]:
    biased = [reference.length_bias for reference in figures]
    moved = [
        (reference.saturation["none"], reference.saturation["byte"]) for reference in figures[1:]
    ]
    if biased and np.median(biased) > TOO_MUCH:
        return "byte", f"length explains {np.median(biased):.0%} of the summed margins' variance"
    if moved:
        summed, by_byte = np.mean(moved, axis=0)
        if summed > TOO_MUCH and by_byte < LESS * summed:
            return "byte", f"CTRO moves {summed:.0%} of summed log-probs, {by_byte:.0%} per byte"
    return "none", "length explains less than half of the summed margins' variance"


def _fitted(
    table: ScoreTable, sound: Sequence[int], normalize: str
) -> tuple[dict[str, Interval], list[str]]:
    """Weights of the references that are not broken; none where there are too few pairs."""
    chosen, rejected = table.pair_scores().reference_logps(list(sound), normalize)
    margins = chosen - rejected
    if len(sound) < 2 or (~np.isnan(margins).any(axis=1)).sum() < FEWEST:
        return {}, []
    fit = fit_weights(margins, table.prompts, bootstrap=BOOTSTRAP)
    assert fit.intervals is not None
    names = [table.aliases[k] for k in sound]
    bounds = zip(fit.weights, fit.intervals)
    weights = [Interval(float(weight), float(low), float(high)) for weight, (low, high) in bounds]
    return dict(zip(names, weights)), [names[k] for k in fit.drop]
