"""Weights from labels: right where the truth is known, sure of as much as it says, never stuck."""

from __future__ import annotations

import numpy as np
import pytest

from mrpo.errors import UserError
from mrpo.method.fitted import FOLDS, RIDGE, fit_weights, logistic_regression

SIMULATIONS = 100


def simulate(
    seed: int, coefficients: list[float], pairs: int = 1500, per_prompt: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Margins [N, K] of references that agree somewhat, with labels drawn from the true model.

    P(first preferred) = sigmoid(Σ_k w_k D_k); a pair whose second response is preferred is turned
    round, as a data set of chosen and rejected responses has it. Prompts share part of D.
    """
    rng = np.random.default_rng(seed)
    k, prompts = len(coefficients), np.arange(pairs) // per_prompt
    margins = rng.normal(0, 8, (pairs, k)) + rng.normal(0, 5, (pairs, 1))
    margins += rng.normal(0, 4, (pairs // per_prompt + 1, k))[prompts]
    first = rng.random(pairs) < 1 / (1 + np.exp(-margins @ coefficients))
    return np.where(first[:, None], margins, -margins), prompts


def test_in_90_of_100_simulations_the_intervals_cover_the_truth_and_noise_is_listed_to_drop() -> (
    None
):
    """Two useful references, 2 : 1, and one that the label does not depend on."""
    truth = np.array([2 / 3, 1 / 3, 0.0])
    covered = dropped = useful_kept = 0
    for seed in range(SIMULATIONS):
        margins, prompts = simulate(seed, [0.10, 0.05, 0.0])
        fit = fit_weights(margins, prompts, bootstrap=200, seed=seed)
        assert fit.intervals is not None
        low, high = fit.intervals.T
        covered += bool(((low <= truth) & (truth <= high)).all())
        dropped += 2 in fit.drop
        useful_kept += 0 not in fit.drop
    assert covered >= 90
    assert dropped >= 90
    assert useful_kept >= 90


def test_the_bootstrap_goes_by_prompt() -> None:
    """Ten copies of every pair under its prompt are no more evidence than one."""
    margins, prompts = simulate(0, [0.1, 0.05], pairs=400)
    once = fit_weights(margins, prompts, bootstrap=100)
    copies = fit_weights(np.repeat(margins, 10, 0), np.repeat(prompts, 10), bootstrap=100)
    assert once.intervals is not None
    np.testing.assert_allclose(copies.weights, once.weights, atol=1e-6)
    np.testing.assert_allclose(copies.intervals, once.intervals, atol=1e-6)


def test_the_fit_is_the_minimum_of_the_penalized_loss_over_weights_of_0_or_more() -> None:
    """The conditions of Karush, Kuhn and Tucker, with the gradient written out again."""
    margins, prompts = simulate(3, [0.08, 0.0, 0.03, -0.05, 0.0])
    fit = fit_weights(margins, prompts)
    scale = np.sqrt(np.mean(margins**2))
    w, d = fit.coefficients * scale, margins / scale
    gradient = -(d / (1 + np.exp(d @ w))[:, None]).mean(axis=0) + RIDGE * w
    assert (w >= 0).all()
    assert (w == 0).any()
    np.testing.assert_allclose(gradient[w > 0], 0, atol=1e-8)
    assert (gradient[w == 0] >= 0).all()
    np.testing.assert_allclose(fit.weights, w / w.sum())


def test_a_sample_of_weight_two_is_a_sample_given_twice_and_coefficients_may_be_negative() -> None:
    margins, _ = simulate(3, [0.08, -0.05], pairs=300)
    features, counts = margins / 10, np.arange(300) % 3
    w = logistic_regression(features, counts, ridge=0.01, non_negative=False)
    assert w[0] > 0 > w[1]
    repeated = np.repeat(features, counts, axis=0)
    again = logistic_regression(repeated, np.ones(len(repeated)), ridge=0.01, non_negative=False)
    np.testing.assert_allclose(w, again, atol=1e-8)
    gradient = -(repeated / (1 + np.exp(repeated @ w))[:, None]).mean(axis=0) + 0.01 * w
    np.testing.assert_allclose(gradient, 0, atol=1e-8)
    bounded = logistic_regression(features, counts, ridge=0.01, non_negative=True)
    assert bounded[1] == 0
    assert logistic_regression(features, 0 * counts, ridge=0.01, non_negative=True).tolist() == [
        0,
        0,
    ]


def test_no_pair_of_training_has_seen_its_own_label() -> None:
    """Turning the labels of one fold's prompts round changes every fold's weights but its own."""
    margins, prompts = simulate(1, [0.1, 0.05, 0.02], pairs=600, per_prompt=2)
    before = fit_weights(margins, prompts)
    turned = prompts % FOLDS == 2
    after = fit_weights(np.where(turned[:, None], -margins, margins), prompts)
    same = (before.fold_weights == after.fold_weights).all(axis=1)
    assert same.tolist() == [False, False, True, False, False]
    own = before.for_prompts(prompts)
    assert own.shape == margins.shape
    for row in range(0, 600, 37):
        np.testing.assert_array_equal(own[row], before.fold_weights[prompts[row] % FOLDS])


def test_it_is_deterministic_and_does_not_depend_on_the_unit_of_the_log_probs() -> None:
    margins, prompts = simulate(2, [0.1, 0.05, 0.0])
    first, second = (fit_weights(margins, prompts, bootstrap=20) for _ in range(2))
    for a, b in ((first.weights, second.weights), (first.intervals, second.intervals)):
        np.testing.assert_array_equal(a, b)
    per_byte = fit_weights(margins / 300, prompts)
    np.testing.assert_allclose(per_byte.weights, first.weights, atol=1e-7)
    np.testing.assert_allclose(per_byte.coefficients, first.coefficients * 300, rtol=1e-5)


def test_pairs_that_a_reference_is_missing_from_are_left_out() -> None:
    margins, prompts = simulate(4, [0.1, 0.05])
    holed = margins.copy()
    holed[::3, 1] = np.nan
    kept = ~np.isnan(holed).any(axis=1)
    fit = fit_weights(holed, prompts)
    assert fit.pairs == kept.sum()
    np.testing.assert_array_equal(fit.weights, fit_weights(margins[kept], prompts[kept]).weights)
    with pytest.raises(UserError, match="found no pair that every reference has scored"):
        fit_weights(np.full((3, 2), np.nan), np.arange(3))


@pytest.mark.filterwarnings("error")
def test_separable_data_end_with_finite_weights() -> None:
    """Both references are right on every pair: the ridge alone keeps the coefficients finite."""
    rng = np.random.default_rng(0)
    margins = rng.uniform(1, 50, (300, 2))
    fit = fit_weights(margins, np.arange(300), bootstrap=20)
    assert np.isfinite(fit.coefficients).all()
    assert (fit.weights > 0.3).all()
    assert fit.weights.sum() == pytest.approx(1)
    alone = fit_weights(margins[:, :1], np.arange(300))
    assert alone.weights.tolist() == [1.0]


@pytest.mark.filterwarnings("error")
def test_where_every_reference_prefers_the_rejected_response_the_base_is_used_alone() -> None:
    margins, prompts = simulate(5, [-0.1, -0.05, -0.1])
    fit = fit_weights(margins, prompts, bootstrap=20)
    assert fit.coefficients.tolist() == [0, 0, 0]
    assert fit.weights.tolist() == [1, 0, 0]
    assert fit.fold_weights.tolist() == [[1, 0, 0]] * FOLDS
    assert fit.drop == (0, 1, 2)
    lines = "\n".join(fit.describe(["llama", "mistral", "qwen"]))
    assert "WARNING: no reference predicts the labels; llama, the base, is used ALONE" in lines


def test_references_of_pure_noise_are_all_listed_to_drop() -> None:
    margins, prompts = simulate(6, [0.0, 0.0, 0.0])
    fit = fit_weights(margins, prompts, bootstrap=200)
    assert fit.drop == (0, 1, 2)
    assert fit.weights.sum() == pytest.approx(1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("margins", [[[0.0, 0.0]], [[1.0, -1.0]], [[1e-300, 0.0]], [[9e3, -9e3]]])
def test_one_pair_and_no_signal_end_well(margins: list[list[float]]) -> None:
    fit = fit_weights(np.array(margins), np.array([7]), bootstrap=3)
    assert fit.weights.sum() == pytest.approx(1)
    assert np.isfinite(fit.fold_weights).all()


def test_any_integers_serve_as_prompts() -> None:
    margins, prompts = simulate(7, [0.1, 0.05], pairs=200)
    for keys in (prompts - 100, prompts.astype(np.uint64) + np.uint64(2**64 - 300)):
        fit = fit_weights(margins, keys, bootstrap=2)
        assert fit.for_prompts(keys).shape == margins.shape


def test_the_report_has_a_line_for_each_reference_with_its_interval() -> None:
    margins, prompts = simulate(0, [0.1, 0.05, 0.0])
    lines = fit_weights(margins, prompts, bootstrap=50).describe(["a", "b", "c"])
    assert lines[0] == "fitted weights from 1,500 pairs:"
    assert [line.split()[0] for line in lines[1:4]] == ["a", "b", "c"]
    assert "to" in lines[1]
    assert lines[4] == "references that may add nothing (interval contains 0): c"
