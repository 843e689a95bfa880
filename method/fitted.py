"""Weights learned from the human labels: which references predict what people preferred.

With the geometric virtual reference, DPO's implied preference is a logistic model of the margins
D_k = log pi_k(chosen) − log pi_k(rejected). So the weights are the coefficients of a logistic
regression of the label on (D_1 … D_K), without intercept and none below 0: exact for the geometric
kind, a heuristic for the others. Every pair is fitted by the prompts of other folds, so that its
weight has not seen its own label; a bootstrap over prompts gives intervals and the references
that could as well be dropped. Numpy alone: K is small, and projected Newton ends in a few steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from ..errors import UserError

FOLDS = 5
RIDGE = 1e-4
"""Penalty on margins scaled to a mean square of 1; it matters where labels are separable."""

CONFIDENCE = 0.95
"""That all K intervals hold at once; each holds with 1 − 0.05/K (Bonferroni)."""


@dataclass(frozen=True, slots=True, eq=False)
class FittedWeights:
    """The fit of all pairs, of each fold's complement, and how sure it is."""

    weights: np.ndarray  # [K], sum 1: for held-out pairs
    coefficients: np.ndarray  # [K], per nat of margin: before they were made to sum to 1
    fold_weights: np.ndarray  # [F, K]: row f was fitted without the prompts of fold f
    pairs: int  # pairs that every reference has scored, the ones that were used
    intervals: np.ndarray | None = None  # [K, 2] on the weights; None without a bootstrap
    drop: tuple[int, ...] = ()  # columns whose coefficient's interval contains 0

    def for_prompts(self, prompts: np.ndarray) -> np.ndarray:
        """[N, K]: for each training pair, the weights that have not seen its prompt."""
        return self.fold_weights[_fold_of(prompts, len(self.fold_weights))]

    def describe(self, aliases: Sequence[str]) -> list[str]:
        """Lines for the user: each weight with its interval, and what to drop."""
        lines = [f"fitted weights from {self.pairs:,} pairs:"]
        for k, alias in enumerate(aliases):
            between = ""
            if self.intervals is not None:
                between = "  ({:.3f} to {:.3f})".format(*self.intervals[k])
            lines.append(f"  {alias}  {self.weights[k]:.3f}{between}")
        if not self.coefficients.any():
            lines.append(
                f"WARNING: no reference predicts the labels; {aliases[0]}, the base, is used ALONE"
            )
        elif self.drop:
            names = ", ".join(aliases[k] for k in self.drop)
            lines.append(f"references that may add nothing (interval contains 0): {names}")
        return lines


def fit_weights(
    margins: np.ndarray,
    prompts: np.ndarray,
    *,
    folds: int = FOLDS,
    bootstrap: int = 0,
    seed: int = 0,
) -> FittedWeights:
    """Fit weights to pairs whose first response is the one people chose.

    Minimizes mean_i log(1 + exp(−Σ_k w_k D_ik)) + ridge over w ≥ 0; the weights are w / Σ w, or the
    base alone if every w is 0. Deterministic.

    Args:
        margins: [N, K] D in nats, NaN where a reference is missing (such pairs are left out).
        prompts: [N] integers, equal for equal prompts: folds and bootstrap go by prompt.
        folds: parts of the prompts; a prompt's fold is its number modulo `folds`.
        bootstrap: resamples of the prompts for the intervals; 0: no intervals.
        seed: of the bootstrap alone.

    The first reference agrees with the labels, the second is their opposite:

    >>> d = np.random.default_rng(0).logistic(1.0, 1.0, 500)
    >>> fit_weights(np.stack([d, -d], axis=1), np.arange(500)).weights
    array([1., 0.])
    """
    complete = ~np.isnan(margins).any(axis=1)
    if not complete.any():
        raise UserError(
            "weighting fitted found no pair that every reference has scored; "
            "use --weighting arwc, or leave out the reference that misses most"
        )
    margins, prompts = margins[complete].astype(np.float64), np.asarray(prompts)[complete]
    scale = np.sqrt(np.mean(margins**2)) or 1.0
    scaled = np.ascontiguousarray(margins.T / scale)
    zeros, ones = np.zeros(len(scaled)), np.ones(len(prompts))
    full = _non_negative_logistic(scaled, ones, zeros)
    # Started from zero like the full fit: from its result, a fold would see its own labels.
    fold = _fold_of(prompts, folds)
    fold_fits = [_non_negative_logistic(scaled, ones * (fold != f), zeros) for f in range(folds)]
    intervals: np.ndarray | None = None
    drop: tuple[int, ...] = ()
    if bootstrap:
        intervals, drop = _intervals(_bootstrap(scaled, prompts, full, bootstrap, seed))
    return FittedWeights(
        weights=_sum_to_one(full),
        coefficients=full / scale,
        fold_weights=np.stack([_sum_to_one(fit) for fit in fold_fits]),
        pairs=len(prompts),
        intervals=intervals,
        drop=drop,
    )


def _non_negative_logistic(
    margins: np.ndarray, counts: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """argmin over w ≥ 0 of Σ_i c_i log(1 + exp(−w·D_i)) / Σ_i c_i + RIDGE/2 |w|².

    Projected Newton (Bertsekas 1982): coordinates held at 0 take a gradient step, the others a
    Newton step; both are projected, and halved until the objective falls. [K, N], [N], [K] -> [K].
    """
    total = counts.sum()
    if total == 0:
        return np.zeros_like(start)
    shares = counts / total

    def objective(w: np.ndarray, logits: np.ndarray) -> float:
        softplus = np.maximum(-logits, 0) + np.log1p(np.exp(-np.abs(logits)))
        return shares @ softplus + RIDGE / 2 * w @ w

    w, logits = start, start @ margins
    value = objective(w, logits)
    for _ in range(100):
        wrong = 0.5 - 0.5 * np.tanh(logits / 2)  # sigmoid(−logits), without overflow
        gradient = RIDGE * w - margins @ (shares * wrong)
        distance = np.abs(w - np.maximum(w - gradient, 0)).max()
        if distance < 1e-9:
            break
        free = np.flatnonzero((w > min(1e-3, distance)) | (gradient <= 0))
        curvature = shares * wrong * (1 - wrong)
        hessian = (margins * curvature) @ margins.T + RIDGE * np.eye(len(w))
        step = -gradient
        step[free] = np.linalg.solve(hessian[np.ix_(free, free)], step[free])
        size = 1.0
        while True:
            candidate = np.maximum(w + size * step, 0)
            logits = candidate @ margins
            reached = objective(candidate, logits)
            if reached <= value + 1e-4 * gradient @ (candidate - w) or size < 1e-8:
                break
            size /= 2
        w, value = candidate, reached
    return w


def _bootstrap(
    margins: np.ndarray, prompts: np.ndarray, full: np.ndarray, resamples: int, seed: int
) -> np.ndarray:
    """[B, K] coefficients of margins [K, N], each fitted to as many prompts drawn anew."""
    rng = np.random.default_rng(seed)
    distinct, prompt_of = np.unique(prompts, return_inverse=True)
    fits = []
    for _ in range(resamples):
        drawn = np.bincount(rng.integers(0, len(distinct), len(distinct)), minlength=len(distinct))
        fits.append(_non_negative_logistic(margins, drawn[prompt_of].astype(np.float64), full))
    return np.stack(fits)


def _intervals(coefficients: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Percentile intervals [K, 2] of the weights, and the columns whose coefficient may be 0."""
    tail = (1 - CONFIDENCE) / 2 / coefficients.shape[1]
    weights = np.apply_along_axis(_sum_to_one, 1, coefficients)
    low = np.quantile(weights, tail, axis=0, method="lower")
    high = np.quantile(weights, 1 - tail, axis=0, method="higher")
    may_be_zero = np.quantile(coefficients, tail, axis=0, method="lower") <= 0
    return np.stack([low, high], axis=1), tuple(np.flatnonzero(may_be_zero).tolist())


def _sum_to_one(coefficients: np.ndarray) -> np.ndarray:
    """Weights [K]; the base alone (column 0) if there is nothing to divide."""
    total = coefficients.sum()
    return coefficients / total if total > 0 else np.eye(len(coefficients))[0]


def _fold_of(prompts: np.ndarray, folds: int) -> np.ndarray:
    return (np.asarray(prompts).astype(np.uint64) % np.uint64(folds)).astype(np.intp)


def logistic_regression(
    features: np.ndarray, sample_weights: np.ndarray, *, ridge: float, non_negative: bool
) -> np.ndarray:
    """argmin over w [K] of the weighted mean of log(1 + exp(−w·x)) plus ridge/2 |w|².

    Args:
        features: [N, K] x, one row for each sample.
        sample_weights: [N] 0 or more.
        non_negative: whether to search among w ≥ 0 alone.
    """
    shares = sample_weights / sample_weights.sum()

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        logits = features @ w
        wrong = 0.5 - 0.5 * np.tanh(logits / 2)  # sigmoid(−logits), without overflow
        value = shares @ np.logaddexp(0, -logits) + ridge / 2 * w @ w
        return float(value), ridge * w - features.T @ (shares * wrong)

    size = features.shape[1]
    bounds = [(0.0, None)] * size if non_negative else None
    options = {"ftol": 1e-15, "gtol": 1e-10}
    fit = minimize(
        objective, np.zeros(size), jac=True, method="L-BFGS-B", bounds=bounds, options=options
    )
    return np.asarray(fit.x)
