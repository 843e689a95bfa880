"""Which method does better, how sure that is, and what follows: numbers in, numbers and words out.

Every run answers for the same held-out pairs: right (1) or wrong (0) by a yardstick. Intervals
come from a paired bootstrap that draws prompts and, where there are several, seeds; all methods
see the same draws, so that what makes a pair hard for all of them cancels in a difference. The
intervals of the gains hold together (Bonferroni), since the best of several is looked for.

`compare.py` trains and evaluates the runs; `verdict.py` puts the outcome into words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .intervals import CONFIDENCE, Interval, bootstrap_means, interval

RESAMPLES = 4000


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """What a method with several references has over the best one with a single reference."""

    method: str
    over: str
    gain: Interval  # share of pairs; holds together with those of the other methods


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """All methods at one size of the training data, judged by one yardstick."""

    accuracy: dict[str, Interval]  # by method
    seed_spread: dict[str, float]  # standard deviation over seeds; NaN for fewer than two
    best_single: str | None  # None where no method has one reference
    tied_singles: tuple[str, ...]  # other single references that can't be told from the best
    gains: tuple[Gain, ...]  # the largest first


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """Accuracies of M methods at F fractions, and of each resample."""

    means: np.ndarray  # [M, F]
    by_seed: np.ndarray  # [M, F, S]
    draws: np.ndarray  # [B, M, F]


def resample(
    right: np.ndarray, prompts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> Draws:
    """Means over pairs and seeds, and their bootstrap.

    Args:
        right: [N, M, F, S] whether a run is right about a pair: pairs, methods, fractions, seeds;
            NaN where it has no answer. A run that is missing is NaN throughout, and its method's
            mean is over the other seeds.
        prompts: [N] integers, equal for equal prompts.
    """
    pairs, *shape = right.shape
    num_seeds = shape[-1]
    means, draws = bootstrap_means(right.reshape(pairs, -1), prompts, resamples, seed)
    by_seed, drawn = means.reshape(shape), draws.reshape(resamples, *shape)
    if num_seeds > 1:
        chosen = np.random.default_rng((seed, 1)).integers(num_seeds, size=(resamples, num_seeds))
        drawn = np.take_along_axis(drawn, chosen[:, None, None, :], axis=3)
    return Draws(_mean(by_seed), by_seed, _mean(drawn))


def standing(
    draws: Draws, fraction: int, methods: Sequence[str], single: Sequence[bool]
) -> Standing:
    """The methods at one fraction (its place), `single`: which of them have one reference."""
    means, drawn = draws.means[:, fraction], draws.draws[:, :, fraction]
    accuracy = {name: interval(means[m], drawn[:, m]) for m, name in enumerate(methods)}
    spread = {
        name: float(np.nanstd(values, ddof=1)) if np.isfinite(values).sum() > 1 else float("nan")
        for name, values in zip(methods, draws.by_seed[:, fraction])
    }
    singles = [m for m, one in enumerate(single) if one and np.isfinite(means[m])]
    several = [m for m, one in enumerate(single) if not one and np.isfinite(means[m])]
    if not singles:
        return Standing(
            accuracy=accuracy, seed_spread=spread, best_single=None, tied_singles=(), gains=()
        )
    best = max(singles, key=lambda m: means[m])
    behind = {m: _gain(means, drawn, best, m, len(singles) - 1) for m in singles if m != best}
    gains = [
        Gain(method=methods[m], over=methods[best], gain=_gain(means, drawn, m, best, len(several)))
        for m in several
    ]
    return Standing(
        accuracy=accuracy,
        seed_spread=spread,
        best_single=methods[best],
        tied_singles=tuple(methods[m] for m, lead in behind.items() if not lead.low > 0),
        gains=tuple(sorted(gains, key=lambda gain: -gain.gain.value)),
    )


def growth(draws: Draws, method: int, fraction: int, larger: int) -> Interval:
    """What a method gains from one fraction of the pairs to a larger one."""
    change = draws.draws[:, method, larger] - draws.draws[:, method, fraction]
    return interval(draws.means[method, larger] - draws.means[method, fraction], change)


def _gain(means: np.ndarray, drawn: np.ndarray, one: int, other: int, together: int) -> Interval:
    """The difference of two methods, with an interval that holds together with `together` − 1
    others."""
    confidence = 1 - (1 - CONFIDENCE) / together
    return interval(means[one] - means[other], drawn[:, one] - drawn[:, other], confidence)


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis, of what is there; NaN where nothing is."""
    known = np.isfinite(values)
    counts = known.sum(axis=-1)
    return np.where(known, values, 0.0).sum(axis=-1) / np.where(counts > 0, counts, np.nan)
