"""The schedule is over the pairs that are trained on, whatever the policy can't take."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mrpo.data.rendering import Refusal, Renderer
from mrpo.data.shards import PairShards
from mrpo.errors import UserError
from mrpo.train.checkpoint import checkpoints
from mrpo.train.run import train
from mrpo.train.stream import refusals

LIMIT, TRAINING = 50, 37
EPOCH = {"max_steps": None, "max_length": LIMIT, "warmup_ratio": 0.0, "save_steps": 2}


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def kept(inputs: Any) -> int:
    """Training pairs that are no longer than the limit; a third of them are longer."""
    pairs, renderer = PairShards(inputs.root / "pairs"), Renderer.load(inputs.references["llama"])
    reasons = [
        reason
        for shard in range(len(pairs.names))
        for reason, split in zip(
            refusals(pairs.pairs(shard), renderer, {"beyond_max_length": LIMIT}),
            pairs.table(shard, ["split"])["split"].to_pylist(),
        )
        if split == "train"
    ]
    assert len(reasons) == TRAINING
    assert 8 < reasons.count(None) < TRAINING - 3
    return reasons.count(None)


@pytest.mark.parametrize("epochs", [1.0, 1.5])
def test_the_last_rate_is_the_end_of_the_cosine(
    inputs: Any, tmp_path: Path, kept: int, epochs: float, capsys: pytest.CaptureFixture[str]
) -> None:
    train(inputs.config(tmp_path / "run", **EPOCH, num_train_epochs=epochs))
    steps = math.ceil(round(epochs * kept) / 4)
    log = log_of(tmp_path / "run")
    assert [line["step"] for line in log] == list(range(1, steps + 1))
    rates = [line["learning_rate"] / 1e-3 for line in log]
    assert rates == pytest.approx([(1 + math.cos(math.pi * n / steps)) / 2 for n in range(steps)])
    assert log[-1]["epoch"] == pytest.approx(round(epochs * kept) / kept)
    state = checkpoints(tmp_path / "run" / "checkpoints")[-1].state
    assert state.pairs == round(epochs * kept)
    out = capsys.readouterr().out
    assert f"{kept} to train on" in out
    assert (
        f"{TRAINING - kept} that the policy can't take ({TRAINING - kept} beyond_max_length)" in out
    )
    assert f"steps       {steps} of 4 pairs" in out
    assert (
        f"| pairs that the policy could not take | {TRAINING - kept} |"
        in (tmp_path / "run" / "model" / "README.md").read_text()
    )


def test_a_resumed_run_keeps_rows_and_schedule(inputs: Any, tmp_path: Path, kept: int) -> None:
    for name in ("whole", "resumed"):
        train(inputs.config(tmp_path / name, **EPOCH, save_total_limit=9))
    saved = checkpoints(tmp_path / "resumed" / "checkpoints")
    for later in saved[1:]:
        for file in later.folder.iterdir():
            file.unlink()
        later.folder.rmdir()
    for file in (tmp_path / "resumed" / "model").iterdir():
        file.unlink()
    (tmp_path / "resumed" / "model").rmdir()
    train(inputs.config(tmp_path / "resumed", **EPOCH, save_total_limit=9, resume=True))

    def numbers(name: str) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in line.items() if not key.startswith("perf/")}
            for line in log_of(tmp_path / name)
        ]

    assert numbers("resumed") == numbers("whole")
    last = checkpoints(tmp_path / "resumed" / "checkpoints")[-1].state
    assert (last.pairs, last.dropped) == (kept, {"beyond_max_length": TRAINING - kept})


def test_what_the_policys_template_refuses_is_not_counted(
    inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render_many = Renderer.render_many

    def some(self: Renderer, pairs: Any) -> list[Any]:
        refusal = Refusal("template_refused", "")
        rendered = render_many(self, pairs)
        return [
            refusal if int(pair.prompt[0]["content"].split()[0]) % 2 else shown
            for pair, shown in zip(pairs, rendered)
        ]

    monkeypatch.setattr(Renderer, "render_many", some)
    train(inputs.config(tmp_path / "run", **EPOCH | {"max_length": None}))
    state = checkpoints(tmp_path / "run" / "checkpoints")[-1].state
    assert state.pairs + state.dropped["template_refused"] == TRAINING
    assert log_of(tmp_path / "run")[-1]["step"] == math.ceil(state.pairs / 4)
    assert log_of(tmp_path / "run")[-1]["epoch"] == 1.0


def test_no_pair_within_the_limit_is_refused(inputs: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no pair is left .*37 beyond_max_length.*--max-length"):
        train(inputs.config(tmp_path / "run", **EPOCH | {"max_length": 3}))
