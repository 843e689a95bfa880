"""What holds exactly of MRPO and its relatives, for any log-probs and 1 to 8 references."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mrpo import arwc_weights, ctro_clip, multi_dpo_loss, preference_loss, virtual_reference
from mrpo.method.virtual_reference import KINDS, adaptive_epsilon

PROPERTY = settings(deadline=None, max_examples=100, derandomize=True)
BETA = 0.3
LOGP = st.floats(-10_000, 0, allow_subnormal=False)


class Case(NamedTuple):
    """N pairs under K references, with a policy and weights that sum to 1."""

    policy_chosen: np.ndarray  # [N]
    policy_rejected: np.ndarray
    chosen: np.ndarray  # [N, K]
    rejected: np.ndarray
    weights: np.ndarray  # [N, K]

    @property
    def k(self) -> int:
        return self.chosen.shape[1]


@st.composite
def cases(draw: Any, min_k: int = 1, max_k: int = 8) -> Case:
    n, k = draw(st.integers(1, 3)), draw(st.integers(min_k, max_k))
    raw = draw(arrays(np.float64, (n, k), elements=st.sampled_from([0.0, 1e-30, 0.2, 0.5, 3.0])))
    assume((raw.sum(axis=1) > 0).all())
    logps = [draw(arrays(np.float64, (n, k), elements=LOGP)) for _ in range(2)]
    policy = [draw(arrays(np.float64, n, elements=LOGP)) for _ in range(2)]
    return Case(*policy, *logps, raw / raw.sum(axis=1, keepdims=True))


def dpo(case: Case, chosen: np.ndarray, rejected: np.ndarray, beta: float = BETA) -> np.ndarray:
    """DPO's loss as the paper writes it, apart from our code: log(1 + exp(−beta h))."""
    h = case.policy_chosen - chosen - case.policy_rejected + rejected
    return np.logaddexp(0, -beta * h)


def mrpo(case: Case, epsilon: float | None = 0.1, weights: np.ndarray | None = None) -> np.ndarray:
    """The loss of the method `mrpo`, put together from the public functions."""
    alpha = arwc_weights(case.chosen, case.rejected) if weights is None else weights
    chosen, rejected = case.chosen, case.rejected
    if epsilon is not None:
        chosen, rejected = ctro_clip(chosen, rejected, epsilon)
    virtual = [virtual_reference(logps, alpha) for logps in (chosen, rejected)]
    return preference_loss(case.policy_chosen, case.policy_rejected, *virtual, beta=BETA)


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


@PROPERTY
@given(cases(max_k=1))
def test_one_reference_is_dpo_clipped_or_not_and_of_any_kind(case: Case) -> None:
    expected = dpo(case, case.chosen[:, 0], case.rejected[:, 0])
    close(mrpo(case), expected)
    close(mrpo(case, epsilon=None), expected)
    for kind in KINDS:
        virtual = [virtual_reference(r, case.weights, kind) for r in (case.chosen, case.rejected)]
        close(preference_loss(*case[:2], *virtual, beta=BETA), expected)
    close(multi_dpo_loss(*case, beta=BETA), expected)


@PROPERTY
@given(cases())
def test_an_epsilon_of_zero_is_dpo_with_the_base(case: Case) -> None:
    expected = dpo(case, case.chosen[:, 0], case.rejected[:, 0])
    close(mrpo(case, epsilon=0.0), expected)
    close(mrpo(case, epsilon=0.0, weights=case.weights), expected)


@PROPERTY
@given(cases(), st.integers(0, 7))
def test_all_weight_on_one_reference_is_dpo_with_it(case: Case, which: int) -> None:
    which %= case.k
    one_hot = np.eye(case.k)[which]
    expected = dpo(case, case.chosen[:, which], case.rejected[:, which])
    for kind in KINDS:
        virtual = [virtual_reference(r, one_hot, kind) for r in (case.chosen, case.rejected)]
        close(preference_loss(*case[:2], *virtual, beta=BETA), expected)
    close(multi_dpo_loss(*case[:4], one_hot, beta=BETA), expected)


@PROPERTY
@given(cases())
def test_equal_references_are_one_whatever_the_weights(case: Case) -> None:
    same = [np.repeat(r[:, :1], case.k, axis=1) for r in (case.chosen, case.rejected)]
    case = case._replace(chosen=same[0], rejected=same[1])
    expected = dpo(case, same[0][:, 0], same[1][:, 0])
    close(mrpo(case), expected)
    close(mrpo(case, weights=case.weights), expected)
    close(multi_dpo_loss(*case, beta=BETA), expected)


@PROPERTY
@given(cases(min_k=2), st.randoms(use_true_random=False))
def test_the_order_of_all_references_but_the_base_means_nothing(case: Case, random: Any) -> None:
    order = list(range(1, case.k))
    random.shuffle(order)
    order = [0, *order]
    other = Case(*case[:2], case.chosen[:, order], case.rejected[:, order], case.weights[:, order])
    close(mrpo(case), mrpo(other))
    close(mrpo(case, weights=case.weights), mrpo(other, weights=other.weights))


@PROPERTY
@given(cases())
def test_harmonic_is_below_geometric_is_below_arithmetic(case: Case) -> None:
    harmonic, geometric, arithmetic = (
        virtual_reference(case.chosen, case.weights, kind)
        for kind in ("harmonic", "geometric", "arithmetic")
    )
    slack = 1e-12 * (1 + np.abs(case.chosen).max())
    assert (harmonic <= geometric + slack).all()
    assert (geometric <= arithmetic + slack).all()


@PROPERTY
@given(cases())
def test_harmonic_is_a_minimum_but_for_the_logarithm_of_k(case: Case) -> None:
    with np.errstate(divide="ignore"):
        smallest = (case.chosen - np.log(case.weights)).min(axis=1)
    harmonic = virtual_reference(case.chosen, case.weights)
    slack = 1e-12 * (1 + np.abs(case.chosen).max())
    assert (harmonic <= smallest + slack).all()
    assert (harmonic >= smallest - np.log(case.k) - slack).all()


@PROPERTY
@given(cases(min_k=2), st.floats(0, 2))
def test_clipping_keeps_every_reference_within_epsilon_of_the_base(
    case: Case, epsilon: float
) -> None:
    fixed = ctro_clip(case.chosen, case.rejected, epsilon, adaptive=False)
    adaptive = ctro_clip(case.chosen, case.rejected, epsilon)
    for raw, equal, split in zip((case.chosen, case.rejected), fixed, adaptive):
        base = raw[:, :1]
        np.testing.assert_array_equal(equal[:, :1], base)
        np.testing.assert_array_equal(split[:, :1], base)
        slack = 1e-12 * np.abs(base)
        assert (np.abs(equal - base) <= epsilon * np.abs(base) + slack).all()
        assert (np.abs(split - base) <= epsilon * np.abs(base) + slack).all()
        inside = np.abs(raw - base) <= epsilon * np.abs(base) - slack
        np.testing.assert_array_equal(equal[inside], raw[inside])


@PROPERTY
@given(cases(), st.floats(0, 2))
def test_the_two_epsilons_share_one_in_proportion_to_the_mean_log_probs(
    case: Case, epsilon: float
) -> None:
    eps_w, eps_l = adaptive_epsilon(case.chosen, case.rejected, epsilon)
    b_w, b_l = (np.abs(r.mean(axis=1)) for r in (case.chosen, case.rejected))
    close(eps_w + eps_l, np.full_like(eps_w, epsilon))
    close(eps_w * b_l, eps_l * b_w)
    silent = np.zeros_like(case.chosen)
    for part in adaptive_epsilon(silent, silent, epsilon):
        np.testing.assert_array_equal(part, np.full(len(eps_w), epsilon / 2))


@PROPERTY
@given(cases(min_k=2), st.integers(1, 7))
def test_a_missing_reference_is_as_if_it_had_never_been_there(case: Case, which: int) -> None:
    which = 1 + which % (case.k - 1)
    others = [k for k in range(case.k) if k != which]
    assume((case.weights[:, others].sum(axis=1) > 1e-20).all())
    gone = Case(*case[:2], case.chosen.copy(), case.rejected.copy(), case.weights)
    gone.chosen[:, which] = gone.rejected[:, which] = np.nan
    left = Case(*case[:2], *(array[:, others] for array in case[2:]))
    close(mrpo(gone), mrpo(left))
    close(mrpo(gone, weights=gone.weights), mrpo(left, weights=left.weights))
    close(multi_dpo_loss(*gone, beta=BETA), multi_dpo_loss(*left, beta=BETA))


@PROPERTY
@given(cases())
def test_a_pair_does_not_depend_on_the_others_of_its_batch(case: Case) -> None:
    together = mrpo(case)
    for i in range(len(together)):
        alone = mrpo(Case(*(array[i : i + 1] for array in case)))
        np.testing.assert_array_equal(together[i : i + 1], alone)


@PROPERTY
@given(cases())
def test_torch_gives_what_numpy_gives(case: Case) -> None:
    tensors = [torch.from_numpy(array) for array in case]
    torch_case = Case(*tensors)  # type: ignore[arg-type]
    result = mrpo(torch_case)
    assert isinstance(result, torch.Tensor)
    close(result.numpy(), mrpo(case))
    close(multi_dpo_loss(*tensors, beta=BETA).numpy(), multi_dpo_loss(*case, beta=BETA))
    for kind in KINDS:
        close(
            virtual_reference(tensors[2], tensors[4], kind).numpy(),
            virtual_reference(case.chosen, case.weights, kind),
        )


@pytest.mark.parametrize("k", range(1, 9))
def test_multi_dpo_is_the_weighted_sum_of_the_dpo_losses(k: int) -> None:
    rng = np.random.default_rng(k)
    policy = -rng.uniform(1, 50, (2, 4))
    refs = -rng.uniform(1, 50, (2, 4, k))
    weights = rng.dirichlet(np.ones(k))
    expected = sum(
        weights[j]
        * np.log1p(np.exp(-BETA * (policy[0] - refs[0, :, j] - policy[1] + refs[1, :, j])))
        for j in range(k)
    )
    close(multi_dpo_loss(*policy, *refs, weights, beta=BETA), expected)
