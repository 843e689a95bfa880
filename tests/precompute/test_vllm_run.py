"""`mrpo precompute --engine vllm` in a real worker, for a reference with an uneven LoRA adapter."""

from __future__ import annotations

from pathlib import Path

import pytest

from mrpo.precompute.engines.protocol import EngineSettings
from mrpo.precompute.run import precompute
from mrpo.tests.precompute.workspace import Workspace, rows


@pytest.mark.vllm
def test_vllm_and_transformers_store_the_same_rows(
    tmp_path: Path,
    reference_folder: Path,
    uneven_adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    entry = {"model": str(reference_folder), "adapter": str(uneven_adapter)}
    workspace = Workspace(tmp_path, {"adapted": entry})
    pairs = workspace.prepare(rows(40), shard_pairs=25)
    assert precompute(workspace.config(engine="vllm")).exit_code == 0
    assert "adapted: 80 responses scored (" in capsys.readouterr().out
    stored = workspace.by_id("adapted")
    (record,) = workspace.store.references()
    assert record.runs[0]["engine"] == "vllm"

    (tmp_path / "hf").mkdir()
    other = Workspace(tmp_path / "hf", {"adapted": entry})
    settings = EngineSettings(
        alias="adapted", model=str(reference_folder), adapter=str(uneven_adapter), longest=1024
    )
    other.score("adapted", pairs, settings=settings)
    assert len(stored) == 80
    for response_id, row in other.by_id("adapted").items():
        for name in ("logp", "end_logp"):
            assert stored[response_id][name] == pytest.approx(row[name], abs=1e-3)
        for name in ("tokens", "checksum"):
            assert stored[response_id][name] == row[name]
