"""The training loop against the plain way: one response at a time, the paper's formula, AdamW."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

import mrpo
from mrpo.data.join import JoinedScores
from mrpo.data.rendering import RenderedSequence, Renderer
from mrpo.data.shards import PairShards
from mrpo.errors import UserError
from mrpo.method import losses
from mrpo.method.grammar import parse_method
from mrpo.train import loop
from mrpo.train.dataset import TrainingPairs
from mrpo.train.forward import PairForward
from mrpo.train.groups import rows_of
from mrpo.train.loop import learning_rate, total_steps
from mrpo.train.run import train
from mrpo.train.stream import PairStream


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's steps, without the evaluations."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def response_logp(model: torch.nn.Module, sequence: RenderedSequence) -> torch.Tensor:
    """log pi(response | prompt), one response in one plain forward."""
    ids = torch.tensor([sequence.token_ids])
    logps = model(ids).logits[0].log_softmax(-1)
    scored = range(sequence.start, ids.shape[1])
    return torch.stack([logps[at - 1, ids[0, at]] for at in scored]).sum()


def virtual_margin(chosen: list[float], rejected: list[float], epsilon: float) -> float:
    """log pi~(chosen) - log pi~(rejected) of MRPO as its paper has it, in plain Python."""
    margins = [abs(w - lost) for w, lost in zip(chosen, rejected)]
    alpha = [margin / sum(margins) for margin in margins]
    size_w, size_l = abs(sum(chosen)), abs(sum(rejected))
    virtual = []
    for logps, size in ((chosen, size_w), (rejected, size_l)):
        eps = epsilon * size / (size_w + size_l)
        low, high = (1 + eps) * logps[0], (1 - eps) * logps[0]
        clipped = [logps[0], *(min(max(logp, low), high) for logp in logps[1:])]
        virtual.append(-math.log(sum(a * math.exp(-r) for a, r in zip(alpha, clipped))))
    return virtual[0] - virtual[1]


def test_three_steps_are_those_of_the_formula(inputs: Any, tmp_path: Path) -> None:
    config = inputs.config(tmp_path / "run", max_steps=3, warmup_ratio=0.4, weight_decay=0.1)
    train(config)

    folder = inputs.references["llama"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, foreach=False)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 3)

    scores = JoinedScores(tmp_path / "run" / "scores")
    source = TrainingPairs(PairShards(config.pairs), scores, prompt_numbers=False)
    method = parse_method("mrpo", scores.aliases)
    training, *_ = source.usable(method)
    renderer = Renderer.load(folder)
    stream = PairStream(
        source, training, renderer, method, seed=42, batch_pairs=4, total_rows=12, limits={}
    )
    for batch, line in zip(stream.batches(), log_of(tmp_path / "run"), strict=True):
        losses = []
        for at, pair in enumerate(batch.pairs):
            chosen, rejected = pair.responses
            margin = response_logp(model, chosen) - response_logp(model, rejected)
            refs = batch.scores.ref_chosen_logps[at], batch.scores.ref_rejected_logps[at]
            virtual = virtual_margin(*(logps.tolist() for logps in refs), 0.1)
            losses.append(-torch.nn.functional.logsigmoid(0.1 * (margin - virtual)))
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert line["learning_rate"] == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    expected = model.state_dict()
    for name, tensor in weights_of(tmp_path / "run").items():
        # AdamW divides by the gradient's size: where that is rounding, so is the update.
        difference = (tensor - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-5, name


@pytest.fixture(scope="module")
def plain_run(inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(inputs.config(folder))
    return folder


def assert_same_curve(folder: Path, plain: Path) -> None:
    for name in ("loss", "grad_norm", "rewards/margins", "refs/weight/qwen"):
        lines = [[line[name] for line in log_of(run)] for run in (folder, plain)]
        assert lines[0] == pytest.approx(lines[1], rel=2e-4, abs=1e-6), name


@pytest.mark.parametrize(
    "changes",
    [{"max_tokens": 80}, {"gradient_checkpointing": True}],
    ids=["small budget", "checkpointing"],
)
def test_what_saves_memory_changes_no_number(
    inputs: Any, tmp_path: Path, plain_run: Path, changes: dict[str, Any]
) -> None:
    train(inputs.config(tmp_path / "run", **changes))
    assert_same_curve(tmp_path / "run", plain_run)


@pytest.fixture
def memory_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let a forward that keeps what its backward needs hold no more than so many pairs."""
    forward = PairForward.__call__

    def limit(most: int) -> None:
        def limited(self: PairForward, groups: Any) -> Any:
            if torch.is_grad_enabled() and len(rows_of(groups)) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(self, groups)

        monkeypatch.setattr(PairForward, "__call__", limited)

    return limit


def test_out_of_memory_halves_the_budget_and_loses_no_step(
    inputs: Any, tmp_path: Path, plain_run: Path, memory_for: Callable[[int], None]
) -> None:
    memory_for(2)
    train(inputs.config(tmp_path / "run", max_tokens=512))
    assert_same_curve(tmp_path / "run", plain_run)
    state = json.loads((tmp_path / "run/checkpoints/step-00000004/state.json").read_text())
    assert state["state"]["max_tokens"] < 512


def test_one_pair_too_large_for_memory_is_said(
    inputs: Any, tmp_path: Path, memory_for: Callable[[int], None]
) -> None:
    memory_for(0)
    with pytest.raises(UserError, match="one pair; use --gradient-checkpointing"):
        train(inputs.config(tmp_path / "run"))


def test_stops_before_an_update_that_is_not_finite(inputs: Any, tmp_path: Path) -> None:
    config = inputs.config(
        tmp_path / "run", learning_rate=1e30, warmup_ratio=0.0, save_steps=1, save_total_limit=9
    )
    with pytest.raises(UserError, match=r"step 2: the gradient's norm is (nan|inf)"):
        train(config)
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1]
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert names == ["step-00000001"]
    assert not (tmp_path / "run" / "model").exists()


def test_the_loss_is_the_one_that_the_package_offers(
    inputs: Any, tmp_path: Path, plain_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = mrpo.preference_loss
    monkeypatch.setattr(losses, "preference_loss", lambda *args: 2 * offered(*args))
    train(inputs.config(tmp_path / "run", max_steps=1))
    assert log_of(tmp_path / "run")[0]["loss"] == 2 * log_of(plain_run)[0]["loss"]


def test_line_of_several_steps_is_their_mean(inputs: Any, tmp_path: Path, plain_run: Path) -> None:
    train(inputs.config(tmp_path / "run", logging_steps=3))
    few, all_lines = log_of(tmp_path / "run"), log_of(plain_run)
    assert [line["step"] for line in few] == [3, 4]
    assert few[0]["loss"] == pytest.approx(sum(line["loss"] for line in all_lines[:3]) / 3)
    assert few[0]["num_tokens"] == all_lines[2]["num_tokens"]
    assert few[1]["grad_norm"] == all_lines[3]["grad_norm"]


def test_waiting_and_speed_are_logged(plain_run: Path) -> None:
    for line in log_of(plain_run):
        assert 0 <= line["perf/data_wait"] <= 1
        assert line["perf/pairs_per_second"] * line["perf/step_seconds"] == pytest.approx(4)
        assert sum(line[f"refs/weight/{name}"] for name in ("llama", "mistral", "qwen")) == (
            pytest.approx(1)
        )


def test_epochs_give_the_number_of_steps(inputs: Any) -> None:
    config = inputs.config(Path("run"), max_steps=None, num_train_epochs=1.5)
    assert total_steps(config, 41) == 16  # 62 rows by 4
    assert total_steps(inputs.config(Path("run"), max_steps=7), 41) == 7


@pytest.mark.parametrize(("kind", "end"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_rate_warms_up_from_zero_and_follows_its_course(kind: str, end: float) -> None:
    from mrpo.train.config import TrainConfig

    config = TrainConfig(
        output_dir="run", learning_rate=1.0, warmup_ratio=0.2, lr_scheduler_type=kind
    )
    assert [learning_rate(config, step, 10) for step in (0, 1, 2)] == [0.0, 0.5, 1.0]
    assert learning_rate(config, 6, 10) == pytest.approx(end)


def test_a_rank_out_of_memory_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "micro_batches", run_out)
    ranks, policy = SimpleNamespace(world=2, rank=1, any=bool), SimpleNamespace(tokens=len)
    run: Any = SimpleNamespace(
        config=SimpleNamespace(seed=0),
        state=SimpleNamespace(step=6),
        optimizer=torch.optim.SGD([torch.zeros(1)]),
        forward=SimpleNamespace(
            ranks=ranks, shares=lambda pairs, tokens: [([], 1.0)], policy=policy
        ),
        budget=SimpleNamespace(tokens=512, watch=lambda _: None, fits=lambda *_: True),
    )
    with pytest.raises(UserError, match=r"step 7: rank 1 .* 512 tokens; continue with --resume"):
        loop.backward(run, SimpleNamespace(pairs=[]))  # type: ignore[arg-type]
