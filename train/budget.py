"""The token budget of a micro-batch: found while training, never felt in the loss.

`--max-tokens auto` starts at a size that any device takes well. On a GPU it grows, by what the
last steps have used, until memory is nearly full; on a CPU longer rows are no faster. Whenever
memory runs out the budget is halved and the step repeated. Every rank decides alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import UserError
from .distributed import Ranks

START = {"cpu": 2048, "cuda": 8192}
FULL = 0.88  # share of a GPU's memory to fill; the rest is for fragments and longer rows


@dataclass(slots=True)
class TokenBudget:
    """Tokens of a micro-batch, and whether they may still grow."""

    tokens: int
    grows: bool
    steady: int = 0  # bytes on the device between two steps

    @classmethod
    def of(cls, max_tokens: int | str, device: torch.device, last: int | None) -> TokenBudget:
        """The budget that `--max-tokens` names; for auto the one a checkpoint had in force."""
        if max_tokens != "auto":
            return cls(int(max_tokens), grows=False)
        return cls(last or START[device.type], grows=device.type == "cuda")

    def halve(self, largest: int) -> None:
        """Make room after memory ran out on a plan whose largest micro-batch had `largest` pairs.

        Raises `UserError` where that was one pair: it can't be divided.
        """
        if largest == 1:
            raise UserError(
                "out of memory with a micro-batch of one pair; use --gradient-checkpointing, "
                "--lora-rank 16, a smaller --max-length, or more devices with torchrun"
            )
        self.tokens = max(1, self.tokens // 2)
        self.grows = False

    def watch(self, ranks: Ranks) -> None:
        """Begin to measure what a step takes."""
        if self.grows:
            torch.cuda.reset_peak_memory_stats(ranks.device)
            self.steady = torch.cuda.memory_allocated(ranks.device)

    def grow(self, ranks: Ranks, row_tokens: int) -> None:
        """After a step that needed several micro-batches of up to `row_tokens`: take what is left.

        What a row needs is reckoned in proportion to its tokens. Gradients, which do not grow with
        it, are counted in, so that the budget comes near the limit from below.
        """
        if not self.grows:
            return
        total = torch.cuda.get_device_properties(ranks.device).total_memory
        used = torch.cuda.max_memory_allocated(ranks.device) - self.steady
        needed = torch.tensor([used / row_tokens, float(self.steady)])
        per_token, steady = ranks.max(needed).tolist()
        affordable = int((FULL * total - steady) / per_token)
        if affordable < 1.05 * self.tokens:
            self.grows = False
        else:
            self.tokens = min(affordable, 2 * self.tokens)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is a device's memory running out; a CPU's has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
