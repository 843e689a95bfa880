"""Where training starts: the weight of a pair's gradient, and which references it listens to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from mrpo.method.fitted import FOLDS, fit_reliability
from mrpo.method.grammar import parse_method
from mrpo.method.objective import Method, ReferenceLogps
from mrpo.method.virtual_reference import KINDS, pulls, virtual_reference

from .test_methods import ALIASES, make_scores

METHODS = [
    *("dpo:llama", "dpo:qwen", "dpo:qwen+reliable", "mrpo", "mrpo:qwen/mistral", "harmonic"),
    *("geometric", "arithmetic+arwc", "geometric+max-margin", "geometric+fitted", "geometric+vaw"),
    *("multi-dpo", "multi-dpo+arwc+reliable", "geometric+reliable", "geometric+arwc+reliable"),
]


def prepared(text: str, scores: ReferenceLogps, **options: Any) -> Method:
    return parse_method(text, ALIASES, **options).prepare(scores, scores, bootstrap=0)


def close_scores(n: int = 60) -> ReferenceLogps:
    """References a few nats apart, so that no sigmoid is 0 or 1; some scores are missing."""
    rng = np.random.default_rng(5)
    scores = make_scores(n)
    base = scores.ref_chosen_logps[:, :1], scores.ref_rejected_logps[:, :1]
    chosen, rejected = (logps + rng.normal(0, 4, (n, 3)) for logps in base)
    chosen[3, 0] = rejected[4, 1] = chosen[5, 2] = np.nan
    return replace(scores, ref_chosen_logps=chosen, ref_rejected_logps=rejected)


def base_margins(scores: ReferenceLogps) -> np.ndarray:
    return scores.ref_chosen_logps[:, 0] - scores.ref_rejected_logps[:, 0]


@pytest.mark.parametrize("text", METHODS)
def test_it_is_the_formula(text: str) -> None:
    scores, beta = close_scores(), 0.3
    method = prepared(text, scores, beta=beta)
    targets = method.targets(scores)
    if method.name == "multi-dpo":  # each reference in the place of the virtual one
        logps = targets.ref_chosen_logps - targets.ref_rejected_logps
        margins, alphas = np.nan_to_num(logps.numpy()), targets.weights.numpy()
    else:
        virtual = targets.virtual_chosen_logps - targets.virtual_rejected_logps
        margins, alphas = virtual.numpy()[:, None], np.ones((len(scores), 1))
    h = beta * (margins - base_margins(scores)[:, None])
    s = targets.label_smoothing.numpy()[:, None]
    expected = (alphas * ((1 - s) * expit(h) - s * expit(-h))).sum(1)
    np.testing.assert_allclose(method.initial_weights(scores), expected, rtol=1e-9)
    assert np.isnan(expected).sum() < 4


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": "byte", "beta": 2.5},
        {"normalize": "token", "loss_type": "ipo", "beta": 1.5},
        {"loss_type": "hinge", "sft_weight": 0.3},
    ],
    ids=lambda options: options.get("loss_type", options.get("normalize", "sigmoid")),
)
def test_it_is_the_slope_of_the_loss_that_is_trained(text: str, options: dict[str, Any]) -> None:
    """Central differences of `Method.loss`, the policy's margin moved away from the base's."""
    scores = close_scores()
    method = prepared(text, scores, **options)
    targets = method.targets(scores)
    tokens = [scores.ref_chosen_tokens[:, 0], scores.ref_rejected_tokens[:, 0]]
    units = {"none": 1, "token": tokens[0], "byte": scores.chosen_bytes}[method.normalize]

    def loss(step: float) -> np.ndarray:
        """With `step` more of margin, in the method's own unit."""
        chosen = torch.from_numpy(scores.ref_chosen_logps[:, 0] + step * units)
        rejected = torch.from_numpy(scores.ref_rejected_logps[:, 0])
        plain = replace(method, sft_weight=0.0)
        return plain.loss(chosen, rejected, targets, *map(torch.from_numpy, tokens)).loss.numpy()

    slopes = (loss(1e-5) - loss(-1e-5)) / 2e-5
    np.testing.assert_allclose(
        method.initial_weights(scores), -slopes / method.beta, rtol=1e-5, atol=1e-7
    )


def test_dpo_with_the_base_weighs_all_pairs_alike() -> None:
    scores = make_scores()
    np.testing.assert_array_equal(prepared("dpo", scores).initial_weights(scores), 0.5)
    nothing_left = prepared("mrpo", scores, epsilon=0.0)
    np.testing.assert_allclose(nothing_left.initial_weights(scores), 0.5, rtol=1e-12)


def test_a_label_that_is_surely_wrong_is_read_as_its_opposite() -> None:
    rng = np.random.default_rng(0)
    turned = rng.random(2000) < 0.25
    size = abs(rng.logistic(0, 20, 2000))
    d = np.where(turned, -size, size)
    scores = make_scores(2000)
    scores = replace(scores, ref_chosen_logps=scores.ref_rejected_logps + d[:, None])
    weights = prepared("dpo:llama+reliable", scores).initial_weights(scores)
    sure = size > 20
    np.testing.assert_allclose(weights[turned & sure], -0.5, atol=0.05)
    np.testing.assert_allclose(weights[~turned & sure], 0.5, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
@given(
    st.lists(st.tuples(st.floats(-60, 0), st.floats(0, 1)), min_size=1, max_size=5).filter(
        lambda rows: any(weight > 0.01 for _, weight in rows)
    )
)
def test_pulls_are_the_slopes_of_the_virtual_reference(
    kind: str, rows: list[tuple[float, float]]
) -> None:
    logps, weights = (np.array([column]) for column in zip(*rows))
    steps = 1e-5 * np.eye(len(rows))
    ups, downs = (
        virtual_reference(logps + sign * steps, np.repeat(weights, len(rows), 0), kind)
        for sign in (1, -1)
    )
    found = pulls(logps, weights, kind)
    np.testing.assert_allclose(found[0], (ups - downs) / 2e-5, atol=1e-5)
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-12)


def test_what_is_missing_pulls_nothing() -> None:
    logps = np.array([[-3.0, np.nan, -5.0], [np.nan, np.nan, np.nan]])
    for kind in KINDS:
        found = pulls(logps, np.full(3, 1 / 3), kind)
        assert found[0, 1] == 0
        assert np.isnan(found[1]).all()


def test_what_is_clipped_is_heard_as_the_base() -> None:
    """The second reference is clipped on the chosen response alone, where it decides harmonic."""
    scores = replace(
        make_scores(1),
        ref_chosen_logps=np.array([[-100.0, -300.0, -100.0]]),
        ref_rejected_logps=np.array([[-100.0, -101.0, -100.0]]),
    )
    geometric = prepared("geometric:llama/mistral", scores)
    np.testing.assert_allclose(geometric.reference_shares(scores), [[0.5, 0.5]])
    clipped = prepared("geometric:llama/mistral", scores, epsilon=0.1)
    np.testing.assert_allclose(clipped.reference_shares(scores), [[0.75, 0.25]])
    harmonic = prepared("harmonic:llama/mistral", scores)
    share = (1 + 1 / (1 + np.exp(-1))) / 2
    np.testing.assert_allclose(harmonic.reference_shares(scores), [[1 - share, share]])


def test_what_a_label_costs_is_told_by_prompts_of_other_folds() -> None:
    rng = np.random.default_rng(2)
    prompts = np.arange(1000) // 2
    d = rng.normal(0, 4, (1000, 2))
    d *= np.where(rng.random(1000) < expit(d[:, 0]), 1, -1)[:, None]
    fit = fit_reliability(d, prompts)
    logps = fit.label_logp(d, prompts)
    own = prompts % FOLDS == 1
    turned = fit_reliability(np.where(own[:, None], -d, d), prompts)
    np.testing.assert_array_equal(turned.label_logp(d, prompts)[own], logps[own])
    best = np.logaddexp(0, -d[:, 0]).mean()  # of whoever knows how labels are made
    assert best - 0.01 < -logps.mean() < best + 0.02 < np.log(2)
    nothing = fit_reliability(0 * d, prompts).label_logp(0 * d, prompts)
    np.testing.assert_allclose(nothing, -np.log(2))
