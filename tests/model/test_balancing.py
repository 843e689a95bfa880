"""The load-balancing loss of packed rows beside transformers' own of padded ones."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mrpo.data.rendering import RenderedPrompt
from mrpo.model.load import BALANCED, set_attention
from mrpo.model.logps import Routing, SequenceLogps, balancing_loss

from .conftest import random_prompt

EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "decoder_sparse_step": 1,
}


def policy_of(model: nn.Module) -> SequenceLogps:
    set_attention(model, "sdpa")  # type: ignore[arg-type]
    return SequenceLogps(model).train()


def own_loss(model: nn.Module, prompts: list[RenderedPrompt]) -> Tensor:
    """transformers' `aux_loss` of the responses as padded rows of one batch, as TRL has them."""
    rows = [torch.tensor(s.token_ids) for prompt in prompts for s in prompt.responses]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "single"])
@pytest.mark.parametrize("model_type", sorted(BALANCED))
def test_loss_and_gradient_are_transformers_own(
    tiny_lm: Callable[..., nn.Module], prompts: list[RenderedPrompt], model_type: str, packed: bool
) -> None:
    model = tiny_lm(model_type, **EXPERTS)
    expected = own_loss(model, prompts)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    policy = policy_of(model)
    policy.packs = packed
    policy(policy.collate(prompts, "cpu"))
    assert policy.routing is not None
    loss = balancing_loss(policy.routing, policy.routing.sizes())
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert any("gate" in name or "router" in name for name in gradients)
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert parameter.grad is not None, name
            difference = (parameter.grad - gradients[name]).norm()
            assert difference <= 1e-5 * gradients[name].norm() + 1e-9, name


def test_micro_batches_add_up_to_the_loss_of_the_batch(tiny_lm: Callable[..., nn.Module]) -> None:
    rng = random.Random(1)
    prompts = [random_prompt(rng, responses) for responses in (2, 2, 1, 3, 2, 4, 2)]
    model = tiny_lm("mixtral", **EXPERTS)
    policy = policy_of(model)
    parts = []
    for start, stop in ((0, 1), (1, 4), (4, 7)):
        policy(policy.collate(prompts[start:stop], "cpu"))
        assert policy.routing is not None
        parts.append(policy.routing)
    sizes = torch.stack([part.sizes() for part in parts]).sum(0)
    total = torch.stack([balancing_loss(part, sizes) for part in parts]).sum()
    assert total.item() == pytest.approx(own_loss(model, prompts).item(), rel=1e-6)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "single"])
def test_a_response_of_several_pairs_counts_for_each_of_them(
    tiny_lm: Callable[..., nn.Module], packed: bool
) -> None:
    """Three responses of a prompt, of which the first stands in two pairs."""
    first, second, third = (random_prompt(random.Random(2), 3)).responses
    pairs = [RenderedPrompt.of(both) for both in ((first, second), (first, third))]
    model = tiny_lm("mixtral", **EXPERTS)
    policy = policy_of(model)
    policy.packs = packed
    together = RenderedPrompt.of((first, second, third))
    policy(policy.collate([together], "cpu", copies=[2, 1, 1]))
    assert policy.routing is not None
    loss = balancing_loss(policy.routing, policy.routing.sizes())
    assert loss.item() == pytest.approx(own_loss(model, pairs).item(), rel=1e-6)


def test_balanced_routing_costs_what_it_must() -> None:
    """2 of 4 experts for each of 8 tokens, all alike: 4 * 4 * (4 / 8) * (2 / 8) = 2."""
    even = Routing(torch.full((4,), 4.0), torch.full((4,), 2.0), torch.tensor(8.0))
    assert balancing_loss(even, even.sizes()).item() == 2.0
    # All of them to two experts, with certainty: 4 * 2 * 1 * 0.5 = 4.
    two = Routing(*map(torch.tensor, ([8.0, 8.0, 0.0, 0.0], [4.0, 4.0, 0.0, 0.0], 8.0)))
    assert balancing_loss(two, two.sizes()).item() == 4.0


def test_nothing_is_counted_outside_training_or_without_a_coefficient(
    tiny_lm: Callable[..., nn.Module], prompts: list[RenderedPrompt]
) -> None:
    policy = policy_of(tiny_lm("mixtral", **EXPERTS))
    policy(policy.collate(prompts, "cpu"))
    assert policy.routing is not None
    policy.eval()
    policy(policy.collate(prompts, "cpu"))
    assert policy.routing is None
    switched_off = policy_of(tiny_lm("mixtral", router_aux_loss_coef=0.0, **EXPERTS))
    switched_off(switched_off.collate(prompts, "cpu"))
    assert switched_off.routing is None
