"""Memory: the plan printed before any weights are loaded, and the token budget while training.

Full fine-tuning of P parameters with AdamW takes 16 bytes for each: float32 weights 4, gradients
4, the optimizer's two moments 8. LoRA takes that for the adapter alone. Activations are estimated
for a micro-batch. A plan that does not fit is refused with the ways out.

`--max-tokens auto` starts at the plan's micro-batch. On a GPU it grows, by what the last steps
have used, until memory is nearly full; on a CPU longer rows are no faster. When memory runs out,
the budget is halved and the step repeated. All ranks decide alike: one that runs out in the middle
of a sharded forward leaves the others waiting, so before each step the ranks try to allocate what
it will take and agree on whether all of them could. The budget never changes the loss.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..data.references import files_of
from ..errors import UserError
from ..model.head import KEEP_BYTES, chunk_rows
from ..settings import comma_separated
from .checkpoint import TrainState
from .config import TrainConfig
from .distributed import Ranks

GIB = 2**30
START = {"cpu": 2048, "cuda": 8192}  # tokens of a micro-batch under --max-tokens auto
LEAST = 1024  # and the fewest that are planned: shorter rows use a device badly
FULL = 0.88  # share of a GPU's memory to fill; the rest is for fragments and longer rows
LORA_WAY_OUT = 16


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes needed on each device, and what is free there."""

    parameters: int  # of the whole policy
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    available: int
    tokens: int  # of a micro-batch, that the activations are estimated for

    @property
    def per_token(self) -> float:
        """What a step takes for each token of its row, as `TokenBudget` counts it."""
        return (self.activations + self.gradients) / self.tokens

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {getattr(self, name) / GIB:.2f}"
            for name in ("weights", "gradients", "optimizer", "activations")
        )
        return (
            f"{self.trained:,} of {self.parameters:,} parameters trained; "
            f"about {self.total / GIB:.2f} of {self.available / GIB:.2f} GiB ({parts}; "
            f"micro-batches of {self.tokens:,} tokens)"
        )


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the plan needs to know of an architecture."""

    parameters: int
    trainable: int  # without those of a multimodal model that texts do not pass through
    linear: dict[str, tuple[int, int]]  # layers that LoRA can adapt: name -> (in, out)
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Sizes:
        """From the architecture's modules, created without memory."""
        with files_of(str(config.name_or_path), "no causal language model"), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        head = model.get_output_embeddings()
        text = config.get_text_config()
        parts = [model] if text is config else [model.get_decoder(), head]
        trainable = {parameter for part in parts for parameter in part.parameters()}
        return cls(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            trainable=sum(parameter.numel() for parameter in trainable),
            linear={
                name: (module.in_features, module.out_features)
                for name, module in parts[0].named_modules()
                if isinstance(module, nn.Linear) and module is not head
            },
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            vocabulary=text.vocab_size,
        )

    def lora(self, rank: int, targets: str, dora: bool = False) -> int:
        """Parameters of a LoRA adapter: rank * (in + out) for each layer that it adapts, and with
        DoRA `out` magnitudes."""
        names = comma_separated(targets)
        return sum(
            rank * (inside + outside) + outside * dora
            for name, (inside, outside) in self.linear.items()
            if targets == "all-linear" or name.rsplit(".", 1)[-1] in names
        )

    def activations(
        self, tokens: int, bf16: bool, checkpointing: bool, device: torch.device
    ) -> int:
        """Bytes kept for the backward of a micro-batch, and the head's.

        A decoder layer keeps about 7 widths of the compute dtype and 6 of float32 (norms and
        residuals) a token, and 4 inner widths of its MLP. The head has a chunk of logits three
        times in float32 (logits, slopes, a product of them), and the slopes that it keeps.
        """
        width = 2 if bf16 else 4
        layer = self.hidden * (7 * width + 6 * 4) + self.intermediate * 4 * width
        kept = layer + self.layers * self.hidden * 4 if checkpointing else layer * self.layers
        slopes = min(KEEP_BYTES, tokens * self.vocabulary * width)
        chunk = min(tokens, chunk_rows(self.vocabulary, device))
        return tokens * kept + 3 * chunk * self.vocabulary * 4 + slopes


def memory_plan(sizes: Sizes, config: TrainConfig, ranks: Ranks, bf16: bool) -> MemoryPlan:
    """What each device will hold; with FSDP2 each rank holds its share of all but activations."""
    if config.lora_rank is not None:
        trained = sizes.lora(config.lora_rank, config.lora_target_modules, config.use_dora)
        # A frozen policy is bfloat16 if the computation is; FSDP2 needs a single dtype.
        weights = sizes.parameters * (2 if bf16 and ranks.world == 1 else 4) + trained * 4
    else:
        trained = sizes.trainable
        # Autocast keeps its bfloat16 copies until the backward.
        weights = sizes.parameters * (6 if bf16 else 4)
    auto = config.max_tokens == "auto"
    tokens = START[ranks.device.type] if auto else int(config.max_tokens)

    def plan(tokens: int) -> MemoryPlan:
        return MemoryPlan(
            parameters=sizes.parameters,
            trained=trained,
            weights=weights // ranks.world,
            gradients=4 * trained // ranks.world,
            optimizer=8 * trained // ranks.world,
            activations=sizes.activations(
                tokens, bf16, config.gradient_checkpointing, ranks.device
            ),
            available=available,
            tokens=tokens,
        )

    available = available_bytes(ranks)
    while auto and tokens > LEAST and plan(tokens).total > available:
        tokens //= 2
    return plan(tokens)


def refuse_what_cannot_fit(
    plan: MemoryPlan, sizes: Sizes, config: TrainConfig, ranks: Ranks, bf16: bool
) -> None:
    """Raise `UserError`, with the ways out, for a plan beyond the device's free memory."""
    if plan.total <= plan.available:
        return

    def fits(**changes: object) -> bool:
        changed = memory_plan(sizes, replace(config, **changes), ranks, bf16)  # type: ignore[arg-type]
        return changed.total <= plan.available

    ways = []
    if not config.gradient_checkpointing and fits(gradient_checkpointing=True):
        ways.append("--gradient-checkpointing")
    if config.lora_rank is None and fits(lora_rank=LORA_WAY_OUT):
        ways.append(f"--lora-rank {LORA_WAY_OUT}")
    held = plan.weights + plan.gradients + plan.optimizer
    if ranks.device.type == "cuda" and plan.activations < plan.available:
        devices = -(-held * ranks.world // (plan.available - plan.activations))
        ways.append(f"torchrun --nproc-per-node {devices}")
    raise UserError(
        f"the policy needs about {plan.total / GIB:.1f} GiB and {plan.available / GIB:.1f} GiB are "
        f"free on {ranks.device}; use {' or '.join(ways) or 'a smaller policy'}"
    )


def available_bytes(ranks: Ranks) -> int:
    """Free memory of this process's device; processes on the CPU share the machine's equally."""
    if ranks.device.type == "cuda":
        return torch.cuda.mem_get_info(ranks.device)[0]
    return _free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_memory() -> int:
    """Bytes free on the machine, or in its container if that has less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # the text "max" where there is no limit
        return min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return free


@dataclass(slots=True)
class TokenBudget:
    """Tokens of a micro-batch, and whether the budget may still grow."""

    tokens: int
    grows: bool
    steady: int = 0  # bytes on the device between two steps
    per_token: float = 0.0  # further bytes of a step, for each token of its largest row; at first
    # the plan's, so that the first step of several processes is checked as well

    @classmethod
    def of(
        cls,
        asked: int | str,
        device: torch.device,
        planned: int,
        state: TrainState,
        per_token: float,
    ) -> TokenBudget:
        """What `--max-tokens` asks for; for auto what was planned. A resumed run keeps the budget
        that was in force, unless it asks for another. `per_token` is the plan's."""
        tokens = planned if asked == "auto" else int(asked)
        if state.asked_tokens == asked and state.max_tokens is not None:
            tokens = state.max_tokens
        state.asked_tokens = asked
        grows = asked == "auto" and device.type == "cuda"
        return cls(tokens, grows, per_token=per_token)

    def fits(self, row_tokens: int, ranks: Ranks) -> bool:
        """Whether the memory of a row, estimated from earlier steps, can be allocated now."""
        if ranks.device.type != "cuda":
            return True
        try:
            # Freed at once, to the allocator that the row will take it from.
            torch.empty(int(self.per_token * row_tokens), dtype=torch.uint8, device=ranks.device)
        except torch.OutOfMemoryError:
            return False
        return True

    def halve(self, largest: int) -> None:
        """Halve the budget after memory ran out with at most `largest` pairs in a micro-batch.

        Raises `UserError` if `largest` is 1: a pair can't be divided.
        """
        if largest == 1:
            raise UserError(
                "out of memory with a micro-batch of one pair; use --gradient-checkpointing, "
                "--lora-rank 16, a smaller --max-length, or more devices with torchrun"
            )
        torch.cuda.empty_cache()
        self.tokens = max(1, self.tokens // 2)
        self.grows = False

    def watch(self, ranks: Ranks) -> None:
        """Start measuring the memory of a step."""
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(ranks.device)
            self.steady = torch.cuda.memory_allocated(ranks.device)

    def learn(self, row_tokens: int, ranks: Ranks, *, bound: bool) -> None:
        """Update the estimate after a step with rows of up to `row_tokens`, and grow the budget.

        Gradients, which do not grow with the rows, are included, so that the budget approaches
        the limit from below. It grows only if it `bound` the rows.
        """
        if ranks.device.type != "cuda":
            return
        used = torch.cuda.max_memory_allocated(ranks.device) - self.steady
        seen = torch.tensor([used / row_tokens, float(self.steady)])
        self.per_token, steady = ranks.max(seen).tolist()
        if not (self.grows and bound):
            return
        total = torch.cuda.get_device_properties(ranks.device).total_memory
        affordable = int((FULL * total - steady) / self.per_token)
        if affordable < 1.05 * self.tokens:
            self.grows = False
        else:
            self.tokens = min(affordable, 2 * self.tokens)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means that memory ran out; for a CPU torch has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
