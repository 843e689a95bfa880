"""Checks on how bytes, tokens and log-probs of the responses relate; `checks.py` lists them.

Longer responses have more tokens, and more tokens are less likely: two relations that hold for any
language model that scored the right text.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np

from ..figures import correlation
from ..score_table import ReferenceColumns, ScoreTable
from .verdicts import FEWEST, Finding, Subject

FOLLOWS = 0.5  # correlation with a length that is beyond doubt
CLEARLY = 0.1  # by which one correlation must exceed another
NO_RELATION = 0.25  # correlation with the length that only unrelated rows have
BELOW_OTHERS = 0.3  # by which a correlation may fall short of the best other reference's
SPREAD = 0.25  # of log tokens (standard deviation) below which a slope says little
WIDE = 0.4  # of log bytes above which any tokenizer's counts follow them; made-up data has less
VARIED = 50  # lengths in bytes; where fewer occur, in texts by template, nats need not follow them
SPIKE = 6.0  # standard deviations by which a cut stands out, in number and in bytes


def check_swapped(subject: Subject) -> Finding | None:
    """Each response's figures follow the other response's length; or margins oppose all others'."""
    nats, tokens, response_bytes = _lengths(subject.table, subject.reference)
    for name, values, lengths in (
        ("token counts", tokens, response_bytes),
        ("log-probs", nats, tokens),
        ("log-probs", nats, response_bytes),
    ):
        own, crossed = _follows(values, lengths), _follows(values, lengths[:, ::-1])
        if crossed > max(own + CLEARLY, FOLLOWS) and _surely_above(crossed, own, len(values)):
            correlations = f"(r {crossed:.2f}), not its own ({own:.2f})"
            return _swapped(f"{name} follow the other response's length {correlations}")
    margins = [other.margins for other in subject.others]
    against = [correlation(subject.reference.margins, other) for other in margins]
    among = [correlation(*pair) for pair in combinations(margins, 2)]
    if among and max(against) < -FOLLOWS and min(among) > FOLLOWS:
        return _swapped(f"its margins oppose those of all others (r {max(against):.2f})")
    return None


def check_means(subject: Subject) -> Finding | None:
    """Log-probs that do not grow with the length, and vary less than lengths do."""
    lengths = _lengths(subject.table, subject.reference)
    known = ~np.isnan(lengths.nats) & ~np.isnan(lengths.tokens)
    nats, tokens = lengths.nats[known], lengths.tokens[known]
    if len(tokens) < FEWEST or tokens.std() < SPREAD:
        return None
    slope = float(np.polyfit(tokens, nats, 1)[0])
    if slope > 0.35 or nats.std() > 0.6 * tokens.std():
        return None
    evidence = f"twice the tokens cost {2**slope:.2f} times the nats, not about 2"
    return Finding("fault", "means", evidence, "means per token were stored, not sums")


def check_truncated(subject: Subject) -> Finding | None:
    """Many sequences of exactly one length, longer in bytes than that many tokens hold."""
    table, reference = subject.table, subject.reference
    sequence_tokens = reference.prompt_tokens[:, None] + reference.tokens
    sequence_bytes = table.prompt_bytes[:, None] + table.response_bytes
    for name, tokens, text_bytes in (
        ("sequences", sequence_tokens, sequence_bytes),
        ("responses", reference.tokens, table.response_bytes),
    ):
        known = ~np.isnan(tokens)
        lengths, sizes = tokens[known].astype(int), text_bytes[known]
        if len(lengths) < 2 * FEWEST:
            continue
        frequency = np.bincount(lengths)
        cut = int(frequency.argmax())
        nearby = np.delete(frequency[max(0, cut - 10) : cut + 11], min(10, cut)).mean()
        below = lengths < cut
        if frequency[cut] < nearby + SPIKE * (1 + np.sqrt(nearby)):
            continue
        if len(np.unique(lengths[below])) < FEWEST:
            continue
        line = np.polyfit(lengths[below], sizes[below], 1)
        noise = float((sizes[below] - np.polyval(line, lengths[below])).std())
        expected, actual = float(np.polyval(line, cut)), float(sizes[lengths == cut].mean())
        if actual > 1.05 * expected + SPIKE * noise / np.sqrt(frequency[cut]):
            evidence = (
                f"{frequency[cut]:,} {name} have exactly {cut} tokens, of texts of {actual:.0f} "
                f"bytes on average, where {cut} tokens hold {expected:.0f}"
            )
            return Finding("fault", "truncated", evidence, f"{name} were cut at {cut} tokens")
    return None


def check_shuffled(subject: Subject) -> Finding | None:
    """Token counts unrelated to the texts, or log-probs unrelated to the counts."""
    own = _lengths(subject.table, subject.reference)
    others = [_lengths(subject.table, other) for other in subject.others]
    if not np.std(own.response_bytes) > WIDE:
        return None
    for name, field in (("token counts", "tokens"), ("log-probs", "nats")):
        if field == "nats" and len(np.unique(own.response_bytes)) < VARIED:
            break
        related = correlation(getattr(own, field), own.response_bytes)
        theirs = (correlation(getattr(other, field), other.response_bytes) for other in others)
        best = max(theirs, default=np.nan)
        if related < NO_RELATION or related < min(best, 1.0) - BELOW_OTHERS:
            comparison = "" if np.isnan(best) else f", {best:.2f} for another reference"
            evidence = (
                f"its {name} hardly follow the responses' bytes (r {related:.2f}{comparison})"
            )
            cause = "rows do not belong to their pairs: shuffled, shifted or of other data"
            return Finding("fault", "shuffled", evidence, cause)
    return None


class Lengths(NamedTuple):
    """The scored responses of a reference, [n, 2] each, in logarithms."""

    nats: np.ndarray
    tokens: np.ndarray
    response_bytes: np.ndarray


def _lengths(table: ScoreTable, reference: ReferenceColumns) -> Lengths:
    rows = reference.scored
    with np.errstate(divide="ignore"):
        nats = np.log(np.abs(reference.logps[rows]))
    return Lengths(
        np.where(np.isfinite(nats), nats, np.nan),
        np.log(np.maximum(reference.tokens[rows], 1)),
        np.log(np.maximum(table.response_bytes[rows], 1)),
    )


def _swapped(evidence: str) -> Finding:
    return Finding("fault", "swapped", evidence, "chosen and rejected were exchanged")


def _follows(values: np.ndarray, lengths: np.ndarray) -> float:
    """Correlation with a length within a branch, the lower of the two; −1 if unknown."""
    correlations = [correlation(values[:, branch], lengths[:, branch]) for branch in (0, 1)]
    return -1.0 if np.isnan(correlations).any() else min(correlations)


def _surely_above(larger: float, smaller: float, pairs: int) -> bool:
    """Whether a correlation exceeds another by more than chance does (Fisher's z)."""
    difference = np.arctanh(min(larger, 0.999)) - np.arctanh(min(smaller, 0.999))
    return bool(difference > 4 * np.sqrt(2 / pairs))
