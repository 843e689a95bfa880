"""Responses with scores, ranks or labels: which pairs they become, and what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mrpo.tests.data.raw_rows import (
    answer,
    dropped,
    prepared,
    run,
    said,
    scored,
    to_csv,
    to_parquet,
    turns,
)


@pytest.mark.parametrize(
    ("way", "pairs"),
    [
        ("best-worst", ["41"]),
        ("all", ["43", "42", "41", "32", "31", "21"]),
        ("adjacent", ["43", "32", "21"]),
    ],
)
def test_pairs_from_scores(tmp_path: Path, way: str, pairs: list[str]) -> None:
    shards = prepared(tmp_path, scored(2, 4, 1, 3), pairs_from=way)
    expected = [("q", f"r{better}", f"r{worse}") for better, worse in pairs]
    assert turns(shards) == expected
    ranked = prepared(tmp_path, scored(3, 1, 4, 2, key="rank"), pairs_from=way)
    assert turns(ranked) == [("q", f"r{5 - int(b)}", f"r{5 - int(w)}") for b, w in pairs]


def test_ties_small_gaps_and_missing_scores_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {
        "prompt": "q",
        "responses": ["a", "b", "c", "d", "e"],
        "scores": [3, 1.5, 3, 1, None],
    }
    shards = prepared(tmp_path, row, scored(2, 2), scored(1), pairs_from="all", min_gap=1)
    assert turns(shards) == [
        ("q", chosen, rejected)
        for chosen, rejected in (("a", "b"), ("a", "d"), ("c", "b"), ("c", "d"))
    ]
    left_out = {"tie": 2, "below_min_gap": 1, "no_score": 1, "single_response": 1}
    assert shards.manifest["left_out"] == left_out
    assert shards.manifest["dropped"] == {}
    assert sorted(dropped(shards)) == [
        (1, "below_min_gap"),
        (1, "no_score"),
        (1, "tie"),
        (2, "tie"),
        (3, "single_response"),
    ]
    out = capsys.readouterr().out
    assert "left    2 tie: two responses with the same score" in out


def kto(prompt: Any, completion: str, label: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label}


def test_labelled_responses_meet_at_their_prompt(tmp_path: Path) -> None:
    rows = [
        kto("p", "good 1", True),
        kto("q", "bad 1", False),
        kto("p", "good 2", True),
        kto("p", "bad 1", False),
        kto("q", "good 1", True),
        kto("p", "bad 2", False),
        kto("p", "bad 3", False),
        kto("r", "good 1", True),
    ]
    shards = prepared(tmp_path, *rows)
    assert turns(shards) == [
        ("p", "good 1", "bad 1"),
        ("q", "good 1", "bad 1"),
        ("p", "good 2", "bad 2"),
    ]
    assert shards.manifest["left_out"] == {"unpaired": 2}
    assert shards.manifest["rows"] == 8
    assert dropped(shards) == [(7, "unpaired"), (8, "unpaired")]
    assert turns(run(to_csv(tmp_path / "rows", rows), tmp_path / "pairs")) == turns(shards)


def test_labelled_messages_meet_too(tmp_path: Path) -> None:
    rows = [kto(said("q"), said("x", text)[1:], text == "a") for text in ("b", "a")]  # type: ignore[arg-type]
    shards = run(to_parquet(tmp_path / "rows", rows), tmp_path / "pairs")
    assert turns(shards) == [(said("q"), answer("a"), answer("b"))]


def test_labelled_responses_meet_whether_a_field_is_null_or_missing(tmp_path: Path) -> None:
    rows = [kto(said("q"), "a", True) | {"system": None}, kto(said("q"), "b", False)]
    rows[1]["prompt"] = [message | {"name": None} for message in said("q")]
    assert turns(prepared(tmp_path, *rows)) == [(said("q"), answer("a"), answer("b"))]


def test_half_a_character_in_a_labelled_row_costs_that_pair_alone(tmp_path: Path) -> None:
    rows = [kto(prompt, text, text == "a") for prompt in ("\ud83d", "q") for text in "ab"]
    shards = prepared(tmp_path, *rows, allow_dropped=True)
    assert turns(shards) == [("q", "a", "b")]
    assert shards.manifest["dropped"] == {"not_unicode": 1}
