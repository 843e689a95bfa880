"""Log-probs per token and per byte, before anything else is done with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mrpo.errors import UserError
from mrpo.method.arrays import normalize_logps
from mrpo.method.grammar import beta_warning


def test_references_divide_by_their_own_tokens_or_by_the_bytes_of_the_response() -> None:
    logps = np.array([[-12.0, -12.0], [-6.0, np.nan]])
    tokens = np.array([[3, 4], [2, 0]])
    size = np.array([24, 8])
    none, token, byte = (normalize_logps(logps, how, tokens, size) for how in _HOWS)
    np.testing.assert_array_equal(none, logps)
    np.testing.assert_array_equal(token, [[-4, -3], [-3, np.nan]])
    np.testing.assert_array_equal(byte, [[-0.5, -0.5], [-0.75, np.nan]])


_HOWS = ("none", "token", "byte")


@pytest.mark.parametrize(("how", "slope"), [("none", 1), ("token", 1 / 4), ("byte", 1 / 16)])
def test_the_policy_is_divided_likewise_and_its_gradient_with_it(how: str, slope: float) -> None:
    logps = torch.tensor([-12.0], requires_grad=True)
    normalize_logps(logps, how, torch.tensor([4]), np.array([16])).sum().backward()
    assert logps.grad.tolist() == [slope]


def test_a_length_of_zero_is_undefined() -> None:
    got = normalize_logps(np.array([-1.0]), "byte", np.array([1]), np.array([0]))
    assert np.isnan(got).all()


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(UserError, match="'char' is unknown; choose one of none, token, byte"):
        normalize_logps(np.array([-1.0]), "char", np.array([1]), np.array([1]))


@pytest.mark.parametrize(
    ("how", "beta", "warns"),
    [("none", 0.1, False), ("token", 0.1, True), ("byte", 0.999, True), ("byte", 1.0, False)],
)
def test_the_warning_comes_with_a_beta_below_one_only(how: str, beta: float, warns: bool) -> None:
    warning = beta_warning(how, beta)
    assert (warning is not None) == warns
    if warning:
        assert f"--beta {beta:g}" in warning
        assert f"--normalize {how}" in warning
