"""The table's figures: intervals worked by hand, and the layout."""

from __future__ import annotations

import numpy as np

from mrpo.demo.run import differences, domain_rows


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
