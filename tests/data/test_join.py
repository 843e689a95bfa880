"""Scores beside pairs: every row where it belongs, missing ones as NaN, unscored ones refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrpo.data.ids import IdArray, ResponseIds
from mrpo.data.join import JoinedScores, join, matrix
from mrpo.data.store import Store
from mrpo.errors import UserError


class FakeShards:
    """Ids in shards, as `PairShards` gives them; a pair's own id is that of its prompt."""

    def __init__(self, ids: ResponseIds, rows: int) -> None:
        self.path, self.digest = Path("pairs"), "0" * 32
        starts = range(0, len(ids.prompts), rows)
        self._shards = [ids.take(np.arange(s, min(s + rows, len(ids.prompts)))) for s in starts]
        self.names = [f"part-{number:05d}.parquet" for number in range(len(self._shards))]
        self.rows = [len(shard.prompts) for shard in self._shards]

    def response_ids(self, shard: int) -> ResponseIds:
        return self._shards[shard]

    def pair_ids(self, shard: int) -> IdArray:
        return self._shards[shard].prompts


def some(ids: ResponseIds, start: int, stop: int | None = None) -> ResponseIds:
    return ids.take(np.arange(len(ids.prompts))[start:stop])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def stored(store: Store, make: Any, ids: ResponseIds, number: int, rows: int = 17) -> Any:
    """A reference whose score of the n-th pair is -(1000 number + n), in files of its own cut."""
    record = store.record(make.record("abc"[number], commit=str(number) * 40))
    for start in range(0, len(ids.prompts), rows):
        first = -1000.0 * number - start
        table = make.pair_scores(some(ids, start, start + rows), first=first)
        store.scores(record.identity).add(table)
    return record


def test_every_row_gets_its_own_scores_whatever_the_order_and_the_files(
    store: Store, make: Any, tmp_path: Path
) -> None:
    ids = make.pair_ids(100)
    order = np.random.default_rng(0).permutation(100)[:70]
    pairs = FakeShards(ids.take(order), rows=30)
    records = [stored(store, make, ids, number, rows=17 + number) for number in range(3)]
    joined = join(pairs, store, records, tmp_path / "run" / "scores")  # type: ignore[arg-type]
    assert joined.aliases == ["a", "b", "c"]
    assert (joined.names, joined.rows, joined.num_pairs) == (pairs.names, [30, 30, 10], 70)
    for shard, places in enumerate((order[:30], order[30:60], order[60:])):
        table = joined.table(shard)
        assert table["pair_id"].to_pylist() == [
            pair_id.tobytes() for pair_id in ids.prompts[places]
        ]
        expected = -1000.0 * np.arange(3)[None] - places[:, None]
        np.testing.assert_array_equal(matrix(table, "ref_chosen_logps"), expected)
        np.testing.assert_array_equal(matrix(table, "ref_rejected_logps"), expected - 0.5)
        assert (matrix(table, "ref_chosen_tokens") == 7).all()
        assert table["reasons"].to_pylist() == [[None] * 3] * len(places)


def test_a_permanently_missing_score_is_nan_with_its_reason_and_counted(
    store: Store, make: Any, tmp_path: Path
) -> None:
    ids = make.pair_ids(4)
    whole = stored(store, make, ids, 0)
    part = stored(store, make, some(ids, 0, 3), 1)
    store.scores(part.identity).add(make.missing(some(ids, 3).both, "beyond_context"))
    joined = join(FakeShards(ids, 4), store, [whole, part], tmp_path / "scores")  # type: ignore[arg-type]
    table = joined.table(0, ["ref_chosen_logps", "reasons"])
    assert np.isnan(matrix(table, "ref_chosen_logps")).tolist() == [[False] * 2] * 3 + [
        [False, True]
    ]
    assert table["reasons"].to_pylist()[3] == [None, "beyond_context"]
    assert [reference.missing for reference in joined.references] == [{}, {"beyond_context": 1}]


def test_one_response_without_a_score_leaves_its_pairs_without_one(
    store: Store, make: Any, tmp_path: Path
) -> None:
    """A response stands in several pairs; what it lacks is missing in these and in no other."""
    ids = make.pair_ids(5)
    ids = ResponseIds(ids.prompts, ids.chosen, ids.rejected[[0, 0, 2, 3, 4]])
    record = store.record(make.record())
    table = make.pair_scores(ids)
    place = table["response_id"].to_pylist().index(ids.rejected[0].tobytes())
    rest = table.filter(np.arange(len(table)) != place)
    scores = store.scores(record.identity)
    scores.add(rest)
    with pytest.raises(UserError, match=r"not yet scored in .*: 2 for llama"):
        join(FakeShards(ids, 3), store, [record], tmp_path / "scores")  # type: ignore[arg-type]
    scores.add(make.missing(ids.rejected[:1], "response_not_shown"))
    joined = join(FakeShards(ids, 5), store, [record], tmp_path / "scores")  # type: ignore[arg-type]
    rows = joined.table(0)
    lost = [True, True, False, False, False]
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert np.isnan(matrix(rows, name))[:, 0].tolist() == lost
    assert [reason == ["response_not_shown"] for reason in rows["reasons"].to_pylist()] == lost


def test_two_responses_of_the_same_token_ids_make_no_pair(
    store: Store, make: Any, tmp_path: Path
) -> None:
    """They are scored like any other: it is the pair that says nothing."""
    ids = make.pair_ids(4)
    record = store.record(make.record())
    sums = {"chosen_checksum": [5, 6, 7, None], "rejected_checksum": [5, 6, 8, None]}
    tokens = {"chosen_tokens": [3, 3, 3, 3], "rejected_tokens": [3, 4, 3, 3]}
    store.scores(record.identity).add(make.pair_scores(ids, **sums, **tokens))
    joined = join(FakeShards(ids, 4), store, [record], tmp_path / "scores")  # type: ignore[arg-type]
    expected = [["responses_render_equal"], [None], [None], [None]]
    assert joined.table(0)["reasons"].to_pylist() == expected
    assert joined.references[0].missing == {"responses_render_equal": 1}
    assert np.isnan(matrix(joined.table(0), "ref_rejected_logps"))[:, 0].tolist() == [
        *(True, False, False, False)
    ]


def test_of_two_rows_the_join_takes_the_one_that_every_reader_takes(
    store: Store, make: Any, tmp_path: Path
) -> None:
    ids = make.pair_ids(2)
    record = store.record(make.record())
    scores = store.scores(record.identity)
    scores.add(make.pair_scores(ids, first=-10.0))
    scores.add(make.pair_scores(some(ids, 0, 1), first=-20.0))
    joined = join(FakeShards(ids, 2), store, [record], tmp_path / "scores")  # type: ignore[arg-type]
    kept = dict(zip(*scores.read(["response_id", "logp"]).to_pydict().values()))
    assert matrix(joined.table(0), "ref_chosen_logps")[:, 0].tolist() == [
        kept[response_id.tobytes()] for response_id in ids.chosen
    ]


def test_unscored_pairs_are_refused_with_the_line_to_run_and_nothing_is_written(
    store: Store, make: Any, tmp_path: Path
) -> None:
    ids = make.pair_ids(10)
    records = [stored(store, make, some(ids, 0, 10 - 2 * number), number) for number in range(3)]
    with pytest.raises(UserError) as caught:
        join(FakeShards(ids, 4), store, records, tmp_path / "scores", refs_config="my refs.yaml")  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"pairs: pairs not yet scored in {store.root}: 2 for b, 4 for c; run: mrpo precompute "
        f"--pairs pairs --refs b,c --refs-config 'my refs.yaml' --store {store.root}"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_a_damaged_score_file_never_reaches_training(
    store: Store, make: Any, tmp_path: Path
) -> None:
    ids = make.pair_ids(10)
    record = stored(store, make, ids, 0)
    path = next(Path(store.root).glob("*/scores/*.parquet"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        join(FakeShards(ids, 4), store, [record], tmp_path / "scores")  # type: ignore[arg-type]
    assert not (tmp_path / "scores").exists()


def test_a_join_replaces_an_earlier_one_and_the_store_is_not_needed_again(
    store: Store, make: Any, tmp_path: Path
) -> None:
    ids = make.pair_ids(6)
    records = [stored(store, make, ids, number) for number in range(2)]
    out = tmp_path / "scores"
    join(FakeShards(ids, 2), store, records, out)  # type: ignore[arg-type]
    join(FakeShards(ids, 4), store, records[1:], out)  # type: ignore[arg-type]
    Path(store.root).rename(tmp_path / "away")
    joined = JoinedScores(out)
    assert (joined.aliases, joined.rows) == (["b"], [4, 2])
    assert joined.references[0].identity == records[1].identity
    assert sorted(path.name for path in out.iterdir()) == [
        "joined.json",
        "part-00000.parquet",
        "part-00001.parquet",
    ]
    path = out / joined.names[1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged"):
        joined.table(1)


def test_joined_scores_that_are_not_there_say_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no joined scores"):
        JoinedScores(tmp_path)


def test_the_manifest_names_the_references_and_no_machine(
    store: Store, make: Any, tmp_path: Path
) -> None:
    ids = make.pair_ids(3)
    record = stored(store, make, ids, 0)
    join(FakeShards(ids, 3), store, [record], tmp_path / "scores")  # type: ignore[arg-type]
    manifest = (tmp_path / "scores" / "joined.json").read_text()
    assert json.loads(manifest)["references"][0]["identity"] == record.identity
    assert str(tmp_path) not in manifest


def test_pairs_that_a_limit_left_out_are_missing_and_listed(
    store: Store, make: Any, tmp_path: Path
) -> None:
    ids = make.pair_ids(40)
    pairs = FakeShards(ids, 17)
    first, second = (stored(store, make, some(ids, 0, 35), number) for number in range(2))
    for record in (first, second):
        store.scores(record.identity).leave_out(some(ids, 33, 38).both)  # two of them scored since
    with pytest.raises(UserError, match=r"not yet scored in .*: 2 for a, 2 for b; run: mrpo"):
        join(pairs, store, [first, second], tmp_path / "scores")
    store.scores(first.identity).leave_out(some(ids, 38).both)
    store.scores(second.identity).add(make.pair_scores(some(ids, 35, 39)))
    store.scores(second.identity).leave_out(some(ids, 39).both)
    joined = join(pairs, store, [first, second], tmp_path / "scores")
    assert [reference.missing for reference in joined.references] == [
        {"over_limit": 5},
        {"over_limit": 1},
    ]
    table = joined.table(2)
    missing = np.isnan(matrix(table, "ref_chosen_logps"))
    assert missing[:, 0].tolist() == [row >= 1 for row in range(6)]
    assert missing[:, 1].tolist() == [row == 5 for row in range(6)]
    lines = (tmp_path / "scores" / "missing.csv").read_text().splitlines()
    assert lines[0] == "pair_id,reference,reason"
    listed = [f"{ids.prompts[row].tobytes().hex()},a,over_limit" for row in range(35, 40)]
    assert lines[1:] == [*listed, f"{ids.prompts[39].tobytes().hex()},b,over_limit"]
