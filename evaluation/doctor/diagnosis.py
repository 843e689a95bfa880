"""From figures and findings to a verdict: one line a reference, and what to do with all of them.

Whether a reference can be trusted is one question (`findings.py`), what it adds is another: the
weights that predict the labels (`train/mathematics/fitted.py`) and their intervals answer that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...method.fitted import fit_weights
from ..figures import UNITS, ReferenceFigures
from ..intervals import Interval
from ..score_table import ScoreTable
from .findings import Finding
from .length_checks import FEWEST

HALF = 0.5  # of margins that length explains, or of responses that CTRO moves: too much
LESS = 0.8  # times the saturation of summed log-probs that per-byte ones must bring
BOOTSTRAP = 100

State = Literal["healthy", "suspect", "broken"]
TO_DO = {
    "swapped": "exchange the columns and bring the scores in again",
    "duplicate": "drop one of the two",
    "uniform": "drop it, or mend the model that refs.yaml names and rescore",
    "guessing": "drop it, or mend the model or tokenizer that refs.yaml names and rescore",
    "missing": "see the reasons; `mrpo precompute` scores what is not yet scored",
    "template": "mend chat_template in refs.yaml and rescore",
    "odd": "rescore if --probe 16 finds it wrong",
    "unlikely": "rescore if --probe 16 finds it wrong, else drop it",
}
RESCORE = "rescore: remove {folder} and run `mrpo precompute`"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to think of a reference, and what to do with it."""

    alias: str
    state: State
    reason: str  # evidence and likely cause; or what speaks for it
    suggestion: str
    weight: Interval | None  # fitted, among the references that are not broken


@dataclass(frozen=True, slots=True)
class Advice:
    """What the references together ask for."""

    normalize: Literal["none", "byte"]
    reason: str
    weights: dict[str, Interval]  # fitted, of the references that are not broken
    drop: list[str]  # of these, the ones whose weight may as well be 0


def verdicts(
    figures: Sequence[ReferenceFigures],
    findings: Mapping[str, Sequence[Finding]],
    advice: Advice,
    store: str,
) -> list[Verdict]:
    """One for each reference, in their order."""
    return [_verdict(one, _worst_first(findings[one.alias]), advice, store) for one in figures]


def advise(
    table: ScoreTable,
    figures: Sequence[ReferenceFigures],
    findings: Mapping[str, Sequence[Finding]],
) -> Advice:
    """Normalization by length bias and saturation, weights by a fit to the labels."""
    sound = [k for k, one in enumerate(figures) if not _broken(findings[one.alias])]
    normalize, reason = _normalization([figures[k] for k in sound])
    weights, drop = _fitted(table, sound, normalize)
    return Advice(normalize, reason, weights, drop)


def _verdict(
    figure: ReferenceFigures, findings: Sequence[Finding], advice: Advice, store: str
) -> Verdict:
    weight = advice.weights.get(figure.alias)
    if not findings:
        accuracy = figure.accuracy[advice.normalize]
        reason = (
            f"{UNITS[advice.normalize]} it prefers the chosen response in {accuracy.percent()} % "
            f"of the pairs, {figure.chosen_bits_per_byte:.2f} bits per byte"
        )
        return Verdict(figure.alias, "healthy", reason, _worth(figure.alias, advice), weight)
    worst = findings[0]
    state: State = "broken" if worst.level == "fault" else "suspect"
    reason = f"{worst.evidence}: {worst.cause}"
    folder = f"{store}/{figure.identity}"
    suggestion = TO_DO.get(worst.code, RESCORE.format(folder=folder))
    return Verdict(figure.alias, state, reason, suggestion, weight)


def _worth(alias: str, advice: Advice) -> str:
    """Whether a healthy reference adds to the others, as far as the labels tell."""
    if alias not in advice.drop:
        return "keep"
    if len(advice.drop) == len(advice.weights):
        return "keep: these pairs are too few, or the references too alike, to weigh them"
    return f"drop it or leave it: its fitted weight is {advice.weights[alias]}, and may be 0"


def _worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """Faults before suspicions; of equals the probe's, which knows the cause."""
    return sorted(findings, key=lambda one: (one.level != "fault", one.shown_by != "probe"))


def _broken(findings: Sequence[Finding]) -> bool:
    return any(finding.level == "fault" for finding in findings)


def _normalization(figures: Sequence[ReferenceFigures]) -> tuple[Literal["none", "byte"], str]:
    biased = [one.length_bias for one in figures]
    moved = [(one.saturation["none"], one.saturation["byte"]) for one in figures[1:]]
    if biased and np.median(biased) > HALF:
        return "byte", f"length explains {np.median(biased):.0%} of the summed margins' variance"
    if moved:
        summed, by_byte = np.mean(moved, axis=0)
        if summed > HALF and by_byte < LESS * summed:
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
