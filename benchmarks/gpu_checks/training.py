"""`mrpo train` beside the same run in float32 on the CPU."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from mrpo.benchmarks.trainers import Steps, run_to_end
from mrpo.model.load import load_model
from mrpo.model.logps import SequenceLogps, sum_by_sequence
from mrpo.train.config import TrainConfig
from mrpo.train.loop import Run

from .check import GPU, NotHereError, check, need_gpu
from .scoring import prompts_of
from .world import World


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run left: the losses of its steps, how its weights changed, and what it took."""

    losses: np.ndarray
    weights: dict[str, Tensor]  # float32, on the CPU
    steps: Steps
    tokens: int  # the budget at the end
    steady: int  # bytes between two steps
    per_token: float

    @classmethod
    def of(cls, run: Run, lines: list[dict[str, Any]], steps: Steps) -> Trained:
        state = run.forward.policy.lm.state_dict()
        budget = run.budget
        return cls(
            losses=np.array([line["loss"] for line in lines]),
            weights={name: tensor.float().cpu() for name, tensor in state.items()},
            steps=steps,
            tokens=budget.tokens,
            steady=budget.steady,
            per_token=budget.per_token,
        )


def train(config: TrainConfig) -> Trained:
    """The run, in this process; what it prints goes to a file beside it."""
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    log = Path(f"{config.output_dir}.log")
    with log.open("w") as file, contextlib.redirect_stdout(file):
        return Trained.of(*run_to_end(config, bool(config.bf16)))


def compare_training(world: World, most: float, **settings: Any) -> str:
    """A run beside the one in float32 on the CPU: the largest difference of a step's loss."""
    return compared(train(world.config(**settings)), exact(world), most)


def compared(run: Trained, expected: Trained, most: float) -> str:
    difference = float(np.abs(run.losses - expected.losses).max())
    figures = f"losses {difference:.1e} apart at most, {run.losses[0]:.3f} to {run.losses[-1]:.3f}"
    assert difference <= most, figures
    return figures


@cache
def exact(world: World) -> Trained:
    """The run in float32 on the CPU with which the others are compared."""
    return train(world.config(device="cpu"))


@check("training, float32, against the CPU")
def _(world: World) -> str:
    """Losses and weights: the whole step, with the fused AdamW."""
    run = train(world.config())
    figures = compared(run, exact(world), 1e-3)
    moved = _norm(exact(world).weights, _weights(world.scored / "model"))
    ratio = _norm(run.weights, exact(world).weights) / moved
    figures += f"; weights {ratio:.1e} apart, relative to their change"
    assert ratio <= 0.05, figures
    return figures


def _weights(model: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()


def _norm(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return sum(float((left[name] - right[name]).double().square().sum()) for name in left) ** 0.5


@check("training, bfloat16 autocast")
def _(world: World) -> str:
    return compare_training(world, 0.1, bf16=True)


@check("training, gradient checkpointing")
def _(world: World) -> str:
    return compare_training(world, 1e-3, gradient_checkpointing=True)


@check("training, LoRA over bfloat16 weights")
def _(world: World) -> str:
    """Beside LoRA in float32 on the CPU."""
    lora = {"lora_rank": 8, "learning_rate": 1e-3}
    expected = train(world.config(**lora, device="cpu"))
    return compared(train(world.config(**lora, bf16=True)), expected, 0.1)


@check("training, sliding windows and softcap (Gemma 2)")
def _(world: World) -> str:
    """Through FlexAttention's backward: one DPO step's gradient, beside the CPU's."""
    need_gpu()
    model = world.model("gemma2")
    prompts = prompts_of(world, model, 16)
    gradients = {}
    for device in ("cpu", "cuda"):
        policy = SequenceLogps(load_model(model, device=device)).train()
        batch = policy.collate(prompts, device)
        sums = sum_by_sequence(policy(batch), batch)
        logsigmoid(0.01 * (sums[::2] - sums[1::2])).sum().backward()
        gradients[device] = {
            name: parameter.grad.float().cpu()
            for name, parameter in policy.named_parameters()
            if parameter.grad is not None
        }
    size = sum(float(g.double().square().sum()) for g in gradients["cpu"].values()) ** 0.5
    ratio = _norm(gradients["cuda"], gradients["cpu"]) / size
    figures = f"gradients {ratio:.1e} apart, relative to their norm"
    assert ratio <= 1e-2, figures
    return figures


@check("training, torch.compile")
def _(world: World) -> str:
    """Micro-batches of many lengths, beside the same uncompiled; no graph after the third step."""
    need_gpu()
    plain = train(world.config(bf16=True, max_tokens=2048, max_steps=12))
    run = train(world.config(bf16=True, max_tokens=2048, max_steps=12, torch_compile=True))
    figures = compared(run, plain, 0.05)
    graphs = run.steps.graphs
    figures += f"; {graphs[3]} graphs in 3 steps, {graphs[-1] - graphs[3]} in 9 more"
    assert graphs[-1] - graphs[3] <= 2, figures
    return figures


@check("training, two GPUs")
def _(world: World) -> str:
    """FSDP2 over NCCL, which takes one process a GPU."""
    need_gpu()
    if torch.cuda.device_count() < 2:
        raise NotHereError("needs two GPUs")
    config = world.config()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command += ["mrpo", "train", "--config"]
    settings = world.folder / "two.json"
    settings.write_text(json.dumps(asdict(config)))
    done = subprocess.run([*command, str(settings)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-300:]
    log = Path(config.output_dir, "log.jsonl").read_text().splitlines()
    losses = np.array([line["loss"] for line in map(json.loads, log) if "loss" in line])
    difference = float(np.abs(losses - exact(world).losses).max())
    figures = f"losses {difference:.1e} apart from one process on the CPU"
    assert difference <= 1e-3, figures
    return figures
