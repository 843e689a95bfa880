"""Confidence intervals of means over pairs: the percentile bootstrap, drawing whole prompts.

Pairs of one prompt are not independent, so a resample draws prompts, and each brings all its
pairs. All columns of one call share the resamples, so the difference of two columns of draws is a
paired bootstrap. scipy.stats.bootstrap serves neither: it draws single rows, and evaluates a
statistic where sums by prompt and a matrix product do.

    means, draws = bootstrap_means(np.stack([right_a, right_b], axis=1), prompts)
    gain = interval(means[0] - means[1], draws[:, 0] - draws[:, 1])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 1000
DRAWN_AT_ONCE = 2**22  # random numbers of one block of resamples


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % interval; the bounds are NaN where no interval can be computed."""

    value: float
    low: float
    high: float

    def percent(self) -> str:
        """A share in percent, as tables show it.

        >>> Interval(0.5625, 0.5, 0.625).percent()
        '56.2 (50.0–62.5)'
        """
        return f"{100 * self.value:.1f} ({100 * self.low:.1f}–{100 * self.high:.1f})"

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def bootstrap_means(
    values: np.ndarray, clusters: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each column, and the means of its resamples.

    Args:
        values: [N, M] a number for each pair and quantity; NaN where a pair has none.
        clusters: [N] integers, equal for pairs that are drawn together.

    Returns:
        [M] means and [resamples, M] means of the resamples. The mean of a resample in which a
        column has no value is NaN; with fewer than two clusters all of them are.

    >>> means, draws = bootstrap_means(np.array([[1.0], [0.0], [np.nan]]), np.arange(3))
    >>> means.tolist(), draws.shape
    ([0.5], (1000, 1))
    """
    present = ~np.isnan(values)
    distinct, cluster_of = np.unique(clusters, return_inverse=True)
    sums = _by_cluster(np.where(present, values, 0.0), cluster_of, len(distinct))
    counts = _by_cluster(present.astype(np.float64), cluster_of, len(distinct))
    means = ratio(sums.sum(0), counts.sum(0))
    if len(distinct) < 2:
        return means, np.full((resamples, values.shape[1]), np.nan)
    rng = np.random.default_rng(seed)
    draws = []
    block = max(1, DRAWN_AT_ONCE // len(distinct))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = rng.integers(len(distinct), size=(size, len(distinct)))
        times = np.stack([np.bincount(row, minlength=len(distinct)) for row in drawn])
        draws.append(ratio(times @ sums, times @ counts))
    return means, np.concatenate(draws)


def interval(value: float, draws: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """The percentile interval of a value from its resamples [B]; NaN ones are left out."""
    known = draws[~np.isnan(draws)]
    if len(known) == 0:
        return Interval(float(value), float("nan"), float("nan"))
    tail = (1 - confidence) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def mean_intervals(values: np.ndarray, clusters: np.ndarray, seed: int = 0) -> list[Interval]:
    """The mean of each column of `values` [N, M] with its interval."""
    means, draws = bootstrap_means(values, clusters, seed=seed)
    return [interval(mean, column) for mean, column in zip(means, draws.T)]


def wilson(right: np.ndarray) -> Interval:
    """A share with Wilson's 95 % interval, which also holds where all are right.

    >>> wilson(np.array([1, 1, 1, 1, 1, 1, 1, 1, 0, 0])).percent()
    '80.0 (49.0–94.3)'
    """
    from scipy.stats import binomtest

    test = binomtest(int(right.sum()), len(right))
    low, high = test.proportion_ci(method="wilson")
    return Interval(test.statistic, low, high)


def _by_cluster(values: np.ndarray, cluster_of: np.ndarray, num_clusters: int) -> np.ndarray:
    """Sums [C, M] of the rows of each cluster."""
    return np.stack([np.bincount(cluster_of, column, num_clusters) for column in values.T], axis=1)


def ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means from sums and counts; NaN for a count of 0."""
    return sums / np.where(counts > 0, counts, np.nan)
