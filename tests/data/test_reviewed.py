"""A reviewed table in the next run: excluded and flipped pairs, and unknown ids."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from mrpo.errors import UserError
from mrpo.tests.data.raw_rows import all_ids, all_pairs, run, text_rows, write


def reviewed(path: Path, rows: list[tuple[str, str]]) -> Path:
    """A table as `mrpo audit` writes it, filled in."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["pair_id", "reasons", "decision"])
        table.writerows([pair_id, "near_duplicate", decision] for pair_id, decision in rows)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", text_rows(30))


@pytest.fixture
def ids(source: Path, tmp_path: Path) -> list[str]:
    return [pair_id.hex() for pair_id in all_ids(run(source, tmp_path / "before"))]


def test_excluded_pairs_go_flipped_ones_turn_round_all_others_stay(
    source: Path, ids: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decisions = [(ids[3], "exclude"), (ids[5], "Flip"), (ids[7], "keep"), (ids[9], "")]
    table = reviewed(tmp_path / "audit.csv", decisions)
    shards = run(source, tmp_path / "after", exclude=str(table), flip=str(table))
    after = all_pairs(shards)
    expected = [pair for row, pair in enumerate(all_pairs(run(source, tmp_path / "b"))) if row != 3]
    turned = expected.pop(4)
    assert [pair for row, pair in enumerate(after) if row != 4] == expected
    assert (after[4].chosen, after[4].rejected) == (turned.rejected, turned.chosen)
    assert after[4].prompt == turned.prompt
    assert shards.manifest["reviewed"] == {"excluded": 1, "flipped": 1, "unknown": {}}
    assert "review  1 excluded, 1 flipped" in capsys.readouterr().out


def test_each_flag_takes_its_own_decisions_from_a_table(
    source: Path, ids: list[str], tmp_path: Path
) -> None:
    table = reviewed(tmp_path / "audit.csv", [(ids[3], "exclude"), (ids[5], "flip")])
    assert len(all_ids(run(source, tmp_path / "a", exclude=str(table)))) == 29
    assert len(all_ids(run(source, tmp_path / "b", flip=str(table)))) == 30


def test_a_table_without_decisions_means_all_of_its_rows(
    source: Path, ids: list[str], tmp_path: Path
) -> None:
    table = tmp_path / "ids.csv"
    table.write_text("pair_id\n" + "\n".join(ids[:2]) + "\n")
    after = all_ids(run(source, tmp_path / "after", exclude=str(table)))
    assert [pair_id.hex() for pair_id in after] == ids[2:]


def test_an_unknown_id_is_reported_and_changes_nothing(
    source: Path, ids: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = reviewed(tmp_path / "audit.csv", [("ab" * 16, "exclude"), (ids[0], "exclude")])
    shards = run(source, tmp_path / "after", exclude=str(table))
    assert shards.manifest["reviewed"]["unknown"] == {str(table): ["ab" * 16]}
    out = capsys.readouterr().out
    assert f"pairs of {table} that are not in the data: 1 ({'ab' * 16})" in out


def test_a_flipped_pair_is_left_out_by_its_new_id_too(source: Path, tmp_path: Path) -> None:
    ids = [pair_id.hex() for pair_id in all_ids(run(source, tmp_path / "before"))]
    first = reviewed(tmp_path / "first.csv", [(ids[5], "flip")])
    turned = all_ids(run(source, tmp_path / "once", flip=str(first)))[5].hex()
    second = reviewed(tmp_path / "second.csv", [(turned, "exclude")])
    shards = run(source, tmp_path / "twice", flip=str(first), exclude=str(second))
    assert [pair_id.hex() for pair_id in all_ids(shards)] == ids[:5] + ids[6:]


def test_a_pair_turned_into_another_of_the_data_counts_once(tmp_path: Path) -> None:
    rows = text_rows(3)
    rows.append(rows[0] | {"chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]})
    source = write(tmp_path / "rows.jsonl", rows)
    ids = [pair_id.hex() for pair_id in all_ids(run(source, tmp_path / "before"))]
    table = reviewed(tmp_path / "audit.csv", [(ids[3], "flip")])
    shards = run(source, tmp_path / "after", flip=str(table))
    assert [pair_id.hex() for pair_id in all_ids(shards)] == ids[:3]
    assert shards.manifest["duplicates"] == 1


def test_excluded_pairs_are_no_unusable_rows(
    source: Path, ids: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = reviewed(tmp_path / "audit.csv", [(pair_id, "exclude") for pair_id in ids[:20]])
    shards = run(source, tmp_path / "after", exclude=str(table), strict=True)
    assert shards.num_pairs == 10
    assert shards.manifest["dropped"] == {}
    assert (tmp_path / "after" / "dropped.jsonl").read_text().count('"excluded"') == 20


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("ab" * 16, "drop"), ["row 1", "'drop'", "keep, exclude, flip"]),
        (("ab" * 15, "exclude"), ["row 1", "32 hexadecimal digits"]),
        (("1.2E+31", "exclude"), ["row 1", "'1.2E+31'"]),  # what a spreadsheet can make of an id
    ],
)
def test_a_table_that_says_nothing_clear_is_refused(
    source: Path, tmp_path: Path, row: tuple[str, str], words: list[str]
) -> None:
    table = reviewed(tmp_path / "audit.csv", [row])
    with pytest.raises(UserError) as caught:
        run(source, tmp_path / "after", exclude=str(table))
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "after").exists()


def test_both_decisions_for_one_pair_are_refused(
    source: Path, ids: list[str], tmp_path: Path
) -> None:
    first = reviewed(tmp_path / "first.csv", [(ids[0], "exclude")])
    second = reviewed(tmp_path / "second.csv", [(ids[0], "flip")])
    with pytest.raises(UserError, match="keep one of the two decisions"):
        run(source, tmp_path / "after", exclude=str(first), flip=str(second))
