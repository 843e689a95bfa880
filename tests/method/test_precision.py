"""Exactness and stability: against 60 digits, against finite differences, at the extremes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mrpo import (
    arwc_weights,
    ctro_clip,
    max_margin_weights,
    multi_dpo_loss,
    preference_loss,
    virtual_reference,
)
from mrpo.method.loss_functions import LOSS_TYPES, NEEDS_SMOOTHING
from mrpo.method.virtual_reference import KINDS
from mrpo.method.weightings import uniform_weights, vaw_weights, vdw_weights

mpmath.mp.dps = 60
UNSMOOTHED = [name for name in LOSS_TYPES if name not in NEEDS_SMOOTHING]
FLOAT32_LOGP = st.floats(-10_000, -(2.0**-10), width=32)


def exact_clip(
    chosen: Sequence[Any], rejected: Sequence[Any], epsilon: Any
) -> tuple[list[Any], list[Any]]:
    """CTRO as the paper writes it, on mpmath numbers of one pair."""
    b_w, b_l = (abs(mpmath.fsum(r) / len(r)) for r in (chosen, rejected))
    eps_w = epsilon * b_w / (b_w + b_l)
    clipped = []
    for logps, eps in ((chosen, eps_w), (rejected, epsilon - eps_w)):
        low, high = (1 + eps) * logps[0], (1 - eps) * logps[0]
        clipped.append([max(low, min(high, r)) for r in logps])
    return clipped[0], clipped[1]


def exact_arwc(chosen: Sequence[Any], rejected: Sequence[Any]) -> list[Any]:
    gaps = [abs(y_w - y_l) for y_w, y_l in zip(chosen, rejected)]
    total = mpmath.fsum(gaps)
    return [gap / total if total else mpmath.mpf(1) / len(gaps) for gap in gaps]


def exact_harmonic(logps: Sequence[Any], weights: Sequence[Any]) -> Any:
    return -mpmath.log(mpmath.fsum(w * mpmath.exp(-r) for w, r in zip(weights, logps)))


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.integers(1, 8).flatmap(lambda k: arrays(np.float32, (2, k), elements=FLOAT32_LOGP)))
def test_float32_scores_give_harmonic_and_clipping_to_a_millionth(logps: np.ndarray) -> None:
    chosen, rejected = ([mpmath.mpf(float(r)) for r in row] for row in logps)
    weights = exact_arwc(chosen, rejected)
    clipped = exact_clip(chosen, rejected, mpmath.mpf(0.1))
    for make in (np.asarray, torch.from_numpy):
        refs = [make(row[None]) for row in logps]
        ours = ctro_clip(*refs, 0.1)
        alpha = arwc_weights(*refs)
        for raw, mine, exact in zip((chosen, rejected), ours, clipped):
            for number, expected in zip(np.asarray(mine)[0], exact):
                assert abs(number - expected) <= 1e-6 * abs(expected)
            clipped_virtual = np.asarray(virtual_reference(mine, alpha))[0]
            expected = exact_harmonic(exact, weights)
            assert abs(clipped_virtual - expected) <= 1e-6 * abs(expected)
            row = make(np.array([raw], dtype=np.float32))
            raw_virtual = np.asarray(virtual_reference(row, alpha))[0]
            expected = exact_harmonic(raw, weights)
            assert abs(raw_virtual - expected) <= 1e-6 * abs(expected)


def test_the_whole_float32_path_keeps_the_loss_to_a_millionth() -> None:
    rng = np.random.default_rng(0)
    for k in range(1, 9):
        refs = -rng.uniform(1, 300, (2, 50, k)).astype(np.float32)
        policy = -rng.uniform(1, 300, (2, 50)).astype(np.float32)
        alpha = arwc_weights(*refs)
        virtual = [virtual_reference(r, alpha) for r in ctro_clip(*refs, 0.1)]
        loss = preference_loss(*policy, *virtual, beta=0.1)
        assert loss.dtype == np.float32
        for i in range(50):
            raw = [[mpmath.mpf(float(x)) for x in refs[side, i]] for side in (0, 1)]
            weights = exact_arwc(*raw)
            m_w, m_l = (exact_harmonic(r, weights) for r in exact_clip(*raw, mpmath.mpf(0.1)))
            p_w, p_l = (mpmath.mpf(float(policy[side, i])) for side in (0, 1))
            h = mpmath.mpf(0.1) * (p_w - m_w - p_l + m_l)
            expected = mpmath.log(1 + mpmath.exp(-h))
            # Rounding the margin to float32 moves it by up to 2e-5; the loss is relative to that.
            assert abs(loss[i] - expected) <= 1e-6 * abs(expected) * (1 + abs(h)) + 1e-12


LIMITS: list[tuple[list[float], list[float], dict[str, float]]] = [
    ([-10_000.0, -10_000.0], [0.5, 0.5], dict.fromkeys(KINDS, -10_000.0)),
    ([-10_000.0, -1.0], [0.0, 1.0], dict.fromkeys(KINDS, -1.0)),
    ([-10_000.0, -1.0], [1.0, 0.0], dict.fromkeys(KINDS, -10_000.0)),
    (
        [-10_000.0, 0.0],
        [0.5, 0.5],
        {"harmonic": -10_000 + np.log(2), "geometric": -5_000.0, "arithmetic": -np.log(2)},
    ),
    ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], dict.fromkeys(KINDS, 0.0)),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("logps", "weights", "expected"), LIMITS)
def test_extreme_log_probs_and_weights_of_exactly_zero_and_one(
    logps: list[float], weights: list[float], expected: dict[str, float], dtype: type
) -> None:
    for kind, value in expected.items():
        array = np.array([logps], dtype=dtype)
        got = virtual_reference(array, np.array(weights, dtype=dtype), kind)
        np.testing.assert_allclose(got, [value], rtol=1e-12, atol=1e-12)
        tensor = torch.from_numpy(array).requires_grad_()
        virtual_reference(tensor, torch.tensor(weights), kind).sum().backward()
        assert torch.isfinite(tensor.grad).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_and_gradients_are_finite_at_ten_thousand_nats(loss_type: str) -> None:
    for chosen, rejected in ((-10_000.0, 0.0), (0.0, -10_000.0), (-10_000.0, -10_000.0)):
        policy = torch.tensor([chosen], requires_grad=True)
        other = torch.tensor([rejected], requires_grad=True)
        refs = torch.tensor([[-1.0, -10_000.0]])
        virtual = virtual_reference(refs, [0.5, 0.5])
        options = 0.5, loss_type, 0.1 * (loss_type in NEEDS_SMOOTHING)
        single = preference_loss(policy, other, virtual, virtual, *options)
        several = multi_dpo_loss(policy, other, refs, refs.flip(1), [0.5, 0.5], *options)
        (single + several).sum().backward()
        for tensor in (single, several, policy.grad, other.grad):
            assert torch.isfinite(tensor).all()


SMOOTHINGS = [(name, 0.0) for name in UNSMOOTHED]
SMOOTHINGS += [(name, 0.2) for name in ("sigmoid", "robust", "exo_pair")]


@pytest.mark.parametrize(("loss_type", "smoothing"), SMOOTHINGS)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_gradients_through_the_policy_equal_finite_differences(
    loss_type: str, smoothing: float, k: int
) -> None:
    generator = torch.Generator().manual_seed(k)

    def logps(*shape: int) -> torch.Tensor:
        return -5 * torch.rand(*shape, generator=generator, dtype=torch.float64)

    refs = [logps(4, k), logps(4, k)]
    alpha = arwc_weights(*refs)
    virtual = [virtual_reference(r, alpha) for r in ctro_clip(*refs, 0.1)]
    policy = [logps(4).requires_grad_(), logps(4).requires_grad_()]

    def single(*policy: torch.Tensor) -> torch.Tensor:
        return preference_loss(*policy, *virtual, 0.7, loss_type, smoothing)

    def several(*policy: torch.Tensor) -> torch.Tensor:
        return multi_dpo_loss(*policy, *refs, alpha, 0.7, loss_type, smoothing)

    assert torch.autograd.gradcheck(single, policy, eps=1e-6, atol=1e-7, rtol=1e-6)
    assert torch.autograd.gradcheck(several, policy, eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradients_through_the_references_equal_finite_differences(kind: str) -> None:
    """Nothing in training needs them, but whoever learns references or weights will."""
    generator = torch.Generator().manual_seed(0)
    refs = (-5 * torch.rand(4, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    weights = torch.rand(4, 3, generator=generator, dtype=torch.float64).requires_grad_()

    def virtual(r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return virtual_reference(r, w, kind)

    assert torch.autograd.gradcheck(virtual, (refs, weights), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_integers_half_precision_and_lists_of_weights_are_taken(make: Callable[..., Any]) -> None:
    refs = make([[-10, -8]])
    expected = virtual_reference(np.array([[-10.0, -8.0]]), np.array([0.25, 0.75]))
    for weights in ([0.25, 0.75], (0.25, 0.75), np.array([0.25, 0.75])):
        np.testing.assert_allclose(virtual_reference(refs, weights), expected, rtol=1e-15)
    assert float(arwc_weights(refs, make([[-20, -13]]))[0, 0]) == pytest.approx(2 / 3)
    assert max_margin_weights(refs, make([[-20, -13]])).tolist() == [[1.0, 0.0]]
    half = torch.tensor([[-10.0, -8.0]], dtype=torch.bfloat16)  # both are exact in bfloat16
    np.testing.assert_allclose(virtual_reference(half, [0.25, 0.75]).numpy(), expected, rtol=1e-15)


def test_a_float64_reference_meets_a_float32_policy_as_a_difference() -> None:
    """At −10,000 nats float32 steps by 0.001, and the references' margin must not."""
    virtual = torch.tensor([-10_000.0], dtype=torch.float64)
    loss = preference_loss(
        torch.zeros(1), torch.zeros(1), virtual + 1e-5, virtual, beta=1.0, loss_type="hinge"
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1 + 1e-5, abs=2e-7)


def _on(device: str) -> list[torch.Tensor]:
    """The results of all public functions for tensors of one device, weights a list."""
    refs = -torch.rand(2, 4, 3, device=device)
    policy = -torch.rand(2, 4, device=device)
    clipped = ctro_clip(*refs, 0.1)
    results = [arwc_weights(*refs), max_margin_weights(*refs), *clipped]
    results += [weigh(*refs) for weigh in (uniform_weights, vdw_weights, vaw_weights)]
    for kind in KINDS:
        virtual = [virtual_reference(r, [0.2, 0.3, 0.5], kind) for r in clipped]
        results += [preference_loss(*policy, *virtual, 0.1, name) for name in UNSMOOTHED]
    return [*results, multi_dpo_loss(*policy, *refs, [0.2, 0.3, 0.5], 0.1)]


DEVICES = ["meta", "cuda"] if torch.cuda.is_available() else ["meta"]


@pytest.mark.parametrize("device", DEVICES)
def test_results_stay_on_the_device_of_what_was_given(device: str) -> None:
    """The meta device holds no numbers, but refuses to be mixed with any other."""
    for result in _on(device):
        assert result.device.type == device
        assert device == "meta" or torch.isfinite(result).all()
