"""Faults in how bytes, tokens and log-probs of the responses go together.

Longer responses have more tokens, and more tokens are less likely: two relations that hold for any
language model that scored the right text. Part of `checks.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..figures import correlation
from ..score_table import ReferenceColumns, ScoreTable
from .findings import Finding

FEWEST = 20  # pairs from which a relation can be told
FOLLOWS = 0.5  # correlation with a length that is surely meant
CLEARLY = 0.1  # by which one correlation must exceed another
NO_RELATION = 0.25  # correlation with the length that only unrelated rows have
BELOW_OTHERS = 0.3  # by which a correlation may fall short of the best other reference's
SPREAD = 0.25  # of log tokens (standard deviation) below which a slope says little
WIDE = 0.4  # of log bytes above which any tokenizer's counts follow them; made-up data has less
SPIKE = 6.0  # standard deviations by which a cut stands out, in number and in bytes


class Lengths(NamedTuple):
    """The scored responses of a reference, [n, 2] each, in logarithms."""

    nats: np.ndarray
    tokens: np.ndarray
    response_bytes: np.ndarray


def check_lengths(table: ScoreTable, k: int) -> Finding | None:
    """The first fault in how bytes, tokens and log-probs go together."""
    reference = table.references[k]
    lengths = _lengths(table, reference)
    return (
        check_swapped(table, k, lengths)
        or check_means(lengths)
        or check_truncated(table, reference)
        or check_shuffled(table, k, lengths)
    )


def check_swapped(table: ScoreTable, k: int, lengths: Lengths) -> Finding | None:
    """Each response's figures follow the other response's length; or margins oppose all others'."""
    for what, values, by in (
        ("token counts follow", lengths.tokens, lengths.response_bytes),
        ("log-probs follow", lengths.nats, lengths.tokens),
        ("log-probs follow", lengths.nats, lengths.response_bytes),
    ):
        own, crossed = _follows(values, by), _follows(values, by[:, ::-1])
        if crossed > max(own + CLEARLY, FOLLOWS) and _surely_above(crossed, own, len(values)):
            return _swapped(
                f"{what} the other response's length (r {crossed:.2f}), not its own ({own:.2f})"
            )
    margins = [reference.margins for reference in table.references]
    others = [j for j in range(len(margins)) if j != k]
    against = [correlation(margins[k], margins[j]) for j in others]
    among = [correlation(margins[i], margins[j]) for i in others for j in others if i < j]
    if among and max(against) < -FOLLOWS and min(among) > FOLLOWS:
        return _swapped(f"its margins oppose those of all others (r {max(against):.2f})")
    return None


def check_means(lengths: Lengths) -> Finding | None:
    """Log-probs that do not grow with the length, and vary less than lengths do."""
    nats, tokens = _known(lengths.nats, lengths.tokens)
    if len(tokens) < FEWEST or tokens.std() < SPREAD:
        return None
    slope = float(np.polyfit(tokens, nats, 1)[0])
    if slope > 0.35 or nats.std() > 0.6 * tokens.std():
        return None
    return Finding(
        "fault",
        "means",
        f"twice the tokens cost {2**slope:.2f} times the nats, not about 2",
        "means per token were stored, not sums",
    )


def check_truncated(table: ScoreTable, reference: ReferenceColumns) -> Finding | None:
    """Many sequences of exactly one length, longer in bytes than that many tokens hold."""
    sequences = reference.prompt_tokens[:, None] + reference.tokens
    texts = table.prompt_bytes[:, None] + table.response_bytes
    for what, tokens, size in (
        ("sequences", sequences, texts),
        ("responses", reference.tokens, table.response_bytes),
    ):
        known = ~np.isnan(tokens)
        counts, size = tokens[known].astype(int), size[known]
        if len(counts) < 2 * FEWEST:
            continue
        frequency = np.bincount(counts)
        cut = int(frequency.argmax())
        nearby = np.delete(frequency[max(0, cut - 10) : cut + 11], min(10, cut)).mean()
        below = counts < cut
        if frequency[cut] < nearby + SPIKE * (1 + np.sqrt(nearby)):
            continue
        if len(np.unique(counts[below])) < FEWEST:
            continue
        line = np.polyfit(counts[below], size[below], 1)
        noise = float((size[below] - np.polyval(line, counts[below])).std())
        holds, found = float(np.polyval(line, cut)), float(size[counts == cut].mean())
        if found > 1.05 * holds + SPIKE * noise / np.sqrt(frequency[cut]):
            return Finding(
                "fault",
                "truncated",
                f"{frequency[cut]:,} {what} have exactly {cut} tokens, of texts of {found:.0f} "
                f"bytes on average, where {cut} tokens hold {holds:.0f}",
                f"{what} were cut at {cut} tokens",
            )
    return None


def check_shuffled(table: ScoreTable, k: int, lengths: Lengths) -> Finding | None:
    """Token counts that do not go with the texts, or log-probs that do not go with the counts."""
    others = [_lengths(table, other) for j, other in enumerate(table.references) if j != k]
    if not np.std(lengths.response_bytes) > WIDE:
        return None
    for what, own, theirs in (
        ("token counts", lengths.tokens, [other.tokens for other in others]),
        ("log-probs", lengths.nats, [other.nats for other in others]),
    ):
        related = correlation(own, lengths.response_bytes)
        best = max(
            (correlation(one, by.response_bytes) for one, by in zip(theirs, others)), default=np.nan
        )
        if related < NO_RELATION or related < min(best, 1.0) - BELOW_OTHERS:
            against = f", {best:.2f} for another reference" if best == best else ""
            return Finding(
                "fault",
                "shuffled",
                f"its {what} hardly go with the responses' bytes (r {related:.2f}{against})",
                "rows are not those of their pairs: shuffled, shifted or of other data",
            )
    return None


def _swapped(evidence: str) -> Finding:
    return Finding("fault", "swapped", evidence, "chosen and rejected were exchanged")


def _lengths(table: ScoreTable, reference: ReferenceColumns) -> Lengths:
    rows = reference.scored
    with np.errstate(divide="ignore"):
        nats = np.log(np.abs(reference.logps[rows]))
    return Lengths(
        np.where(np.isfinite(nats), nats, np.nan),
        np.log(np.maximum(reference.tokens[rows], 1)),
        np.log(np.maximum(table.response_bytes[rows], 1)),
    )


def _follows(values: np.ndarray, by: np.ndarray) -> float:
    """How well the responses of each branch go with a length, the lower of both; −1 if unknown."""
    both = [correlation(values[:, branch], by[:, branch]) for branch in (0, 1)]
    return -1.0 if np.isnan(both).any() else min(both)


def _surely_above(one: float, other: float, pairs: int) -> bool:
    """Whether a correlation exceeds another by more than chance does (Fisher's z)."""
    difference = np.arctanh(min(one, 0.999)) - np.arctanh(min(other, 0.999))
    return bool(difference > 4 * np.sqrt(2 / pairs))


def _known(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = ~np.isnan(one) & ~np.isnan(other)
    return one[known], other[known]
