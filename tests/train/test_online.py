"""Methods that learn while they train, and from the labels: resumed runs are undisturbed ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mrpo.errors import UserError
from mrpo.train.checkpoint import checkpoints
from mrpo.train.export import export
from mrpo.train.run import train

from .test_resume import log_of

METHODS = ["geometric+swcw", "geometric+thompson", "mrpo+thompson+reliable", "dpo:qwen+reliable"]


@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_is_the_undisturbed_one(inputs: Any, tmp_path: Path, method: str) -> None:
    plain, resumed = tmp_path / "plain", tmp_path / "resumed"
    train(inputs.config(plain, method=method, max_steps=6, save_steps=3))
    shutil.copytree(plain, resumed, ignore=shutil.ignore_patterns("model", "step-00000006"))
    train(inputs.config(resumed, method=method, max_steps=6, save_steps=3, resume=True))
    assert log_of(resumed) == log_of(plain)
    weights = "model/model.safetensors"
    assert (resumed / weights).read_bytes() == (plain / weights).read_bytes()
    state = "checkpoints/step-00000006/state.json"
    states = [json.loads((run / state).read_text())["state"] for run in (plain, resumed)]
    assert states[0] == states[1]


def test_swcw_trains_each_batch_on_the_confidence_of_the_one_before(
    inputs: Any, tmp_path: Path
) -> None:
    train(inputs.config(tmp_path / "run", method="geometric+swcw", max_steps=3, save_steps=1))
    lines = [line for line in log_of(tmp_path / "run") if "loss" in line]
    weights = [[line[f"refs/weight/{name}"] for name in inputs.references] for line in lines]
    assert weights[0] == pytest.approx([1 / 3] * 3)
    saved = checkpoints(tmp_path / "run" / "checkpoints")
    for checkpoint in saved:
        assert checkpoint.state.online is not None
        if checkpoint.state.step < 3:
            after = weights[checkpoint.state.step]
            assert after == pytest.approx(checkpoint.state.online.weights)
            assert after != pytest.approx([1 / 3] * 3, abs=1e-3)


def test_thompson_draws_one_reference_a_batch_and_counts_its_rewards(
    inputs: Any, tmp_path: Path
) -> None:
    train(inputs.config(tmp_path / "run", method="geometric+thompson", max_steps=6, save_steps=6))
    lines = [line for line in log_of(tmp_path / "run") if "loss" in line]
    weights = [[line[f"refs/weight/{name}"] for name in inputs.references] for line in lines]
    assert all(sorted(row) == [0, 0, 1] for row in weights)
    (last,) = checkpoints(tmp_path / "run" / "checkpoints")
    online = last.state.online
    assert online is not None
    totals = [won + lost for won, lost in zip(online.wins, online.losses)]
    assert totals == [sum(column) for column in zip(*weights)]
    assert online.accuracy is not None


@pytest.mark.parametrize("method", ["geometric+reliable", "geometric+swcw"])
def test_what_acts_while_training_is_not_exported(inputs: Any, tmp_path: Path, method: str) -> None:
    with pytest.raises(UserError, match="acts on the loss while it trains"):
        export(
            pairs=str(inputs.root / "pairs"), store=str(inputs.root / "store"),
            refs_config=str(inputs.root / "refs.yaml"), refs="llama,qwen", method=method,
            out=str(tmp_path / "out"),
        )  # fmt: skip


def test_the_card_and_the_summary_say_what_was_learned(
    inputs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(inputs.config(tmp_path / "run", method="dpo:qwen+reliable", max_steps=1))
    assert "wrong by the references' word" in capsys.readouterr().out
    assert "judged wrong by the references" in (tmp_path / "run/model/README.md").read_text()
