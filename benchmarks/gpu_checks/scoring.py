"""Engine hf and, where it is installed, vLLM, beside transformers' own forward on the CPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mrpo.benchmarks.workload import rendered
from mrpo.data.rendering import RenderedPrompt, Renderer
from mrpo.precompute.engines import load_engine
from mrpo.precompute.engines.protocol import Engine, EngineSettings

from .check import GPU, NotHereError, check, limit_memory, need_gpu
from .world import World

# Nats a token from float32 on a CPU, the largest of all tokens: of float32 on a GPU, and the mean
# of bfloat16's, which differs as much from itself at another batch size.
EXACT, ROUNDED = 1e-3, 0.05


def prompts_of(world: World, model: Path, count: int) -> list[RenderedPrompt]:
    """The first pairs as the model's tokens."""
    return rendered(Renderer.load(model), world.pairs[:count])


def alone(model: Path, prompts: list[RenderedPrompt]) -> list[np.ndarray]:
    """Log-probs by transformers, each response in a forward of its own: CPU, float32, eager."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    values = []
    for prompt in prompts:
        for response in prompt.responses:
            ids = torch.tensor([response.token_ids])
            with torch.inference_mode():
                logps = lm(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            each = logps.gather(-1, ids[0, 1:, None]).squeeze(-1)[response.start - 1 :]
            values.append(response.scored(each).numpy())
    return values


def apart(values: list[np.ndarray], expected: list[np.ndarray]) -> tuple[float, float]:
    """The largest and the mean absolute difference of a token's log-prob, in nats."""
    differences = np.abs(np.concatenate(values) - np.concatenate(expected))
    return float(differences.max()), float(differences.mean())


def scores(engine: Engine, prompts: list[RenderedPrompt]) -> list[np.ndarray]:
    return [logps for prompt in engine.score(prompts) for logps in prompt]


def compare_scores(world: World, architecture: str, **settings: Any) -> tuple[float, float]:
    model = world.model(architecture)
    prompts = prompts_of(world, model, 64 if GPU else 8)
    settings |= {"max_tokens": 4096 if GPU else 512}
    engine = load_engine("hf", EngineSettings(alias="x", model=str(model), **settings))
    found = scores(engine, prompts)
    engine.close()
    return apart(found, alone(model, prompts))


def scoring_in_float32(world: World, architecture: str) -> str:
    most, mean = compare_scores(world, architecture)
    figures = f"{most:.1e} nats a token at most from the CPU, {mean:.1e} on average"
    assert most <= EXACT, figures
    return figures


@check("scoring, float32")
def _(world: World) -> str:
    return scoring_in_float32(world, "llama")


@check("scoring, sliding windows and softcap (Gemma 2)")
def _(world: World) -> str:
    return scoring_in_float32(world, "gemma2")


@check("scoring, 6 heads in 2 groups (Qwen 2)")
def _(world: World) -> str:
    return scoring_in_float32(world, "qwen2")


def scoring_in_bfloat16(world: World, **settings: Any) -> str:
    most, mean = compare_scores(world, "llama", **settings)
    figures = f"{mean:.1e} nats a token on average from float32 on the CPU, {most:.1e} at most"
    assert mean <= ROUNDED, figures
    return figures


@check("scoring, bfloat16 weights")
def _(world: World) -> str:
    return scoring_in_bfloat16(world, dtype="bfloat16")


@check("scoring, bfloat16 autocast")
def _(world: World) -> str:
    return scoring_in_bfloat16(world, autocast=True)


@check("scoring, out of memory")
def _(world: World) -> str:
    """With half of the memory that its rows take, the engine halves them and scores the same."""
    need_gpu()
    model = world.model("llama")
    prompts = prompts_of(world, model, 256)
    engine = load_engine("hf", EngineSettings(alias="x", model=str(model), max_tokens=65_536))
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    expected = scores(engine, prompts)
    used = torch.cuda.max_memory_allocated() - held
    torch.cuda.empty_cache()
    limit_memory(held + used // 2)
    found = scores(engine, prompts)
    most, _ = apart(found, expected)
    tokens = engine.facts["max_tokens"]
    engine.close()
    figures = f"rows of 65,536 tokens became {tokens:,}, {most:.1e} nats a token apart"
    assert tokens < 65_536, figures
    assert most <= EXACT, figures
    return figures


@check("scoring, vLLM")
def _(world: World) -> str:
    need_gpu()
    if find_spec("vllm") is None:
        raise NotHereError("vLLM is not installed")
    model = world.model("llama")
    prompts = prompts_of(world, model, 64)
    longest = max(len(one.token_ids) for prompt in prompts for one in prompt.responses)
    engine = load_engine(
        "vllm",
        EngineSettings(alias="x", model=str(model), longest=longest, gpu_memory_utilization=0.3),
    )
    found = scores(engine, prompts)
    most, mean = apart(found, alone(model, prompts))
    figures = f"{engine.facts['route']}: {most:.1e} nats a token at most, {mean:.1e} on average"
    engine.close()
    assert most <= 10 * EXACT, figures
    return figures
