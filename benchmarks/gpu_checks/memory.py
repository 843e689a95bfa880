"""The token budget and the memory plan of `mrpo train`, against what a GPU's memory does."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig

from mrpo.train.distributed import Ranks
from mrpo.train.memory import FULL, START, Sizes, memory_plan

from .check import check, free_memory, limit_memory, need_gpu
from .training import Trained, compared, train
from .world import DEVICE, World

WIDE: dict[str, Any] = {"bf16": True, "batch_pairs": 256, "max_steps": 6}
MEDIUM = {"num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 8}


@cache
def grown(world: World) -> Trained:
    """A run in bfloat16 whose token budget may grow."""
    return train(world.config(**WIDE, max_tokens="auto"))


@check("token budget, grows")
def _(world: World) -> str:
    """`--max-tokens auto` with batches beyond it, beside the same with small rows."""
    need_gpu()
    small = train(world.config(**WIDE, max_tokens=4096))
    figures = compared(grown(world), small, 0.05)
    figures = f"{START['cuda']:,} tokens became {grown(world).tokens:,}; {figures}"
    assert grown(world).tokens > START["cuda"], figures
    return figures


@check("token budget, stays where memory is nearly full")
def _(world: World) -> str:
    """Other tensors leave room for a little more than the first micro-batches take."""
    need_gpu()
    before = grown(world)
    total = torch.cuda.get_device_properties(0).total_memory
    room = before.steady + before.per_token * START["cuda"] * 1.02
    ballast = torch.empty(int(FULL * total - room), dtype=torch.uint8, device="cuda")
    try:
        run = train(world.config(**WIDE | {"max_steps": 4}, max_tokens="auto"))
    finally:
        del ballast
    figures = f"{START['cuda']:,} tokens stayed {run.tokens:,}"
    assert run.tokens == START["cuda"], figures
    return figures


@check("token budget, out of memory")
def _(world: World) -> str:
    """Memory for half a micro-batch: it is halved, the step repeated, the losses are the same."""
    need_gpu()
    before = grown(world)
    limit_memory(int(before.steady + before.per_token * START["cuda"] * 0.6))
    run = train(world.config(**WIDE, max_tokens=START["cuda"]))
    figures = compared(run, before, 0.05)
    figures = f"{START['cuda']:,} tokens became {run.tokens:,}; {figures}"
    assert run.tokens < START["cuda"], figures
    return figures


MEDIUM = {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16,
          "num_key_value_heads": 8}  # fmt: skip


@check("memory, plan against peak")
def _(world: World) -> str:
    """Four runs of a model of 150 million parameters in bfloat16, micro-batches of 8,192."""
    need_gpu()
    model = world.model("llama", "medium", **MEDIUM)
    sizes = Sizes.of(AutoConfig.from_pretrained(model))
    shares = {}
    for name, settings in {
        "full": {},
        "full, checkpointing": {"gradient_checkpointing": True},
        "LoRA": {"lora_rank": 16},
        "LoRA, checkpointing": {"lora_rank": 16, "gradient_checkpointing": True},
    }.items():
        run_settings = {"policy": str(model), "max_steps": 3, "batch_pairs": 64}
        config = world.config(**settings, **run_settings, bf16=True, max_tokens=8192)
        plan = memory_plan(sizes, config, Ranks.start(DEVICE), True)
        run = train(config)
        shares[name] = max(run.steps.peaks) / plan.total
        free_memory()
    figures = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
    assert all(0.8 <= share <= 1.2 for share in shares.values()), f"peak / plan: {figures}"
    return f"peak / plan: {figures}"
