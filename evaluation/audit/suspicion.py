"""Which labels deserve a second look, from the references' scores alone: numbers in, ranks out.

A reference's margin per byte, divided by its usual size, is one unit for all references. How much
each reference counts is learned from the labels (`method/fitted.py`), so that a reference that
predicts nothing has no influence. Three questions, each a score by which pairs are ranked:

- against:  do the references find the label unlikely?
- divided:  does one reference clearly prefer the chosen, another clearly the rejected response?
- length:   does length predict the label where the references, adjusted for length, do not?
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from ...method.fitted import fit_weights, logistic_regression

SIGNIFICANT = 3.84  # likelihood ratio (chi-squared, 95 %) at which length predicts labels
RIDGE = 1e-3  # of the regression on length, on the sum over pairs


@dataclass(frozen=True, slots=True, eq=False)
class Suspicion:
    """What the references say about N labels. Scores are NaN where a pair is not suspect."""

    units: np.ndarray  # [N, K] margins per byte in their usual size; NaN where missing
    weights: np.ndarray  # [K] of the units in the log-odds of the label, 0 or more
    label_probability: np.ndarray  # [N] by the references; NaN where none scored the pair
    length_probability: np.ndarray  # [N] of the label from length alone
    length_weight: float  # log-odds per log ratio of lengths; 0: length predicts nothing
    against: np.ndarray  # [N] log-odds against the label
    divided: np.ndarray  # [N] the smaller of the strongest support and the strongest objection
    length: np.ndarray  # [N] length's log-odds for the label plus the references' against it

    @property
    def informed(self) -> bool:
        """Whether any reference predicts the labels at all."""
        return bool(self.weights.any())


def suspicion(
    byte_margins: np.ndarray, response_bytes: np.ndarray, prompts: np.ndarray
) -> Suspicion:
    """Judge N labels by K references.

    Args:
        byte_margins: [N, K] nats per byte of chosen minus the same of rejected, NaN where missing.
        response_bytes: [N, 2] lengths of the chosen and the rejected response.
        prompts: [N] integers, equal for equal prompts.
    """
    units = byte_margins / usual_size(byte_margins)
    weights = _weights(units, prompts)
    logits = _combined(units, weights)
    ratio = np.log(response_bytes[:, 0] / response_bytes[:, 1])
    length_weight = _length_weight(ratio)
    length_logits = length_weight * ratio
    adjusted = _without_length(units, ratio)
    adjusted_logits = _combined(adjusted, _weights(adjusted, prompts))
    divided = np.minimum(_strongest(units), _strongest(-units))
    explained = (length_logits > 0) & (adjusted_logits < 0)
    return Suspicion(
        units=units,
        weights=weights,
        label_probability=expit(logits),
        length_probability=expit(length_logits),
        length_weight=length_weight,
        against=np.where(logits < 0, -logits, np.nan),
        divided=np.where(divided > 1, divided, np.nan),
        length=np.where(explained, length_logits - adjusted_logits, np.nan),
    )


def usual_size(margins: np.ndarray) -> np.ndarray:
    """[K] the median absolute margin of each reference, which outliers do not move; never 0."""
    sizes = np.abs(margins)
    with np.errstate(all="ignore"):
        usual = np.nanmedian(np.where(sizes > 0, sizes, np.nan), axis=0)
    return np.where(usual > 0, usual, 1.0)


def _weights(units: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """[K] log-odds of the label per unit; all 0 where nothing can be learned."""
    if np.isnan(units).any(axis=1).all():
        return np.zeros(units.shape[1])
    return fit_weights(units, prompts).coefficients


def _combined(units: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[N] log-odds of the label; the plain mean where no reference predicts labels."""
    present = ~np.isnan(units)
    if weights.any():
        logits = np.nansum(units * weights, axis=1)
    else:
        logits = np.nansum(units, axis=1) / np.maximum(present.sum(axis=1), 1)
    return np.where(present.any(axis=1), logits, np.nan)


def _length_weight(ratio: np.ndarray) -> float:
    """Log-odds of the label per log ratio of lengths [N], by logistic regression.

    0 where the likelihood is not significantly better than without: length then explains no label.
    """
    ridge = RIDGE / len(ratio)
    fit = logistic_regression(ratio[:, None], np.ones(len(ratio)), ridge=ridge, non_negative=False)
    weight = float(fit[0])
    gain = np.log(2) - np.logaddexp(0, -weight * ratio)
    return weight if 2 * gain.sum() > SIGNIFICANT else 0.0


def _without_length(units: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """[N, K] the units less the part that is proportional to the log ratio of lengths."""
    present = ~np.isnan(units)
    size = np.maximum((present * ratio[:, None] ** 2).sum(axis=0), 1e-12)
    return units - np.nansum(units * ratio[:, None], axis=0) / size * ratio[:, None]


def _strongest(units: np.ndarray) -> np.ndarray:
    """[N] the largest of each row; −inf where all are missing."""
    return np.where(np.isnan(units), -np.inf, units).max(axis=1)
