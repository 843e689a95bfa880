"""Token log-probs from hidden states against log_softmax of the full logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mrpo.model.head import LogitRule, token_logps

ROWS, WIDTH, VOCAB = 23, 6, 31
RULES = [LogitRule(), LogitRule(scale=0.5), LogitRule(softcap=2.0), LogitRule(3.0, softcap=2.0)]


def inputs(dtype: torch.dtype, *frozen: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = {"hidden": normal(ROWS, WIDTH), "weight": normal(VOCAB, WIDTH), "bias": normal(VOCAB)}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name not in frozen)
    return tensors


TARGETS = torch.arange(ROWS) * 7 % VOCAB
UPSTREAM = torch.linspace(-1, 2, ROWS)


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, rule: LogitRule) -> Tensor:
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    logits = rule.scale * (logits if bias is None else logits + bias)
    if rule.softcap is not None:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    return logits.log_softmax(-1).gather(1, TARGETS[:, None])[:, 0]


def test_worked_by_hand() -> None:
    # Logits 0, 0, ln 2: probabilities 1/4, 1/4, 1/2, and slopes [j = 2] - p_j.
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[1.0], [1.0], [2.0]]).log()
    weight.requires_grad_()
    logp = token_logps(hidden, weight, None, torch.tensor([2]), LogitRule(), chunk=8)
    assert logp.item() == pytest.approx(torch.tensor(0.5).log().item())
    logp.sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == pytest.approx([-0.25, -0.25, 0.5])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("chunk", [1, 7, ROWS, 100])
@pytest.mark.parametrize("kept_chunks", [0, 2, 100])
def test_values_and_gradients(rule: LogitRule, chunk: int, kept_chunks: int) -> None:
    expected, ours = inputs(torch.float64), inputs(torch.float64)
    plain_logps = plain(**expected, rule=rule)
    keep = kept_chunks * chunk * VOCAB * 8
    logps = token_logps(**ours, targets=TARGETS, rule=rule, chunk=chunk, keep_bytes=keep)
    assert torch.allclose(logps, plain_logps, rtol=1e-12)
    plain_logps.backward(UPSTREAM.double())
    logps.backward(UPSTREAM.double())
    for name, tensor in ours.items():
        assert torch.allclose(tensor.grad, expected[name].grad, rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize(
    "frozen", [("weight", "bias"), ("hidden",), ("weight",), ("hidden", "weight")]
)
def test_frozen_parts_get_no_gradient(frozen: tuple[str, ...]) -> None:
    expected, ours = inputs(torch.float64, *frozen), inputs(torch.float64, *frozen)
    plain(**expected, rule=LogitRule()).backward(UPSTREAM.double())
    logps = token_logps(**ours, targets=TARGETS, rule=LogitRule(), chunk=5)
    logps.backward(UPSTREAM.double())
    for name, tensor in ours.items():
        if name in frozen:
            assert tensor.grad is None
        else:
            assert torch.allclose(tensor.grad, expected[name].grad, rtol=1e-10, atol=1e-12), name


def test_backward_twice_computes_again_what_was_given_up() -> None:
    tensors = inputs(torch.float64)
    logps = token_logps(**tensors, targets=TARGETS, rule=LogitRule(), chunk=5)
    logps.backward(UPSTREAM.double(), retain_graph=True)
    first = {name: tensor.grad.clone() for name, tensor in tensors.items()}
    logps.backward(UPSTREAM.double())
    for name, tensor in tensors.items():
        assert torch.allclose(tensor.grad, 2 * first[name], rtol=1e-12), name


def test_softmax_is_float32_under_bfloat16() -> None:
    tensors = inputs(torch.bfloat16)
    logps = token_logps(**tensors, targets=TARGETS, rule=LogitRule(), chunk=5)
    assert logps.dtype == torch.float32
    assert torch.allclose(logps, plain(**tensors, rule=LogitRule()), atol=1e-6)
    logps.backward(UPSTREAM)
    assert all(tensor.grad.dtype == torch.bfloat16 for tensor in tensors.values())


def test_autocast_is_the_cast_by_hand() -> None:
    wide, narrow = inputs(torch.float32), inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logps = token_logps(**wide, targets=TARGETS, rule=LogitRule(), chunk=5)
    by_hand = {name: tensor.bfloat16() for name, tensor in narrow.items()}
    logps_by_hand = token_logps(**by_hand, targets=TARGETS, rule=LogitRule(), chunk=5)
    assert torch.equal(logps, logps_by_hand)
    logps.backward(UPSTREAM)
    logps_by_hand.backward(UPSTREAM)
    for name, tensor in wide.items():
        assert tensor.grad.dtype == torch.float32
        assert torch.equal(tensor.grad, narrow[name].grad), name


def test_bfloat16_gradients_of_many_chunks_are_added_in_float32() -> None:
    tensors = inputs(torch.bfloat16)
    single = inputs(torch.bfloat16)
    logps = token_logps(**tensors, targets=TARGETS, rule=LogitRule(), chunk=1)
    logps.backward(UPSTREAM)
    token_logps(**single, targets=TARGETS, rule=LogitRule(), chunk=ROWS).backward(UPSTREAM)
    for name in ("weight", "bias"):
        distance = (tensors[name].grad - single[name].grad).float().norm()
        assert distance < 2**-7 * single[name].grad.float().norm(), name


def test_nothing_to_score() -> None:
    tensors = inputs(torch.float32)
    hidden = tensors["hidden"][:0]
    none = token_logps(hidden, tensors["weight"], None, TARGETS[:0], LogitRule(), chunk=5)
    assert none.shape == (0,)
    none.sum().backward()
    assert tensors["weight"].grad is not None
    assert not tensors["weight"].grad.any()
