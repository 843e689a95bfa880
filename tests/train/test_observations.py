"""What a run says of its own log at the end."""

from __future__ import annotations

from typing import Any

import pytest

from mrpo.train import observations as module
from mrpo.train.run import train
from mrpo.train.run_folder import read_log


def line(step: int, **changes: float | None) -> dict[str, float | None]:
    values = {"rewards/accuracies": 0.7, "refs/weight/a": 0.5, "refs/weight/b": 0.5}
    return {"step": step, "loss": 0.6} | values | {"refs/clipped/b": 0.2} | changes


def held_out(step: int, chosen: float, rejected: float, accuracy: float = 0.7) -> dict[str, float]:
    logps = {"eval_logps/chosen": chosen, "eval_logps/rejected": rejected}
    return {"step": step, "eval_rewards/accuracies": accuracy} | logps


def observations(lines: list[Any], weighting: str = "arwc") -> list[str]:
    return module.observations(lines, weighting)


QUIET = [line(1), held_out(1, -20, -20), line(2), held_out(2, -21.5, -19), held_out(3, -20.5, -30)]


def test_an_ordinary_log_gives_no_sentence() -> None:
    assert observations(QUIET) == []
    assert observations([]) == []
    assert observations([line(1, **{"refs/weight/a": None, "rewards/accuracies": None})]) == []


def test_both_responses_less_likely() -> None:
    (sentence,) = observations([*QUIET, held_out(4, -22, -40)])
    assert sentence.startswith(
        "from step 1 to 4 the held-out chosen responses became less likely, by 2.0 nats, as the "
        "rejected did, by 20.0 (likelihood displacement); try --sft-weight 0.1"
    )


def test_all_right_on_training_pairs_alone() -> None:
    learned = [line(step, **{"rewards/accuracies": float(step > 8)}) for step in range(1, 13)]
    (sentence,) = observations([*learned, held_out(12, -20, -25, 0.62)])
    assert "accuracy is 100.0% on training pairs and 62.0% on held-out ones" in sentence
    assert observations([*learned, held_out(12, -20, -25, 0.95)]) == []
    assert observations(learned) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"refs/weight/a": 0.02, "refs/weight/b": 0.98}, "b has 98% of the weight"),
        ({"refs/clipped/b": 0.97}, "clipping moved 97% of every other reference's responses"),
    ],
)
def test_one_reference_decides(changes: dict[str, float], words: str) -> None:
    (sentence,) = observations([line(step, **changes) for step in (1, 2)])
    assert words in sentence
    assert observations([line(1, **changes)], "fixed") == []
    alone = {"refs/weight/a": 1.0, "loss": 0.5, "rewards/accuracies": 0.5, "step": 1}
    assert observations([alone]) == []  # a run with one reference


def test_a_run_that_ruins_its_policy_says_so(
    inputs: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ruined = {"learning_rate": 0.3, "warmup_ratio": 0.0, "max_steps": 4, "eval_steps": 1}
    train(inputs.config(tmp_path / "run", **ruined))
    sentences = observations(list(read_log(tmp_path / "run")))
    assert any("likelihood displacement" in sentence for sentence in sentences)
    out = capsys.readouterr().out
    assert all(f"NOTE: {sentence}" in out for sentence in sentences)


def test_dpo_with_reliable_labels_is_meant_to_have_one_reference(
    inputs: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    train(inputs.config(tmp_path / "run", method="dpo:llama+reliable", max_steps=2))
    steps = [line for line in read_log(tmp_path / "run") if "loss" in line]
    assert {step["refs/weight/llama"] for step in steps} == {1.0}
    assert "of the weight" not in capsys.readouterr().out
