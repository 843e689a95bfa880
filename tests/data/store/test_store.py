"""Identities, names and rows of the store: what is kept, found again, and never mixed up."""

from __future__ import annotations

import dataclasses
import json
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrpo.data.ids import unit_of
from mrpo.data.references import ReferenceSpec
from mrpo.data.store import SCORE_SCHEMA, Store
from mrpo.data.store.scores import to_bytes
from mrpo.errors import UserError

SPEC = ReferenceSpec("llama", "org/name")
SPECS = {"llama": SPEC}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_nothing_is_made_before_something_is_written(store: Store) -> None:
    assert store.references() == []
    assert not Path(store.root).exists()


def test_rows_come_back_as_they_were(store: Store, make: Any) -> None:
    scores = store.scores(store.record(make.record()).identity)
    ids = make.ids(10)
    table = make.scores(ids)
    scores.add(table)
    scores.add(make.missing(make.ids(3, seed=1), "beyond_context"))
    assert scores.read().slice(0, 13).num_rows == scores.num_rows() == 13
    kept = scores.read()
    order = [kept["response_id"].to_pylist().index(pair_id.tobytes()) for pair_id in ids]
    assert kept.take(order).equals(table.cast(SCORE_SCHEMA))
    assert kept["reason"].to_pylist().count("beyond_context") == 3


def test_token_logps_are_kept_beside_files_without_them(store: Store, make: Any) -> None:
    scores = store.scores(make.record().identity)
    ids = make.ids(4)
    scores.add(make.scores(ids[:2]))
    lists = [[-0.5, -0.5], [-1.0]]
    table = make.scores(ids[2:])
    scores.add(table.append_column("token_logps", [lists]))
    kept = scores.read(["token_logps"])["token_logps"].to_pylist()
    assert sorted(map(str, kept)) == sorted(map(str, [None, None, *lists]))


def test_only_unknown_responses_are_missing_whatever_their_order_or_data_set(
    store: Store, make: Any
) -> None:
    identity = make.record().identity
    writer, reader = store.scores(identity), store.scores(identity)
    ids = make.ids(1000)
    assert reader.missing(ids).all()
    for start in range(0, 500, 50):  # many small files, read as they come
        writer.add(make.scores(ids[start : start + 50]))
        assert reader.missing(ids).sum() == 950 - start
    mixed = np.random.default_rng(0).permutation(1000)
    assert (reader.missing(ids[mixed]) == (mixed >= 500)).all()
    assert set(reader.response_ids().tolist()) == set(ids[:500].tolist())
    assert store.scores("0" * 32).missing(ids).all()


def test_of_two_rows_for_a_response_the_first_by_file_name_counts_for_every_reader(
    store: Store, make: Any
) -> None:
    scores = store.scores(make.record().identity)
    ids = make.ids(3)
    names = [
        scores.add(make.scores(ids[:2], first=-10.0)),
        scores.add(make.scores(ids[1:], first=-20.0)),
    ]
    winner = -11.0 if names[0] < names[1] else -20.0
    kept = scores.read(["response_id", "logp"])
    values = dict(zip(kept["response_id"].to_pylist(), kept["logp"].to_pylist()))
    assert values == {ids[0].tobytes(): -10.0, ids[1].tobytes(): winner, ids[2].tobytes(): -21.0}
    assert len(scores.response_ids()) == 3
    assert scores.num_rows() == 4


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(6)))
def test_a_unit_is_its_set_of_responses(order: list[int]) -> None:
    ids = np.frombuffer(bytes(range(96)), dtype="V16")
    assert unit_of(ids[order]) == unit_of(ids)
    assert unit_of(ids[order[:5]]) != unit_of(ids)


def test_the_same_rows_have_the_same_name_and_stand_once(store: Store, make: Any) -> None:
    scores = store.scores(make.record().identity)
    table = make.scores(make.ids(5))
    assert scores.add(table) == scores.add(table)
    assert scores.num_rows() == 5


@pytest.mark.parametrize(
    "columns",
    [
        {"logp": [-1.0, float("nan")]},
        {"logp": [float("-inf"), -1.0]},
        {"logp": [None, -1.0]},
        {"end_logp": [float("inf"), -1.0]},
    ],
)
def test_a_score_is_finite_or_has_its_reason(store: Store, make: Any, columns: dict) -> None:
    scores = store.scores(make.record().identity)
    with pytest.raises(UserError, match=r"must be finite, or missing with a reason"):
        scores.add(make.scores(make.ids(2), **columns))
    assert scores.names() == []


def test_wrong_columns_and_repeated_rows_are_faults_of_ours(store: Store, make: Any) -> None:
    scores = store.scores(make.record().identity)
    ids = make.ids(2)
    with pytest.raises(AssertionError):
        scores.add(make.scores(ids[[0, 0]]))
    with pytest.raises(AssertionError):
        scores.add(make.scores(ids).drop_columns("prompt_tokens"))


def test_an_alias_means_the_newest_identity_with_an_equal_entry(store: Store, make: Any) -> None:
    first = store.record(make.record(commit="a" * 40))
    second = store.record(make.record(commit="b" * 40))
    store.record(make.record("other", commit="c" * 40))
    assert store.resolve("llama", SPECS).identity == second.identity
    store.record(make.record(commit="a" * 40))  # scored with again, so it is what is meant
    assert store.resolve("llama", SPECS).identity == first.identity
    changed = {"llama": dataclasses.replace(SPEC, dtype="float16")}
    with pytest.raises(UserError, match=r"no scores .* under its present entry"):
        store.resolve("llama", changed)


def test_an_alias_with_prefix_names_one_identity(store: Store, make: Any) -> None:
    records = [store.record(make.record(commit=letter * 40)) for letter in "abcdefgh"]
    for record in records:
        assert store.resolve(f"llama@{record.identity[:9]}", SPECS).identity == record.identity
    with pytest.raises(UserError, match="matches no identity"):
        store.resolve("llama@ffffffffffffffff")
    common = next(
        r.identity[0] for r in records if sum(o.identity[0] == r.identity[0] for o in records) > 1
    )
    with pytest.raises(UserError, match="matches several"):
        store.resolve(f"llama@{common}")


def test_one_identity_may_have_several_names(store: Store, make: Any) -> None:
    created = store.record(make.record("one", runs=({"engine": "hf"},))).created
    again = store.record(make.record("two", runs=({"engine": "vllm"},)))
    assert store.resolve("one").identity == store.resolve("two").identity
    assert again.created == created
    assert [run["engine"] for run in again.runs] == ["hf", "vllm"]
    assert [record.alias for record in store.references()] == ["one", "two"]


def test_an_unknown_alias_names_the_known_ones(store: Store, make: Any) -> None:
    with pytest.raises(UserError, match=r"unknown reference 'gemma'; refs.yaml has llama"):
        store.resolve("gemma", SPECS)


def test_an_aliass_first_commits_are_kept_until_another_is_recorded(
    store: Store, make: Any
) -> None:
    assert store.kept_commits(SPEC) == {}
    store.record(make.record(commit="a" * 40))
    assert store.kept_commits(SPEC) == {"model": "a" * 40}
    assert store.kept_commits(dataclasses.replace(SPEC, revision="v2")) == {}
    store.record(make.record(commit="b" * 40))
    assert store.kept_commits(SPEC) == {"model": "b" * 40}


@pytest.mark.parametrize("alias", ["../up", "a/b", "", ".hidden", "a\nb", "a" * 65, "a@b@c/.."])
def test_an_alias_cannot_leave_the_store(store: Store, make: Any, alias: str) -> None:
    with pytest.raises(UserError):
        store.record(make.record(alias))
    with pytest.raises(UserError):
        store.resolve(alias)


@pytest.mark.parametrize("identity", ["..", "../x", "A" * 32, "a" * 31, "a" * 32 + "\n"])
def test_an_identity_cannot_leave_the_store(store: Store, identity: str) -> None:
    with pytest.raises(AssertionError):
        store.scores(identity)


def test_a_unit_cannot_leave_the_store(store: Store, make: Any) -> None:
    with pytest.raises(AssertionError):
        store.scores(make.record().identity).lease("../../evil")


def test_foreign_folders_and_files_are_no_references(store: Store, make: Any) -> None:
    record = store.record(make.record())
    root = Path(store.root)
    (root / "notes").mkdir()
    (root / record.identity / "scores").mkdir()
    (root / record.identity / "scores" / "mine.parquet").write_bytes(b"")
    (root / ("f" * 32)).mkdir()
    assert [r.identity for r in store.references()] == [record.identity]
    assert store.scores(record.identity).names() == []


def test_a_record_with_any_flipped_bit_counts_as_none_and_is_written_anew(
    store: Store, make: Any
) -> None:
    record = store.record(make.record())
    store.scores(record.identity).add(make.scores(make.ids(2)))
    path = Path(store.root) / record.identity / "reference.json"
    good = path.read_bytes()
    noticed = 0
    for bit in range(0, 8 * len(good), 7):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        references = store.references()
        # White space and the case of \u escapes may flip without a change of content.
        assert references in ([], [record])
        noticed += references == []
    assert noticed > 0.8 * len(range(0, 8 * len(good), 7))
    path.write_bytes(good[:-40])
    assert store.is_damaged(record.identity)
    store.record(make.record())
    assert not store.is_damaged(record.identity)
    assert path.with_name("reference.json.bad").read_bytes() == good[:-40]
    assert store.scores(record.identity).num_rows() == 2


def test_a_record_copied_to_another_folder_is_not_believed(store: Store, make: Any) -> None:
    record = store.record(make.record())
    folder = Path(store.root) / ("e" * 32)
    folder.mkdir()
    (folder / "reference.json").write_bytes(
        (Path(store.root) / record.identity / "reference.json").read_bytes()
    )
    assert [r.identity for r in store.references()] == [record.identity]
    assert store.is_damaged("e" * 32)
    assert not store.is_damaged(record.identity)


def test_the_store_holds_json_and_parquet_and_no_pickle(store: Store, make: Any) -> None:
    record = store.record(make.record())
    name = store.scores(record.identity).add(make.scores(make.ids(3)))
    files = [path for path in Path(store.root).rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == sorted([name, "reference.json"])
    for path in files:
        with pytest.raises((ValueError, IndexError, KeyError)):
            list(pickletools.genops(path.read_bytes()))
    json.loads((Path(store.root) / record.identity / "reference.json").read_text())
    schema = pq.read_schema(Path(store.root) / record.identity / "scores" / name)
    assert set(schema.names) == set(SCORE_SCHEMA.names)


def test_the_same_rows_are_the_same_bytes(make: Any) -> None:
    assert to_bytes(make.scores(make.ids(20))) == to_bytes(make.scores(make.ids(20)))
