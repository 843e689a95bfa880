"""The statistics of a comparison, and the sentences that state them.

Bootstrap over prompts and seeds, gains over the best single reference with intervals that hold
together, and in words: whether several references beat one, which one, and how sure that is.
Sentences are chosen by the intervals, never by the values alone. Where the intervals leave a
question open they say so, and how many held-out pairs would settle it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..intervals import CONFIDENCE, Interval, bootstrap_means, interval

MATTERS = 0.01  # the smallest gain, as a share of pairs, that is worth several references
RESAMPLES = 4000


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """What a method with several references gains over the best one with a single reference."""

    method: str
    over: str
    gain: Interval  # share of pairs; simultaneous over all methods of the standing


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """All methods at one size of the training data, judged by one metric."""

    accuracy: dict[str, Interval]  # by method
    seed_spread: dict[str, float]  # standard deviation over seeds; NaN for fewer than two
    best_single: str | None  # None where no method has one reference
    tied_singles: tuple[str, ...]  # other single references that may be as good as the best
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


def standing(
    draws: Draws, fraction: int, methods: Sequence[str], single: Sequence[bool]
) -> Standing:
    """The methods at one fraction (an index); `single` says which of them have one reference."""
    means, drawn = draws.means[:, fraction], draws.draws[:, :, fraction]
    accuracy = {name: interval(means[m], drawn[:, m]) for m, name in enumerate(methods)}
    spread = {
        name: float(np.nanstd(values, ddof=1)) if np.isfinite(values).sum() > 1 else float("nan")
        for name, values in zip(methods, draws.by_seed[:, fraction])
    }
    known = np.flatnonzero(np.isfinite(means)).tolist()
    singles = [m for m in known if single[m]]
    several = [m for m in known if not single[m]]
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


def _gain(means: np.ndarray, drawn: np.ndarray, method: int, over: int, count: int) -> Interval:
    """A method's accuracy minus another's, with one of `count` simultaneous intervals."""
    confidence = 1 - (1 - CONFIDENCE) / count
    return interval(means[method] - means[over], drawn[:, method] - drawn[:, over], confidence)


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis, of the finite values; NaN where there are none."""
    known = np.isfinite(values)
    number = known.sum(axis=-1)
    return np.where(known, values, 0.0).sum(axis=-1) / np.where(number > 0, number, np.nan)


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonOutcome:
    """What the sentences are made from."""

    metrics: Sequence[str]  # in words, the one that decides first
    fractions: Sequence[float]  # ascending; the last decides
    standings: Mapping[str, Sequence[Standing]]  # by metric, one for each fraction
    references: Mapping[str, str]  # of each method with one reference, the alias
    growth: Mapping[str, Interval]  # of each method, from the last fraction but one to the last
    pairs: int  # held-out
    seeds: int
    missing: int  # runs that failed


def verdict(outcome: ComparisonOutcome) -> list[str]:
    """Sentences, the answer first."""
    deciding = outcome.metrics[0]
    final = outcome.standings[deciding][-1]
    lines = [*_answer(final, outcome), *_others_say(outcome), *_by_size(outcome)]
    if outcome.seeds == 1:
        lines.append("One seed: the intervals do not include the spread between runs.")
    if outcome.missing:
        lines.append(
            f"{outcome.missing} runs FAILED and are missing here; run the same command again."
        )
    lines.append(
        f"Judged by {deciding} on {outcome.pairs:,} held-out pairs; intervals of gains hold "
        "together at 95 %."
    )
    return lines


def stance(standing: Standing) -> str:
    """Whether several references beat the best single one: better, worse or open."""
    if any(gain.gain.low > 0 for gain in standing.gains):
        return "better"
    return "worse" if all(gain.gain.high < 0 for gain in standing.gains) else "open"


def points(value: Interval) -> str:
    """A difference of shares.

    >>> points(Interval(0.0125, -0.004, 0.029))
    '+1.2 points (−0.4 to +2.9)'
    """
    low, high = _signed(value.low), _signed(value.high)
    return f"{_signed(value.value)} points ({low} to {high})"


def _answer(final: Standing, outcome: ComparisonOutcome) -> list[str]:
    """Whether several references are worth it."""
    if final.best_single is None:
        return [
            "No method here has a single reference, so the gain of several is unknown; "
            "add dpo:ALIAS for each reference to --methods."
        ]
    name = outcome.references[final.best_single]
    which = _which(final, outcome)
    if not final.gains:
        return [which]
    best = final.gains[0]
    if stance(final) == "better":
        beating = [gain for gain in final.gains if gain.gain.low > 0]
        lines = [
            f"Several references beat one here: {beating[0].method} gains "
            f"{points(beating[0].gain)} over {best.over}, the best with one."
        ]
        lines += [f"So does {gain.method}: {points(gain.gain)}." for gain in beating[1:]]
        return [*lines, which]
    settled = best.gain.high <= MATTERS
    until = "" if settled else " until more pairs show otherwise"
    lines = [
        f"One reference is enough here{until}, and it is {name}: {best.method}, the best with "
        f"several, stands at {points(best.gain)} against {best.over}."
    ]
    lines += [] if settled else [_open(best.gain, outcome.pairs)]
    return [*lines, which] if final.tied_singles else lines


def _which(final: Standing, outcome: ComparisonOutcome) -> str:
    """How sure the best single reference is the best."""
    assert final.best_single is not None
    name = outcome.references[final.best_single]
    if len(outcome.references) == 1:
        return f"No other single reference than {name} was tried."
    if not final.tied_singles:
        return f"Of single references {name} is clearly the best."
    tied = ", ".join(outcome.references[method] for method in final.tied_singles)
    return f"Of single references {name} does best, but {tied} may be as good."


def _open(gain: Interval, pairs: int) -> str:
    """What the interval can't rule out, and how many pairs would."""
    half_width = (gain.high - gain.low) / 2
    needed = pairs * (half_width / MATTERS) ** 2
    return (
        f"A gain of up to {100 * gain.high:.1f} points can't be ruled out; telling a gain of "
        f"{100 * MATTERS:.0f} point from none takes about {_round(needed):,} held-out pairs."
    )


def _others_say(outcome: ComparisonOutcome) -> list[str]:
    """The other metrics, where any of them gives another answer."""
    deciding, *others = outcome.metrics
    final = outcome.standings[deciding][-1]
    if not final.gains:
        return []
    answers = {
        "better": "several references do beat one",
        "worse": "several references do worse than one",
        "open": "no gain of several references is shown",
    }
    lines = []
    for metric in others:
        standing = outcome.standings[metric][-1]
        if standing.gains and stance(standing) != stance(final):
            first = standing.gains[0]
            lines.append(
                f"Judged by {metric} instead, {answers[stance(standing)]}: {first.method} against "
                f"{first.over} {points(first.gain)}."
            )
    return lines or ["The other metrics give the same answer."] * bool(others)


def _by_size(outcome: ComparisonOutcome) -> list[str]:
    """Whether less data gives another answer, and whether more would help."""
    if len(outcome.fractions) < 2:
        return []
    standings = outcome.standings[outcome.metrics[0]]
    final = standings[-1]
    lines = []
    for fraction, standing in zip(outcome.fractions[:-1], standings):
        if standing.gains and final.gains and stance(standing) != stance(final):
            gain = standing.gains[0]
            lines.append(
                f"With {percent(fraction)} of the training pairs the answer is another: "
                f"{gain.method} against {gain.over} {points(gain.gain)}."
            )
    best = max(outcome.growth, key=lambda name: final.accuracy[name].value)
    change, step = outcome.growth[best], outcome.fractions[-2:]
    says = "whether more pairs would help is open."
    if change.low > 0:
        says = "more pairs would help."
    elif change.high < 0:
        says = "more pairs did worse; look at the learning rate and the labels."
    lines.append(
        f"From {percent(step[0])} to {percent(step[1])} of the training pairs {best} changes by "
        f"{points(change)}: {says}"
    )
    return lines


def percent(fraction: float) -> str:
    """A share of the training pairs, as 20 %."""
    return f"{100 * fraction:.3g} %"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _round(count: float) -> int:
    """Up, to two digits: the number is a rough estimate."""
    size = 10 ** max(len(str(int(count))) - 2, 0)
    return int(-(-count // size) * size)
