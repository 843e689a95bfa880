"""Pairs through the policy: which are in which micro-batch, and what is measured of them.

Used by the training step and by the held-out evaluation alike. All ranks compute the same plan
for the whole batch and each takes its share of the micro-batches. A rank that is left without one
runs one of weight 0, because FSDP2 needs the same number of forwards on every rank.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.rendering import RenderedPrompt
from ..method.objective import Method
from ..model.logps import Routing, SequenceLogps, sum_by_sequence
from .distributed import Ranks
from .groups import PromptGroup, grouped, rows_of
from .stream import PairStream, StepBatch

EVALUATION_PAIRS = 32  # of a batch of held-out pairs
MEASURES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)  # TRL's names


class PairLogps(NamedTuple):
    """The policy's log-probs of N pairs, [N] each: sums in nats, and the tokens they run over."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    tokens: int  # that the decoder computed: a prompt and a response once, padding included


class MicroBatch(NamedTuple):
    """What came out of some pairs of a batch."""

    loss: Tensor  # summed over the pairs; gradients flow where they are enabled
    measures: Tensor  # [len(MEASURES)] sums over the pairs, without gradient
    tokens: int  # that the decoder computed
    routing: Routing | None = None  # of an MoE policy in training


@dataclass(frozen=True, slots=True)
class PairForward:
    """The policy on its devices."""

    policy: SequenceLogps
    ranks: Ranks
    autocast: bool  # bfloat16 over float32 weights

    def __call__(self, groups: Sequence[PromptGroup]) -> PairLogps:
        """Log-probs of the groups' pairs, in the order of `rows_of`, as one micro-batch.

        Gradients flow where they are enabled.
        """
        device, first, numbers = self.ranks.device, 0, []
        for group in groups:
            numbers += [(first + chosen, first + rejected) for chosen, rejected in group.numbers]
            first += len(group.prompt.responses)
        copies = [count for group in groups for count in group.copies]
        batch = self.policy.collate([group.prompt for group in groups], device, copies)
        with torch.autocast(device.type, torch.bfloat16) if self.autocast else nullcontext():
            token_logps = self.policy(batch)
        logps = sum_by_sequence(token_logps, batch)
        tokens = torch.tensor(batch.token_counts).to(device, non_blocking=True)
        chosen, rejected = torch.tensor(numbers).T.to(device, non_blocking=True)
        return PairLogps(
            logps[chosen], logps[rejected], tokens[chosen], tokens[rejected], batch.num_tokens
        )

    def run(self, batch: StepBatch, groups: Sequence[PromptGroup], method: Method) -> MicroBatch:
        """Groups of a batch's pairs as one micro-batch, measured against their targets."""
        logps = self(groups)
        loss, chosen, rejected = method.loss(
            logps.chosen,
            logps.rejected,
            batch.targets.of_rows(rows_of(groups)),
            logps.chosen_tokens,
            logps.rejected_tokens,
        )
        columns = (
            loss.detach(),
            chosen,
            rejected,
            chosen > rejected,
            chosen - rejected,
            logps.chosen.detach(),
            logps.rejected.detach(),
        )
        measures = torch.stack([column.to(chosen.dtype) for column in columns]).sum(1)
        return MicroBatch(loss.sum(), measures, logps.tokens, self.policy.routing)

    def shares(
        self, pairs: Sequence[RenderedPrompt], max_tokens: int
    ) -> list[tuple[list[PromptGroup], float]]:
        """This rank's micro-batches of a batch: groups of its pairs, and their weight, 1 or 0.

        As many as the token budget needs, the tokens spread evenly over them; the same number on
        every rank. A prompt whose pairs are beyond the budget is divided, and a single pair beyond
        it gets a micro-batch of its own.
        """
        whole, tokens, world = grouped(pairs), self.policy.tokens, self.ranks.world

        def plan(budget: int) -> list[list[PromptGroup]]:
            # To divide a prompt costs a copy of it: worth it where other ranks would have no work.
            most = budget if world > 1 else max_tokens
            groups = [part for group in whole for part in group.parts(most, tokens)]
            rows = self.policy.plan([group.prompt for group in groups], budget)
            return [[groups[number] for number in row] for row in rows]

        rounds = -(-len(plan(max_tokens)) // world)
        most = rounds * world
        # The smallest budget that needs no more rounds.
        micro_batches = plan(
            1 + bisect_left(range(1, max_tokens), True, key=lambda n: len(plan(n)) <= most)
        )
        numbers = range(self.ranks.rank, most, world)
        return [
            (micro_batches[n], 1.0) if n < len(micro_batches) else (micro_batches[-1], 0.0)
            for n in numbers
        ]


class HeldOut:
    """The policy on the validation pairs: loss, accuracy and margin, under TRL's names.

    The pairs of the evaluations during training are rendered once.
    """

    def __init__(
        self, stream: PairStream | None, forward: PairForward, method: Method, num_pairs: int
    ) -> None:
        """`stream`: batches of held-out pairs, None where there are none; `num_pairs`: of an
        evaluation during training, rounded up to whole batches."""
        self.stream, self.forward, self.method = stream, forward, method
        self._num_batches = -(-num_pairs // EVALUATION_PAIRS)
        self._batches: list[StepBatch] | None = None
        self._sample: list[StepBatch] | None = None
        self._latest: tuple[int, dict[str, float]] | None = None  # the step and its figures

    def evaluate(self, step: int, max_tokens: int) -> dict[str, float]:
        """Figures of the same part of the held-out pairs each time; empty where there are none."""
        if self.stream is None:
            return {}
        if self._batches is None:
            self._batches = list(islice(self.stream.batches(), self._num_batches))
        self._latest = step, self._figures(self._batches, max_tokens)
        return self._latest[1]

    def sample_accuracy(self, max_tokens: int) -> float:
        """The accuracy on the first batch of held-out pairs, which thompson goes by."""
        assert self.stream is not None, "no held-out pairs, which `Method.prepare` refuses"
        if self._sample is None:
            self._sample = list(islice(self.stream.batches(), 1))
        return self._figures(self._sample, max_tokens)["eval_rewards/accuracies"]

    def evaluate_all(self, step: int, max_tokens: int) -> dict[str, float]:
        """Figures of all held-out pairs; empty where there are none."""
        if self.stream is None:
            return {}
        part_is_all = self.stream.epoch_rows <= self._num_batches * EVALUATION_PAIRS
        if part_is_all and self._latest is not None and self._latest[0] == step:
            return self._latest[1]
        return self._figures(self.stream.batches(), max_tokens)

    def _figures(self, batches: Iterable[StepBatch], max_tokens: int) -> dict[str, float]:
        """Means over the pairs, their names prefixed by `eval_`, and the number `eval_pairs`."""
        policy, ranks = self.forward.policy, self.forward.ranks
        sums, pairs = torch.zeros(len(MEASURES), dtype=torch.float64), 0
        policy.eval()
        with torch.no_grad():
            for batch in batches:
                for groups, weight in self.forward.shares(batch.pairs, max_tokens):
                    sums += self.forward.run(batch, groups, self.method).measures.cpu() * weight
                pairs += len(batch)
        policy.train()
        means = (ranks.sum(sums) / pairs).tolist()
        return {f"eval_{name}": mean for name, mean in zip(MEASURES, means)} | {"eval_pairs": pairs}
