"""The comparison's numbers against simulation, and the words against the numbers."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from mrpo.evaluation.compare import results as results_module
from mrpo.evaluation.compare.outcome import METRIC_WORDS, calibrations
from mrpo.evaluation.compare.results import Comparison, Condition, Result, conditions_of
from mrpo.evaluation.compare.verdict import (
    Draws,
    change,
    judge,
    resample,
    tied_singles,
    verdict,
)
from mrpo.evaluation.config import Metric
from mrpo.evaluation.intervals import Interval

BOTH = ["llama", "qwen"]
METHODS = {"dpo:llama": ["llama"], "dpo:qwen": ["qwen"], "mrpo": BOTH}


def simulated(
    rates: list[float], seed: int, pairs: int = 400, seeds: int = 3, noise: float = 0.0
) -> np.ndarray:
    """[N, M, 1, S] right or wrong; hard pairs are hard for all methods, runs differ by noise."""
    rng = np.random.default_rng(seed)
    hard = rng.uniform(size=(pairs, 1, 1, 1))
    level = np.array(rates)[None, :, None, None] + rng.normal(0, noise, (1, len(rates), 1, seeds))
    answers = 0.7 * hard + 0.3 * rng.uniform(size=(pairs, len(rates), 1, seeds))
    return (np.argsort(np.argsort(answers, 0), 0) / pairs < level).astype(float)


def drawn(right: np.ndarray, prompts: np.ndarray | None = None) -> Draws:
    return resample(right, np.arange(len(right)) if prompts is None else prompts, 1000)


def judged(right: np.ndarray, prompts: np.ndarray | None = None) -> dict[str, Result]:
    results = judge(drawn(right, prompts), METHODS, [Condition(1.0)], "reward")
    return {result.method: result for result in results}


def gain_of(result: Result) -> Interval:
    assert result.gain is not None
    return result.gain


def words(
    *draws: Draws,
    references: dict[str, list[str]] = METHODS,
    fractions: tuple[float, ...] = (1.0,),
    noises: tuple[float, ...] = (0.0,),
    pairs: int = 400,
    seeds: int = 3,
    missing: int = 0,
) -> list[str]:
    """The sentences on a comparison by the first metrics, one for each of `draws`."""
    metrics: list[Metric] = ["reward", "token"]
    comparison = Comparison(
        base="llama",
        pairs=pairs,
        prompts=pairs,
        metric="reward",
        metrics={metric: METRIC_WORDS[metric] for metric, _ in zip(metrics, draws)},
        methods=list(references),
        references=references,
        fractions=list(fractions),
        label_noises=list(noises),
        seeds=list(range(seeds)),
        base_accuracy={},
        results=[
            result
            for metric, given in zip(metrics, draws)
            for result in judge(given, references, conditions_of(fractions, noises), metric)
        ],
        growth=change(draws[0], references, -2, -1) if len(fractions) > 1 else {},
        noise_cost=change(draws[0], references, -1, len(fractions) - 1),
        runs=[],
        missing=["a run"] * missing,
        scoring=[],
        verdict=[],
    )
    return verdict(comparison, tied_singles(draws[0], references))


def test_the_examples_give_what_they_say() -> None:
    assert doctest.testmod(results_module) == (0, 1)


def test_accuracy_is_the_plain_mean_over_pairs_and_seeds() -> None:
    right = simulated([0.6, 0.7, 0.75], 0)
    results = judged(right)
    for m, name in enumerate(METHODS):
        assert results[name].accuracy.value == pytest.approx(right[:, m].mean())
        assert results[name].seed_spread == pytest.approx(right[:, m, 0].mean(0).std(ddof=1))
    assert results["mrpo"].over == "dpo:qwen"
    difference = right[:, 2].mean() - right[:, 1].mean()
    assert gain_of(results["mrpo"]).value == pytest.approx(difference)


def test_a_difference_has_a_narrower_interval_than_its_parts() -> None:
    """Pairs that are hard for one method are hard for the other; pairing cancels this."""
    results = judged(simulated([0.6, 0.7, 0.72], 1))
    gain = gain_of(results["mrpo"])
    widths = [result.accuracy.high - result.accuracy.low for result in results.values()]
    assert gain.high - gain.low < 0.8 * min(widths)


def test_intervals_cover_as_often_as_they_say() -> None:
    """mrpo gains 0 over a single reference; each prompt has two pairs."""
    covered = 0
    for seed in range(60):
        right = simulated([0.3, 0.6, 0.6], seed, pairs=150, seeds=6, noise=0.02)
        right = np.repeat(right, 2, axis=0)  # two equal pairs of a prompt say no more than one
        gain = gain_of(judged(right, np.repeat(np.arange(150), 2))["mrpo"])
        covered += gain.low <= 0 <= gain.high
    assert covered >= 51  # 95 %, less the noise of sixty trials with six seeds


def test_more_methods_with_several_references_make_wider_intervals() -> None:
    right = simulated([0.6, 0.7, 0.72], 2)
    several = np.concatenate([right, right[:, 2:], right[:, 2:]], axis=1)
    draws = drawn(several)
    references = METHODS | {"geometric": BOTH, "multi-dpo": BOTH}
    of_three = gain_of(judge(draws, references, [Condition(1.0)], "reward")[2])
    alone = Draws(draws.means[:3], draws.by_seed[:3], draws.draws[:, :3])
    of_one = gain_of(judge(alone, METHODS, [Condition(1.0)], "reward")[2])
    assert of_three.high - of_three.low > of_one.high - of_one.low


def test_a_missing_run_leaves_the_mean_of_the_other_seeds() -> None:
    right = simulated([0.6, 0.7, 0.75], 3)
    right[:, 2, 0, 1] = np.nan
    left = judged(right)["mrpo"]
    assert left.accuracy.value == pytest.approx(right[:, 2, 0, [0, 2]].mean())
    right[:, 2] = np.nan
    gone = judged(right)["mrpo"]
    assert np.isnan(gone.accuracy.value)
    assert gone.gain is None


def test_calibration_by_hand() -> None:
    """Margins of ln 3 are a probability of 3/4; of the surer half all are right, else a half."""
    surer, unsure = np.full(100, np.log(9.0)), np.log(3.0) * np.tile([1.0, -1.0], 50)
    margins = np.concatenate([unsure, surer])[:, None, None, None]
    margins = np.concatenate([margins, np.full_like(margins, np.nan)], axis=1)
    entries = calibrations(margins, np.arange(200), ["dpo:llama", "not run"], [Condition(0.5, 0.3)])
    assert [(entry.method, entry.fraction, entry.label_noise) for entry in entries] == [
        ("dpo:llama", 0.5, 0.3)
    ]
    loss = -(np.log(0.75) * 50 + np.log(0.25) * 50 + np.log(0.9) * 100) / 200
    assert entries[0].log_loss.value == pytest.approx(loss)
    assert entries[0].log_loss.low < loss < entries[0].log_loss.high
    assert entries[0].brier.value == pytest.approx((50 / 16 + 50 * 9 / 16 + 100 * 0.01) / 200)
    assert entries[0].confidence == pytest.approx([0.75] * 5 + [0.9] * 5)
    assert np.mean(entries[0].accuracy[:5]) == pytest.approx(0.5)
    assert entries[0].accuracy[5:] == [1.0] * 5


# In words


def test_a_clear_gain_is_said() -> None:
    lines = words(drawn(simulated([0.5, 0.6, 0.75], 4)))
    assert lines[0].startswith("Several references beat one here: mrpo gains +1")
    assert lines[1] == "Of single references qwen is clearly the best."


def test_one_reference_is_enough_where_several_do_no_better() -> None:
    lines = words(drawn(simulated([0.5, 0.8, 0.7], 5)))
    assert lines[0].startswith("One reference is enough here, and it is qwen: mrpo")
    assert "−" in lines[0]
    assert "can't be ruled out" not in " ".join(lines)


def test_an_open_question_is_said_to_be_open() -> None:
    draws = drawn(simulated([0.5, 0.7, 0.7], 6, pairs=60))
    lines = words(draws, pairs=60, seeds=1, missing=2)
    assert lines[0].startswith("One reference is enough here until more pairs show otherwise")
    assert "can't be ruled out; telling a gain of 1 point from none takes about" in lines[1]
    assert any("One seed" in line for line in lines)
    assert any("2 runs FAILED" in line for line in lines)


def test_singles_that_cannot_be_told_apart_are_named() -> None:
    lines = words(drawn(simulated([0.7, 0.7, 0.5], 7)))
    assert any("may be as good" in line for line in lines)


def test_without_a_single_reference_nothing_is_claimed() -> None:
    draws = drawn(simulated([0.5, 0.6, 0.7], 8))
    lines = words(draws, references=dict.fromkeys(["mrpo", "geometric", "multi-dpo"], BOTH))
    assert "add dpo:ALIAS" in lines[0]


def test_another_metric_with_another_answer_is_said() -> None:
    better = drawn(simulated([0.5, 0.6, 0.75], 4))
    worse = drawn(simulated([0.5, 0.8, 0.7], 5))
    lines = words(worse, better)
    assert any(
        line.startswith("Judged by likelihood per token instead, several references do beat one")
        for line in lines
    )


def test_the_learning_curve_is_put_into_words() -> None:
    small, large = simulated([0.4, 0.5, 0.5], 9), simulated([0.5, 0.6, 0.8], 9)
    draws = drawn(np.concatenate([small, large], axis=2))
    lines = words(draws, fractions=(0.05, 1.0))
    assert any(line.startswith("With 5 % of the training pairs the answer is") for line in lines)
    assert any("mrpo changes by +30" in line and "more pairs would help" in line for line in lines)


def test_what_noise_costs_is_put_into_words() -> None:
    """Without noise qwen alone is best; at 30 % mrpo holds its 80 % and qwen falls to 60 %."""
    clean, noisy = simulated([0.6, 0.8, 0.8], 9), simulated([0.5, 0.6, 0.8], 9)
    lines = words(drawn(np.concatenate([noisy, clean], axis=2)), noises=(0.0, 0.3))
    assert lines[0].startswith("One reference is enough here")
    elsewhere = next(line for line in lines if "the answer is another" in line)
    assert elsewhere.startswith(
        "With 100 % of the training pairs and 30 % of their labels turned round the answer is "
        "another: mrpo against dpo:qwen +20.0 points"
    )
    cost = next(line for line in lines if line.startswith("From 0 % to 30 % of the labels"))
    assert "mrpo changes by +0.0 points" in cost
    assert cost.endswith("mrpo is the most accurate then.")


def test_the_same_answer_under_noise_comes_with_its_gain() -> None:
    lines = words(drawn(np.repeat(simulated([0.6, 0.8, 0.7], 9), 2, axis=2)), noises=(0.0, 0.3))
    assert not any("the answer is another" in line for line in lines)
    assert any(
        line.startswith(
            "With 30 % turned round mrpo, the best with several references, stands at −"
        )
        for line in lines
    )


def test_results_of_several_betas_of_a_reference_are_no_second_reference() -> None:
    draws = drawn(simulated([0.7, 0.7, 0.7], 7))
    both = {"dpo:llama beta=0.1": ["llama"], "dpo:llama beta=0.5": ["llama"], "mrpo": BOTH}
    lines = words(draws, references=both)
    assert not any("may be as good" in line for line in lines)
