"""Figures of each reference, computed from the stored scores: no weights, no texts.

Every figure is a pure function of the arrays of `score_table.py`, and NaN where a reference has
nothing to compute it from. `doctor/checks.py` looks for faults in them, `doctor/doctor.py` prints
them; evaluate, compare, report and the demo share `preferred`, `agreement` and `saturation`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..method.arrays import normalize_logps
from ..method.grammar import parse_method
from ..method.objective import ReferenceLogps
from ..method.virtual_reference import KINDS, ctro_clip, pulls
from ..method.weightings import arwc_weights
from .intervals import Interval, mean_intervals
from .score_table import ReferenceColumns, ScoreTable

UNITS = {"none": "summed", "token": "per token", "byte": "per byte"}
DOMINATES = 0.5  # a reference with a larger share of the virtual reference decides alone


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceFigures:
    """Figures of a reference; `accuracy` and `saturation` by normalization (none, token, byte)."""

    alias: str
    identity: str
    pairs: int  # scored
    missing: dict[str, int]  # pairs without a score, by reason
    chosen_bits_per_byte: float
    rejected_bits_per_byte: float
    nats_per_token: float
    bytes_per_token: float
    accuracy: dict[str, Interval]  # share of pairs whose chosen response is the likelier one
    margin: float  # mean of log pi(chosen) − log pi(rejected), nats
    margin_scale: float  # its standard deviation
    length_bias: float  # share of the margins' variance that the difference in bytes explains
    saturation: dict[str, float]  # share of responses that CTRO clips
    first_loss: float  # of DPO with this reference, for a policy equal to the base
    boundary: float  # share of responses whose first scored token begins inside the prompt
    end_of_turn: float  # the end of turn's share of the log-probs
    end_of_turn_nats: float  # mean of −log pi(end of turn)
    agreement: dict[str, float]  # by other reference: share of pairs with the same preference
    correlation: dict[str, float]  # by other reference: of the margins
    difficulty: dict[str, float]  # by other reference: correlation of `difficulty`
    dominance: dict[str, float]  # by kind: share of pairs that it decides alone


def figures(
    table: ScoreTable, beta: float, epsilon: float = 0.1, normalize: str = "none"
) -> list[ReferenceFigures]:
    """The figures of every reference; the first is the base.

    `beta` is DPO's and `normalize` its unit of log-probs, for the first loss; `epsilon` is CTRO's.
    """
    scores, columns, size = table.pair_scores(), table.references, table.response_bytes
    saturated = {unit: saturation(scores, epsilon, unit) for unit in UNITS}
    dominant = dominance(scores, epsilon)
    chosen, rejected = scores.reference_logps(list(range(len(columns))), normalize)
    above_base = (chosen - rejected)[:, :1] - (chosen - rejected)
    hard = [difficulty(table, reference) for reference in columns]
    result = []
    for k, reference in enumerate(columns):
        logps, margins = reference.logps, reference.margins
        others = [(j, other.alias) for j, other in enumerate(columns) if j != k]
        right = [preferred(normalize_logps(logps, unit, reference.tokens, size)) for unit in UNITS]
        result.append(
            ReferenceFigures(
                alias=reference.alias,
                identity=reference.record.identity,
                pairs=int(reference.scored.sum()),
                missing=reference.missing,
                chosen_bits_per_byte=_mean_ratio(-logps[:, 0], size[:, 0]) / math.log(2),
                rejected_bits_per_byte=_mean_ratio(-logps[:, 1], size[:, 1]) / math.log(2),
                nats_per_token=_mean_ratio(-logps, reference.tokens),
                bytes_per_token=_mean_ratio(size, reference.tokens),
                accuracy=dict(zip(UNITS, mean_intervals(np.stack(right, axis=1), table.prompts))),
                margin=_mean(margins),
                margin_scale=float(np.nanstd(margins)) if reference.scored.any() else math.nan,
                length_bias=correlation(margins, size[:, 0] - size[:, 1]) ** 2,
                saturation={unit: shares[k] for unit, shares in saturated.items()},
                first_loss=_mean(np.logaddexp(0, -beta * above_base[:, k])),
                boundary=_mean(reference.boundary),
                end_of_turn=_mean_ratio(reference.end_logps, logps),
                end_of_turn_nats=_mean(-reference.end_logps),
                agreement={name: agreement(reference, columns[j]) for j, name in others},
                correlation={name: correlation(margins, columns[j].margins) for j, name in others},
                difficulty={name: correlation(hard[k], hard[j]) for j, name in others},
                dominance={kind: float(shares[k]) for kind, shares in dominant.items()},
            )
        )
    return result


def preferred(logps: np.ndarray) -> np.ndarray:
    """[N] 1 where the first of two log-probs [N, 2] is the larger, else 0; NaN where unknown."""
    return np.where(np.isnan(logps).any(axis=1), np.nan, logps[:, 0] > logps[:, 1])


def agreement(a: ReferenceColumns, b: ReferenceColumns) -> float:
    """The share of the pairs scored by both references on which they prefer the same response."""
    same = preferred(a.logps) == preferred(b.logps)
    return _mean(np.where(a.scored & b.scored, same, np.nan))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r over the entries known in both arrays; NaN for fewer than 3 or a constant."""
    known = ~np.isnan(a.ravel()) & ~np.isnan(b.ravel())
    x, y = a.ravel()[known], b.ravel()[known]
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def difficulty(table: ScoreTable, reference: ReferenceColumns) -> np.ndarray:
    """[N, 2] how far a response's log-prob is above what its length predicts, in nats / √byte.

    The residual of a linear regression of the log-prob on the bytes. Which responses are hard for
    their length is a property of the text, so references that are scored correctly agree on it.
    """
    size = table.response_bytes
    known = ~np.isnan(reference.logps)
    if known.sum() < 3:
        return np.full_like(reference.logps, np.nan)
    line = np.stack([np.ones(known.sum()), size[known]], axis=1)
    fit = np.linalg.lstsq(line, reference.logps[known], rcond=None)[0]
    return (reference.logps - fit[0] - fit[1] * size) / np.sqrt(np.maximum(size, 1))


def dominance(scores: ReferenceLogps, epsilon: float) -> dict[str, np.ndarray]:
    """The share of the pairs that each reference decides alone, [K] by kind.

    A reference's pull is the derivative of the virtual reference's log-prob with respect to its
    own, averaged over both responses; the pulls sum to 1. A reference decides a pair alone where
    its pull is above `DOMINATES`. Weights are ARWC's; "mrpo" is harmonic after CTRO.
    """
    raw = scores.reference_logps(list(range(scores.ref_chosen_logps.shape[1])), "none")
    weights = arwc_weights(*raw)
    clipped = ctro_clip(*raw, epsilon)
    of_kinds = {kind: [pulls(logps, weights, kind) for logps in raw] for kind in KINDS}
    of_kinds["mrpo"] = [pulls(logps, weights) for logps in clipped]
    usable = ~np.isnan(raw[0]).all(axis=1)
    return {
        kind: ((chosen + rejected)[usable] / 2 > DOMINATES).mean(0)
        for kind, (chosen, rejected) in of_kinds.items()
    }


def method_first_loss(
    scores: ReferenceLogps,
    aliases: Sequence[str],
    method: str,
    beta: float,
    normalize: str = "none",
) -> float:
    """A method's mean loss for a policy equal to the base; with DPO on the base it is ln 2."""
    targets = parse_method(method, aliases, beta=beta, normalize=normalize).targets(scores)
    virtual = (targets.virtual_chosen_logps - targets.virtual_rejected_logps).numpy()
    chosen, rejected = scores.reference_logps([0], normalize)
    return _mean(np.logaddexp(0, -beta * ((chosen - rejected)[:, 0] - virtual)))


def saturation(scores: ReferenceLogps, epsilon: float, unit: str) -> list[float]:
    """The share of each reference's responses that CTRO clips, [K]; 0 for the base."""
    chosen, rejected = scores.reference_logps(list(range(scores.ref_chosen_logps.shape[1])), unit)
    clipped = ctro_clip(chosen, rejected, epsilon)
    known = ~np.isnan(clipped[0])
    moved = 0.5 * (clipped[0] != chosen) + 0.5 * (clipped[1] != rejected)
    return [_mean(np.where(known, moved, np.nan)[:, k]) for k in range(chosen.shape[1])]


def _mean_ratio(values: np.ndarray, units: np.ndarray) -> float:
    """Σ values / Σ units over the entries that have both."""
    known = ~np.isnan(values) & ~np.isnan(units)
    total = float(units[known].sum())
    return float(values[known].sum()) / total if total else float("nan")


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
