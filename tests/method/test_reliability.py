"""Labels judged by the references: right where the truth is known, blind to the label judged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from mrpo import multi_dpo_loss, preference_loss
from mrpo.errors import UserError
from mrpo.method.fitted import FOLDS, NOISES, RIDGE, NoisyFit, fit_noise, fit_reliability
from mrpo.method.grammar import parse_method
from mrpo.method.loss_functions import RESPONSE_LOSSES
from mrpo.method.objective import Method

from .test_methods import ALIASES, loss_of, make_scores, policy

SIMULATIONS = 30


def simulate(
    seed: int, coefficients: list[float], noise: float, pairs: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """Margins [N, K] as labels write them, and [N] which labels were turned round.

    The true preference is drawn from sigmoid(w·D), and then a share of the labels is turned.
    """
    rng = np.random.default_rng(seed)
    margins = rng.normal(0, 4, (pairs, len(coefficients))) + rng.normal(0, 3, (pairs, 1))
    first = rng.random(pairs) < 1 / (1 + np.exp(-margins @ coefficients))
    turned = rng.random(pairs) < noise
    return np.where((first != turned)[:, None], margins, -margins), turned


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_noise_rate_and_coefficients_are_recovered_over_many_seeds(noise: float) -> None:
    truth = [0.8, 0.4, 0.0]
    fits = []
    for seed in range(SIMULATIONS):
        margins, _ = simulate(seed, truth, noise)
        fits.append(fit_noise(margins, np.ones(len(margins), bool)))
    rates = np.array([fit.noise for fit in fits])
    covered = [
        low <= noise + 1e-9 and noise <= high + 1e-9 for low, high in map(NoisyFit.interval, fits)
    ]
    assert np.mean(covered) >= 0.9
    assert abs(rates.mean() - noise) < 0.025
    assert rates.std() < 0.05
    at_truth = np.abs(NOISES - noise).argmin()
    mean = np.mean([fit.coefficients[at_truth] for fit in fits], axis=0)
    np.testing.assert_allclose(mean, truth, atol=0.1)


def test_turned_labels_are_told_from_right_ones() -> None:
    """The area under the ROC curve is that of the truth, nearly."""
    for seed in range(5):
        margins, turned = simulate(seed, [0.8, 0.4, 0.0], 0.3)
        chances = fit_reliability(margins, np.arange(1000)).chance_wrong(margins, np.arange(1000))
        best = 1 / (1 + np.exp(margins @ [0.8, 0.4, 0.0] - np.log(0.3 / 0.7)))
        assert auc(chances, turned) > auc(best, turned) - 0.015
        assert chances.mean() == pytest.approx(0.3, abs=0.09)


def auc(score: np.ndarray, positive: np.ndarray) -> float:
    return float((score[positive][:, None] > score[~positive]).mean())


def test_no_label_moves_the_fit_that_judges_it() -> None:
    margins, _ = simulate(0, [0.8, 0.4, 0.0], 0.3)
    prompts = np.arange(1000) // 2
    before = fit_reliability(margins, prompts)
    for f in range(FOLDS):
        turned = np.where((prompts % FOLDS == f)[:, None], -margins, margins)
        after = fit_reliability(turned, prompts)
        np.testing.assert_array_equal(after.folds[f].coefficients, before.folds[f].coefficients)
        np.testing.assert_array_equal(after.folds[f].probabilities, before.folds[f].probabilities)
        assert not np.array_equal(after.full.probabilities, before.full.probabilities)


def test_every_fit_is_a_minimum_with_its_likelihood() -> None:
    """The conditions of Karush, Kuhn and Tucker by finite differences of the formula itself."""
    margins, _ = simulate(1, [0.8, 0.4, 0.0], 0.2, pairs=400)
    fit = fit_noise(margins, np.ones(400, bool))
    scale = np.sqrt(np.mean(margins**2))

    def value(w: np.ndarray, noise: float) -> float:
        p = noise + (1 - 2 * noise) / (1 + np.exp(-(margins / scale) @ w))
        return float(-np.log(p).mean() + RIDGE / 2 * w @ w)

    values = []
    for noise, coefficients in zip(NOISES, fit.coefficients):
        w = coefficients * scale
        values.append(value(w, noise))
        for step in 1e-5 * np.eye(3):
            slope = (value(w + step, noise) - value(w - step, noise)) / 2e-5
            assert slope > -1e-6
            assert slope < 1e-6 or w @ step == 0
    expected = np.exp(-400 * (np.array(values) - min(values)))
    np.testing.assert_allclose(fit.probabilities, expected / expected.sum(), rtol=1e-6)


def test_chances_are_exact_at_the_extremes() -> None:
    """Against 60 digits: eps sigmoid(−z) / (eps + (1 − 2 eps) sigmoid(z)), averaged."""
    mpmath.mp.dps = 60
    probabilities = np.arange(1.0, 16) / 120
    fit = NoisyFit(probabilities, np.ones((15, 1)))
    for z in (-800.0, -40.0, -1.0, 0.0, 1e-9, 3.0, 40.0, 700.0):

        def chance(noise: float, z: float = z) -> Any:
            right, wrong = (1 / (1 + mpmath.exp(mpmath.mpf(v))) for v in (-z, z))
            eps = mpmath.mpf(noise)
            return eps * wrong / (eps + (1 - 2 * eps) * right)

        expected = mpmath.fsum(
            p * chance(eps) for p, eps in zip(probabilities[1:].tolist(), NOISES[1:].tolist())
        )
        chances = fit.chance_wrong(np.array([[z]]))
        np.testing.assert_allclose(chances, [float(expected)], rtol=1e-12)


def test_clean_labels_leave_the_loss_as_it_is() -> None:
    """Sure references that agree with every label: no noise, and the loss is the plain one."""
    rng = np.random.default_rng(0)
    scores = make_scores(400)
    size = abs(rng.logistic(0, 8, (400, 3)))
    scores = replace(scores, ref_chosen_logps=scores.ref_rejected_logps + size)
    method = prepared("geometric+arwc+reliable", scores)
    assert method.targets(scores).label_smoothing.max() < 1e-4
    plain = loss_of(parse_method("geometric+arwc", ALIASES), scores)
    np.testing.assert_allclose(loss_of(method, scores), plain, atol=1e-4)


def test_references_that_know_nothing_leave_a_constant_smoothing() -> None:
    scores = make_scores(400)
    scores = replace(scores, ref_chosen_logps=scores.ref_rejected_logps)
    smoothing = float(NOISES.mean())  # no rate is more probable than another
    for text in ("dpo:qwen", "geometric", "multi-dpo"):
        method = prepared(f"{text}+reliable", scores)
        np.testing.assert_allclose(method.targets(scores).label_smoothing, smoothing, rtol=1e-12)
        plain = parse_method(text, ALIASES, label_smoothing=smoothing)
        np.testing.assert_allclose(loss_of(method, scores), loss_of(plain, scores), rtol=1e-5)


def test_margins_without_a_bearing_on_labels_hardly_move_the_chances() -> None:
    rng = np.random.default_rng(3)
    margins = rng.normal(0, 5, (5000, 3))
    chances = fit_reliability(margins, np.arange(5000)).chance_wrong(margins, np.arange(5000))
    assert np.quantile(chances, 0.95) - np.quantile(chances, 0.05) < 0.1
    assert chances.max() < 0.5


def test_per_pair_smoothing_is_the_mean_of_both_readings_of_the_label() -> None:
    margin, s = np.array([-700.0, -3.0, 0.0, 2.0, 700.0]), np.array([0.0, 0.2, 0.5, 0.9, 1.0])
    mpmath.mp.dps = 60
    expected = [
        (1 - mpmath.mpf(share)) * mpmath.log1p(mpmath.exp(-mpmath.mpf(h) / 2))
        + mpmath.mpf(share) * mpmath.log1p(mpmath.exp(mpmath.mpf(h) / 2))
        for h, share in zip(margin.tolist(), s.tolist())
    ]
    zeros = np.zeros(5)
    loss = preference_loss(margin, zeros, zeros, zeros, 0.5, label_smoothing=s)
    np.testing.assert_allclose(loss, [float(value) for value in expected], rtol=1e-13)
    refs = np.zeros((5, 2))
    several = multi_dpo_loss(margin, zeros, refs, refs, [0.3, 0.7], 0.5, label_smoothing=s)
    np.testing.assert_allclose(several, loss)
    for loss_type, value in (("hinge", 0.8 * 2.5 + 0.2 * 0), ("ipo", 0.8 * 16 + 0.2 * 4)):
        zero = np.zeros(1)
        got = preference_loss(np.array([-3.0]), zero, zero, zero, 0.5, loss_type, np.array([0.2]))
        np.testing.assert_allclose(got, [value])


def test_of_a_loss_of_each_response_the_responses_change_places() -> None:
    logps = [np.array([value]) for value in (-1.0, -4.0, -2.0, -3.0)]
    turned = [logps[n] for n in (1, 0, 3, 2)]
    for loss_type in RESPONSE_LOSSES:
        right, wrong = (preference_loss(*each, 0.5, loss_type) for each in (logps, turned))
        assert right != wrong
        got = preference_loss(*logps, 0.5, loss_type, np.array([0.2]))
        np.testing.assert_allclose(got, 0.8 * right + 0.2 * wrong)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "nca_pair"])
def test_its_gradients_equal_finite_differences(loss_type: str) -> None:
    generator = torch.Generator().manual_seed(0)
    policy_logps = [
        torch.rand(4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)
    ]
    refs = [torch.rand(4, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    s = torch.rand(4, generator=generator, dtype=torch.float64)

    def single(*logps: torch.Tensor) -> torch.Tensor:
        return preference_loss(*logps, refs[0][:, 0], refs[1][:, 0], 0.7, loss_type, s)

    def several(*logps: torch.Tensor) -> torch.Tensor:
        return multi_dpo_loss(*logps, *refs, torch.ones(3), 0.7, loss_type, s)

    assert torch.autograd.gradcheck(single, policy_logps, eps=1e-6, atol=1e-7)
    assert torch.autograd.gradcheck(several, policy_logps, eps=1e-6, atol=1e-7)


def prepared(text: str, scores: Any, **options: Any) -> Method:
    return parse_method(text, ALIASES, **options).prepare(scores, make_scores(5), bootstrap=0)


def test_dpo_keeps_the_margin_of_its_reference_and_is_judged_by_all() -> None:
    scores = make_scores(60)
    method = prepared("dpo:qwen+reliable", scores)
    assert (method.references, method.columns) == (("qwen", "llama", "mistral"), (2, 0, 1))
    plain, targets = parse_method("dpo:qwen", ALIASES).targets(scores), method.targets(scores)
    assert torch.equal(targets.virtual_chosen_logps, plain.virtual_chosen_logps)
    assert torch.equal(targets.virtual_rejected_logps, plain.virtual_rejected_logps)
    margins = (scores.ref_chosen_logps - scores.ref_rejected_logps)[:, [2, 0, 1]]
    expected = fit_reliability(margins, scores.prompts).chance_wrong(margins, scores.prompts)
    np.testing.assert_array_equal(targets.label_smoothing, expected)
    assert (targets.label_smoothing > 0).all()
    assert not method.targets(scores, held_out=True).label_smoothing.any()
    logps, tokens = policy(60)
    by_hand = preference_loss(
        *logps, plain.virtual_chosen_logps, plain.virtual_rejected_logps, 0.1,
        label_smoothing=targets.label_smoothing,
    )  # fmt: skip
    assert torch.equal(method.loss(*logps, targets, *tokens).loss, by_hand)


def test_a_missing_reference_says_nothing_of_the_label() -> None:
    scores = make_scores(60)
    method = prepared("geometric+reliable", scores)
    gap = replace(scores, ref_chosen_logps=scores.ref_chosen_logps.copy())
    gap.ref_chosen_logps[7, 1] = np.nan
    same = replace(scores, ref_chosen_logps=scores.ref_chosen_logps.copy())
    same.ref_chosen_logps[7, 1] = same.ref_rejected_logps[7, 1]
    smoothings = [method.targets(each).label_smoothing for each in (gap, same)]
    torch.testing.assert_close(*smoothings)
    assert np.isfinite(loss_of(method, gap)).all()


def test_it_composes_in_the_grammar() -> None:
    names = {
        "dpo+reliable": "dpo:llama/mistral/qwen+reliable",
        "dpo:qwen/llama+reliable": "dpo:qwen/llama+reliable",
        "mrpo+reliable": "mrpo:llama/mistral/qwen+arwc+reliable",
        "geometric+reliable+fitted": "geometric:llama/mistral/qwen+fitted+reliable",
        "geometric+base": "geometric:llama/mistral/qwen+base",
    }
    assert {text: str(parse_method(text, ALIASES)) for text in names} == names
    for text in names.values():
        assert str(parse_method(text, ALIASES)) == text


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("mrpo+reliable", {"label_smoothing": 0.1}, "does not go with .reliable"),
        ("mrpo+reliable", {"loss_type": "robust"}, "has one chance of a wrong label for all pairs"),
        ("mrpo+reliable+reliable", {}, "reliable twice"),
        ("mrpo+arwc+vdw", {}, "more than one weighting"),
        ("dpo:llama+arwc+reliable", {}, "dpo is held to one reference and has no weights"),
        ("dpo:llama+reliable", {"weights": "1,1,1"}, "has no weights"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    text: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        parse_method(text, ALIASES, **options)


def test_pairs_that_no_reference_set_has_scored_are_refused() -> None:
    scores = make_scores(4)
    scores.ref_chosen_logps[:, 1] = np.nan
    with pytest.raises(UserError, match="no pair that every reference has scored"):
        prepared("geometric+reliable", scores)
