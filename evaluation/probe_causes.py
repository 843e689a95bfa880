"""Which mistake gives the stored numbers: known ones, each tried on the probe's pairs.

Those here can be tried on the log-probs at hand; `probe_renderings.py` has those that show the
model another text, and need the pairs scored once more. A mistake that gives the stored scores of
nearly all responses is named; otherwise what differs is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.pairs import Pair
from .findings import Finding
from .plain_scoring import PlainScore

EXPLAINS = 0.8  # share of the responses that a mistake must reproduce
FEWEST = 3  # responses that it must reproduce and the right way does not
BY_CHANCE = 0.1  # chance that one of many sums comes as near by accident, at most


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a recomputed log-prob may be from the stored one, in nats."""

    sequence: float
    token: float

    @classmethod
    def of(cls, exact: bool) -> Tolerance:
        """float32 throughout; or a lower precision, where a token's log-prob is off by 0.05."""
        return cls(2e-3, 2e-5) if exact else cls(0.1, 0.1)

    def fits(self, stored: float, recomputed: float, tokens: int) -> bool:
        return bool(abs(stored - recomputed) <= self.of_sum(tokens))

    def of_sum(self, tokens: int) -> float:
        return self.sequence + self.token * tokens


@dataclass(frozen=True, slots=True, eq=False)
class Probed:
    """One response: what the store says, and what the plain way gives."""

    pair: Pair
    branch: int  # 0 chosen, 1 rejected
    stored: float
    stored_tokens: float  # NaN where unknown
    stored_prompt_tokens: float  # in front of the chosen response
    score: PlainScore
    other: PlainScore  # of the pair's other response

    def agrees(self, tolerance: Tolerance) -> bool:
        return tolerance.fits(self.stored, self.score.logp, self.score.tokens)

    def same_tokens(self, score: PlainScore) -> bool:
        """Whether the stored counts, where known, are those of a score of this response."""
        counts = [(self.stored_tokens, score.tokens)]
        if self.branch == 0:
            counts.append((self.stored_prompt_tokens, score.sequence.start))
        return all(np.isnan(stored) or stored == own for stored, own in counts)


Guess = Callable[[Probed, Tolerance], bool]  # whether a mistake gives the stored score


def known_mistake(probed: Sequence[Probed], tolerance: Tolerance) -> Finding | None:
    """The first mistake in `MISTAKES` that gives the stored scores."""
    right = np.array([one.agrees(tolerance) for one in probed])
    for code, cause, guess, least in MISTAKES:
        hits = np.array([guess(one, tolerance) for one in probed])
        if (hits | right).mean() >= least and (hits & ~right).sum() >= FEWEST:
            return found(code, cause, probed, int((hits | right).sum()))
    return None


def found(code: str, cause: str, probed: Sequence[Probed], explained: int) -> Finding:
    """A fault that reproduces the stored scores."""
    evidence = f"{differs(probed)}; this mistake gives {explained} of {len(probed)} exactly"
    return Finding("fault", code, evidence, cause, "probe")


def unexplained(probed: Sequence[Probed], tolerance: Tolerance) -> Finding:
    """What differs, where no known mistake gives the stored scores."""
    agree = float(np.mean([one.agrees(tolerance) for one in probed]))
    same = float(np.mean([one.same_tokens(one.score) for one in probed]))
    stored, own = (np.array([one.stored for one in probed]), [one.score.logp for one in probed])
    evidence = differs(probed)
    if agree > 0.2:
        code, cause = "mixed", f"{agree:.0%} of the rows are right, the others of another origin"
    elif len(probed) > 3 and np.corrcoef(stored, own)[0, 1] < 0.5:
        code, cause = "shuffled", "rows are not those of their pairs, or of other data"
    elif same < 0.5:
        code, cause = "rendering", "another text was scored: another template or tokenizer"
    else:
        code, cause = "weights", "other weights, or another text of as many tokens"
    return Finding("fault", code, evidence, cause, "probe")


def differs(probed: Sequence[Probed]) -> str:
    """How far apart stored and recomputed scores are."""
    off = np.mean([abs(one.stored - one.score.logp) / one.score.tokens for one in probed])
    other = sum(not one.same_tokens(one.score) for one in probed)
    counts = f", {other} of {len(probed)} with other token counts" if other else ""
    return f"scored again, it is {off:.2g} nats per token off{counts}"


def _base(factor: float) -> Guess:
    return lambda one, t: t.fits(one.stored * factor, one.score.logp, one.score.tokens)


def _mean(one: Probed, t: Tolerance) -> bool:
    return t.fits(one.stored * one.score.tokens, one.score.logp, one.score.tokens)


def _swapped(one: Probed, t: Tolerance) -> bool:
    return t.fits(one.stored, one.other.logp, one.other.tokens)


def _rounded(one: Probed, t: Tolerance) -> bool:
    """The nearest float16, or the next to it."""
    step = abs(float(np.spacing(np.float16(one.score.logp))))
    near = abs(one.stored - one.score.logp) <= 2 * step
    return bool(near and float(np.float16(one.stored)) == one.stored)


def _without_end(one: Probed, t: Tolerance) -> bool:
    sequence = one.score.sequence
    ended = sequence.end_start < len(sequence.token_ids)
    return ended and t.fits(one.stored, one.score.content_logp, one.score.tokens - 1)


def _cut_short(one: Probed, t: Tolerance) -> bool:
    """The sum of the response's first tokens."""
    sums = np.cumsum(one.score.response)[:-1]
    if not np.isnan(one.stored_tokens) and one.stored_tokens < one.score.tokens:
        last = int(one.stored_tokens)
        sums = sums[last - 1 : last]
    return any(t.fits(one.stored, value, count + 1) for count, value in enumerate(sums))


def _shifted(one: Probed, t: Tolerance) -> bool:
    """The sum of as many tokens, beginning inside the prompt; not where any number would fit."""
    width, start = one.score.tokens, one.score.sequence.start
    sums = np.concatenate([[0.0], np.cumsum(one.score.token_logps[1:])])  # [i]: tokens 1 to i
    first = np.arange(1, start)
    windows = sums[first + width - 1] - sums[first - 1]
    if len(windows) == 0 or 2 * len(windows) * t.of_sum(width) > BY_CHANCE * np.ptp(windows):
        return False
    return any(t.fits(one.stored, value, width) for value in windows)


# Code, cause, whether it gives the stored score, share of responses that it or the right way gives.
# Left padding can't give all: some padding is longer than the prompt.
MISTAKES: tuple[tuple[str, str, Guess, float], ...] = (
    ("base", "log-probs were stored in base 2, not as nats", _base(np.log(2)), EXPLAINS),
    ("base", "log-probs were stored in base 10, not as nats", _base(np.log(10)), EXPLAINS),
    ("sign", "losses were stored, not log-probs", _base(-1.0), EXPLAINS),
    ("means", "means per token were stored, not sums", _mean, EXPLAINS),
    ("swapped", "chosen and rejected were exchanged", _swapped, EXPLAINS),
    ("rounded", "sums were stored in float16", _rounded, EXPLAINS),
    ("end", "the end of turn was not scored", _without_end, EXPLAINS),
    ("truncated", "responses were cut short", _cut_short, EXPLAINS),
    ("padding", "the prompt's tail was scored as response, as left padding does", _shifted, 0.25),
)
