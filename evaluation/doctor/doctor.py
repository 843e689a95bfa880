"""`mrpo doctor`: whether each reference's scores can be trusted, and what it is worth.

    scores -> figures -> checks (-> probe) -> verdicts -> tables, doctor.json

Everything but the probe works from the store alone; no weights are opened for it.


A diagnosis as text: what `mrpo doctor` prints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import try_to_load_from_cache

from ...data.join import precompute_line
from ...data.references import ReferenceSpec, load_refs
from ...data.shards import PairShards
from ...data.store import NotScored, ReferenceRecord, Store, open_store
from ...errors import UserError
from ...files import output_file, write_json
from ...settings import write_resolved
from ...terminal import Rows, table_lines
from ..config import DoctorConfig
from ..figures import UNITS, ReferenceFigures, figures, method_first_loss
from ..score_table import ScoreTable, load_score_table
from .checks import check_scores
from .diagnosis import Advice, Verdict, advise, verdicts
from .findings import Finding
from .probe import REFUTED, ProbeReport, probe

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """All that doctor found; what doctor.json holds."""

    pairs: int  # looked at
    of_pairs: int
    references: list[ReferenceFigures]
    findings: dict[str, list[Finding]]
    probes: list[ProbeReport]
    verdicts: list[Verdict]
    advice: Advice
    first_loss: float  # of MRPO with all references, where the policy starts at the base


def doctor(config: DoctorConfig) -> int:
    """Print the diagnosis and write it; 1 where a reference is broken, else 0."""
    out = output_file(config.out, ".json")
    diagnosis = diagnose(config)
    for line in diagnosis_lines(diagnosis):
        print(line)
    write_resolved(config, out.with_suffix(".yaml"))
    write_json(out, diagnosis)
    print(out)
    return int(any(one.state == "broken" for one in diagnosis.verdicts))


def diagnose(config: DoctorConfig) -> Diagnosis:
    """Read the scores, look for faults, weigh the references."""
    pairs, store = PairShards(config.pairs), open_store(config.store)
    specs = load_refs(config.refs_config)
    records = _records(config, pairs, store, specs)
    table = load_score_table(pairs, store, records, sample=config.sample)
    for reference in table.references:
        if not reference.scored.any():
            line = precompute_line(pairs, store, [reference.alias], config.refs_config)
            raise UserError(f"reference {reference.alias} has no score of these pairs; run: {line}")
    numbers = figures(table, config.beta, config.epsilon)
    found = check_scores(table, numbers, _vocabularies(records, specs))
    probes = _probes(config, table, specs, pairs, store)
    for report in probes:
        if report.confirms:
            found[report.alias] = [one for one in found[report.alias] if one.code not in REFUTED]
        found[report.alias] += report.findings
    advice = advise(table, numbers, found)
    return Diagnosis(
        pairs=len(table),
        of_pairs=pairs.num_pairs,
        references=numbers,
        findings=found,
        probes=probes,
        verdicts=verdicts(numbers, found, advice, store.root),
        advice=advice,
        first_loss=method_first_loss(table.pair_scores(), table.aliases, "mrpo", config.beta),
    )


def _records(
    config: DoctorConfig, pairs: PairShards, store: Store, specs: Mapping[str, ReferenceSpec]
) -> list[ReferenceRecord]:
    aliases = [alias.strip() for alias in config.refs.split(",") if alias.strip()]
    if not aliases or len(set(aliases)) < len(aliases):
        raise UserError(f"--refs {config.refs!r}: name each reference once, as llama,mistral")
    try:
        return [store.resolve(alias, specs) for alias in aliases]
    except NotScored as error:
        line = precompute_line(pairs, store, aliases, config.refs_config)
        raise UserError(f"{error}; run: {line}") from None


def _probes(
    config: DoctorConfig,
    table: ScoreTable,
    specs: Mapping[str, ReferenceSpec],
    pairs: PairShards,
    store: Store,
) -> list[ProbeReport]:
    """A probe of each reference, one after the other; none without --probe."""
    if not config.probe:
        return []
    known = [_spec_of(reference.record, specs) for reference in table.references]
    reports = []
    for k, spec in enumerate(known):
        others = [other for j, other in enumerate(known) if j != k and other is not None]
        reports.append(probe(table, k, spec, others, pairs, store, config.probe))
    return reports


def _spec_of(record: ReferenceRecord, specs: Mapping[str, ReferenceSpec]) -> ReferenceSpec | None:
    """The entry of refs.yaml under which the scores were made, where it is still there."""
    spec = specs.get(record.alias)
    return spec if spec is not None and spec.entry() == record.entry else None


def _vocabularies(
    records: Sequence[ReferenceRecord], specs: Mapping[str, ReferenceSpec]
) -> dict[str, int]:
    """Tokens of each reference's vocabulary, where its configuration is on this machine."""
    sizes = {}
    for record in records:
        spec = _spec_of(record, specs)
        if spec is not None and (size := _vocabulary(spec)):
            sizes[record.alias] = size
    return sizes


def _vocabulary(spec: ReferenceSpec) -> int | None:
    try:
        path: Any = spec.model_folder and spec.model_folder / "config.json"
        path = path or try_to_load_from_cache(spec.model, "config.json", revision=spec.revision)
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UserError, OSError, TypeError, ValueError):
        return None
    return content.get("vocab_size") or content.get("text_config", {}).get("vocab_size")


def diagnosis_lines(diagnosis: Diagnosis) -> Iterator[str]:
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
    yield from table_lines(rows)


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
