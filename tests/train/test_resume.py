"""A run that is killed and resumed is the run that was never disturbed, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from mrpo.errors import UserError
from mrpo.train import loop
from mrpo.train.checkpoint import best, checkpoints
from mrpo.train.run import train

KILLS: dict[str, dict[str, int]] = {
    "undisturbed": {},
    "before any checkpoint": {"step": 1},
    "behind a checkpoint": {"step": 3},
    "in a checkpoint": {"save": 2},
    "before its name": {"rename": 4},
    "at the end": {"finish": 1},
}


@pytest.fixture(scope="module")
def killed(inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs, each killed somewhere and resumed, over two epochs with LoRA's dropout."""
    root = tmp_path_factory.mktemp("killed")
    changes = {
        "max_steps": 7,
        "save_steps": 2,
        "logging_steps": 3,
        "batch_pairs": 8,
        "max_tokens": 512,
        "lora_rank": 2,
        "lora_dropout": 0.1,
        "use_dora": True,
    }
    runs = {name: [inputs.settings(root / name, **changes), kill] for name, kill in KILLS.items()}
    (root / "runs.json").write_text(json.dumps(runs))
    script = Path(__file__).with_name("killed_runs.py")
    subprocess.run(
        [sys.executable, str(script), str(root / "runs.json")],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return root


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Every line, without what a clock says."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def tensors_of(checkpoint: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint: weights and optimizer."""
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if hasattr(entry, "properties")
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", [name for name in KILLS if name != "undisturbed"])
def test_killed_run_ends_as_the_undisturbed_one(killed: Path, name: str) -> None:
    plain, resumed = killed / "undisturbed", killed / name
    assert log_of(resumed) == log_of(plain)
    assert (resumed / "evaluation.json").read_text() == (plain / "evaluation.json").read_text()
    last = "checkpoints/step-00000007"
    expected, resumed_tensors = tensors_of(plain / last), tensors_of(resumed / last)
    assert any("exp_avg" in name for name in expected)
    assert expected.keys() == resumed_tensors.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, resumed_tensors[key]), key
    states = [json.loads((run / last / "state.json").read_text()) for run in (plain, resumed)]
    assert states[0]["state"] == states[1]["state"]
    assert states[0]["accuracy"] == states[1]["accuracy"]
    weights = "model/adapter_model.safetensors"
    assert (resumed / weights).read_bytes() == (plain / weights).read_bytes()
    assert not list(resumed.glob("**/*.partial"))


def test_undisturbed_log_has_every_step_once(killed: Path) -> None:
    lines = log_of(killed / "undisturbed")
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 7]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 6, 7]


@pytest.mark.parametrize("save_steps", [3, 100])
def test_sigterm_saves_within_the_step_and_resume_goes_on(
    inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_steps: int
) -> None:
    config = inputs.config(tmp_path / "plain", save_steps=save_steps)
    train(config)
    step = loop.optimizer_step

    def stopped_in_the_third(run: loop.Run, batch: Any) -> Any:
        if run.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, batch)

    config.output_dir = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", stopped_in_the_third)
        result = train(config)
    assert (result.status, result.exit_code, result.held_out) == ("stopped", 143, {})
    assert [saved.state.step for saved in checkpoints(tmp_path / "run" / "checkpoints")] == [3]
    assert not (tmp_path / "run" / "model").exists()
    config.resume = True
    assert train(config).exit_code == 0
    assert log_of(tmp_path / "run") == log_of(tmp_path / "plain")
    weights = "model/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "plain" / weights).read_bytes()


@pytest.fixture(scope="module")
def finished(inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(inputs.config(folder, max_steps=5, save_steps=1, save_total_limit=2))
    return folder


def test_finished_run_says_so(
    inputs: Any, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "log.jsonl").read_bytes()
    config = inputs.config(finished, max_steps=5, save_steps=1, resume=True)
    result = train(config)
    assert (result.status, result.exit_code) == ("finished", 0)
    assert result.held_out["eval_pairs"] == 11
    assert "this run is finished" in capsys.readouterr().out
    assert (finished / "log.jsonl").read_bytes() == before


def test_last_checkpoints_and_the_best_are_kept(finished: Path) -> None:
    evaluated = [line for line in log_of(finished) if "eval_loss" in line]
    accuracies = {line["step"]: line["eval_rewards/accuracies"] for line in evaluated}
    top = max(accuracies, key=lambda step: (accuracies[step], -step))
    saved = checkpoints(finished / "checkpoints")
    assert {checkpoint.state.step for checkpoint in saved} == {4, 5, top}
    kept = best(saved)
    assert kept is not None
    assert kept.state.step == top


@pytest.mark.parametrize(
    ("name", "value"), [("beta", 0.3), ("method", "dpo:qwen"), ("seed", 1), ("batch_pairs", 8)]
)
def test_changed_setting_is_refused_by_name(
    inputs: Any, finished: Path, name: str, value: Any
) -> None:
    changed = {"max_steps": 5, "save_steps": 1, "resume": True, name: value}
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is {value}, and the run in"):
        train(inputs.config(finished, **changed))


def test_folder_with_a_run_is_refused_without_resume(inputs: Any, finished: Path) -> None:
    with pytest.raises(UserError, match="holds a run; add --resume"):
        train(inputs.config(finished))


def test_resume_without_a_checkpoint_begins_at_the_start(inputs: Any, tmp_path: Path) -> None:
    train(inputs.config(tmp_path / "new", max_steps=1))
    train(inputs.config(tmp_path / "resumed", max_steps=1, resume=True))
    logs = [log_of(tmp_path / name) for name in ("new", "resumed")]
    assert logs[0] == logs[1] != []
