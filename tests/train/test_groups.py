"""Pairs of one prompt computed together, against one response at a time."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, AutoModelForCausalLM

from mrpo.data.pairs import Pair
from mrpo.data.rendering import RenderedPrompt, RenderedSequence, Renderer
from mrpo.model.logps import SequenceLogps
from mrpo.model.packing import packed_tokens
from mrpo.tests.train.conftest import SMALL
from mrpo.train.distributed import Ranks
from mrpo.train.forward import PairForward
from mrpo.train.groups import PromptGroup, grouped, rows_of

TOKEN = st.integers(0, 60)
CPU = torch.device("cpu")


@st.composite
def batches(draw: st.DrawFn) -> list[RenderedPrompt]:
    """Pairs of up to three prompts and of up to four responses of each, in any order and repeated.

    Some responses begin with a token that joins the prompt's last one.
    """
    pairs = []
    for number in range(draw(st.integers(1, 3))):
        prompt = [number, *draw(st.lists(TOKEN, min_size=1, max_size=12))]
        responses = []
        for _ in range(draw(st.integers(2, 4))):
            merged = draw(st.integers(0, 5)) == 0
            ids = [*prompt[: len(prompt) - merged], *draw(st.lists(TOKEN, min_size=1, max_size=9))]
            responses.append(RenderedSequence(ids, len(prompt) - merged, len(ids), merged))
        both = st.permutations(range(len(responses))).map(lambda order: order[:2])
        for chosen, rejected in draw(st.lists(both, min_size=1, max_size=7)):
            pairs.append(RenderedPrompt.of([responses[chosen], responses[rejected]]))
    return draw(st.permutations(pairs))


def check_groups(groups: Sequence[PromptGroup], pairs: Sequence[RenderedPrompt]) -> None:
    """Every pair once, with its own responses; in a group no response twice or unused."""
    assert sorted(rows_of(groups)) == list(range(len(pairs)))
    for group in groups:
        responses, shared = group.prompt.responses, group.prompt.shared
        for row, numbers in zip(group.rows, group.numbers, strict=True):
            assert [responses[number] for number in numbers] == [*pairs[row].responses]
            assert pairs[row].shared == shared
        assert len({(one.start, *one.token_ids) for one in responses}) == len(responses)
        assert {number for both in group.numbers for number in both} == {*range(len(responses))}
        assert len({tuple(one.token_ids[:shared]) for one in responses}) == 1
        assert sum(group.copies) == 2 * len(group.rows)
        assert all(count > 0 for count in group.copies)


@given(batches())
@settings(max_examples=200, deadline=None)
def test_a_batch_has_each_prompt_and_each_of_its_responses_once(
    pairs: list[RenderedPrompt],
) -> None:
    groups = grouped(pairs)
    check_groups(groups, pairs)
    prompts = {tuple(pair.responses[0].token_ids[: pair.shared]) for pair in pairs}
    assert len(groups) == len(prompts)


@given(batches(), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_parts_are_within_the_budget_or_single_pairs(
    pairs: list[RenderedPrompt], max_tokens: int
) -> None:
    parts = [part for g in grouped(pairs) for part in g.parts(max_tokens, packed_tokens)]
    check_groups(parts, pairs)
    for part in parts:
        assert packed_tokens(part.prompt) <= max_tokens or len(part.rows) == 1


def test_a_prompt_beyond_the_budget_is_divided_where_few_responses_are_repeated() -> None:
    """All pairings of six responses of one token: four fit, which are six pairs."""
    responses = [RenderedSequence([7, 7, number], 2, 3, False) for number in range(6)]
    pairs = [RenderedPrompt.of([*both]) for both in combinations(responses, 2)]
    (group,) = grouped(pairs[::-1])
    parts = group.parts(6, packed_tokens)
    assert len(parts) == 4
    assert len(parts[0].rows) == 6
    assert max(packed_tokens(part.prompt) for part in parts) == 6


@cache
def tiny(model_type: str) -> nn.Module:
    """A small model in float64, whose rounding hides nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, vocab_size=61, **SMALL)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float64)


def pair_losses(chosen: Tensor, rejected: Tensor, rows: list[int]) -> Tensor:
    """Of the pairs in `rows`, each against a margin of its own."""
    margins = torch.tensor([0.7 * row - 2 for row in rows])
    return -logsigmoid(0.3 * (chosen - rejected - margins))


def one_at_a_time(model: nn.Module, pairs: Sequence[RenderedPrompt]) -> Tensor:
    """The batch's loss through transformers' own forward, each response of each pair alone."""

    def logp(sequence: RenderedSequence) -> Tensor:
        ids = torch.tensor([sequence.token_ids])
        logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        return logps[:-1].gather(1, ids[0, 1:, None])[sequence.start - 1 :].sum()

    chosen, rejected = (
        torch.stack([logp(pair.responses[number]) for pair in pairs]) for number in (0, 1)
    )
    return pair_losses(chosen, rejected, list(range(len(pairs)))).sum()


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "single"])
@given(batches(), st.sampled_from([1, 40, 4096]), st.sampled_from([1, 2, 3]))
@settings(max_examples=15, deadline=None)
def test_loss_and_gradient_are_those_of_one_response_at_a_time(
    packs: bool, pairs: list[RenderedPrompt], max_tokens: int, world: int
) -> None:
    """However the batch is divided into micro-batches, on however many processes."""
    model = tiny("llama")
    model.zero_grad(set_to_none=True)
    expected = one_at_a_time(model, pairs)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    policy = SequenceLogps(model)
    policy.packs = packs
    total, rows, rounds = 0.0, [], set()
    for rank in range(world):
        forward = PairForward(policy, Ranks(rank, world, CPU), autocast=False)
        shares = forward.shares(pairs, max_tokens)
        rounds.add(len(shares))
        for groups, weight in shares:
            logps = forward(groups)
            loss = weight * pair_losses(logps.chosen, logps.rejected, rows_of(groups)).sum()
            loss.backward()
            total += loss.item()
            rows += rows_of(groups) if weight else []
    assert len(rounds) == 1  # of the same number on every process
    assert sorted(rows) == list(range(len(pairs)))
    assert total == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        difference = (parameter.grad - gradients[name]).norm()
        assert difference <= 1e-5 * gradients[name].norm() + 1e-12, name
