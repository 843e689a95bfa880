"""Doctor finds nothing in healthy references: other seeds, other data, few pairs, any others."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrpo.data.config import PrepareConfig
from mrpo.data.prepare import prepare
from mrpo.data.references import load_refs
from mrpo.data.rendering import Renderer
from mrpo.data.store import ReferenceRecord, Store
from mrpo.errors import UserError
from mrpo.evaluation.doctor.checks import check_scores
from mrpo.evaluation.doctor.doctor import diagnose, diagnosis_lines, doctor
from mrpo.evaluation.figures import figures
from mrpo.evaluation.score_table import ScoreTable, load_score_table
from mrpo.precompute.identity import resolve_reference
from mrpo.tests.evaluation.doctor import faulty
from mrpo.tests.evaluation.trained import Clinic, open_clinic, score


def loaded(clinic: Clinic, store: Store) -> ScoreTable:
    records = [store.resolve(alias, clinic.specs()) for alias in clinic.models]
    return load_score_table(clinic.shards, store, records)


def part(table: ScoreTable, rows: np.ndarray, columns: list[int]) -> ScoreTable:
    """Some pairs of a table under some of its references."""

    def taken(whole: Any, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(whole, name)[rows] for name in names}

    arrays = ("logps", "end_logps", "tokens", "prompt_tokens", "boundary", "reasons")
    pairs = ("places", "ids", "sources", "prompts", "prompt_bytes", "response_bytes")
    references = [
        type(reference)(record=reference.record, **taken(reference, arrays))
        for reference in (table.references[k] for k in columns)
    ]
    return ScoreTable(references=references, **taken(table, pairs))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_and_probe_find_nothing(
    seed: int, clinic: Clinic, rows: dict[str, list[Any]], tmp_path: Path
) -> None:
    some = clinic if seed == 0 else open_clinic(rows, tmp_path / "clinic", seed)
    diagnosis = some.diagnose(some.store(tmp_path / "store"), probe=16)
    assert [verdict.state for verdict in diagnosis.verdicts] == ["healthy"] * 3
    assert not any(diagnosis.findings.values())
    assert diagnosis.rendering == []
    for report in diagnosis.probes:
        assert (report.skipped, report.agree, report.other_tokens) == (None, report.responses, 0)
        assert report.responses == 32
        assert report.difference < 1e-5


def test_no_false_alarm_in_200_draws_of_pairs_and_references(
    clinic: Clinic, tmp_path: Path
) -> None:
    table = loaded(clinic, clinic.store(tmp_path / "store"))
    rng = np.random.default_rng(0)
    kinds = [np.flatnonzero(table.sources == name) for name in np.unique(table.sources)]
    kinds.append(np.arange(len(table)))
    for _ in range(200):
        kind = kinds[rng.integers(len(kinds))]
        size = min(len(kind), int(rng.choice([20, 30, 50, 100])))
        columns = rng.permutation(3)[: rng.integers(1, 4)].tolist()
        drawn = part(table, rng.choice(kind, size, replace=False), columns)
        findings = check_scores(drawn, figures(drawn, beta=0.1), [700] * len(columns))
        assert not any(findings.values()), findings


def test_a_broken_reference_does_not_make_others_suspect(clinic: Clinic, tmp_path: Path) -> None:
    """Means are so small that sums look unlikely beside them."""
    store = clinic.store(tmp_path / "store", llama=faulty.means(clinic.scores["llama"]))
    states = {verdict.alias: verdict.state for verdict in clinic.diagnose(store).verdicts}
    assert states == {"llama": "broken", "mistral": "healthy", "qwen": "healthy"}


def test_one_reference_under_two_names_is_no_fault(clinic: Clinic, tmp_path: Path) -> None:
    store = clinic.store(tmp_path / "store", qwen=clinic.scores["llama"])
    findings = clinic.diagnose(store).findings
    assert [finding.code for finding in findings["qwen"]] == ["duplicate"]
    assert {finding.level for group in findings.values() for finding in group} == {"suspect"}


def test_weights_that_changed_are_not_probed(clinic: Clinic, tmp_path: Path) -> None:
    store = clinic.store(tmp_path / "store")
    clinic.specs()
    config_file = clinic.models["llama"] / "config.json"
    before = config_file.read_text(encoding="utf-8")
    config_file.write_text(json.dumps(json.loads(before) | {"rms_norm_eps": 0.5}), encoding="utf-8")
    try:
        with pytest.raises(UserError, match=r"llama changed since llama@.* run: mrpo precompute"):
            clinic.diagnose(store, refs="llama")
        [record] = [record for record in store.references() if record.alias == "llama"]
        diagnosis = clinic.diagnose(store, refs=record.title, probe=2)
    finally:
        config_file.write_text(before, encoding="utf-8")
    assert diagnosis.probes[0].skipped == "its model changed since it was scored"
    assert diagnosis.probes[0].findings == []
    [note] = diagnosis.rendering
    assert re.fullmatch(
        r"llama@[0-9a-f]{12}: the model of .*llama changed since it was scored", note
    )


def test_the_command_writes_what_it_prints_and_says_so(
    clinic: Clinic, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clinic.specs()
    healthy = clinic.config(clinic.store(tmp_path / "healthy"))
    assert doctor(healthy).exit_code == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == healthy.out
    content = json.loads(Path(healthy.out).read_text(encoding="utf-8"))
    assert [reference["alias"] for reference in content["references"]] == [
        "llama",
        "mistral",
        "qwen",
    ]
    assert content["references"][0]["first_loss"] == pytest.approx(np.log(2))
    assert Path(healthy.out).with_suffix(".yaml").is_file()
    swapped = clinic.store(tmp_path / "swapped", qwen=faulty.swapped(clinic.scores["qwen"]))
    assert doctor(clinic.config(swapped)).exit_code == 1
    assert "chosen and rejected were exchanged" in capsys.readouterr().out


def test_what_is_special_about_the_rendering_is_said(clinic: Clinic, tmp_path: Path) -> None:
    opens = (
        "{%- for m in messages %}{{ m.role ~ ': ' ~ m.content ~ bos_token }}{%- endfor %}"
        "{{ 'assistant: <think>' if add_generation_prompt }}"
    )
    (tmp_path / "refs.yaml").write_text(
        f"llama: {{model: {clinic.models['llama']}, system_role: fold, chat_template: opens.jinja}}"
    )
    (tmp_path / "opens.jinja").write_text(opens)
    spec = load_refs(tmp_path / "refs.yaml")["llama"]
    renderer = Renderer.of_reference(spec)
    end = renderer.end_of_turn  # of refs.yaml's template; the tokenizer's own has another
    assert end == renderer.tokenizer.bos_token
    rows = [
        {"prompt": f"Is it {n}?", "chosen": f" Yes, {n}.{end if n % 2 else ''}", "rejected": " No."}
        for n in range(8)
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = prepare(
        PrepareConfig(source=str(tmp_path / "texts.jsonl"), out=str(tmp_path / "texts"))
    )
    store = Store(tmp_path / "store")
    record = ReferenceRecord(
        alias="llama", entry=spec.entry(), inputs=resolve_reference(spec).inputs
    )
    store.record(record)
    rendered = renderer.render_many(texts.pairs(0))
    for table in (
        clinic.scores["llama"],
        score(clinic.models["llama"], texts.pairs(0), rendered=rendered),
    ):
        store.scores(record.identity).add(table)
    config = clinic.config(store, refs="llama", probe=4)
    config = replace(config, refs_config=str(tmp_path / "refs.yaml"), out=str(tmp_path / "d.json"))
    said = "\n".join(diagnosis_lines(diagnose(config)))
    assert "rendering  llama: the response begins where a sentinel in its place does" in said
    assert "rendering  llama: system messages go in front of the first user turn" in said
    assert "responses bring their own" not in said
    said = "\n".join(diagnosis_lines(diagnose(replace(config, pairs=str(texts.path)))))
    assert f"llama: 25% of the first 16 responses bring their own {end!r}; none is added" in said
    assert "probe  llama: 8 of 8 responses score the same again" in said
