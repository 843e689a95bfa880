"""A diagnosis as text: what `mrpo doctor` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .figures import UNITS, ReferenceFigures
from .probe import ProbeReport
from .results import Rows, columns

if TYPE_CHECKING:
    from .doctor import Diagnosis


def describe(diagnosis: Diagnosis) -> Iterator[str]:
    """Line by line; the verdicts come last, where they are read first."""
    references, advice = diagnosis.references, diagnosis.advice
    of = f" of {diagnosis.of_pairs:,}" if diagnosis.of_pairs > diagnosis.pairs else ""
    yield f"{diagnosis.pairs:,}{of} pairs, {len(references)} references, base {references[0].alias}"
    yield from _table("", _likelihood(references))
    yield from _table("summed margins, log pi(chosen) - log pi(rejected)", _margins(references))
    if len(references) > 1:
        yield from _table(
            "pairs on which two references agree, % (correlation of their margins)",
            _agreement(references),
        )
        yield from _table("pairs that a reference decides alone, %", _dominance(references))
    if diagnosis.probes:
        yield ""
        yield from map(_probe, diagnosis.probes)
    yield ""
    width = max(len(one.alias) for one in references)
    for verdict in diagnosis.verdicts:
        state = verdict.state.upper() if verdict.state == "broken" else verdict.state
        yield f"{verdict.alias:<{width}}  {state:<7}  {verdict.reason}"
        yield f"{'':<{width}}           {verdict.suggestion}"
    yield ""
    if advice.normalize != "none":
        yield f"suggested   --normalize {advice.normalize}: {advice.reason}"
    if advice.weights:
        weights = ", ".join(f"{alias} {weight}" for alias, weight in advice.weights.items())
        yield f"weights     fitted to the labels: {weights}; --weighting fitted uses them"
    if len(references) > 1:
        yield f"first loss  {diagnosis.first_loss:.3f} for mrpo with all of them; DPO's is 0.693"


def _table(title: str, rows: Rows) -> Iterator[str]:
    yield ""
    if title:
        yield title
    yield from columns(rows)


def _likelihood(references: Sequence[ReferenceFigures]) -> Rows:
    heads = ["pairs", "bits/byte chosen", "rejected", "nats/token"]
    accuracies = [f"accuracy {unit}, %" for unit in UNITS.values()]
    rows = [["reference", *heads, *accuracies]]
    for one in references:
        bits = (one.chosen_bits_per_byte, one.rejected_bits_per_byte, one.nats_per_token)
        rows.append(
            [
                one.alias,
                f"{one.pairs:,}",
                *(f"{value:.2f}" for value in bits),
                *(one.accuracy[unit].percent() for unit in UNITS),
            ]
        )
    return rows


def _margins(references: Sequence[ReferenceFigures]) -> Rows:
    heads = ["mean", "scale", "by length", "CTRO moves", "per byte", "first loss"]
    rows = [["reference", *heads, "end of turn", "boundary", "missing"]]
    for one in references:
        shares = (one.length_bias, one.saturation["none"], one.saturation["byte"])
        missing = ", ".join(f"{count:,} {reason}" for reason, count in one.missing.items())
        rows.append(
            [
                one.alias,
                f"{one.margin:.1f}",
                f"{one.margin_scale:.1f}",
                *map(_percent, shares),
                f"{one.first_loss:.3f}",
                _percent(one.end_of_turn),
                _percent(one.boundary),
                missing or "none",
            ]
        )
    return rows


def _agreement(references: Sequence[ReferenceFigures]) -> Rows:
    names = [one.alias for one in references]
    rows = [["", *names]]
    for one in references:
        cells = [
            "–"
            if name == one.alias
            else f"{100 * one.agreement[name]:.0f} ({one.correlation[name]:.2f})"
            for name in names
        ]
        rows.append([one.alias, *cells])
    return rows


def _dominance(references: Sequence[ReferenceFigures]) -> Rows:
    kinds = list(references[0].dominance)
    rows = [["weights of ARWC", *kinds]]
    return [
        *rows,
        *(
            [one.alias, *(f"{100 * one.dominance[kind]:.0f}" for kind in kinds)]
            for one in references
        ),
    ]


def _probe(report: ProbeReport) -> str:
    if report.skipped is not None:
        return f"probe  {report.alias}: none, {report.skipped}"
    return (
        f"probe  {report.alias}: {report.agree} of {report.responses} responses score the same in "
        f"the plain way, {report.difference:.1e} nats per token off"
    )


def _percent(share: float) -> str:
    """
    >>> _percent(0.0004), _percent(0.5)
    ('0.0%', '50%')
    """
    return f"{share:.0%}" if share >= 0.1 or share == 0 else f"{share:.1%}"
