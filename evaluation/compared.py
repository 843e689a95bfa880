"""Faults that show when a reference's scores are held against the others'.

Part of `checks.py`: copies of another's rows, another's tokens, a likelihood far from the others'.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .figures import ReferenceFigures
from .findings import Finding
from .score_table import ReferenceScores, ScoreTable

SAME = 0.98  # share of equal rows from which two references are one
SAME_TOKENS = 0.95  # share of pairs with equal token counts that two tokenizers don't reach
GUESSED = 0.9  # of the nats of a blind guess: no model that knows its tokens needs as many
FAR_WORSE = 2.5  # times the bits per byte of the best reference
ODD = 0.6  # agreement on hard responses below which a reference stands apart ...
AGREED = 0.85  # ... where others agree with one another this much


def check_copies(table: ScoreTable, k: int) -> Finding | None:
    """Rows whose log-probs equal another reference's to the last bit."""
    reference = table.references[k]
    for other in table.references:
        if other is reference or other.record.identity == reference.record.identity:
            continue
        both = reference.scored & other.scored
        equal = both & (reference.logps == other.logps).all(axis=1)
        equal &= np.abs(reference.logps).max(axis=1) > 1e-3  # certain responses of any model are 0
        share = equal.sum() / max(both.sum(), 1)
        if share > SAME:
            return Finding(
                "suspect",
                "duplicate",
                f"{share:.0%} of its scores equal {other.alias}'s",
                f"the same model as {other.alias}; of the two, one adds nothing",
            )
        if equal.sum() >= 3 and share > 0.005 and _is_the_copy(table, reference, other, equal):
            return Finding(
                "fault",
                "copied",
                f"{equal.sum():,} of its rows ({share:.0%}) equal {other.alias}'s to the last bit",
                f"rows of {other.alias} were stored under its name",
            )
    return None


def check_other_tokenizer(
    table: ScoreTable,
    figures: list[ReferenceFigures],
    k: int,
    others: Sequence[int],
    vocabulary: int | None,
) -> Finding | None:
    """Another reference's token counts, at a likelihood that no model of that tokenizer has.

    Models of one family share a tokenizer, and a small one may need twice the bits of a large one.
    """
    reference, nats = table.references[k], figures[k].nats_per_token
    for j in others:
        other = table.references[j]
        both = reference.scored & other.scored
        if not both.any():
            continue
        same = float((reference.tokens[both] == other.tokens[both]).all(axis=1).mean())
        own, theirs = _bits(figures[k]), _bits(figures[j])
        blind = own > FAR_WORSE * theirs
        if vocabulary is not None:
            blind = own > theirs and nats > GUESSED * np.log(vocabulary)
        if same > SAME_TOKENS and blind:
            return Finding(
                "fault",
                "tokens",
                f"{same:.0%} of its token counts are {other.alias}'s, at {own:.1f} bits per byte "
                f"where {other.alias} needs {theirs:.1f}",
                f"it was given the token ids of {other.alias}'s tokenizer",
            )
    return None


def check_likelihood(
    figures: list[ReferenceFigures], k: int, others: Sequence[int], vocabulary: int | None
) -> Finding | None:
    """Tokens less likely than a blind guess; bits per byte far above the best reference's."""
    nats, bits = figures[k].nats_per_token, _bits(figures[k])
    if vocabulary is not None and nats > np.log(vocabulary):
        return Finding(
            "fault",
            "guessing",
            f"a token costs {nats:.1f} nats, more than a guess among its {vocabulary:,} "
            f"({np.log(vocabulary):.1f})",
            "token ids of another tokenizer, or damaged weights",
        )
    best = min((_bits(figures[j]) for j in others), default=np.nan)
    if bits > FAR_WORSE * best:
        return Finding(
            "suspect",
            "unlikely",
            f"{bits:.1f} bits per byte, {bits / best:.1f} times the best reference's",
            "another tokenizer's ids, a wrong template, or a much weaker model",
        )
    return None


def check_difficulty(
    figures: list[ReferenceFigures], k: int, others: Sequence[int]
) -> Finding | None:
    """Others agree on which responses are hard for their length, this one does not."""
    names = [figures[j].alias for j in others]
    own = max((figures[k].difficulty[name] for name in names), default=np.nan)
    among = [
        figures[j].difficulty[name] for j in others for name in names if name != figures[j].alias
    ]
    best = max(among, default=np.nan)
    if not (own < ODD and best > AGREED):
        return None
    return Finding(
        "suspect",
        "odd",
        f"which responses are hard for their length correlates {own:.2f} with any other "
        f"reference, {best:.2f} among others",
        "part of the text that was scored is not the response: left padding, another template",
    )


def _is_the_copy(
    table: ScoreTable, reference: ReferenceScores, other: ReferenceScores, equal: np.ndarray
) -> bool:
    """Whether the reference, not the other, is out of line on its equal rows; True if unclear."""
    own, theirs = (_shift(table, one, other, reference, equal) for one in (reference, other))
    return not (theirs > 3 and own < theirs)


def _shift(
    table: ScoreTable,
    one: ReferenceScores,
    other: ReferenceScores,
    reference: ReferenceScores,
    equal: np.ndarray,
) -> float:
    """How far a reference's nats and tokens on the equal rows differ from its other rows in mean or
    scatter, in standard errors, measured against a third reference or the bytes."""
    third = next((r for r in table.references if r is not other and r is not reference), None)
    scales = [table.response_bytes, table.response_bytes]
    if third is not None:
        scales = [-third.logps, third.tokens]
    shifts = [0.0]
    for values, scale in (*zip((-one.logps, one.tokens), scales), (-one.logps, one.tokens)):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.log(values / scale).mean(axis=1)
        known = one.scored & np.isfinite(ratio)
        inside, outside = ratio[known & equal], ratio[known & ~equal]
        if min(len(inside), len(outside)) < 3 or min(inside.std(), outside.std()) == 0:
            continue
        error = np.sqrt(inside.var() / len(inside) + outside.var() / len(outside))
        shifts.append(float(abs(inside.mean() - outside.mean()) / error))
        scatter = abs(np.log(inside.std() / outside.std()))
        shifts.append(float(scatter / np.sqrt(0.5 / len(inside) + 0.5 / len(outside))))
    return max(shifts)


def _bits(figure: ReferenceFigures) -> float:
    return (figure.chosen_bits_per_byte + figure.rejected_bits_per_byte) / 2
