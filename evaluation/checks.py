"""Faults that a reference's scores show by themselves, each with its evidence and likely cause.

Most faults break how log-probs go with lengths (`lengths.py`), set a reference apart from the
others (`compared.py`), or make numbers that no model makes. Thresholds stand between what healthy
references show and what injected faults do (docs/doctor.md has the figures); a fault that no score
can show needs the probe.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .compared import check_copies, check_difficulty, check_likelihood, check_other_tokenizer
from .figures import ReferenceFigures
from .findings import Finding
from .lengths import FEWEST, check_lengths
from .score_table import ReferenceScores, ScoreTable

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


def check_sign(reference: ReferenceScores) -> Finding | None:
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


def check_rounding(reference: ReferenceScores) -> Finding | None:
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
    figures: list[ReferenceFigures], reference: ReferenceScores, k: int
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
