"""The token budget of a micro-batch: found while training, never felt in the loss.

`--max-tokens auto` starts at a size that any device takes well. On a GPU it grows, by what the
last steps have used, until memory is nearly full; on a CPU longer rows are no faster. Whenever
memory runs out the budget is halved and the step repeated, and every rank decides alike.

A rank that ran out in the middle of a sharded forward would leave the others waiting for it. So
several processes set memory aside before they begin, and agree on whether all could.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import UserError
from .checkpoint import TrainState
from .distributed import Ranks

START = {"cpu": 2048, "cuda": 8192}
FULL = 0.88  # share of a GPU's memory to fill; the rest is for fragments and longer rows


@dataclass(slots=True)
class TokenBudget:
    """Tokens of a micro-batch, and whether they may still grow."""

    tokens: int
    grows: bool
    steady: int = 0  # bytes on the device between two steps
    per_token: float = 0.0  # bytes that a step has taken on top, for each token of its largest row

    @classmethod
    def of(
        cls, asked: int | str, device: torch.device, planned: int, state: TrainState
    ) -> TokenBudget:
        """What `--max-tokens` asks for, the plan's number for auto; a resumed run goes on with
        the budget that was in force, unless it asks for another."""
        tokens = planned if asked == "auto" else int(asked)
        if state.asked_tokens == asked and state.max_tokens is not None:
            tokens = state.max_tokens
        state.asked_tokens = asked
        return cls(tokens, grows=asked == "auto" and device.type == "cuda")

    def fits(self, row_tokens: int, ranks: Ranks) -> bool:
        """Whether a row's memory can be had at this moment, as far as earlier steps tell."""
        if ranks.device.type != "cuda":
            return True
        try:
            # Given back at once, to the allocator that the row will take it from.
            torch.empty(int(self.per_token * row_tokens), dtype=torch.uint8, device=ranks.device)
        except torch.OutOfMemoryError:
            return False
        return True

    def halve(self, largest: int) -> None:
        """Make room after memory ran out on a plan whose largest micro-batch had `largest` pairs.

        Raises `UserError` where that was one pair: it can't be divided.
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
        """Begin to measure what a step takes."""
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(ranks.device)
            self.steady = torch.cuda.memory_allocated(ranks.device)

    def learn(self, row_tokens: int, ranks: Ranks, *, bound: bool) -> None:
        """After a step with rows of up to `row_tokens`: what they took, and room for longer ones.

        Gradients, which do not grow with the rows, are counted in, so that the budget comes near
        the limit from below. It grows where it was what bounded the rows.
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
    """Whether an error is a device's memory running out; a CPU's has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
