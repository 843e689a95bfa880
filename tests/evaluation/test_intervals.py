"""The bootstrap over prompts: hand-worked cases, coverage, pairing."""

from __future__ import annotations

import numpy as np
import pytest

from mrpo.evaluation.intervals import bootstrap_means, interval, mean_intervals, wilson


def test_means_leave_out_what_is_missing() -> None:
    values = np.array([[1.0, np.nan], [0.0, 3.0], [1.0, 5.0], [np.nan, np.nan]])
    means, draws = bootstrap_means(values, np.arange(4), resamples=50)
    assert means.tolist() == [2 / 3, 4.0]
    assert draws.shape == (50, 2)


def test_pairs_of_one_prompt_are_drawn_together() -> None:
    """Ten equal pairs of each of four prompts say no more than four pairs."""
    right = np.repeat([1.0, 0.0, 1.0, 0.0], 10)
    together = mean_intervals(right[:, None], np.repeat(np.arange(4), 10))[0]
    alone = mean_intervals(right[:, None], np.arange(40))[0]
    assert (together.low, together.high) == (0.0, 1.0)
    assert alone.high - alone.low < 0.35


def test_one_prompt_gives_no_interval() -> None:
    only = mean_intervals(np.ones((5, 1)), np.zeros(5, int))[0]
    assert only.value == 1.0
    assert np.isnan([only.low, only.high]).all()


def test_columns_see_the_same_draws() -> None:
    values = np.random.default_rng(0).normal(size=(60, 1))
    means, draws = bootstrap_means(np.concatenate([values, values + 2], axis=1), np.arange(60))
    gain = interval(means[1] - means[0], draws[:, 1] - draws[:, 0])
    assert np.allclose([gain.value, gain.low, gain.high], 2.0)


def test_intervals_cover_the_true_mean_about_19_times_in_20() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        right = (rng.random((120, 1)) < 0.6).astype(float)
        result = mean_intervals(right, np.arange(120), seed=seed)[0]
        covered += result.low <= 0.6 <= result.high
    assert 178 <= covered <= 200


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
