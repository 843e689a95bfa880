"""`mrpo precompute` as a user runs it: three references, failures, dry runs, and mistakes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from mrpo.errors import UserError
from mrpo.precompute import preflight, process
from mrpo.precompute.run import precompute
from mrpo.tests.precompute.workspace import Workspace, rows

SERVED = {"engine": "server", "server": "http://a:1", "refs": "llama"}
FORBIDDEN = (sys.executable, "-c", "raise SystemExit('no worker was to be started')")


def test_three_references_then_nothing(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.prepare(rows(20))
    assert precompute(workspace.config()).exit_code == 0
    printed = capsys.readouterr().out
    for alias in ("llama", "mistral", "qwen"):
        assert f"{alias}: 40 responses scored (" in printed
        assert len(workspace.by_id(alias)) == 40
        assert workspace.scores(alias).num_rows() == 40
        (record,) = [record for record in workspace.store.references() if record.alias == alias]
        assert record.runs[0]["engine"] == "hf"
        assert record.runs[0]["tokens_per_second"] > 0
    assert "0 responses in the store; 40 to score (" in printed
    assert printed.splitlines()[-1] == f"scores in {workspace.store.root}"
    (logs,) = Path(workspace.store.root, "logs").iterdir()
    assert yaml.safe_load((logs / "precompute.yaml").read_text())["refs"] == "llama,mistral,qwen"

    monkeypatch.setattr(process, "PYTHON", FORBIDDEN)
    assert precompute(workspace.config()).exit_code == 0
    assert "llama: 0 responses scored; 40 from the store" in capsys.readouterr().out


def test_a_dry_run_counts_everything_and_writes_nothing(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "PYTHON", FORBIDDEN)
    data = rows(10)
    data[0]["chosen"][0]["content"] = "word " * 1200  # the context is 1,024 tokens
    data[1]["chosen"][0]["content"] = "word " * 120
    workspace.prepare(data)
    assert (
        precompute(workspace.config(refs="llama", dry_run=True, max_model_len=120)).exit_code == 0
    )
    printed = capsys.readouterr().out
    assert "0 responses in the store; 18 to score (" in printed
    assert "1 that can't be (beyond_context 1); 1 left out by --max-model-len" in printed
    assert not Path(workspace.store.root).exists()


def test_preflight_counts_the_same_on_many_cores(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.prepare(rows(10), shard_pairs=4)
    config = workspace.config(refs="llama,qwen", dry_run=True)
    precompute(config)
    alone = capsys.readouterr().out.partition("engine hf")[2]
    monkeypatch.setattr(preflight, "POOL_RESPONSES", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    precompute(config)
    assert capsys.readouterr().out.partition("engine hf")[2] == alone


def test_a_reference_that_fails_costs_the_others_nothing(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that do not load, weights that are NaN, and a reference without fault."""
    references = yaml.safe_load(workspace.refs_config.read_text())
    torn, broken = tmp_path / "torn", tmp_path / "broken"
    for folder, alias in ((torn, "llama"), (broken, "mistral")):
        shutil.copytree(references[alias]["model"], folder)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    model = AutoModelForCausalLM.from_pretrained(broken, dtype=torch.float32)
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    model.save_pretrained(broken)

    (tmp_path / "run").mkdir()
    qwen = Path(references["qwen"]["model"])
    run = Workspace(tmp_path / "run", {"torn": torn, "broken": broken, "fine": qwen})
    run.prepare(rows(5))
    reasons = "reference broken: .* not finite.*; model .*torn could not be loaded"
    with pytest.raises(UserError, match=reasons) as raised:
        precompute(run.config())
    assert "\n" not in str(raised.value)
    printed = capsys.readouterr()
    assert "torn: 0 responses scored; 0 from the store; 10 NOT SCORED" in printed.out
    assert "fine: 10 responses scored (" in printed.out
    assert len(run.by_id("fine")) == 10
    assert len(run.by_id("torn")) == len(run.by_id("broken")) == 0


def test_data_is_prepared_first(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    source = workspace.folder / "raw.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows(3)))
    config = workspace.config(data=str(source), dry_run=True)
    assert precompute(config).exit_code == 0
    assert (workspace.folder / "pairs" / "manifest.json").exists()


def test_text_pairs_for_a_model_with_a_chat_template_are_warned_of(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.prepare([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}])
    precompute(workspace.config(refs="llama", dry_run=True))
    assert "this model has a chat template" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refs": "llama,gemma"}, "unknown reference 'gemma'; known: llama, mistral, qwen"),
        ({"pairs": "nowhere"}, "nowhere holds no prepared pairs"),
        ({"engine": "server"}, "has no URL for llama"),
        ({"engine": "server", "server": "http://a:1"}, "a server serves one model"),
        ({"engine": "server", "server": "llama=a:1", "refs": "llama"}, "has no URL for llama"),
        ({"engine": "server", "server": "http://me:key@a:1", "refs": "llama"}, "VLLM_API_KEY"),
        ({"engine": "vllm", "bf16": True}, "--bf16 is True, which has no effect on engine vllm"),
        ({"server": "http://a:1", "refs": "llama"}, "--server is http://a:1, which has no effect"),
        ({"engine": "auto", "server": "http://a:1"}, "only with --engine server; leave it out"),
        ({"concurrency": 2}, "--concurrency is 2, which has no effect on engine hf"),
        ({"update_refs": True}, "--update-refs is True, which has no effect where no reference"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size is 2, which has no effect"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size is 2"),
        ({"gpu_memory_utilization": 0.5}, "--gpu-memory-utilization is 0.5"),
        (
            {**SERVED, "max_tokens": 512},
            "--max-tokens is 512, which has no effect on engine server",
        ),
        ({**SERVED, "data_parallel_size": 2}, "--data-parallel-size is 2"),
        ({**SERVED, "bf16": True}, "--bf16 is True"),
        ({"max_tokens": 0}, "--max-tokens is 0; it must be above 0"),
        ({"gpu_memory_utilization": 90}, "--gpu-memory-utilization is 90; it must be in"),
    ],
)
def test_a_users_mistake_stops_before_any_work(
    workspace: Workspace, options: dict[str, Any], message: str
) -> None:
    workspace.prepare(rows(2))
    with pytest.raises(UserError, match=message):
        precompute(workspace.config(**options))
    assert not Path(workspace.store.root).exists()


def test_vllm_that_is_not_there_is_a_users_mistake(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mrpo.precompute.reference_run.find_spec", lambda name: None)
    with pytest.raises(UserError, match="vLLM is not installed"):
        precompute(workspace.config(engine="vllm"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "llama9"}, "architecture 'llama9' is unknown to transformers"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
            "needs code of its own, and code that comes with a model is not run here",
        ),
    ],
    ids=["newer", "own code"],
)
def test_a_model_that_transformers_does_not_have_stops_before_any_work(
    workspace: Workspace, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    entry = yaml.safe_load(workspace.refs_config.read_text())["llama"]
    folder = shutil.copytree(entry["model"], tmp_path / "new")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    (folder / "own.py").write_text("raise SystemExit('it was run')")
    workspace.refs_config.write_text(yaml.safe_dump({"new": {"model": str(folder)}}))
    workspace.prepare(rows(2))
    with pytest.raises(UserError, match=message):
        precompute(workspace.config())
    assert not Path(workspace.store.root).exists()


def test_a_model_folder_without_tokenizer_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    source = Path(yaml.safe_load(workspace.refs_config.read_text())["llama"]["model"])
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, bare)
    (tmp_path / "run").mkdir()
    run = Workspace(tmp_path / "run", {"bare": bare})
    run.prepare(rows(2))
    with pytest.raises(UserError, match="tokenizer"):
        precompute(run.config())
