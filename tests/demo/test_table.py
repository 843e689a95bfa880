"""The table's figures: intervals worked by hand, and the layout."""

from __future__ import annotations

import numpy as np
import pytest

from mrpo.demo.run import differences, domain_rows, wilson


def test_wilsons_interval_of_eight_in_ten() -> None:
    """(0.8 + 0.19208) / 1.38416 = 0.71674; 1.96/1.38416 · √(0.016 + 0.009604) = 0.22658."""
    known = wilson(np.array([1.0] * 8 + [0.0] * 2))
    assert known.value == 0.8
    assert known.low == pytest.approx(0.49016, abs=1e-4)
    assert known.high == pytest.approx(0.94332, abs=1e-4)


def test_all_right_is_not_certain() -> None:
    """n / (n + 1.96²): 96 of 96 may be 0.9615 in truth."""
    known = wilson(np.ones(96))
    assert known.low == pytest.approx(96 / (96 + 1.96**2), abs=1e-5)
    assert known.high == pytest.approx(1)


def test_a_row_has_every_domain_and_all_of_them_together() -> None:
    sources = np.array(["facts"] * 4 + ["style"] * 4)
    heading, counts, row = domain_rows({"name": np.array([1, 1, 1, 1, 0, 0, 0, 0])}, sources)
    assert heading == ["", "facts", "arithmetic", "style", "overall"]
    assert counts == ["", "4 pairs", "0 pairs", "4 pairs", "8 pairs"]
    assert [cell.split()[0] for cell in row] == ["name", "100.0", "–", "0.0", "50.0"]


def test_differences_are_those_of_the_last_policy() -> None:
    right = {"a": np.ones(50), "b": np.zeros(50), "c": np.ones(50)}
    assert differences(right, np.arange(50)) == {
        "a": "+0.0 (+0.0 to +0.0)",
        "b": "+100.0 (+100.0 to +100.0)",
    }
