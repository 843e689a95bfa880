"""The losses, with numbers worked by hand and formulas written out plainly."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import mrpo
from mrpo import arwc_weights, ctro_clip, multi_dpo_loss, preference_loss, virtual_reference
from mrpo.errors import UserError
from mrpo.method.loss_functions import LOSS_TYPES, NEEDS_SMOOTHING
from mrpo.method.losses import sft_loss

ARRAYS = pytest.mark.parametrize("make", [np.array, torch.tensor])
Make = Callable[..., Any]


@ARRAYS
def test_the_whole_of_mrpo_for_three_references_worked_by_hand(make: Make) -> None:
    """Clipping, adaptive weights, harmonic mean and loss, each by pencil.

    Log-probs            base   second  third     mean
        chosen          −100      −100    −40      −80
        rejected        −120      −160    −80     −120

    eps = 1/2 is split 80 : 120, so eps_w = 1/5 and eps_l = 3/10. The chosen region is
    [−120, −80], the rejected one [−156, −84]: the third is held at −80 and −84, the second keeps
    its −100 and is held at −156.
    D before clipping = 20, 60, 40, so alpha = 1/6, 1/2, 1/3.
    Harmonic, chosen: the third's e^80 vanishes beside e^100:
        log pi~(y_w) = −log((1/6 + 1/2) e^100 + …) = −100 + log(3/2)    (but for e^−20)
    rejected: the second's e^156 outweighs the others by e^36:
        log pi~(y_l) = −log(e^156 / 2 + …) = −156 + log 2
    The virtual reference's margin is 56 + log(3/4). The policy's is made log 3 larger, from −90
    and −146 − log(3/4) − log 3, so h = log 3, sigmoid(h) = 3/4, and the loss is log(4/3).
    """
    chosen = make([[-100.0, -100.0, -40.0]], dtype=_double(make))
    rejected = make([[-120.0, -160.0, -80.0]], dtype=_double(make))
    alpha = arwc_weights(chosen, rejected)
    np.testing.assert_allclose(alpha, [[1 / 6, 1 / 2, 1 / 3]])
    clipped = ctro_clip(chosen, rejected, 0.5)
    np.testing.assert_allclose(clipped[0], [[-100, -100, -80]])
    np.testing.assert_allclose(clipped[1], [[-120, -156, -84]])
    virtual = [virtual_reference(logps, alpha) for logps in clipped]
    np.testing.assert_allclose(virtual[0], [-100 + np.log(3 / 2)], rtol=1e-10)
    np.testing.assert_allclose(virtual[1], [-156 + np.log(2)], rtol=1e-10)
    policy_chosen = make([-90.0], dtype=_double(make))
    policy_rejected = make([-146.0 - np.log(3 / 4) - np.log(3)], dtype=_double(make))
    loss = preference_loss(policy_chosen, policy_rejected, *virtual, beta=1.0)
    np.testing.assert_allclose(loss, [np.log(4 / 3)], rtol=1e-7)


def _double(make: Make) -> Any:
    return torch.float64 if make is torch.tensor else np.float64


@ARRAYS
def test_multi_dpo_worked_by_hand(make: Make) -> None:
    """Policy margin 0. References' margins −log 3 and log 3, weights 3/4 and 1/4, beta 1.

    Losses: −log sigmoid(log 3) = log(4/3) and −log sigmoid(−log 3) = log 4; the sum is
    3/4 log(4/3) + 1/4 log 4.
    """
    refs = make([[0.0, np.log(3)]]), make([[np.log(3), 0.0]])
    loss = multi_dpo_loss(make([0.0]), make([0.0]), *refs, make([0.75, 0.25]), beta=1.0)
    np.testing.assert_allclose(loss, [0.75 * np.log(4 / 3) + 0.25 * np.log(4)], rtol=1e-6)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


PLAIN: dict[tuple[str, float], Callable[[np.ndarray, float], np.ndarray]] = {
    ("sigmoid", 0.0): lambda h, beta: -np.log(sigmoid(beta * h)),
    ("sigmoid", 0.3): lambda h, beta: (
        -0.7 * np.log(sigmoid(beta * h)) - 0.3 * np.log(sigmoid(-beta * h))
    ),
    ("robust", 0.3): lambda h, beta: (
        (-0.7 * np.log(sigmoid(beta * h)) + 0.3 * np.log(sigmoid(-beta * h))) / 0.4
    ),
    ("robust", 0.0): lambda h, beta: -np.log(sigmoid(beta * h)),
    ("hinge", 0.0): lambda h, beta: np.where(beta * h < 1, 1 - beta * h, 0),
    ("ipo", 0.0): lambda h, beta: (h - 1 / (2 * beta)) ** 2,
}


def margin_loss(h: Any, beta: float, loss_type: str, label_smoothing: float = 0.0) -> Any:
    """The loss of pairs whose margin is h."""
    zero = 0 * h
    return preference_loss(h, zero, zero, zero, beta, loss_type, label_smoothing)


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_each_loss_is_its_plain_formula(case: tuple[str, float], beta: float) -> None:
    h = np.linspace(-12, 12, 49)
    expected = PLAIN[case](h, beta)
    np.testing.assert_allclose(margin_loss(h, beta, *case), expected, rtol=1e-12, atol=1e-12)
    tensor = margin_loss(torch.from_numpy(h), beta, *case)
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_an_untrained_policy_that_equals_its_reference_has_loss_log_two() -> None:
    logps = torch.tensor([-12.0, -7.0])
    loss = preference_loss(logps, logps * 2, logps, logps * 2, beta=0.1)
    np.testing.assert_allclose(loss.numpy(), np.log(2), rtol=1e-6)


def test_robust_is_unbiased_when_labels_flip_with_the_chance_it_assumes() -> None:
    """(1 − s) · loss(h) + s · loss(−h), the mean over flipped labels, is the clean loss of h."""
    h, s = np.linspace(-5, 5, 11), 0.2
    mean = (1 - s) * margin_loss(h, 0.5, "robust", s) + s * margin_loss(-h, 0.5, "robust", s)
    np.testing.assert_allclose(mean, margin_loss(h, 0.5, "sigmoid"), rtol=1e-12)


@ARRAYS
def test_the_sft_term_is_the_mean_over_the_tokens_of_one_response(make: Make) -> None:
    assert sft_loss(make([-6.0, -1.0]), make([3, 2])).tolist() == [2.0, 0.5]


def test_the_loss_has_the_dtype_of_the_policy_and_one_number_a_pair() -> None:
    refs = -torch.rand(5, 3, dtype=torch.float64)
    policy = torch.zeros(5, requires_grad=True)
    for loss_type in LOSS_TYPES:
        options = 0.1, loss_type, 0.1 * (loss_type in NEEDS_SMOOTHING)
        single = preference_loss(policy, policy, refs[:, 0], refs[:, 1], *options)
        several = multi_dpo_loss(policy, policy, refs, 2 * refs, [1, 1, 1], *options)
        assert single.dtype == several.dtype == torch.float32
        assert single.shape == several.shape == (5,)
        assert single.requires_grad
        assert several.requires_grad


BAD = [
    (
        lambda logps: preference_loss(logps, logps, logps, logps, 0.1, "dpo"),
        "loss type 'dpo' is unknown",
    ),
    (
        lambda logps: preference_loss(logps, logps, logps, logps, 0.1, "hinge", 0.1),
        "label smoothing 0.1 does not go with loss type hinge",
    ),
    (
        lambda logps: preference_loss(logps, logps, logps, logps, 0.1, "robust", 0.5),
        "label smoothing is 0.5; as a chance of a wrong label it must be 0 or more and below 0.5",
    ),
    (
        lambda logps: virtual_reference(logps[:, None], [1.0], "mean"),
        "reference kind 'mean' is unknown",
    ),
    (
        lambda logps: virtual_reference(logps[:, None], [0.5, 0.5]),
        "weights of shape (2,) do not go with log-probs of shape (1, 1)",
    ),
    (
        lambda logps: ctro_clip(logps[:, None], logps[:, None], -0.1),
        "epsilon is -0.1; it must be 0",
    ),
    (lambda logps: ctro_clip(logps[:, None], logps[:, None], float("nan")), "epsilon is nan"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_a_callers_mistake_is_named(call: Callable[[np.ndarray], Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        call(np.array([-1.0]))


def test_a_negative_weight_and_a_pair_without_references_are_nan_not_zero() -> None:
    refs = np.array([[-1.0, -2.0], [np.nan, np.nan], [-1.0, np.nan]])
    weights = np.array([[1.5, -0.5], [0.5, 0.5], [0.0, 1.0]])
    for kind in ("harmonic", "geometric", "arithmetic"):
        assert np.isnan(virtual_reference(refs, weights, kind)).all()


def test_the_public_names_are_importable_from_the_top() -> None:
    for name in mrpo.__all__:
        assert callable(getattr(mrpo, name))
        assert name in dir(mrpo)
    with pytest.raises(AttributeError, match="no attribute 'dpo'"):
        mrpo.dpo  # noqa: B018
