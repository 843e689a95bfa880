"""Every GPU path at small size, in one command: what holds, what does not, with figures.

    make gpu-check                       # or: python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --only training --out table.md

It needs torch, transformers, peft and the package itself: models and pairs are made on the spot,
nothing is downloaded. Scores are compared with transformers' own forward of one response at a time
on the CPU in float32, training with the same run there; vLLM is checked where it is installed.
Without a GPU the same checks run on the CPU as far as they can, and the others say "not here".
The exit code is 1 where a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from mrpo.benchmarks.common import machine, machine_line, table
from mrpo.benchmarks.trainers import Steps, run_to_end
from mrpo.benchmarks.workload import messages, write_pairs, write_scores
from mrpo.data.pairs import Pair
from mrpo.data.rendering import RenderedPrompt, Renderer
from mrpo.data.shards import PairShards
from mrpo.precompute.engines.hf import HfEngine
from mrpo.precompute.engines.protocol import EngineSettings
from mrpo.train.config import TrainConfig
from mrpo.train.distributed import Ranks
from mrpo.train.loop import Run
from mrpo.train.memory import FULL, START, Sizes, memory_plan

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
VOCABULARY, CONTEXT = 2048 if GPU else 512, 8192
# Nats a token from float32 on a CPU, the largest of all tokens: of float32 on a GPU, and the mean
# of bfloat16's, which differs as much from itself at another batch size.
EXACT, ROUNDED = 1e-3, 0.05


class NotHereError(Exception):
    """The machine lacks what a check needs; the text says what."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    run: Callable[[World], str]  # the figures; raises AssertionError with them where they are bad


CHECKS: list[Check] = []


def check(name: str) -> Callable[[Callable[[World], str]], Callable[[World], str]]:
    def register(run: Callable[[World], str]) -> Callable[[World], str]:
        CHECKS.append(Check(name, run))
        return run

    return register


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="checks whose name contains this")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    options = parser.parse_args()
    rows, failed = [], 0
    logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        world = World(Path(folder))
        for one in CHECKS:
            if options.only not in one.name:
                continue
            started = time.perf_counter()
            outcome, figures = outcome_of(one, world)
            failed += outcome == "FAIL"
            rows.append([one.name, outcome, figures, f"{time.perf_counter() - started:.0f} s"])
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
            free_memory()
    text = f"{machine_line(machine())}.\n\n{table(['', 'outcome', 'figures', 'time'], rows)}"
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    sys.exit(1 if failed else 0)


def outcome_of(one: Check, world: World) -> tuple[str, str]:
    """pass, FAIL or not here, and what there is to say."""
    try:
        return "pass", one.run(world)
    except NotHereError as reason:
        return "not here", str(reason)
    except AssertionError as figures:
        return "FAIL", str(figures) or traceback.format_exc(limit=-1).replace("\n", " ")
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# What the checks work with.


@dataclass
class World:
    """Models and pairs, made when a check first asks for them."""

    folder: Path
    pairs_count: int = 1024 if GPU else 32
    runs: dict[str, Trained] = field(default_factory=dict)

    @cached_property
    def pairs(self) -> list[Pair]:
        """Random words: prompts of 5 to 400, responses of 5 to 150; every length occurs."""
        return list(random_pairs(self.pairs_count, longest=400 if GPU else 60))

    @cached_property
    def shards(self) -> PairShards:
        with contextlib.redirect_stdout(sys.stderr):
            return write_pairs(self.folder / "pairs", self.pairs, len(self.pairs))

    def model(self, architecture: str, **shape: Any) -> Path:
        """The folder of a small model with a tokenizer learned from the pairs."""
        folder = self.folder / architecture
        if not folder.exists():
            write_model(folder, architecture, self.pairs, **shape)
        return folder

    @cached_property
    def scored(self) -> Path:
        """The folder of a store with two references' scores of all pairs, and their `model`."""
        write_model(self.folder / "model", "llama", self.pairs)
        write_scores(self.folder, self.shards, 2)
        return self.folder

    def config(self, **settings: Any) -> TrainConfig:
        """Settings of a run of MRPO on these scores: 6 steps in float32, each of 16 pairs."""
        defaults: dict[str, Any] = {
            "output_dir": str(self.folder / f"run-{time.time_ns()}"),
            "pairs": str(self.shards.path),
            "refs": "ref0,ref1",
            "refs_config": str(self.scored / "refs.yaml"),
            "store": str(self.scored / "store"),
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
            "max_steps": 6 if GPU else 3,
            "batch_pairs": 16 if GPU else 8,
            "max_tokens": 4096,
            "bf16": False,
            "device": DEVICE,
            "eval_steps": 2**31,
            "save_steps": 2**31,
        }
        return TrainConfig(**defaults | settings)

    @cached_property
    def exact(self) -> Trained:
        """The run in float32 on the CPU with which the others are compared."""
        return train(self.config(device="cpu"))

    @cached_property
    def grown(self) -> Trained:
        """A run in bfloat16 whose token budget may grow."""
        return train(self.config(**WIDE, max_tokens="auto"))


WIDE: dict[str, Any] = {"bf16": True, "batch_pairs": 256, "max_steps": 6}


def random_pairs(count: int, longest: int) -> Iterator[Pair]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(1, 7))) for _ in range(3000)]

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(5, most)))

    for _ in range(count):
        answers = (text(longest * 3 // 8) for _ in range(2))
        prompt = [{"role": "user", "content": text(longest)}]
        chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in answers)
        yield Pair(prompt, chosen, rejected)


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "gemma2": {  # sliding windows in every other layer, and attention scores with a softcap
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 100},
        **{"query_pre_attn_scalar": 64, "attn_logit_softcapping": 5.0},
    },
    "qwen2": {"num_attention_heads": 6, "num_key_value_heads": 2},
}


def write_model(folder: Path, architecture: str, pairs: list[Pair], **shape: Any) -> None:
    """A model of random weights, larger than they usually start, so that masks matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from mrpo.demo.models import build_tokenizer, save_reference

    texts = [turn["content"] for row in messages(pairs) for part in row.values() for turn in part]
    tokenizer = build_tokenizer("llama", texts, VOCABULARY)
    defaults = (
        {"num_hidden_layers": 4, "head_dim": 64}
        if GPU
        else {"num_hidden_layers": 2, "head_dim": 16}
    )
    shape = defaults | SHAPES[architecture] | shape
    shape.setdefault("hidden_size", shape["num_attention_heads"] * shape["head_dim"])
    config = AutoConfig.for_model(
        architecture,
        **shape,
        vocab_size=len(tokenizer),
        intermediate_size=shape["hidden_size"] * 3,
        max_position_embeddings=CONTEXT,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    save_reference(model, tokenizer, folder)


def free_memory() -> None:
    gc.collect()
    if GPU:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def need_gpu() -> None:
    if not GPU:
        raise NotHereError("needs a GPU")


# Scoring.


def rendered(world: World, model: Path, count: int) -> list[RenderedPrompt]:
    shown = Renderer.load(model).render_many(world.pairs[:count])
    assert all(isinstance(prompt, RenderedPrompt) for prompt in shown)
    return shown  # type: ignore[return-value]


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


def scores(engine: HfEngine, prompts: list[RenderedPrompt]) -> list[np.ndarray]:
    return [logps for prompt in engine.score(prompts) for logps in prompt]


def compare_scores(world: World, architecture: str, **settings: Any) -> tuple[float, float]:
    model = world.model(architecture)
    prompts = rendered(world, model, 64 if GPU else 8)
    engine = HfEngine(
        EngineSettings(alias="x", model=str(model), max_tokens=4096 if GPU else 512, **settings)
    )
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
    prompts = rendered(world, model, 256)
    settings = EngineSettings(alias="x", model=str(model), max_tokens=65_536)
    engine = HfEngine(settings)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    expected = scores(engine, prompts)
    used = torch.cuda.max_memory_allocated() - held
    torch.cuda.empty_cache()
    limit_memory(held + used // 2)
    found = scores(engine, prompts)
    most, _ = apart(found, expected)
    figures = f"rows of 65,536 tokens became {engine.max_tokens:,}, {most:.1e} nats a token apart"
    engine.close()
    assert engine.max_tokens < 65_536, figures
    assert most <= EXACT, figures
    return figures


def limit_memory(limit: int) -> None:
    """Let torch take so many bytes of the GPU and no more."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total)


@check("scoring, vLLM")
def _(world: World) -> str:
    need_gpu()
    if find_spec("vllm") is None:
        raise NotHereError("vLLM is not installed")
    from mrpo.precompute.engines import load_engine

    model = world.model("llama")
    prompts = rendered(world, model, 64)
    longest = max(len(one.token_ids) for prompt in prompts for one in prompt.responses)
    engine = load_engine(
        "vllm",
        EngineSettings(alias="x", model=str(model), longest=longest, gpu_memory_utilization=0.3),
    )
    found = [logps for prompt in engine.score(prompts) for logps in prompt]
    most, mean = apart(found, alone(model, prompts))
    figures = f"{engine.facts['route']}: {most:.1e} nats a token at most, {mean:.1e} on average"
    engine.close()
    assert most <= 10 * EXACT, figures
    return figures


# Training.


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
    return compared(train(world.config(**settings)), world.exact, most)


def compared(run: Trained, expected: Trained, most: float) -> str:
    difference = float(np.abs(run.losses - expected.losses).max())
    figures = f"losses {difference:.1e} apart at most, {run.losses[0]:.3f} to {run.losses[-1]:.3f}"
    assert difference <= most, figures
    return figures


@check("training, float32, against the CPU")
def _(world: World) -> str:
    """Losses and weights: the whole step, with the fused AdamW."""
    run = train(world.config())
    figures = compared(run, world.exact, 1e-3)
    moved = _norm(world.exact.weights, _weights(world.scored / "model"))
    ratio = _norm(run.weights, world.exact.weights) / moved
    figures += f"; weights {ratio:.1e} apart, relative to their change"
    assert ratio <= 0.05, figures
    return figures


def _weights(model: Path) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

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
    from mrpo.model.load import load_model
    from mrpo.model.logps import SequenceLogps, sum_by_sequence

    model = world.model("gemma2")
    prompts = rendered(world, model, 16)
    gradients = {}
    for device in ("cpu", "cuda"):
        policy = SequenceLogps(load_model(model, device=device)).train()
        batch = policy.collate(prompts, device)
        sums = sum_by_sequence(policy(batch), batch)
        torch.nn.functional.logsigmoid(0.01 * (sums[::2] - sums[1::2])).sum().backward()
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


@check("token budget, grows")
def _(world: World) -> str:
    """`--max-tokens auto` with batches beyond it, beside the same with small rows."""
    need_gpu()
    small = train(world.config(**WIDE, max_tokens=4096))
    figures = compared(world.grown, small, 0.05)
    figures = f"{START['cuda']:,} tokens became {world.grown.tokens:,}; {figures}"
    assert world.grown.tokens > START["cuda"], figures
    return figures


@check("token budget, stays where memory is nearly full")
def _(world: World) -> str:
    """Other tensors leave room for a little more than the first micro-batches take."""
    need_gpu()
    grown = world.grown
    total = torch.cuda.get_device_properties(0).total_memory
    room = grown.steady + grown.per_token * START["cuda"] * 1.02
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
    grown = world.grown
    limit_memory(int(grown.steady + grown.per_token * START["cuda"] * 0.6))
    run = train(world.config(**WIDE, max_tokens=START["cuda"]))
    figures = compared(run, grown, 0.05)
    figures = f"{START['cuda']:,} tokens became {run.tokens:,}; {figures}"
    assert run.tokens < START["cuda"], figures
    return figures


MEDIUM = {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16,
          "num_key_value_heads": 8}  # fmt: skip


@check("memory, plan against peak")
def _(world: World) -> str:
    """Four runs of a model of 150 million parameters in bfloat16, micro-batches of 8,192."""
    need_gpu()
    if not (world.folder / "medium").exists():
        write_model(world.folder / "medium", "llama", world.pairs, **MEDIUM)
    from transformers import AutoConfig

    sizes = Sizes.of(AutoConfig.from_pretrained(world.folder / "medium"))
    shares = {}
    for name, settings in {
        "full": {},
        "full, checkpointing": {"gradient_checkpointing": True},
        "LoRA": {"lora_rank": 16},
        "LoRA, checkpointing": {"lora_rank": 16, "gradient_checkpointing": True},
    }.items():
        run_settings = {"policy": str(world.folder / "medium"), "max_steps": 3, "batch_pairs": 64}
        config = world.config(**settings, **run_settings, bf16=True, max_tokens=8192)
        plan = memory_plan(sizes, config, Ranks.start(DEVICE), True)
        run = train(config)
        shares[name] = max(run.steps.peaks) / plan.total
        free_memory()
    figures = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
    assert all(0.8 <= share <= 1.2 for share in shares.values()), f"peak / plan: {figures}"
    return f"peak / plan: {figures}"


@check("training, two GPUs")
def _(world: World) -> str:
    """FSDP2 over NCCL, which takes one process a GPU."""
    need_gpu()
    if torch.cuda.device_count() < 2:
        raise NotHereError("needs two GPUs")
    import subprocess

    config = world.config()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command += ["mrpo", "train", "--config"]
    settings = world.folder / "two.json"
    settings.write_text(json.dumps(asdict(config)))
    done = subprocess.run([*command, str(settings)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-300:]
    log = Path(config.output_dir, "log.jsonl").read_text().splitlines()
    losses = np.array([line["loss"] for line in map(json.loads, log) if "loss" in line])
    difference = float(np.abs(losses - world.exact.losses).max())
    figures = f"losses {difference:.1e} apart from one process on the CPU"
    assert difference <= 1e-3, figures
    return figures


if __name__ == "__main__":
    main()
