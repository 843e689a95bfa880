"""Two processes under torchrun: one curve, checkpoints for any number, decisions in common."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mrpo.train.checkpoint import checkpoints
from mrpo.train.run import train

LEARNING = ["geometric+swcw", "geometric+thompson", "dpo:llama+reliable"]


@pytest.fixture(scope="module")
def runs(inputs: Any, mixture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one process, by two, by two of which one is short of memory, and begun by
    either number and ended by the other; and that of a mixture of experts by one and by two."""
    root = tmp_path_factory.mktemp("ranks")
    # 20 of the pairs are short enough, and 36 rows are 6 steps.
    changes = {"max_steps": None, "num_train_epochs": 1.8, "max_length": 50}
    changes |= {"batch_pairs": 6, "max_tokens": 200, "save_steps": 3}
    train(inputs.config(root / "one", **changes))
    experts = changes | {"policy": mixture}
    train(inputs.config(root / "experts, one", **experts | {"max_tokens": 4096}))
    begin(root / "one", root / "one then two")
    for method in LEARNING:
        train(inputs.config(root / f"one {method}", **changes, method=method))
    two = [
        inputs.settings(root / "experts, two", **experts),
        inputs.settings(root / "two", **changes),
        inputs.settings(root / "one then two", **changes, resume=True),
        *(inputs.settings(root / f"two {m}", **changes, method=m) for m in LEARNING),
        inputs.settings(root / "short", **changes) | {"short_of_memory": True},
    ]
    (root / "runs.json").write_text(json.dumps(two))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).with_name("rank.py")
    subprocess.run([*command, str(script), str(root / "runs.json")], check=True)
    begin(root / "two", root / "two then one")
    train(inputs.config(root / "two then one", **changes, resume=True))
    return root


def begin(source: Path, target: Path) -> None:
    """What a run looks like that was stopped at its first checkpoint."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model", "step-00000006"))


def curve(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize("name", ["two", "one then two", "two then one", "short"])
def test_curve_is_that_of_one_process(runs: Path, name: str) -> None:
    for value in ("loss", "grad_norm", "rewards/margins", "eval_loss", "eval_rewards/accuracies"):
        expected = curve(runs / "one", value)
        assert len(expected) == (2 if value.startswith("eval") else 6)
        assert curve(runs / name, value) == pytest.approx(expected, rel=1e-3, abs=1e-5), value


def test_balancing_loss_is_that_of_one_process(runs: Path) -> None:
    for value in ("loss", "aux_loss", "grad_norm"):
        expected = curve(runs / "experts, one", value)
        assert len(expected) == 6
        assert curve(runs / "experts, two", value) == pytest.approx(expected, rel=1e-3), value


@pytest.mark.parametrize("name", ["two", "one then two", "two then one"])
def test_model_is_that_of_one_process(runs: Path, name: str) -> None:
    expected, trained = (load_file(runs / run / "model/model.safetensors") for run in ("one", name))
    assert expected.keys() == trained.keys()
    for key, tensor in expected.items():
        assert (trained[key] - tensor).norm() / tensor.norm() < 1e-4, key


def test_halved_budget_is_that_of_all_ranks(runs: Path) -> None:
    (last,) = checkpoints(runs / "short" / "checkpoints")[-1:]
    assert last.state.max_tokens is not None
    assert last.state.max_tokens < 200
    assert last.state.step == 6


@pytest.mark.parametrize("method", LEARNING)
def test_what_is_learned_is_that_of_one_process(runs: Path, method: str) -> None:
    for value in ("loss", "grad_norm", "refs/weight/qwen", "eval_loss"):
        expected = curve(runs / f"one {method}", value)
        got = curve(runs / f"two {method}", value)
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-5), value
    states = [checkpoints(runs / f"{n} {method}" / "checkpoints")[-1].state for n in ("one", "two")]
    assert states[0].online == states[1].online
