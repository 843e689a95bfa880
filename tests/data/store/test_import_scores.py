"""Scores of others: read beside pairs or their ids, marked, and used like any reference's."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mrpo.data.config import ImportConfig, PrepareConfig, StatusConfig
from mrpo.data.join import join, matrix
from mrpo.data.pairs import Pair
from mrpo.data.prepare import prepare
from mrpo.data.shards import PairShards
from mrpo.data.store import Store
from mrpo.data.store.commands import status
from mrpo.data.store.import_scores import import_scores
from mrpo.errors import UserError

ROWS = [{"prompt": f"Say {n}.", "chosen": f" {n}", "rejected": f" {n + 1}"} for n in range(6)]


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def pairs(tmp_path: Path) -> PairShards:
    return prepare(
        PrepareConfig(source=jsonl(tmp_path / "data.jsonl", ROWS), out=str(tmp_path / "pairs"))
    )


def scored(**more: Any) -> list[dict[str, Any]]:
    """TRL's columns of precomputed log-probs beside the pairs, in another order."""
    return [
        row | {"ref_chosen_logps": -1.0 - n, "ref_rejected_logps": -2.0 - n} | more
        for n, row in reversed(list(enumerate(ROWS)))
    ]


def bring(tmp_path: Path, source: str, **more: Any) -> Store:
    settings: dict[str, Any] = {
        "alias": "judge",
        "model": "judge-v2",
        "store": str(tmp_path / "store"),
    }
    import_scores(ImportConfig(source=source, **settings | more))
    return Store(tmp_path / "store")


def test_trls_columns_become_a_reference_that_joins_like_any_other(
    tmp_path: Path, pairs: PairShards, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = scored(ref_chosen_tokens=3)
    store = bring(tmp_path, jsonl(tmp_path / "scores.jsonl", rows))
    record = store.resolve("judge", {})
    assert record.imported
    assert record.entry == {"imported": "judge-v2"}
    table = join(pairs, store, [record], tmp_path / "joined").table(0)
    assert matrix(table, "ref_chosen_logps")[:, 0].tolist() == [-1.0, -2, -3, -4, -5, -6]
    assert matrix(table, "ref_rejected_logps")[:, 0].tolist() == [-2.0, -3, -4, -5, -6, -7]
    assert matrix(table, "ref_chosen_tokens")[:, 0].tolist() == [3.0] * 6
    assert table["ref_rejected_tokens"].to_pylist() == [[None]] * 6
    capsys.readouterr()
    status(StatusConfig(store=store.root))
    assert "imported" in capsys.readouterr().out.splitlines()[1].split()


def test_scores_beside_another_layout_belong_to_the_same_pairs(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 2", "system": "s", "chosen": "3", "rejected": "4"}
    named = row | {"context": "c"}
    source = jsonl(tmp_path / "data.jsonl", [row, named | {"instruction": "Sum."}])
    options: dict[str, Any] = {"ignore_columns": "context", "map": ("system=be {system}",)}
    pairs = prepare(PrepareConfig(source=source, out=str(tmp_path / "pairs"), **options))
    scores = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    rows = [json.loads(line) | scores for line in Path(source).read_text().splitlines()]
    scored = jsonl(tmp_path / "scores.jsonl", rows)
    with pytest.raises(UserError, match="'context' looks like a part of the prompt"):
        bring(tmp_path, scored)
    store = bring(tmp_path, scored, **options)
    table = join(pairs, store, [store.resolve("judge", {})], tmp_path / "joined").table(0)
    assert matrix(table, "ref_chosen_logps")[:, 0].tolist() == [-1.0, -1.0]


def test_a_row_of_several_responses_has_no_two_scores(tmp_path: Path) -> None:
    row = {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}
    with pytest.raises(UserError, match="field 'chosen' is missing"):
        bring(tmp_path, jsonl(tmp_path / "x.jsonl", [row]))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_by_pair_id_is_enough(tmp_path: Path, pairs: PairShards, kind: str) -> None:
    """The way of a reference behind an API: ids and two numbers, as hex in CSV."""
    ids = [pair_id.tobytes() for pair_id in pairs.pair_ids(0)]
    path = tmp_path / f"scores.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["pair_id", "c", "r"])
            writer.writerows([pair_id.hex(), -n, -n - 0.5] for n, pair_id in enumerate(ids))
    else:
        n = range(len(ids))
        table = {
            "pair_id": pa.array(ids, pa.binary(16)),
            "c": [-i for i in n],
            "r": [-i - 0.5 for i in n],
        }
        pq.write_table(pa.table(table), path)
    named = {"by_id": True, "pairs": str(pairs.path)}
    store = bring(tmp_path, str(path), chosen_logps_column="c", rejected_logps_column="r", **named)
    joined = join(pairs, store, [store.resolve("judge", {})], tmp_path / "joined")
    assert matrix(joined.table(0), "ref_rejected_logps")[:, 0].tolist() == [
        -0.5, -1.5, -2.5, -3.5, -4.5, -5.5,
    ]  # fmt: skip


def test_ids_of_other_pairs_are_left_out_and_counted(
    tmp_path: Path, pairs: PairShards, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [pairs.pair_ids(0)[2].tobytes().hex(), "0" * 32]
    scores = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    rows = [{"pair_id": pair_id} | scores for pair_id in ids]
    source, folder = jsonl(tmp_path / "scores.jsonl", rows), str(pairs.path)
    store = bring(tmp_path, source, by_id=True, pairs=folder)
    assert (
        "imported 2 responses; pairs left out: not in the folder of pairs 1"
        in capsys.readouterr().out
    )
    stored = store.scores(store.resolve("judge", {}).identity).response_ids()
    expected = pairs.response_ids(0).take(np.array([2])).both
    assert sorted(stored.tolist()) == sorted(expected.tolist())
    with pytest.raises(UserError, match="no effect without --by-id"):
        ImportConfig(source=source, alias="judge", model="judge-v2", pairs=folder)


def test_a_response_of_several_pairs_is_imported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounding tells apart what others computed for each pair; the first score counts."""

    def pair(chosen: str, rejected: str, *logps: float) -> dict[str, Any]:
        names = ("prompt", "chosen", "rejected", "ref_chosen_logps", "ref_rejected_logps")
        return dict(zip(names, ("Count.", chosen, rejected, *logps)))

    rows = [pair("1", "2", -100.0, -200.0), pair("1", "3", -100.4, -300.0)]
    rows.append(pair("2", "3", -199.0, -301.0))
    store = bring(tmp_path, jsonl(tmp_path / "scores.jsonl", rows))
    assert "imported 3 responses; pairs left out: none" in capsys.readouterr().out
    stored = store.scores(store.resolve("judge", {}).identity).read(["logp"])["logp"].to_pylist()
    assert sorted(stored) == [-300.0, -200.0, -100.0]
    rows[2]["ref_chosen_logps"] = -190.0
    with pytest.raises(UserError, match=r"1 times a response comes again .* is -190\.0, before"):
        bring(tmp_path, jsonl(tmp_path / "other.jsonl", rows), alias="other")


def test_rows_without_a_score_are_counted_and_never_zero(
    tmp_path: Path, pairs: PairShards, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = scored()
    rows[0]["ref_chosen_logps"] = None
    rows[1]["ref_rejected_logps"] = float("nan")
    rows[2]["chosen"] = ""
    store = bring(tmp_path, jsonl(tmp_path / "scores.jsonl", rows))
    assert (
        "imported 6 responses; pairs left out: empty_response 1, no score 2"
        in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="3 for judge"):
        join(pairs, store, [store.resolve("judge", {})], tmp_path / "joined")


def chosen(store: Store, name: str = "judge") -> dict[bytes, float]:
    """The chosen log-probs that a name means, by prompt."""
    table = store.scores(store.resolve(name, {}).identity).read()
    ids = {Pair(**row).response_ids[1] for row in ROWS}
    rows = table.select(["response_id", "prompt_id", "logp"]).to_pylist()
    return {row["prompt_id"]: row["logp"] for row in rows if row["response_id"] in ids}


def test_the_same_scores_again_are_already_there_and_another_model_is_another_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bring(tmp_path, jsonl(tmp_path / "scores.jsonl", scored()))
    twice = jsonl(tmp_path / "twice.jsonl", [*scored(), *scored()])
    store = bring(tmp_path, twice)
    assert (
        "imported 0 responses; 12 were there already; pairs left out: none"
        in capsys.readouterr().out
    )
    first = store.resolve("judge", {})
    other = jsonl(tmp_path / "other.jsonl", scored(ref_chosen_logps=-99.0))
    bring(tmp_path, other, model="judge-v3")
    second = store.references()[-1]
    message = rf"several models .* {first.title} \(judge-v2\), {second.title} \(judge-v3\)"
    with pytest.raises(UserError, match=message):  # which may be another project's
        store.resolve("judge", {})
    assert set(chosen(store, second.title).values()) == {-99.0}
    assert sorted(chosen(store, first.title).values()) == [-6.0, -5, -4, -3, -2, -1]


def test_corrected_scores_are_refused_until_they_may_replace_the_stored_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = bring(tmp_path, jsonl(tmp_path / "scores.jsonl", scored(ref_chosen_tokens=3)))
    before, wrong = store.resolve("judge", {}), chosen(store)
    corrected = [scored()[0] | {"ref_chosen_logps": -99.0}]  # of the last pair, -6.0 before
    source = jsonl(tmp_path / "corrected.jsonl", corrected)
    message = (
        rf"1 responses have other scores than {before.title}; response [0-9a-f]{{32}}: logp is "
        r"-99\.0, before it was -6\.0; --replace makes"
    )
    with pytest.raises(UserError, match=message):
        bring(tmp_path, source)
    assert store.resolve("judge", {}).identity == before.identity
    bring(tmp_path, source, replace=True)
    after = store.resolve("judge", {})
    assert after.identity != before.identity
    assert f"replaced 1 scores of {before.title}" in capsys.readouterr().out
    assert sorted(chosen(store).values()) == [-99.0, -5, -4, -3, -2, -1]
    tokens = store.scores(after.identity).read()["tokens"]
    assert tokens.to_pylist().count(3) == 6  # which the corrected file does not give
    assert chosen(store, before.title) == wrong
    bring(tmp_path, source, replace=True)  # nothing differs any more
    bring(tmp_path, source)
    assert store.resolve("judge", {}).identity == after.identity
    assert len(store.identities()) == 2


@pytest.mark.parametrize("change", [{"ref_rejected_logps": -9.0}, {"ref_rejected_tokens": 4}])
def test_any_other_value_is_a_difference(tmp_path: Path, change: dict[str, Any]) -> None:
    bring(tmp_path, jsonl(tmp_path / "scores.jsonl", scored()))
    with pytest.raises(UserError, match="6 responses have other scores"):
        bring(tmp_path, jsonl(tmp_path / "other.jsonl", scored(**change)))


def test_two_rows_of_a_pair_that_differ_are_refused(tmp_path: Path) -> None:
    rows = [*scored(), scored()[2] | {"ref_chosen_logps": -99.0}]
    with pytest.raises(
        UserError, match=r"1 times a response comes again .* is -99\.0, before it was -4\.0"
    ):
        bring(tmp_path, jsonl(tmp_path / "scores.jsonl", rows), replace=True)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_chosen_logps": 12.5}, "line 1, field 'ref_chosen_logps' is 12.5; .* not negated"),
        ({"ref_chosen_logps": "much"}, "a log-prob is a number"),
        ({"ref_rejected_logps": float("-inf")}, "finite"),
        ({"ref_chosen_tokens": 2.5}, "whole number from 1"),
        ({"chosen": 7}, "must be text or a list of messages"),
    ],
)
def test_a_wrong_value_stops_with_file_line_and_field(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    rows = scored()
    rows[0] |= change
    with pytest.raises(UserError, match=message):
        bring(tmp_path, jsonl(tmp_path / "scores.jsonl", rows))
    assert not (tmp_path / "store").exists()


def test_a_missing_column_an_odd_id_and_an_odd_alias_are_refused(
    tmp_path: Path, pairs: PairShards
) -> None:
    plain = jsonl(tmp_path / "plain.jsonl", ROWS)
    with pytest.raises(UserError, match="'ref_chosen_logps' is missing; there are"):
        bring(tmp_path, plain)
    odd = jsonl(tmp_path / "odd.jsonl", [row | {"pair_id": "12"} for row in scored()])
    with pytest.raises(UserError, match="32 hex digits"):
        bring(tmp_path, odd, by_id=True, pairs=str(pairs.path))
    with pytest.raises(UserError, match="not allowed"):
        bring(tmp_path, plain, alias="../judge")
    empty = [row | {"ref_chosen_logps": None} for row in scored()]
    with pytest.raises(UserError, match=r"no row has a score \(no score 6\)"):
        bring(tmp_path, jsonl(tmp_path / "empty.jsonl", empty))
