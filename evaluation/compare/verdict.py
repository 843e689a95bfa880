"""The statistics of a comparison, and the sentences that state them.

Bootstrap over prompts and seeds, gains over the best single reference with intervals that hold
together, and in words: whether several references beat one, which one, and how sure that is.
Sentences are chosen by the intervals, never by the values alone. Where the intervals leave a
question open they say so, and how many held-out pairs would settle it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from ..config import Metric
from ..intervals import CONFIDENCE, Interval, bootstrap_means, interval, ratio
from .results import Comparison, Condition, Result, percent, points

MATTERS = 0.01  # the smallest gain, as a share of pairs, that is worth several references
RESAMPLES = 4000


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """Accuracies of M methods under C conditions, the last of which decides; of each resample."""

    means: np.ndarray  # [M, C]
    by_seed: np.ndarray  # [M, C, S]
    draws: np.ndarray  # [B, M, C]


def resample(
    right: np.ndarray, prompts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> Draws:
    """Means over pairs and seeds, and their bootstrap.

    Args:
        right: [N, M, C, S] whether a run is right about a pair: pairs, methods, conditions, seeds;
            NaN where it has no answer. A missing run is NaN throughout; the mean of its method is
            over the other seeds.
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


def judge(
    draws: Draws,
    references: Mapping[str, Sequence[str]],
    conditions: Sequence[Condition],
    metric: Metric,
) -> list[Result]:
    """Every method at every condition; `references` has the methods in the order of the draws."""
    results = []
    for at, condition in enumerate(conditions):
        means, drawn = draws.means[:, at], draws.draws[:, :, at]
        singles, several = _finished(means, references)
        for m, method in enumerate(references):
            seeds = draws.by_seed[m, at]
            spread = np.nanstd(seeds, ddof=1) if np.isfinite(seeds).sum() > 1 else np.nan
            gains = bool(singles) and m in several
            results.append(
                Result(
                    method=method,
                    fraction=condition.fraction,
                    label_noise=condition.label_noise,
                    metric=metric,
                    accuracy=interval(means[m], drawn[:, m]),
                    seed_spread=float(spread),
                    gain=_gain(means, drawn, m, singles[0], len(several)) if gains else None,
                    over=list(references)[singles[0]] if gains else None,
                )
            )
    return results


def tied_singles(draws: Draws, references: Mapping[str, Sequence[str]]) -> list[str]:
    """Other methods with one reference that may be as good as the best, at the last condition."""
    means, drawn = draws.means[:, -1], draws.draws[:, :, -1]
    singles, _ = _finished(means, references)
    leads = {
        m: _gain(means, drawn, singles[0], m, len(singles) - 1).low for m in sorted(singles[1:])
    }
    return [list(references)[m] for m, low in leads.items() if not low > 0]


def change(draws: Draws, methods: Iterable[str], start: int, end: int) -> dict[str, Interval]:
    """What each method gains from one condition, by its place, to another."""
    values = draws.means[:, end] - draws.means[:, start]
    changes = draws.draws[:, :, end] - draws.draws[:, :, start]
    return {method: interval(values[m], changes[:, m]) for m, method in enumerate(methods)}


def _finished(
    means: np.ndarray, references: Mapping[str, Sequence[str]]
) -> tuple[list[int], list[int]]:
    """Methods that have a mean: those with one reference, the best first, and the others."""
    known = [(m, len(names)) for m, names in enumerate(references.values()) if isfinite(means[m])]
    singles = sorted((m for m, count in known if count == 1), key=lambda m: -means[m])
    return singles, [m for m, count in known if count > 1]


def _gain(means: np.ndarray, drawn: np.ndarray, method: int, over: int, count: int) -> Interval:
    """A method's accuracy minus another's, with one of `count` simultaneous intervals."""
    confidence = 1 - (1 - CONFIDENCE) / count
    return interval(means[method] - means[over], drawn[:, method] - drawn[:, over], confidence)


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis, of the finite values; NaN where there are none."""
    return ratio(np.nansum(values, axis=-1), np.isfinite(values).sum(axis=-1))


def verdict(comparison: Comparison, tied: Sequence[str]) -> list[str]:
    """Sentences, the answer first; `tied` are the methods that `tied_singles` finds."""
    lines = [*_answer(comparison, tied), *_others_say(comparison), *_elsewhere(comparison)]
    lines += [*_by_size(comparison), *_by_noise(comparison)]
    if len(comparison.seeds) == 1:
        lines.append("One seed: the intervals do not include the spread between runs.")
    if comparison.missing:
        lines.append(
            f"{len(comparison.missing)} runs FAILED and are missing here; run the same command "
            "again."
        )
    lines.append(
        f"Judged by {comparison.words(comparison.metric)} on {comparison.pairs:,} held-out pairs; "
        "intervals of gains hold together at 95 %."
    )
    return lines


Gains = Sequence[tuple[Result, Interval]]  # of methods with several references, the largest first


def _gains(comparison: Comparison, condition: Condition, metric: Metric | None = None) -> Gains:
    results = comparison.results_at(condition, metric or comparison.metric).values()
    return [(result, result.gain) for result in results if result.gain]


def stance(gains: Gains) -> str:
    """Whether several references beat the best single one: better, worse or open."""
    if any(gain.low > 0 for _, gain in gains):
        return "better"
    return "worse" if all(gain.high < 0 for _, gain in gains) else "open"


def _answer(comparison: Comparison, tied: Sequence[str]) -> list[str]:
    """Whether several references are worth it, and how sure the best single one is the best."""
    final = comparison.results_at(comparison.conditions[-1], comparison.metric)
    singles = {name: refs[0] for name, refs in comparison.references.items() if len(refs) == 1}
    ranked = [name for name in final if name in singles and isfinite(final[name].accuracy.value)]
    if not ranked:
        return [
            "No method here has a single reference, so the gain of several is unknown; "
            "add dpo:ALIAS for each reference to --methods."
        ]
    name = singles[ranked[0]]
    which = f"Of single references {name} is clearly the best."
    equals = ", ".join(dict.fromkeys(singles[m] for m in tied if singles[m] != name))
    if len(set(singles.values())) == 1:
        which = f"No other single reference than {name} was tried."
    elif equals:
        which = f"Of single references {name} does best, but {equals} may be as good."
    gains = _gains(comparison, comparison.conditions[-1])
    if not gains:
        return [which]
    if stance(gains) == "better":
        (best, most), *others = [(result, gain) for result, gain in gains if gain.low > 0]
        lines = [
            f"Several references beat one here: {best.method} gains {points(most)} over "
            f"{best.over}, the best with one."
        ]
        lines += [f"So does {result.method}: {points(gain)}." for result, gain in others]
        return [*lines, which]
    best, most = gains[0]
    settled = most.high <= MATTERS
    until = "" if settled else " until more pairs show otherwise"
    lines = [
        f"One reference is enough here{until}, and it is {name}: {best.method}, the best with "
        f"several, stands at {points(most)} against {best.over}."
    ]
    lines += [] if settled else [_open(most, comparison.pairs)]
    return [*lines, which] if equals else lines


def _open(gain: Interval, pairs: int) -> str:
    """What the interval can't rule out, and how many pairs would; rounded up to two digits."""
    half_width = (gain.high - gain.low) / 2
    needed = pairs * (half_width / MATTERS) ** 2
    size = 10 ** max(len(str(int(needed))) - 2, 0)
    return (
        f"A gain of up to {100 * gain.high:.1f} points can't be ruled out; telling a gain of "
        f"{100 * MATTERS:.0f} point from none takes about {int(-(-needed // size) * size):,} "
        "held-out pairs."
    )


def _others_say(comparison: Comparison) -> list[str]:
    """The other metrics, where any of them gives another answer."""
    final = _gains(comparison, comparison.conditions[-1])
    if not final:
        return []
    answers = {
        "better": "several references do beat one",
        "worse": "several references do worse than one",
        "open": "no gain of several references is shown",
    }
    lines = []
    for metric in comparison.metrics:
        gains = _gains(comparison, comparison.conditions[-1], metric)
        if gains and stance(gains) != stance(final):
            first, gain = gains[0]
            lines.append(
                f"Judged by {comparison.words(metric)} instead, {answers[stance(gains)]}: "
                f"{first.method} against {first.over} {points(gain)}."
            )
    return lines or ["The other metrics give the same answer."]


def _elsewhere(comparison: Comparison) -> list[str]:
    """The conditions under which the answer is another: less data, more noise."""
    *others, last = comparison.conditions
    final, lines = _gains(comparison, last), []
    for condition in sorted(others, key=lambda condition: condition.label_noise):
        gains = _gains(comparison, condition)
        if gains and final and stance(gains) != stance(final):
            first, gain = gains[0]
            pairs = str(condition).replace("the pairs", "the training pairs").replace(",", " and")
            lines.append(
                f"With {pairs} the answer is another: "
                f"{first.method} against {first.over} {points(gain)}."
            )
    return lines


def _by_size(comparison: Comparison) -> list[str]:
    """Whether more data would help."""
    if len(comparison.fractions) < 2:
        return []
    *_, smaller, largest = comparison.fractions
    best = next(iter(comparison.results_at(comparison.conditions[-1], comparison.metric)))
    growth = comparison.growth[best]
    says = "whether more pairs would help is open."
    if growth.low > 0:
        says = "more pairs would help."
    elif growth.high < 0:
        says = "more pairs did worse; look at the learning rate and the labels."
    return [
        f"From {percent(smaller)} to {percent(largest)} of the training pairs {best} changes "
        f"by {points(growth)}: {says}"
    ]


def _by_noise(comparison: Comparison) -> list[str]:
    """Who is best at most noise, and what the noise costs it and the best at least noise."""
    if len(comparison.label_noises) < 2:
        return []
    least, *_, most = comparison.label_noises
    largest, *_ = reversed(comparison.fractions)
    noisy = comparison.results_at(Condition(largest, most), comparison.metric)
    best = next(iter(noisy))
    before = next(iter(comparison.results_at(Condition(largest, least), comparison.metric)))
    lines = [
        f"From {percent(least)} to {percent(most)} of the labels turned round "
        + ", ".join(
            f"{method} changes by {points(comparison.noise_cost[method])}"
            for method in dict.fromkeys([before, best])
        )
        + f"; {best} is the most accurate then."
    ]
    gains = _gains(comparison, Condition(largest, most))
    if gains and stance(gains) == stance(_gains(comparison, comparison.conditions[-1])):
        first, gain = gains[0]
        lines.append(
            f"With {percent(most)} turned round {first.method}, the best with several references, "
            f"stands at {points(gain)} against {first.over}, the best with one."
        )
    return lines
