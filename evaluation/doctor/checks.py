"""The checks of `mrpo doctor` on stored scores: each looks for one fault.

A new check is a function here (in `length_checks.py` if it is about lengths) and one entry in the
lists below them. Most faults change how log-probs relate to lengths, set a reference
apart from the others, or produce numbers that no model produces. Thresholds lie between what
healthy references show and what injected faults do (docs/doctor.md has the figures). A fault that
no score can show needs the probe (`probe.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np

from ...precompute.preflight import SERVER, UNVERIFIED
from ..figures import ReferenceFigures
from ..score_table import ReferenceColumns, ScoreTable
from .length_checks import check_means, check_shuffled, check_swapped, check_truncated
from .verdicts import FEWEST, Check, Finding, Subject

UNIFORM = 0.18  # spread of a token's log-prob over its mean: untrained 0.02 to 0.14, trained 0.23
SAME = 0.98  # share of equal rows from which two references are the same
SAME_TOKENS = 0.95  # share of pairs with equal token counts that two tokenizers don't reach
GUESSED = 0.9  # of the nats of a blind guess: no model that knows its tokens needs as many
FAR_WORSE = 2.5  # times the bits per byte of the best reference
ODD = 0.6  # agreement on hard responses below which a reference stands apart ...
AGREED = 0.85  # ... where others agree with one another this much


def check_scores(
    table: ScoreTable, figures: Sequence[ReferenceFigures], vocabularies: Sequence[int | None]
) -> dict[str, list[Finding]]:
    """Run all checks; the findings by alias, none for a healthy reference.

    Args:
        figures: of the table's references.
        vocabularies: the number of tokens of each, None where it is not known.
    """
    subjects = [Subject(table, figures, k, size) for k, size in enumerate(vocabularies)]
    scored = [subject for subject in subjects if subject.reference.scored.sum() >= FEWEST]
    for subject in scored:
        for group in BY_ITSELF:
            _run(group, subject)
    # References with a fault of their own are no measure for the others.
    sound = [subject.k for subject in scored if not subject.findings]
    for subject in scored:
        _run((check_copies,), subject)
        if subject.k in sound:
            subject.sound = [k for k in sound if k != subject.k]
            for group in AGAINST_SOUND:
                _run(group, subject)
    for subject in subjects:  # those with too few scores for the rest, too
        _run((check_missing,), subject)
        _run((check_unverified,), subject)
    return {subject.reference.alias: subject.findings for subject in subjects}


def check_unverified(subject: Subject) -> Finding | None:
    """Scores of a server that was compared with nothing: its weights or precision may be others."""
    record = subject.reference.record
    runs = [run for run in record.runs if run.get("engine") == "server" and "verified" not in run]
    if SERVER not in record.inputs and not runs:
        return None
    evidence = f"an {UNVERIFIED} gave its scores"
    cause = "nothing shows that it served the weights and the precision that refs.yaml names"
    return Finding("suspect", "unverified", evidence, cause)


def check_sign(subject: Subject) -> Finding | None:
    """A log-prob is never above 0."""
    reference = subject.reference
    share = float((reference.logps[reference.scored] > 1e-6).mean())
    if share < 0.01:
        return None
    evidence = f"{share:.0%} of its log-probs are above 0"
    return Finding("fault", "sign", evidence, "losses were stored, not log-probs")


def check_rounding(subject: Subject) -> Finding | None:
    """Sums over many tokens are hardly ever numbers of 8 or 11 significant bits."""
    values = subject.reference.logps[subject.reference.scored].ravel()
    values = values[np.abs(values) > 0.01]
    if len(values) < FEWEST:
        return None
    with np.errstate(over="ignore"):
        float16 = values.astype(np.float16)
    bits = values.astype(np.float32).view(np.uint32)
    bfloat16 = (bits & np.uint32(0xFFFF0000)).view(np.float32)  # truncated to 8 significant bits
    for name, rounded, precision in (("bfloat16", bfloat16, 2**-7), ("float16", float16, 2**-10)):
        share = float((values == rounded).mean())
        if share <= 0.9:
            continue
        step = np.abs(np.median(values)) * precision
        evidence = f"{share:.0%} of its log-probs are {name} numbers, about {step:.2g} nats apart"
        return Finding("fault", "rounded", evidence, f"sums were stored in {name}")
    return None


def check_uniform(subject: Subject) -> Finding | None:
    """Every token about as likely as any other."""
    reference = subject.reference
    known = reference.scored & ~np.isnan(reference.tokens).any(axis=1)
    logps, tokens = reference.logps[known], reference.tokens[known]
    if len(logps) < FEWEST:
        return None
    nats = -logps.sum() / tokens.sum()
    spread = float(np.sqrt(np.mean((logps + nats * tokens) ** 2 / tokens)) / nats)
    bits = [figures.chosen_bits_per_byte for figures in subject.all_figures]
    own = bits.pop(subject.k)
    if spread > UNIFORM or (bits and not own > 1.1 * min(bits)):
        return None
    evidence = f"every token costs about the same, {nats:.1f} nats (spread {spread:.0%})"
    cause = "random weights: missing or unmatched tensors when the model was loaded"
    return Finding("fault", "uniform", evidence, cause)


def check_copies(subject: Subject) -> Finding | None:
    """Rows whose log-probs equal another reference's to the last bit."""
    reference = subject.reference
    for other in subject.others:
        if other.record.identity == reference.record.identity:
            continue
        scored = reference.scored & other.scored
        equal = scored & (reference.logps == other.logps).all(axis=1)
        equal &= np.abs(reference.logps).max(axis=1) > 1e-3  # certain responses of any model are 0
        share = equal.sum() / max(scored.sum(), 1)
        if share > SAME:
            evidence = f"{share:.0%} of its scores equal {other.alias}'s"
            cause = f"the same model as {other.alias}; the second adds nothing"
            return Finding("suspect", "duplicate", evidence, cause)
        enough = equal.sum() >= 3 and share > 0.005
        if enough and _is_the_copy(subject.table, reference, other, equal):
            evidence = (
                f"{equal.sum():,} of its rows ({share:.0%}) equal {other.alias}'s to the last bit"
            )
            cause = f"rows of {other.alias} were stored under its name"
            return Finding("fault", "copied", evidence, cause)
    return None


def check_other_tokenizer(subject: Subject) -> Finding | None:
    """Another reference's token counts, at a likelihood that no model of that tokenizer has.

    Models of one family share a tokenizer, and a small one may need twice the bits of a large one.
    """
    reference, nats = subject.reference, subject.figures.nats_per_token
    for j in subject.sound:
        other = subject.table.references[j]
        scored = reference.scored & other.scored
        if not scored.any():
            continue
        same = float((reference.tokens[scored] == other.tokens[scored]).all(axis=1).mean())
        own, theirs = _bits(subject.figures), _bits(subject.all_figures[j])
        blind = own > FAR_WORSE * theirs
        if subject.vocabulary is not None:
            blind = own > theirs and nats > GUESSED * np.log(subject.vocabulary)
        if same > SAME_TOKENS and blind:
            evidence = (
                f"{same:.0%} of its token counts are {other.alias}'s, at {own:.1f} bits per byte "
                f"where {other.alias} needs {theirs:.1f}"
            )
            cause = f"it was given the token ids of {other.alias}'s tokenizer"
            return Finding("fault", "tokens", evidence, cause)
    return None


def check_likelihood(subject: Subject) -> Finding | None:
    """Tokens less likely than a blind guess; bits per byte far above the best reference's."""
    nats, bits = subject.figures.nats_per_token, _bits(subject.figures)
    vocabulary = subject.vocabulary
    if vocabulary is not None and nats > np.log(vocabulary):
        evidence = (
            f"a token costs {nats:.1f} nats, more than a guess among its {vocabulary:,} "
            f"({np.log(vocabulary):.1f})"
        )
        cause = "token ids of another tokenizer, or damaged weights"
        return Finding("fault", "guessing", evidence, cause)
    best = min((_bits(subject.all_figures[j]) for j in subject.sound), default=np.nan)
    if bits > FAR_WORSE * best:
        evidence = f"{bits:.1f} bits per byte, {bits / best:.1f} times the best reference's"
        cause = "another tokenizer's ids, a wrong template, or a much weaker model"
        return Finding("suspect", "unlikely", evidence, cause)
    return None


def check_difficulty(subject: Subject) -> Finding | None:
    """The others agree on which responses are hard for their length, this reference does not.

    Judged only where nothing else was found.
    """
    others = [subject.all_figures[j] for j in subject.sound]
    own = max((subject.figures.difficulty[other.alias] for other in others), default=np.nan)
    among = (first.difficulty[second.alias] for first, second in permutations(others, 2))
    best = max(among, default=np.nan)
    if subject.findings or not (own < ODD and best > AGREED):
        return None
    evidence = (
        f"which responses are hard for their length correlates {own:.2f} with any other "
        f"reference, {best:.2f} among others"
    )
    cause = "part of the text that was scored is not the response: left padding, another template"
    return Finding("suspect", "odd", evidence, cause)


def check_missing(subject: Subject) -> Finding | None:
    """More than one pair in twenty without a score."""
    reasons = subject.figures.missing
    missing = sum(reasons.values())
    if missing <= 0.05 * (missing + subject.figures.pairs):
        return None
    counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
    return Finding("suspect", "missing", f"lacks a score for {counts}", "see the reasons")


# Of the checks in one group the first finding counts: they explain the same numbers.
Groups = tuple[tuple[Check, ...], ...]

BY_ITSELF: Groups = (
    (check_sign,),
    (check_rounding,),
    (check_swapped, check_means, check_truncated, check_shuffled, check_uniform),
)
# For references in which no check by itself found anything, against others of the same kind.
AGAINST_SOUND: Groups = ((check_other_tokenizer, check_likelihood), (check_difficulty,))


def _run(group: Sequence[Check], subject: Subject) -> None:
    """Add what the first check finds that finds anything to the subject's findings."""
    for check in group:
        finding = check(subject)
        if finding is not None:
            subject.findings.append(finding)
            return


def _is_the_copy(
    table: ScoreTable, reference: ReferenceColumns, other: ReferenceColumns, equal: np.ndarray
) -> bool:
    """Whether the reference, not the other, is out of line on its equal rows; True if unclear."""
    rest = (third for third in table.references if third not in (reference, other))
    third = next(rest, None)
    own, theirs = (_shift(table, suspect, third, equal) for suspect in (reference, other))
    return not (theirs > 3 and own < theirs)


def _shift(
    table: ScoreTable,
    reference: ReferenceColumns,
    third: ReferenceColumns | None,
    equal: np.ndarray,
) -> float:
    """How far a reference's nats and tokens on the equal rows differ from its other rows.

    In mean or scatter, in standard errors, relative to a third reference or to the bytes.
    """
    nats, tokens = -reference.logps, reference.tokens
    scales = [table.response_bytes] * 2 if third is None else [-third.logps, third.tokens]
    shifts = [0.0]
    for values, scale in ((nats, scales[0]), (tokens, scales[1]), (nats, tokens)):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.log(values / scale).mean(axis=1)
        known = reference.scored & np.isfinite(ratio)
        inside, outside = ratio[known & equal], ratio[known & ~equal]
        if min(len(inside), len(outside)) < 3 or min(inside.std(), outside.std()) == 0:
            continue
        error = np.sqrt(inside.var() / len(inside) + outside.var() / len(outside))
        shifts.append(float(abs(inside.mean() - outside.mean()) / error))
        scatter = abs(np.log(inside.std() / outside.std()))
        shifts.append(float(scatter / np.sqrt(0.5 / len(inside) + 0.5 / len(outside))))
    return max(shifts)


def _bits(figures: ReferenceFigures) -> float:
    return (figures.chosen_bits_per_byte + figures.rejected_bits_per_byte) / 2
