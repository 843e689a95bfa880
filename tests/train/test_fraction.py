"""A fraction of the training pairs: nested, by prompt, and nothing else of the run knows more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrpo.data.join import JoinedScores
from mrpo.data.pairs import in_fraction
from mrpo.data.shards import PairShards
from mrpo.errors import UserError
from mrpo.method.fitted import fit_weights
from mrpo.method.grammar import parse_method
from mrpo.train.dataset import TrainingPairs, stacked
from mrpo.train.run import train

ALIASES = ["llama", "mistral", "qwen"]


def rows_of(source: TrainingPairs) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """(shard, row) of the pairs to train on, and of those held out."""
    training, held_out, unusable, _ = source.usable(parse_method("mrpo", ALIASES))
    assert unusable == 0
    return tuple(  # type: ignore[return-value]
        {(shard, int(row)) for shard, rows in enumerate(kind) for row in rows}
        for kind in (training, held_out)
    )


def test_fractions_are_nested_and_leave_the_held_out_pairs_alone(
    joined: tuple[PairShards, JoinedScores],
) -> None:
    parts = [rows_of(TrainingPairs(*joined, False, fraction)) for fraction in (0.2, 0.6, 1.0)]
    training, held_out = zip(*parts)
    assert training[0] < training[1] < training[2]
    assert held_out[0] == held_out[1] == held_out[2]
    pairs, _ = joined
    chosen = {
        (shard, row)
        for shard in range(len(pairs.names))
        for row, pair in enumerate(pairs.pairs(shard))
        if pair.split == "train" and in_fraction(pair.prompt, 0.6)
    }
    assert training[1] == chosen


def test_another_subset_is_another_draw_and_nested_in_itself(
    joined: tuple[PairShards, JoinedScores],
) -> None:
    def rows(fraction: float, subset: int) -> set[tuple[int, int]]:
        return rows_of(TrainingPairs(*joined, False, fraction, subset=subset))[0]

    assert rows(0.6, 0) == rows_of(TrainingPairs(*joined, False, 0.6))[0]
    assert rows(0.3, 1) < rows(0.6, 1) < rows(1.0, 1) == rows(1.0, 0)
    assert len({frozenset(rows(0.6, subset)) for subset in range(4)}) == 4


def test_weights_are_learned_from_the_fraction_alone(
    joined: tuple[PairShards, JoinedScores],
) -> None:
    source = TrainingPairs(*joined, prompt_numbers=True, fraction=0.6)
    training, *_ = source.usable(parse_method("mrpo", ALIASES))
    scores = stacked([(source.scores(n)[0], rows) for n, rows in enumerate(training)])
    chosen, rejected = scores.reference_logps([0, 1, 2], "none")
    expected = fit_weights(chosen - rejected, scores.prompts).weights
    method = source.prepared(parse_method("geometric+fitted", ALIASES))
    np.testing.assert_array_equal(method.weights, expected)


def test_a_run_trains_on_the_fraction_and_says_so(
    inputs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = inputs.config(tmp_path / "run", max_steps=None, train_fraction=0.6, train_subset=3)
    train(config)
    taken = len(rows_of(TrainingPairs(*scores_of(config), False, 0.6, subset=3))[0])
    assert f"pairs       {taken} to train on" in capsys.readouterr().out
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| train_fraction | 0.6 |\n| train_subset | 3 |" in card
    assert f"| pairs trained on, over all epochs | {taken} |" in card


def scores_of(config: Any) -> tuple[PairShards, JoinedScores]:
    return PairShards(config.pairs), JoinedScores(Path(config.output_dir) / "scores")


def test_a_fraction_without_a_pair_is_refused(inputs: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no pair to train on.*raise --train-fraction"):
        train(inputs.config(tmp_path / "run", train_fraction=1e-9))
