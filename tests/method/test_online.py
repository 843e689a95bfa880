"""Weights that are learned while training: what they are after each batch, and missing scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mrpo.errors import UserError
from mrpo.method.grammar import parse_method
from mrpo.method.weightings import OnlineWeights, vdw_weights

from .test_methods import ALIASES, make_scores


def test_swcw_is_the_confidence_of_the_last_batch() -> None:
    """D = (1, −2, 0) and (3, 0, −2): sums of |D| 4, 2, 2."""
    scores = make_scores(2)
    scores.ref_chosen_logps[:] = [[-1, -4, -5], [-1, -1, -4]]
    scores.ref_rejected_logps[:] = [[-2, -2, -5], [-4, -1, -2]]
    method = parse_method("geometric+swcw", ALIASES)
    assert method.batch_weights(scores) == [0.5, 0.25, 0.25]
    expected = vdw_weights(scores.ref_chosen_logps, scores.ref_rejected_logps)
    np.testing.assert_array_equal(method.batch_weights(scores), expected)
    targets = method.targets(scores, online=method.batch_weights(scores))
    np.testing.assert_array_equal(targets.weights, [[0.5, 0.25, 0.25]] * 2)
    np.testing.assert_allclose(targets.virtual_chosen_logps, scores.ref_chosen_logps @ expected)


@pytest.mark.parametrize("text", ["geometric+swcw", "mrpo+thompson", "multi-dpo+thompson"])
def test_held_out_pairs_and_the_first_batch_have_uniform_weights(text: str) -> None:
    method = parse_method(text, ALIASES)
    first = method.targets(make_scores(4), online=OnlineWeights.start(3).weights)
    for targets in (method.targets(make_scores(4), held_out=True), first):
        torch.testing.assert_close(targets.weights, torch.full((4, 3), 1 / 3, dtype=torch.float64))


def test_thompson_learns_which_reference_raises_accuracy() -> None:
    """Rewards with chances 0.2, 0.7, 0.3: the second is drawn most, in every one of 20 runs."""
    for seed in range(20):
        rng = np.random.default_rng(100 + seed)
        state, drawn, accuracy = OnlineWeights.start(3), np.zeros(3), 0.0
        for step in range(300):
            state = OnlineWeights(state.weights, state.wins, state.losses, accuracy)
            state = state.drawn(seed, step)
            drawn += state.weights
            rose = rng.random() < np.array([0.2, 0.7, 0.3]) @ state.weights
            accuracy += 1 if rose else -1
            state = state.rewarded(accuracy)
        assert sum(state.wins) + sum(state.losses) == 300
        assert drawn.argmax() == 1
        assert drawn[1] > 150


def test_an_accuracy_that_stays_is_no_reward() -> None:
    state = OnlineWeights([1.0, 0.0], [0, 0], [0, 0], accuracy=0.5)
    assert (state.rewarded(0.5).wins, state.rewarded(0.5).losses) == ([0, 0], [1, 0])


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    state = OnlineWeights.start(3)
    draws = [state.drawn(0, step).weights for step in range(40)]
    assert draws == [state.drawn(0, step).weights for step in range(40)]
    assert draws != [state.drawn(1, step).weights for step in range(40)]
    assert len({tuple(weights) for weights in draws}) == 3


def test_a_pair_that_the_drawn_reference_lacks_takes_those_that_it_has() -> None:
    scores = make_scores(3)
    scores.ref_chosen_logps[1, 2] = np.nan
    method = parse_method("geometric+thompson", ALIASES)
    assert method.usable(scores).all()
    targets = method.targets(scores, online=[0.0, 0.0, 1.0])
    assert targets.weights.tolist() == [[0, 0, 1], [0.5, 0.5, 0], [0, 0, 1]]


def test_thompson_needs_held_out_pairs() -> None:
    with pytest.raises(UserError, match="thompson needs held-out pairs and there are none"):
        parse_method("mrpo+thompson", ALIASES).prepare(make_scores(), make_scores(0))
