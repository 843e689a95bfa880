"""Faults of `mrpo prepare`: one line each, and nothing left behind that a reader could take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mrpo.data import prepare as prepare_module
from mrpo.data.shards import PairShards
from mrpo.errors import UserError
from mrpo.tests.data.raw_rows import all_pairs, chat_row, contents, run, text_rows, to_csv, write


def broken_line(folder: Path) -> dict[str, Any]:
    source = write(folder / "rows.jsonl", text_rows(30))
    with source.open("a") as file:
        file.write('{"prompt": \n')
    return {"source": source}


def missing_column(folder: Path) -> dict[str, Any]:
    return {"source": to_csv(folder / "rows", [{"prompt": "q", "chosen": "a"}])}


def unknown_role(folder: Path) -> dict[str, Any]:
    rows = [chat_row(f"q{i}", "a", "b") for i in range(30)]
    rows[29]["chosen"][0]["role"] = "bot"
    return {"source": write(folder / "rows.jsonl", rows)}


def one_unusable(folder: Path) -> dict[str, Any]:
    rows = [*text_rows(30), {"prompt": "q", "chosen": "a", "rejected": "a"}]
    return {"source": write(folder / "rows.jsonl", rows), "strict": True}


def mostly_unusable(folder: Path) -> dict[str, Any]:
    rows = text_rows(30)
    for row in rows[25:]:
        row["chosen"] = ""
    return {"source": write(folder / "rows.jsonl", rows)}


def no_pair_left(folder: Path) -> dict[str, Any]:
    rows = [row | {"chosen": ""} for row in text_rows(3)]
    return {"source": write(folder / "rows.jsonl", rows), "allow_dropped": True}


def no_rows(folder: Path) -> dict[str, Any]:
    return {"source": write(folder / "rows.jsonl", [])}


def second_source_missing(folder: Path) -> dict[str, Any]:
    return {"source": f"{write(folder / 'rows.jsonl', text_rows(3))},{folder / 'gone.csv'}"}


def mixed_kinds(folder: Path) -> dict[str, Any]:
    rows = [*text_rows(30), chat_row("q", "a", "b")]
    return {"source": write(folder / "rows.jsonl", rows)}


def bad_fraction(folder: Path) -> dict[str, Any]:
    return {"source": write(folder / "rows.jsonl", text_rows(3)), "validation_fraction": 1.0}


def bad_shard(folder: Path) -> dict[str, Any]:
    return {"source": write(folder / "rows.jsonl", text_rows(3)), "shard_pairs": 0}


FAULTS: list[tuple[Callable[[Path], dict[str, Any]], str]] = [
    (broken_line, r"rows\.jsonl, line 31 is not JSON: .* at column 13; each line must be one"),
    (missing_column, r"rows\.csv: column 'rejected' is missing; there are prompt, chosen; name"),
    (unknown_role, r"rows\.jsonl, line 30, field 'chosen\[0\]\.role' is 'bot'; a role is one of"),
    (
        one_unusable,
        r"rows\.jsonl, line 31 cannot be used: responses_equal \(.*\); without --strict",
    ),
    (mostly_unusable, r"5 of 30 rows \(16\.7%\) cannot be used .* needs --allow-dropped"),
    (no_pair_left, r"no pair is left of 3 rows \(dropped: empty_response 3\); at least one"),
    (no_rows, r"rows\.jsonl: there are no rows; at least one pair is needed"),
    (second_source_missing, r"gone\.csv: no such file"),
    (mixed_kinds, r"rows\.jsonl, line 31 holds messages, but the first pair .* text"),
    (bad_fraction, r"--validation-fraction is 1\.0; it must be below 1"),
    (bad_shard, r"--shard-pairs is 0; it must be between 1 and"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_fault_is_one_line_and_leaves_nothing_behind(
    tmp_path: Path, fault: Callable[[Path], dict[str, Any]], message: str
) -> None:
    options = {"shard_pairs": 10} | fault(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        run(out=tmp_path / "new" / "folders" / "pairs", **options)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before

    (tmp_path / "good").mkdir()
    kept = run(write(tmp_path / "good" / "g.jsonl", text_rows(12)), tmp_path / "good" / "pairs")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message):
        run(out=kept.path, **options)
    assert contents(tmp_path) == before


def test_an_interrupt_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "rows.jsonl", text_rows(30))
    before = contents(tmp_path)

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "write_resolved", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "new" / "pairs")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("out", ["rows.jsonl", "rows.jsonl/pairs", "rows.jsonl/a/b"])
def test_a_path_at_or_below_a_file_is_no_output(tmp_path: Path, out: str) -> None:
    source = write(tmp_path / "rows.jsonl", text_rows(3))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"--out .*: .*rows\.jsonl is a file; name a folder"):
        run(source, tmp_path / out)
    assert contents(tmp_path) == before


def test_a_folder_of_other_things_is_no_output(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", text_rows(3))
    with pytest.raises(UserError, match="holds other files; name a new folder"):
        run(source, tmp_path)
    (tmp_path / "empty").mkdir()
    assert run(source, tmp_path / "empty").num_pairs == 3


def test_a_killed_run_is_no_obstacle(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", text_rows(35))
    expected = contents(run(source, tmp_path / "pairs", shard_pairs=10).path)
    (tmp_path / "pairs" / "manifest.json").unlink()  # killed while the files took their places
    (tmp_path / "pairs" / ".preparing-x").mkdir()  # killed before
    (tmp_path / "pairs" / ".preparing-x" / "part-00000.parquet").touch()
    with pytest.raises(UserError, match="no prepared pairs"):
        PairShards(tmp_path / "pairs")
    assert contents(run(source, tmp_path / "pairs", shard_pairs=10).path) == expected


@pytest.mark.parametrize("stop", range(7))
def test_a_folder_half_replaced_is_never_taken_for_a_complete_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    out, source = tmp_path / "pairs", tmp_path / "rows.jsonl"
    run(write(source, text_rows(45)), out, shard_pairs=10)
    expected = contents(run(write(source, text_rows(35, 5)), tmp_path / "new", shard_pairs=10).path)
    moves, move = iter(range(100)), Path.replace

    def stopping(path: Path, target: Path) -> Path:
        if next(moves) == stop:
            raise OSError("no space left on device")
        return move(path, target)

    monkeypatch.setattr(Path, "replace", stopping)
    with pytest.raises(OSError, match="no space"):
        run(source, out, shard_pairs=10)
    with pytest.raises(UserError, match="no prepared pairs"):
        PairShards(out)
    monkeypatch.undo()
    again = contents(run(source, out, shard_pairs=10).path)
    assert again.pop("prepare.yaml") != expected.pop("prepare.yaml")  # another --out
    assert again == expected


# Pairs that somebody uses


def test_pairs_that_a_store_or_an_unfinished_run_uses_are_not_overwritten(
    tmp_path: Path, mrpo: Callable[..., Any]
) -> None:
    out, store, unfinished = tmp_path / "pairs", tmp_path / "store", tmp_path / "run"
    run(write(tmp_path / "rows.jsonl", text_rows(30)), out)
    changed = write(tmp_path / "changed.jsonl", text_rows(30, 1))
    for folder in (store, unfinished / "pairs"):
        folder.mkdir(parents=True)
    PairShards(out).note_use("run", unfinished)
    PairShards(out).note_use("store", store)
    before = contents(out)
    refused = mrpo("prepare", changed, "--out", out)
    assert refused.code == 2
    assert f"holds other pairs than these, and the unfinished run {unfinished}" in refused.err
    assert "and 1 more uses them; name another folder (--out" in refused.err
    assert contents(out) == before

    (unfinished / "pairs").rmdir()  # finished
    with pytest.raises(UserError, match=f"and the store {store} uses them"):
        run(changed, out)
    assert run(tmp_path / "rows.jsonl", out).num_pairs == 30  # the same pairs again
    overwritten = run(changed, out, overwrite=True)
    assert all_pairs(overwritten)[0].prompt == "1 + 1 = "
    assert "overwrite: false" in (out / "prepare.yaml").read_text()
    assert run(tmp_path / "rows.jsonl", out).num_pairs == 30  # nobody uses the new ones yet


def test_users_that_are_gone_hold_nothing(tmp_path: Path) -> None:
    shards = run(write(tmp_path / "rows.jsonl", text_rows(30)), tmp_path / "pairs")
    shards.note_use("run", tmp_path / "deleted")
    shards.note_use("store", tmp_path / "deleted")
    assert run(write(tmp_path / "rows.jsonl", text_rows(9)), shards.path).num_pairs == 9
    PairShards(shards.path).note_use("store", "s3://team/store")
    with pytest.raises(UserError, match="the store s3://team/store uses them"):
        run(write(tmp_path / "rows.jsonl", text_rows(8)), shards.path)
