"""`mrpo doctor`: whether each reference's scores can be trusted, and what the reference is worth.

    scores -> figures -> checks (-> probe) -> verdicts -> tables on stdout, doctor.json

Everything but the probe works from the store alone; no weights are loaded for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from ...data.join import precompute_line, resolve_references
from ...data.references import ReferenceSpec, inputs_here, load_refs
from ...data.rendering import PLACES, Renderer
from ...data.shards import PairShards
from ...data.store import ReferenceRecord, open_store
from ...errors import UserError
from ...files import output_file, write_json
from ...method.grammar import epsilon_warning
from ...settings import comma_separated, command, write_resolved
from ...terminal import Rows, table_lines
from ..compare.cells import betas_of, methods_of
from ..config import DoctorConfig
from ..figures import UNITS, ReferenceFigures, figures, method_first_loss
from ..score_table import ScoreTable, load_score_table, pairs_at
from .checks import check_scores
from .forecast import Forecast, default_betas, forecast
from .forecast_words import NOTE, TITLE, conclusions, forecast_rows
from .probe import REFUTED, ProbeReport, probe
from .verdicts import Advice, Finding, Verdict, advise, verdict_on

SHOWN_PAIRS = 1_000  # of plain text, looked at for an end of their own
MARGINS = "summed margins, log pi(chosen) - log pi(rejected)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """All results of doctor; what doctor.json holds."""

    pairs: int  # read
    of_pairs: int  # of the data set
    references: list[ReferenceFigures]
    findings: dict[str, list[Finding]]
    probes: list[ProbeReport]
    verdicts: list[Verdict]
    advice: Advice
    forecast: Forecast | None  # None where a reference is broken
    conclusions: list[str]  # from the forecast
    first_loss: float  # of MRPO with all references, where the policy starts at the base
    rendering: list[str]  # what is special about how pairs are rendered, or changed since

    @property
    def exit_code(self) -> int:
        """1 where a reference is broken, else 0."""
        return int(any(verdict.state == "broken" for verdict in self.verdicts))


@command(DoctorConfig)
def doctor(config: DoctorConfig) -> Diagnosis:
    """Print the diagnosis and write it to `out`."""
    out = output_file(config.out)
    diagnosis = diagnose(config)
    for line in diagnosis_lines(diagnosis):
        print(line)
    if warning := epsilon_warning(config.epsilon):
        print(f"WARNING: {warning}")
    write_resolved(config, out.with_suffix(".yaml"))
    write_json(out, diagnosis)
    print(out)
    return diagnosis


def load_references(config: DoctorConfig) -> ScoreTable:
    """The scores of the references; `UserError` where one of them has none."""
    pairs, store = PairShards(config.pairs), open_store(config.store)
    aliases = comma_separated(config.refs, "--refs")
    if not aliases:
        raise UserError(f"--refs {config.refs!r} names no reference")
    records = resolve_references(pairs, store, aliases, config.refs_config)
    table = load_score_table(pairs, store, records, sample=config.sample)
    for reference in table.references:
        if not reference.scored.any():
            line = precompute_line(pairs, store, [reference.alias], config.refs_config)
            raise UserError(f"reference {reference.alias} has no score of these pairs; run: {line}")
    return table


def diagnose(config: DoctorConfig, table: ScoreTable | None = None) -> Diagnosis:
    """Look for faults in the scores and weigh the references; prints nothing.

    Args:
        table: of `load_references`, where it has been loaded already.
    """
    table = table or load_references(config)
    pairs, store = PairShards(config.pairs), open_store(config.store)
    specs = load_refs(config.refs_config)
    known = [_spec_of(reference.record, specs) for reference in table.references]
    notes = [
        note
        for reference, spec in zip(table.references, known)
        for note in _notes(reference.record, spec, table, pairs)
    ]
    betas = betas_of(config.beta, "--beta") if config.beta else default_betas(config.normalize)
    numbers = figures(table, betas[0], config.epsilon, config.normalize)
    outlook = forecast(
        table.pair_scores(),
        table.aliases,
        methods=methods_of(config.methods) if config.methods else None,
        betas=betas,
        epsilon=config.epsilon,
        normalize=config.normalize,
    )
    vocabularies = [
        _vocabulary(None if _changed(reference.record, spec) else spec)
        for reference, spec in zip(table.references, known)
    ]
    findings = check_scores(table, numbers, vocabularies)
    probes = []
    for k, spec in enumerate(known if config.probe else []):
        others = [other for j, other in enumerate(known) if j != k and other is not None]
        probes.append(probe(table, k, spec, others, pairs, store, config.probe))
    for report in probes:
        kept = findings[report.alias]
        if report.skipped is None and not report.findings:  # it confirms the stored scores
            kept = [finding for finding in kept if finding.code not in REFUTED]
        findings[report.alias] = kept + report.findings
    advice = advise(table, numbers, findings)
    verdicts = [
        verdict_on(reference, findings[reference.alias], advice, store.root)
        for reference in numbers
    ]
    broken = [verdict.alias for verdict in verdicts if verdict.state == "broken"]
    says = conclusions(outlook, table.aliases[0])
    if advice.normalize not in ("none", config.normalize):
        says.append(f"all of this again with --normalize {advice.normalize}, as suggested above")
    if broken:
        says = [f"none while {', '.join(broken)} is broken: mend it, or leave it out of --refs"]
    return Diagnosis(
        pairs=len(table),
        of_pairs=pairs.num_pairs,
        references=numbers,
        findings=findings,
        probes=probes,
        verdicts=verdicts,
        advice=advice,
        forecast=None if broken else outlook,
        conclusions=says,
        first_loss=method_first_loss(
            table.pair_scores(), table.aliases, "mrpo", betas[0], config.normalize
        ),
        rendering=notes,
    )


def _spec_of(record: ReferenceRecord, specs: Mapping[str, ReferenceSpec]) -> ReferenceSpec | None:
    """The entry of refs.yaml with which the scores were made, if it is still there."""
    spec = specs.get(record.alias)
    return spec if spec is not None and spec.entry() == record.entry else None


def _changed(record: ReferenceRecord, spec: ReferenceSpec | None) -> list[str]:
    """The local parts whose files are no longer those that were scored (`alias@prefix` names)."""
    return [] if spec is None else record.changed(inputs_here(spec))


def _notes(
    record: ReferenceRecord, spec: ReferenceSpec | None, table: ScoreTable, pairs: PairShards
) -> Iterator[str]:
    """How a reference's responses were found, if not as usual, and texts that bring their end."""
    if (place := record.inputs.get("response_place")) is not None:
        yield f"{record.alias}: {PLACES[place]}"
    if record.inputs.get("system_role") == "fold":
        yield f"{record.alias}: system messages go in front of the first user turn"
    if spec is not None and (changed := _changed(record, spec)):
        parts = f"the {' and '.join(changed)} of {spec.model}"
        yield f"{record.title}: {parts} changed since it was scored"
        return
    if pairs.kind != "text" or spec is None:
        return
    try:
        renderer = Renderer.of_reference(spec, record.resolved_commit)
    except UserError:  # its tokenizer is not on this machine
        return
    shown = pairs_at(pairs, table.places[:SHOWN_PAIRS])
    found = [renderer.own_end(str(t)) for pair in shown for t in (pair.chosen, pair.rejected)]
    if ends := sorted({end for end in found if end}):
        share = sum(end is not None for end in found) / len(found)
        texts = " or ".join(map(repr, ends))
        yield (
            f"{record.alias}: {share:.0%} of the first {len(found):,} responses bring their own "
            f"{texts}; none is added"
        )


def _vocabulary(spec: ReferenceSpec | None) -> int | None:
    """Tokens of the reference's vocabulary; None where its configuration is not on this machine."""
    if spec is None:
        return None
    try:
        path: Any = spec.model_path and spec.model_path / "config.json"
        path = path or try_to_load_from_cache(spec.model, "config.json", revision=spec.revision)
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UserError, OSError, TypeError, ValueError):
        return None
    return content.get("vocab_size") or content.get("text_config", {}).get("vocab_size")


def diagnosis_lines(diagnosis: Diagnosis) -> Iterator[str]:
    """The diagnosis as text. The verdicts come last, next to the prompt."""
    references, advice = diagnosis.references, diagnosis.advice
    total = f" of {diagnosis.of_pairs:,}" if diagnosis.of_pairs > diagnosis.pairs else ""
    base = references[0].alias
    yield f"{diagnosis.pairs:,}{total} pairs, {len(references)} references, base {base}"
    tables = {"": likelihood_rows(references), MARGINS: margin_rows(references)}
    if len(references) > 1:
        agreement = "pairs on which two references agree, % (correlation of their margins)"
        dominance = "pairs that a reference decides alone, %"
        tables |= {agreement: _agreement(references), dominance: _dominance(references)}
    for title, rows in tables.items():
        yield from ["", title] if title else [""]
        yield from table_lines(rows)
    if diagnosis.forecast is not None and diagnosis.forecast.rows:
        yield from ["", TITLE, f"({NOTE})", *table_lines(forecast_rows(diagnosis.forecast))]
    if diagnosis.rendering:
        yield ""
    for note in diagnosis.rendering:
        yield f"rendering  {note}"
    if diagnosis.probes:
        yield ""
    for probed in diagnosis.probes:
        line = f"none, {probed.skipped}"
        if probed.skipped is None:
            line = (
                f"{probed.agree} of {probed.responses} responses score the same again, "
                f"{probed.difference:.1e} nats per token off"
            )
        yield f"probe  {probed.alias}: {line}"
    yield ""
    width = max(len(reference.alias) for reference in references)
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
    for line in diagnosis.conclusions:
        yield f"forecast    {line}"
    if len(references) > 1:
        yield f"first loss  {diagnosis.first_loss:.3f} for mrpo with all of them; DPO's is 0.693"


def likelihood_rows(references: Sequence[ReferenceFigures]) -> Rows:
    """How likely the responses are, and how often the chosen one is the likelier."""
    accuracies = [f"accuracy {unit}, %" for unit in UNITS.values()]
    heading = ["reference", "pairs", "bits/byte chosen", "rejected", "nats/token", *accuracies]
    rows = [
        [
            reference.alias,
            f"{reference.pairs:,}",
            f"{reference.chosen_bits_per_byte:.2f}",
            f"{reference.rejected_bits_per_byte:.2f}",
            f"{reference.nats_per_token:.2f}",
            *(reference.accuracy[unit].percent() for unit in UNITS),
        ]
        for reference in references
    ]
    return [heading, *rows]


def margin_rows(references: Sequence[ReferenceFigures]) -> Rows:
    """The summed margins, what moves them, and what is missing."""
    heading = ["reference", "mean", "scale", "by length", "CTRO moves", "per byte", "first loss"]
    heading += ["end of turn", "boundary", "missing"]
    rows = [
        [
            reference.alias,
            f"{reference.margin:.1f}",
            f"{reference.margin_scale:.1f}",
            _percent(reference.length_bias),
            _percent(reference.saturation["none"]),
            _percent(reference.saturation["byte"]),
            f"{reference.first_loss:.3f}",
            _percent(reference.end_of_turn),
            _percent(reference.boundary),
            ", ".join(f"{count:,} {reason}" for reason, count in reference.missing.items())
            or "none",
        ]
        for reference in references
    ]
    return [heading, *rows]


def _agreement(references: Sequence[ReferenceFigures]) -> Rows:
    rows = [["", *(reference.alias for reference in references)]]
    for reference in references:
        cells = {
            name: f"{100 * share:.0f} ({reference.correlation[name]:.2f})"
            for name, share in reference.agreement.items()
        }
        rows.append([reference.alias, *(cells.get(name, "–") for name in rows[0][1:])])
    return rows


def _dominance(references: Sequence[ReferenceFigures]) -> Rows:
    rows = [
        [reference.alias, *(f"{100 * share:.0f}" for share in reference.dominance.values())]
        for reference in references
    ]
    return [["weights of ARWC", *references[0].dominance], *rows]


def _percent(share: float) -> str:
    """
    >>> _percent(0.0004), _percent(0.5)
    ('0.0%', '50%')
    """
    return f"{share:.0%}" if share >= 0.1 or share == 0 else f"{share:.1%}"
