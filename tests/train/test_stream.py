"""The order of pairs: every row once an epoch, on from any place, the same everywhere."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrpo.data.config import PrepareConfig
from mrpo.data.join import JoinedScores, join
from mrpo.data.prepare import prepare
from mrpo.data.rendering import Renderer
from mrpo.data.shards import PairShards
from mrpo.data.store import Store
from mrpo.errors import UserError
from mrpo.method.grammar import parse_method
from mrpo.train.dataset import TrainingPairs
from mrpo.train.stream import PairStream, Prefetch, StepBatch, side_by_side, window

SIZES = st.lists(st.integers(0, 9), max_size=6)


def epoch(sizes: list[int], seed: int, number: int, size: int) -> list[tuple[int, int]]:
    """(shard, row) of an epoch in the order in which it is read."""
    usable = [np.arange(count) * 2 for count in sizes]
    read = []
    for at in range(sum(sizes) + 1):
        parts, order = window(usable, seed, number, at, size)
        rows = [(shard, int(row)) for shard, rows in parts for row in rows]
        read += [rows[place] for place in order]
    return read


@given(SIZES, st.integers(0, 2**31), st.integers(0, 3), st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_epoch_reads_every_row_once(sizes: list[int], seed: int, number: int, size: int) -> None:
    expected = [(shard, 2 * row) for shard, count in enumerate(sizes) for row in range(count)]
    assert sorted(epoch(sizes, seed, number, size)) == expected


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first = epoch([30, 20, 25], 1, 0, 16)
    assert first == epoch([30, 20, 25], 1, 0, 16)
    assert first != epoch([30, 20, 25], 2, 0, 16)
    assert first != epoch([30, 20, 25], 1, 1, 16)


def test_window_mixes_rows_of_its_shards() -> None:
    parts, order = window([np.arange(50), np.arange(50)], 0, 0, 0, 80)
    assert [len(rows) for _, rows in parts] == [50, 30]
    assert sorted(order) == list(range(80))
    assert {int(place) // 50 for place in order[:10]} == {0, 1}


PROMPTS = st.lists(st.integers(-3, 5), min_size=1, max_size=40)


@given(PROMPTS, st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_prompts_side_by_side_are_all_rows_once_and_in_their_order(
    prompts: list[int], seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(len(prompts))
    read = side_by_side(order, np.array(prompts), seed, 0, 0).tolist()
    assert sorted(read) == list(range(len(prompts)))
    runs = [number for number, _ in groupby(prompts[row] for row in read)]
    assert len(runs) == len(set(prompts))
    for number in runs:
        own = [row for row in read if prompts[row] == number]
        assert own == [row for row in order.tolist() if prompts[row] == number]


def test_a_prompt_with_many_pairs_comes_no_earlier_than_one_with_few() -> None:
    """Of ten prompts one has 30 rows and the others one each; over 2,000 windows its mean place
    among them is 4.5, within 4 standard errors (0.064 each)."""
    prompts = np.array([0] * 30 + [*range(1, 10)])
    places = []
    for number in range(2000):
        read = side_by_side(np.arange(len(prompts)), prompts, 5, 0, number)
        places.append([prompt for prompt, _ in groupby(prompts[read])].index(0))
    assert abs(np.mean(places) - 4.5) < 4 * 0.064
    assert len(set(places)) == 10


@pytest.fixture(scope="module")
def source(inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> TrainingPairs:
    store = Store(inputs.root / "store")
    pairs = PairShards(inputs.root / "pairs")
    records = [store.resolve(alias) for alias in ("llama", "qwen")]
    out = tmp_path_factory.mktemp("joined") / "scores"
    return TrainingPairs(pairs, join(pairs, store, records, out), prompt_numbers=False)


@pytest.fixture(scope="module")
def renderer(inputs: Any) -> Renderer:
    return Renderer.load(inputs.references["qwen"])


def stream(source: TrainingPairs, renderer: Renderer, **changes: Any) -> PairStream:
    method = parse_method("mrpo", source.joined.aliases)
    training, *_ = source.usable(method)
    given: dict[str, Any] = {
        "seed": 3,
        "batch_pairs": 4,
        "total_rows": 90,
        "limits": {"beyond_max_length": 60},
        "window_rows": 16,
    }
    return PairStream(source, training, renderer, method, **given | changes)


def contents(batch: StepBatch) -> tuple[Any, ...]:
    return batch.ids, batch.pairs, batch.position, batch.dropped, batch.targets.weights.tolist()


@pytest.mark.parametrize("by_prompt", [False, True])
def test_reading_on_from_any_batch_gives_the_same_rest(
    source: TrainingPairs, renderer: Renderer, by_prompt: bool
) -> None:
    whole = list(stream(source, renderer, by_prompt=by_prompt).batches())
    assert whole[0].dropped or whole[-1].dropped
    for stop, batch in enumerate(whole, start=1):
        again = stream(source, renderer, by_prompt=by_prompt)
        rest = again.batches(batch.position, batch.dropped)
        assert [contents(batch) for batch in rest] == [contents(batch) for batch in whole[stop:]]


def test_batches_run_on_across_epochs_and_only_the_last_is_short(
    source: TrainingPairs, renderer: Renderer
) -> None:
    read = stream(source, renderer, limits={}, total_rows=90)
    batches = list(read.batches())
    rows = read.epoch_rows
    assert rows % 4 == 1
    assert [len(batch) for batch in batches] == [4] * 22 + [2]
    ids = [pair_id for batch in batches for pair_id in batch.ids]
    assert len(set(ids[:rows])) == len(set(ids[rows : 2 * rows])) == rows
    assert ids[:rows] != ids[rows : 2 * rows]
    assert [batches[at].position.epoch for at in (rows // 4 - 1, rows // 4)] == [0, 1]


def test_batch_holds_its_pairs_own_scores(source: TrainingPairs, renderer: Renderer) -> None:
    scores = {}
    for shard in range(source.num_shards):
        table = source.joined.table(shard).to_pydict()
        for pair_id, chosen in zip(table["pair_id"], table["ref_chosen_logps"]):
            scores[pair_id] = chosen
    for batch in stream(source, renderer).batches():
        expected = [scores[pair_id] for pair_id in batch.ids]
        np.testing.assert_array_equal(batch.scores.ref_chosen_logps, expected)


def test_long_pairs_are_dropped_whole_and_counted_once(
    source: TrainingPairs, renderer: Renderer
) -> None:
    rows = stream(source, renderer).epoch_rows
    all_batches = stream(source, renderer, limits={}, total_rows=rows).batches()
    pairs = [pair for batch in all_batches for pair in batch.pairs]
    long = sum(max(len(one.token_ids) for one in p.responses) > 60 for p in pairs)
    assert 0 < long < rows == len(pairs)
    limited = list(stream(source, renderer, total_rows=2 * rows).batches())
    assert sum(map(len, limited)) == 2 * (rows - long)
    assert limited[-1].dropped == {"beyond_max_length": long}


@pytest.mark.parametrize("total_rows", [10, 2**62])
def test_stream_without_a_pair_left_is_refused(
    source: TrainingPairs, renderer: Renderer, total_rows: int
) -> None:
    none_left = stream(source, renderer, limits={"beyond_context": 5}, total_rows=total_rows)
    with pytest.raises(UserError, match=r"no pair is left .*beyond_context"):
        list(none_left.batches())


def test_nothing_is_left_behind_the_last_batch(source: TrainingPairs, renderer: Renderer) -> None:
    read = stream(source, renderer)
    last = list(read.batches())[-1]
    assert list(read.batches(last.position, last.dropped)) == []


def test_prefetch_hands_items_on_and_raises_where_they_are_taken() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise UserError("broken")

    ready = Prefetch(items())
    assert [ready.next() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="broken"):
        ready.next()


def test_closed_prefetch_leaves_no_thread() -> None:
    before = set(threading.enumerate())  # one of an earlier test may end meanwhile
    ready = Prefetch(iter(range(10**9)), ahead=2)
    assert ready.next() == 0
    ready.close()
    assert set(threading.enumerate()) <= before


def test_other_pairs_than_those_joined_are_refused(source: TrainingPairs) -> None:
    other = PairShards(source.pairs.path)
    other.rows = [number - 1 for number in other.rows]
    with pytest.raises(UserError, match="joined to other pairs"):
        TrainingPairs(other, JoinedScores(source.joined.path), prompt_numbers=False)


def test_by_prompt_the_pairs_of_a_prompt_follow_each_other_within_a_window(
    inputs: Any, renderer: Renderer, scored: Any, tmp_path: Path
) -> None:
    lines = [
        {"prompt": f"Is it {number}?", "chosen": f" yes {pair}", "rejected": " no"}
        for pair in range(3)
        for number in range(10)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = prepare(
        PrepareConfig(
            source=str(tmp_path / "pairs.jsonl"),
            out=str(tmp_path / "pairs"),
            shard_pairs=20,
            validation_fraction=0,
        )
    )
    scored(tmp_path, pairs, ["llama"])
    store = Store(tmp_path / "store")
    joined = join(pairs, store, [store.resolve("llama")], tmp_path / "scores")
    ranked = TrainingPairs(pairs, joined, prompt_numbers=False)
    changes: dict[str, Any] = {"limits": {}, "total_rows": 60, "window_rows": 1000}
    for by_prompt in (False, True):
        read = stream(ranked, renderer, by_prompt=by_prompt, **changes)
        ids = [pair_id for batch in read.batches() for pair_id in batch.ids]
        by_id = {pair.id: pair.prompt for shard in (0, 1) for pair in pairs.pairs(shard)}
        for epoch in (ids[:30], ids[30:]):
            assert sorted(epoch) == sorted(by_id)
            runs = [prompt for prompt, _ in groupby(by_id[pair_id] for pair_id in epoch)]
            assert (len(runs) == 10) is by_prompt
        assert ids[:30] != ids[30:]
