"""What doctor found wrong with a reference: evidence, likely cause, what to do.

Faults that a reference's scores show by themselves, each with its evidence and likely cause.

Most faults break how log-probs go with lengths (`lengths.py`), set a reference apart from the
others (`compared.py`), or make numbers that no model makes. Thresholds stand between what healthy
references show and what injected faults do (docs/doctor.md has the figures); a fault that no score
can show needs the probe.


Faults that show when a reference's scores are held against the others'.

Part of `checks.py`: copies of another's rows, another's tokens, a likelihood far from the others'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..figures import ReferenceFigures
from ..score_table import ReferenceColumns, ScoreTable
from .findings import Finding
from .length_checks import FEWEST, check_lengths

ALL_ALIKE = 0.18  # spread of a token's log-prob over its mean: untrained 0.02 to 0.14, trained 0.23


def check_scores(
    table: ScoreTable, figures: list[ReferenceFigures], vocabularies: Mapping[str, int]
) -> dict[str, list[Finding]]:
    """What is found, by alias; nothing for a healthy reference.

    Args:
        figures: of the table's references.
        vocabularies: the number of tokens of those references of which it is known.
    """
    scored = [reference.scored.sum() >= FEWEST for reference in table.references]
    alone = [
        _found(
            check_sign(one),
            check_rounding(one),
            check_lengths(table, k) or check_uniform(figures, one, k),
        )
        if scored[k]
        else []
        for k, one in enumerate(table.references)
    ]
    # What is wrong by itself is no measure for the others.
    sound = [k for k, faults in enumerate(alone) if scored[k] and not faults]
    found = {}
    for k, reference in enumerate(table.references):
        faults = alone[k] + (_found(check_copies(table, k)) if scored[k] else [])
        if k in sound:
            others = [j for j in sound if j != k]
            vocabulary = vocabularies.get(reference.alias)
            faults += _found(
                check_other_tokenizer(table, figures, k, others, vocabulary)
                or check_likelihood(figures, k, others, vocabulary)
            )
            faults += [] if faults else _found(check_difficulty(figures, k, others))
        found[reference.alias] = faults + _found(check_missing(figures[k]))
    return found


def check_sign(reference: ReferenceColumns) -> Finding | None:
    """A log-prob is never above 0."""
    share = float((reference.logps[reference.scored] > 1e-6).mean())
    if share < 0.01:
        return None
    return Finding(
        "fault",
        "sign",
        f"{share:.0%} of its log-probs are above 0",
        "losses were stored, not log-probs",
    )


def check_rounding(reference: ReferenceColumns) -> Finding | None:
    """Sums of many tokens are all but never numbers of 8 or 11 significant bits."""
    values = reference.logps[reference.scored].ravel()
    values = values[np.abs(values) > 0.01]
    if len(values) < FEWEST:
        return None
    for name, rounded in (("bfloat16", _to_bfloat16(values)), ("float16", _to_float16(values))):
        share = float((values == rounded).mean())
        if share > 0.9:
            step = np.abs(np.median(values)) * (2**-10 if name == "float16" else 2**-7)
            return Finding(
                "fault",
                "rounded",
                f"{share:.0%} of its log-probs are {name} numbers, about {step:.2g} nats apart",
                f"sums were stored in {name}",
            )
    return None


def check_uniform(
    figures: list[ReferenceFigures], reference: ReferenceColumns, k: int
) -> Finding | None:
    """Every token about as likely as any other."""
    known = reference.scored & ~np.isnan(reference.tokens).any(axis=1)
    logps, tokens = reference.logps[known], reference.tokens[known]
    if len(logps) < FEWEST:
        return None
    nats = -logps.sum() / tokens.sum()
    spread = float(np.sqrt(np.mean((logps + nats * tokens) ** 2 / tokens)) / nats)
    others = [one.chosen_bits_per_byte for j, one in enumerate(figures) if j != k]
    bits = figures[k].chosen_bits_per_byte
    if spread > ALL_ALIKE or (others and not bits > 1.1 * min(others)):
        return None
    return Finding(
        "fault",
        "uniform",
        f"every token costs about the same, {nats:.1f} nats (spread {spread:.0%})",
        "random weights: missing or unmatched tensors when the model was loaded",
    )


def check_missing(figure: ReferenceFigures) -> Finding | None:
    """More than one pair in twenty without a score."""
    missing = sum(figure.missing.values())
    if missing <= 0.05 * (missing + figure.pairs):
        return None
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in figure.missing.items())
    return Finding("suspect", "missing", f"lacks a score for {reasons}", "see the reasons")


def _found(*findings: Finding | None) -> list[Finding]:
    return [finding for finding in findings if finding is not None]


def _to_float16(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float64)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to the 8 significant bits of bfloat16."""
    bits = values.astype(np.float32).view(np.uint32)
    kept = (bits & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    return kept


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
    table: ScoreTable, reference: ReferenceColumns, other: ReferenceColumns, equal: np.ndarray
) -> bool:
    """Whether the reference, not the other, is out of line on its equal rows; True if unclear."""
    own, theirs = (_shift(table, one, other, reference, equal) for one in (reference, other))
    return not (theirs > 3 and own < theirs)


def _shift(
    table: ScoreTable,
    one: ReferenceColumns,
    other: ReferenceColumns,
    reference: ReferenceColumns,
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
