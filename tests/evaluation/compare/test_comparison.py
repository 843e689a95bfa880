"""The comparison's numbers against simulation, and the words against the numbers."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from mrpo.evaluation.compare import verdict as verdict_module
from mrpo.evaluation.compare.outcome import Draws, Standing, growth, resample, standing
from mrpo.evaluation.compare.verdict import ComparisonOutcome, verdict

METHODS = ["dpo:llama", "dpo:qwen", "mrpo"]
SINGLE = [True, True, False]
REFERENCES = {"dpo:llama": "llama", "dpo:qwen": "qwen"}


def simulated(
    rates: list[float], seed: int, pairs: int = 400, seeds: int = 3, noise: float = 0.0
) -> np.ndarray:
    """[N, M, 1, S] right or wrong; hard pairs are hard for all methods, runs differ by noise."""
    rng = np.random.default_rng(seed)
    hard = rng.uniform(size=(pairs, 1, 1, 1))
    level = np.array(rates)[None, :, None, None] + rng.normal(0, noise, (1, len(rates), 1, seeds))
    answers = 0.7 * hard + 0.3 * rng.uniform(size=(pairs, len(rates), 1, seeds))
    return (np.argsort(np.argsort(answers, 0), 0) / pairs < level).astype(float)


def judged(right: np.ndarray, prompts: np.ndarray | None = None) -> Standing:
    draws = resample(right, np.arange(len(right)) if prompts is None else prompts, 1000)
    return standing(draws, 0, METHODS, SINGLE)


def outcome(*standings: Standing, **changes: object) -> ComparisonOutcome:
    given = {
        "metrics": ["reward"],
        "fractions": [1.0],
        "standings": {"reward": list(standings)},
        "references": REFERENCES,
        "growth": {},
        "pairs": 400,
        "seeds": 3,
        "missing": 0,
    }
    return ComparisonOutcome(**{**given, **changes})  # type: ignore[arg-type]


def test_the_examples_give_what_they_say() -> None:
    assert doctest.testmod(verdict_module) == (0, 1)


def test_accuracy_is_the_plain_mean_over_pairs_and_seeds() -> None:
    right = simulated([0.6, 0.7, 0.75], 0)
    judgement = judged(right)
    for m, name in enumerate(METHODS):
        assert judgement.accuracy[name].value == pytest.approx(right[:, m].mean())
        assert judgement.seed_spread[name] == pytest.approx(right[:, m, 0].mean(0).std(ddof=1))
    assert judgement.best_single == "dpo:qwen"
    difference = right[:, 2].mean() - right[:, 1].mean()
    assert judgement.gains[0].gain.value == pytest.approx(difference)


def test_a_difference_has_a_narrower_interval_than_its_parts() -> None:
    """Pairs that are hard for one method are hard for the other; pairing cancels this."""
    judgement = judged(simulated([0.6, 0.7, 0.72], 1))
    gain = judgement.gains[0].gain
    widths = [accuracy.high - accuracy.low for accuracy in judgement.accuracy.values()]
    assert gain.high - gain.low < 0.8 * min(widths)


def test_intervals_cover_as_often_as_they_say() -> None:
    """mrpo gains 0 over a single reference; each prompt has two pairs."""
    covered = 0
    for seed in range(60):
        right = simulated([0.3, 0.6, 0.6], seed, pairs=150, seeds=6, noise=0.02)
        right = np.repeat(right, 2, axis=0)  # two equal pairs of a prompt say no more than one
        gain = judged(right, np.repeat(np.arange(150), 2)).gains[0].gain
        covered += gain.low <= 0 <= gain.high
    assert covered >= 51  # 95 %, less the noise of sixty trials with six seeds


def test_more_methods_with_several_references_make_wider_intervals() -> None:
    right = simulated([0.6, 0.7, 0.72], 2)
    several = np.concatenate([right, right[:, 2:], right[:, 2:]], axis=1)
    draws = resample(several, np.arange(len(right)), 1000)
    names = [*METHODS, "geometric", "multi-dpo"]
    of_three = standing(draws, 0, names, [*SINGLE, False, False]).gains[0].gain
    alone = Draws(draws.means[:3], draws.by_seed[:3], draws.draws[:, :3])
    of_one = standing(alone, 0, METHODS, SINGLE).gains[0].gain
    assert of_three.high - of_three.low > of_one.high - of_one.low


def test_a_missing_run_leaves_the_mean_of_the_other_seeds() -> None:
    right = simulated([0.6, 0.7, 0.75], 3)
    right[:, 2, 0, 1] = np.nan
    judgement = judged(right)
    assert judgement.accuracy["mrpo"].value == pytest.approx(right[:, 2, 0, [0, 2]].mean())
    right[:, 2] = np.nan
    gone = judged(right)
    assert np.isnan(gone.accuracy["mrpo"].value)
    assert gone.gains == ()


# In words


def test_a_clear_gain_is_said() -> None:
    lines = verdict(outcome(judged(simulated([0.5, 0.6, 0.75], 4))))
    assert lines[0].startswith("Several references beat one here: mrpo gains +1")
    assert lines[1] == "Of single references qwen is clearly the best."


def test_one_reference_is_enough_where_several_do_no_better() -> None:
    lines = verdict(outcome(judged(simulated([0.5, 0.8, 0.7], 5))))
    assert lines[0].startswith("One reference is enough here, and it is qwen: mrpo")
    assert "−" in lines[0]
    assert "can't be ruled out" not in " ".join(lines)


def test_an_open_question_is_said_to_be_open() -> None:
    judgement = judged(simulated([0.5, 0.7, 0.7], 6, pairs=60))
    lines = verdict(outcome(judgement, pairs=60, seeds=1, missing=2))
    assert lines[0].startswith("One reference is enough here until more pairs show otherwise")
    assert "can't be ruled out; telling a gain of 1 point from none takes about" in lines[1]
    assert any("One seed" in line for line in lines)
    assert any("2 runs FAILED" in line for line in lines)


def test_singles_that_cannot_be_told_apart_are_named() -> None:
    lines = verdict(outcome(judged(simulated([0.7, 0.7, 0.5], 7))))
    assert any("may be as good" in line for line in lines)


def test_without_a_single_reference_nothing_is_claimed() -> None:
    draws = resample(simulated([0.5, 0.6, 0.7], 8), np.arange(400), 200)
    judgement = standing(draws, 0, ["mrpo", "geometric", "multi-dpo"], [False] * 3)
    lines = verdict(outcome(judgement, references={}))
    assert "add dpo:ALIAS" in lines[0]


def test_another_metric_with_another_answer_is_said() -> None:
    better = judged(simulated([0.5, 0.6, 0.75], 4))
    worse = judged(simulated([0.5, 0.8, 0.7], 5))
    standings = {"reward": [worse], "likelihood per token": [better]}
    lines = verdict(outcome(metrics=list(standings), standings=standings))
    assert any(
        line.startswith("Judged by likelihood per token instead, several references do beat one")
        for line in lines
    )


def test_the_learning_curve_is_put_into_words() -> None:
    small, large = simulated([0.4, 0.5, 0.5], 9), simulated([0.5, 0.6, 0.8], 9)
    draws = resample(np.concatenate([small, large], axis=2), np.arange(400), 1000)
    standings = [standing(draws, at, METHODS, SINGLE) for at in (0, 1)]
    grown = {name: growth(draws, m, 0, 1) for m, name in enumerate(METHODS)}
    lines = verdict(outcome(fractions=[0.05, 1.0], standings={"reward": standings}, growth=grown))
    assert any(line.startswith("With 5 % of the training pairs the answer is") for line in lines)
    assert any("mrpo changes by +30" in line and "more pairs would help" in line for line in lines)
