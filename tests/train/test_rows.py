"""Pairs beside joined scores: rows in any order, and what a resumed run need not read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrpo.data.join import join
from mrpo.data.shards import PairShards
from mrpo.data.store import Store
from mrpo.method.grammar import parse_method
from mrpo.train.dataset import TrainingPairs, Window


@pytest.fixture
def source(inputs: Any, tmp_path: Path) -> TrainingPairs:
    store = Store(inputs.root / "store")
    pairs = PairShards(inputs.root / "pairs")
    records = [store.resolve(alias) for alias in ("llama", "qwen")]
    return TrainingPairs(pairs, join(pairs, store, records, tmp_path / "scores"), False)


def test_rows_taken_from_a_window_are_those_of_their_shards_in_the_order_asked(
    source: TrainingPairs,
) -> None:
    assert source.num_shards > 1
    rows = [np.arange(count)[::-2] for count in source.pairs.rows]
    window = Window([source.chunk(shard, part) for shard, part in enumerate(rows)])
    flat = [(shard, int(row)) for shard, part in enumerate(rows) for row in part]
    order = np.random.default_rng(0).permutation(len(flat))
    taken = window.take(order)
    for start in range(0, len(taken), 7):
        stop = min(start + 7, len(taken))
        expected = [flat[place] for place in order[start:stop]]
        assert taken.pairs(start, stop) == [
            source.pairs.pairs(shard, [row])[0] for shard, row in expected
        ]
        assert taken.ids(np.arange(start, stop)) == [
            source.pairs.pair_ids(shard)[row].tobytes() for shard, row in expected
        ]
        for place, (shard, row) in zip(range(start, stop), expected):
            whole, _ = source.scores(shard)
            np.testing.assert_array_equal(
                taken.scores.ref_chosen_logps[place], whole.ref_chosen_logps[row]
            )
            assert taken.scores.rejected_bytes[place] == whole.rejected_bytes[row]


def test_a_resumed_run_knows_its_rows_without_reading_the_scores(
    source: TrainingPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = parse_method("mrpo", source.joined.aliases)
    training, held_out, unusable, _ = source.usable(method)
    total = sum(map(len, training)) + sum(map(len, held_out)) + unusable
    assert total == source.pairs.num_pairs
    monkeypatch.setattr(TrainingPairs, "scores", lambda *_: pytest.fail("read the scores"))
    again = source.usable(method, resumed=True)
    for ours, theirs in zip((training, held_out), again[:2]):
        assert [rows.tolist() for rows in ours] == [rows.tolist() for rows in theirs]
    assert again[2] == unusable
