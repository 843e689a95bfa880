"""The token budget of micro-batches: how it grows on a GPU, and what a resumed run goes on with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mrpo.errors import UserError
from mrpo.train.checkpoint import TrainState
from mrpo.train.distributed import Ranks
from mrpo.train.memory import FULL, TokenBudget, is_out_of_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Card:
    """A GPU of 80,000 bytes whose steps take 1,000 for gradients and 10 for each token."""

    total, steady = 80_000, 20_000

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak = 0
        properties = SimpleNamespace(total_memory=self.total)
        for name, value in {
            "reset_peak_memory_stats": None,
            "memory_allocated": self.steady,
            "get_device_properties": properties,
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)

    def step(self, budget: TokenBudget) -> None:
        """A step that fills its budget, and would have filled a larger one."""
        ranks = Ranks(0, 1, GPU)
        budget.watch(ranks)
        self.peak = self.steady + 1_000 + 10 * budget.tokens
        budget.learn(budget.tokens, ranks, bound=True)


def test_budget_grows_until_memory_is_nearly_full(monkeypatch: pytest.MonkeyPatch) -> None:
    card, budget = Card(monkeypatch), TokenBudget.of("auto", GPU, 500, TrainState(), 0.0)
    tokens = []
    while budget.grows:
        card.step(budget)
        tokens.append(budget.tokens)
        assert 1_000 + 10 * budget.tokens + card.steady <= FULL * card.total
    assert tokens[:2] == [1000, 2000]
    assert tokens[-1] > 0.9 * (FULL * card.total - card.steady - 1_000) / 10


def test_budget_that_did_not_bound_the_rows_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    card, budget = Card(monkeypatch), TokenBudget.of("auto", GPU, 500, TrainState(), 0.0)
    card.peak = card.steady + 6_000
    budget.watch(Ranks(0, 1, GPU))
    budget.learn(500, Ranks(0, 1, GPU), bound=False)
    assert budget.tokens == 500
    assert budget.per_token == 12


def test_halved_budget_grows_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    card, budget = Card(monkeypatch), TokenBudget.of("auto", GPU, 500, TrainState(), 0.0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    budget.halve(largest=3)
    card.step(budget)
    assert budget.tokens == 250
    with pytest.raises(UserError, match="out of memory with a micro-batch of one pair"):
        budget.halve(largest=1)


def test_resumed_run_goes_on_with_the_budget_in_force() -> None:
    state = TrainState(max_tokens=256, asked_tokens=512)
    assert TokenBudget.of(512, CPU, 2048, state, 0.0).tokens == 256
    assert TokenBudget.of(1024, CPU, 2048, state, 0.0).tokens == 1024
    assert state.asked_tokens == 1024
    state = TrainState(max_tokens=4096, asked_tokens="auto")
    assert TokenBudget.of("auto", CPU, 2048, state, 0.0).tokens == 4096
    assert TokenBudget.of("auto", CPU, 2048, TrainState(), 0.0).tokens == 2048


def test_the_first_sharded_step_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any step was seen the plan's bytes a token are what the ranks try to allocate."""
    asked: list[int] = []

    def empty(count: int, **how: object) -> None:
        asked.append(count)
        if count > 10_000:
            raise torch.OutOfMemoryError

    budget = TokenBudget.of("auto", GPU, 500, TrainState(), 30.0)
    monkeypatch.setattr(torch, "empty", empty)
    assert not budget.fits(400, Ranks(0, 2, GPU))
    assert budget.fits(300, Ranks(1, 2, GPU))
    assert asked == [12_000, 9_000]


def test_only_memory_running_out_is_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
