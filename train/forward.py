"""Pairs through the policy: which lie in which micro-batch, and what is measured of them.

Used by the training step and by the held-out evaluation alike. All ranks compute the same plan
for the whole batch and each takes its share of the micro-batches; a rank that is left without one
runs one that counts 0, because FSDP2 needs the same number of forwards everywhere.


The policy on pairs that it is not trained on: loss, accuracy and margin, under TRL's names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.rendering import RenderedPair
from ..method.objective import Method, PairLosses, ReferenceTargets
from ..model.logps import SequenceLogps, sum_by_sequence
from .distributed import Ranks
from .stream import PairStream, StepBatch

MEASURES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


class PairLogps(NamedTuple):
    """The policy's log-probs of N pairs, [N] each: sums in nats, and the tokens they run over."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    tokens: int  # what the decoder went through: a shared prompt once, padding included


@dataclass(frozen=True, slots=True)
class PairForward:
    """The policy on its devices."""

    policy: SequenceLogps
    ranks: Ranks
    autocast: bool  # bfloat16 over float32 weights

    def __call__(self, pairs: Sequence[RenderedPair]) -> PairLogps:
        """Log-probs of the pairs in one micro-batch. Gradients flow where they are enabled."""
        device = self.ranks.device
        batch = self.policy.collate(pairs, device)
        with torch.autocast(device.type, torch.bfloat16) if self.autocast else nullcontext():
            token_logps = self.policy(batch)
        logps = sum_by_sequence(token_logps, batch)
        counts = torch.tensor(batch.token_counts).to(device, non_blocking=True)
        return PairLogps(logps[0::2], logps[1::2], counts[0::2], counts[1::2], batch.num_tokens)

    def shares(
        self, pairs: Sequence[RenderedPair], max_tokens: int
    ) -> list[tuple[list[int], float]]:
        """This rank's micro-batches of a batch: indices of pairs, and 1 or 0 for what they count.

        As many as the token budget needs, the tokens spread evenly over them; the same number on
        every rank. A pair longer than the budget gets a micro-batch of its own.
        """
        plan, world = self.policy.plan, self.ranks.world
        rounds = -(-len(plan(pairs, max_tokens)) // world)
        low, high = 1, max_tokens  # in search of the smallest budget that needs no more rounds
        while low < high:
            middle = (low + high) // 2
            if len(plan(pairs, middle)) <= rounds * world:
                high = middle
            else:
                low = middle + 1
        rows = plan(pairs, high)
        places = range(self.ranks.rank, rounds * world, world)
        return [(rows[at], 1.0) if at < len(rows) else (rows[-1], 0.0) for at in places]


def pair_losses(method: Method, logps: PairLogps, targets: ReferenceTargets) -> PairLosses:
    """The method's loss and rewards of the pairs, [N] each."""
    return method.loss(
        logps.chosen, logps.rejected, targets, logps.chosen_tokens, logps.rejected_tokens
    )


def measures(losses: PairLosses, logps: PairLogps) -> Tensor:
    """Sums over the pairs of what is logged, in the order of `MEASURES`."""
    chosen, rejected = losses.chosen_rewards, losses.rejected_rewards
    columns = (
        losses.loss.detach(),
        chosen,
        rejected,
        chosen > rejected,
        chosen - rejected,
        logps.chosen.detach(),
        logps.rejected.detach(),
    )
    return torch.stack([column.to(chosen.dtype) for column in columns]).sum(1)


def select(targets: ReferenceTargets, rows: Sequence[int]) -> ReferenceTargets:
    """The targets of some of the pairs."""
    index = list(rows)
    return ReferenceTargets(
        **{field.name: getattr(targets, field.name)[index] for field in fields(targets)}
    )


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
