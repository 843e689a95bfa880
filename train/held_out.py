"""The policy on pairs that it is not trained on: loss, accuracy and margin, under TRL's names."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch

from .forward import MEASURES, PairForward, measures, pair_losses, select
from .objective import Method
from .stream import PairStream, StepBatch

BATCH_PAIRS = 32


class HeldOut:
    """The validation pairs. Those of the evaluations during training are rendered once."""

    def __init__(
        self, stream: PairStream | None, forward: PairForward, method: Method, num_pairs: int
    ) -> None:
        """`stream`: batches of held-out pairs, None where there are none; `num_pairs`: of an
        evaluation during training, rounded up to whole batches."""
        self.stream, self.forward, self.method = stream, forward, method
        self._few = -(-num_pairs // BATCH_PAIRS)
        self._kept: list[StepBatch] | None = None
        self._latest: tuple[int, dict[str, float]] | None = None  # of which step

    def evaluate(self, step: int, max_tokens: int) -> dict[str, float]:
        """On the same part of the held-out pairs each time; nothing where there are none."""
        if self.stream is None:
            return {}
        if self._kept is None:
            self._kept = list(islice(self.stream.batches(), self._few))
        self._latest = step, self._measured(self._kept, max_tokens)
        return self._latest[1]

    def evaluate_all(self, step: int, max_tokens: int) -> dict[str, float]:
        """On all of them; nothing where there are none."""
        if self.stream is None:
            return {}
        part_is_all = self.stream.epoch_rows <= self._few * BATCH_PAIRS
        if part_is_all and self._latest is not None and self._latest[0] == step:
            return self._latest[1]
        return self._measured(self.stream.batches(), max_tokens)

    def _measured(self, batches: Iterable[StepBatch], max_tokens: int) -> dict[str, float]:
        """Means over the pairs, `eval_` in front, and `eval_pairs`, how many they are."""
        policy, ranks = self.forward.policy, self.forward.ranks
        sums, pairs = torch.zeros(len(MEASURES), dtype=torch.float64), 0
        policy.eval()
        with torch.no_grad():
            for batch in batches:
                for rows, counts in self.forward.shares(batch.pairs, max_tokens):
                    logps = self.forward([batch.pairs[row] for row in rows])
                    losses = pair_losses(self.method, logps, select(batch.targets, rows))
                    sums += measures(losses, logps).cpu() * counts
                pairs += len(batch)
        policy.train()
        means = (ranks.sum(sums) / pairs).tolist()
        return {f"eval_{name}": mean for name, mean in zip(MEASURES, means)} | {"eval_pairs": pairs}
