"""Every weighting against its formula, with what a missing reference does to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mrpo import arwc_weights, max_margin_weights
from mrpo.errors import UserError
from mrpo.method.weightings import (
    FROM_HELD_OUT,
    PER_PAIR,
    fixed_weights,
    uniform_weights,
    vaw_weights,
    vdw_weights,
)

NAN = float("nan")
ARRAYS = pytest.mark.parametrize("make", [np.array, torch.tensor])
Make = Callable[..., Any]


@ARRAYS
def test_arwc_gives_each_reference_the_weight_of_its_own_confidence(make: Make) -> None:
    """|D| = 6 and 2: the first gets 3/4. The public MRPO code crosses them and gives it 1/4."""
    weights = arwc_weights(make([[-4.0, -9.0]]), make([[-10.0, -7.0]]))
    assert weights.tolist() == [[0.75, 0.25]]


@ARRAYS
def test_arwc_is_uniform_where_no_reference_prefers_anything(make: Make) -> None:
    same = make([[-4.0, -9.0, -1.0, -2.0]])
    assert arwc_weights(same, same).tolist() == [[0.25] * 4]


@ARRAYS
def test_max_margin_takes_the_largest_confidence_and_the_first_of_equals(make: Make) -> None:
    chosen = make([[-4.0, -9.0, -1.0], [-1.0, -1.0, -1.0]])
    rejected = make([[-6.0, -4.0, -2.0], [-1.0, -1.0, -1.0]])
    assert max_margin_weights(chosen, rejected).tolist() == [[0, 1, 0], [1, 0, 0]]


@ARRAYS
@pytest.mark.parametrize("name", list(PER_PAIR))
def test_weights_of_a_pair_ignore_what_is_missing_and_are_nan_without_any(
    make: Make, name: str
) -> None:
    chosen = make([[-4.0, NAN, -1.0], [NAN, -3.0, NAN], [NAN, NAN, NAN]])
    rejected = make([[-6.0, -4.0, -2.0], [-1.0, -1.0, -5.0], [NAN, NAN, -1.0]])
    weights = np.asarray(PER_PAIR[name](chosen, rejected))
    left = PER_PAIR[name](chosen[:1][:, [0, 2]], rejected[:1][:, [0, 2]])
    np.testing.assert_allclose(weights[0, [0, 2]], np.asarray(left)[0])
    assert weights[0, 1] == 0
    expected = [NAN] * 3 if name == "base" else [0, 1, 0]  # a pair without its base is unusable
    np.testing.assert_array_equal(weights[1], expected)
    assert np.isnan(weights[2]).all()


@ARRAYS
def test_vdw_is_the_mean_confidence_over_held_out_pairs(make: Make) -> None:
    """|D|: 1 and 3 for the first, 2 and 4 for the second; the third has 6, once."""
    chosen = make([[-1.0, -5.0, -1.0], [-4.0, -1.0, NAN]])
    rejected = make([[-2.0, -3.0, -7.0], [-1.0, -5.0, -1.0]])
    np.testing.assert_allclose(np.asarray(vdw_weights(chosen, rejected)), np.array([2, 3, 6]) / 11)


@ARRAYS
def test_vaw_is_the_share_of_held_out_pairs_that_a_reference_gets_right(make: Make) -> None:
    """The first is right on 1 of 2, the second on 2 of 2, the third on 1 of 1; a tie is wrong."""
    chosen = make([[-1.0, -2.0, -1.0], [-4.0, -1.0, NAN]])
    rejected = make([[-2.0, -3.0, -7.0], [-4.0, -5.0, -1.0]])
    np.testing.assert_allclose(np.asarray(vaw_weights(chosen, rejected)), [0.2, 0.4, 0.4])


@ARRAYS
@pytest.mark.parametrize("name", list(FROM_HELD_OUT))
def test_weights_from_held_out_pairs_are_uniform_without_any_evidence(
    make: Make, name: str
) -> None:
    same = make([[-4.0, -9.0], [-1.0, -2.0]])
    assert FROM_HELD_OUT[name](same, same).tolist() == [0.5, 0.5]


@ARRAYS
@pytest.mark.parametrize("name", list(FROM_HELD_OUT))
def test_a_reference_that_scored_no_held_out_pair_gets_no_weight(make: Make, name: str) -> None:
    weights = FROM_HELD_OUT[name](make([[-1.0, NAN, -1.0]]), make([[-2.0, -2.0, -2.0]]))
    assert weights.tolist() == [0.5, 0.0, 0.5]


def test_uniform_counts_the_references_present() -> None:
    chosen = np.array([[-1.0, -2.0, NAN, -4.0]])
    np.testing.assert_allclose(uniform_weights(chosen, chosen), [[1 / 3, 1 / 3, 0, 1 / 3]])


@pytest.mark.parametrize("weights", [[], [0, 0], [-1, 2], [NAN, 1], [float("inf"), 1]])
def test_weights_that_mean_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(UserError, match="must be numbers of 0 or more, not all 0"):
        fixed_weights(weights)
