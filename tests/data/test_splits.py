"""What is held out: a split column, sources of their own, groups that never stand on both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mrpo.data import prepare as prepare_module
from mrpo.data.shards import PairShards
from mrpo.errors import UserError
from mrpo.tests.data.raw_rows import (
    all_ids,
    all_pairs,
    chat_row,
    dropped,
    run,
    text_rows,
    to_csv,
    to_jsonl,
    to_parquet,
    write,
)


def splits(shards: PairShards) -> dict[str, str]:
    """The split of each pair by its prompt, a text or its last message."""
    return {
        pair.prompt if isinstance(pair.prompt, str) else pair.prompt[-1]["content"]: pair.split
        for pair in all_pairs(shards)
    }


@pytest.mark.parametrize("write_format", [to_jsonl, to_csv, to_parquet])
def test_a_split_column_decides_what_is_held_out(
    tmp_path: Path, write_format: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    values = ["train", "validation", "test", "train_prefs", "dev", "Test_prefs", ""]
    rows = [row | {"split": value} for row, value in zip(text_rows(7), values)]
    shards = run(write_format(tmp_path / "rows", rows), tmp_path / "pairs")
    train = [rows[i]["prompt"] for i in (0, 3, 6)]
    assert [prompt for prompt, split in splits(shards).items() if split == "train"] == train
    assert shards.manifest["splits"] == {"train": 3, "validation": 4}
    assert shards.manifest["unused_columns"] == []
    out = capsys.readouterr().out
    assert "split   Test_prefs 1, dev 1, test 1, train 1, train_prefs 1, validation 1 (" in out


@pytest.mark.parametrize("batch_rows", [2, 4096])
def test_training_rows_of_a_held_out_prompt_are_taken_out_whatever_their_order(
    tmp_path: Path, batch_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "BATCH_ROWS", batch_rows)
    rows = [row | {"split": "train"} for row in text_rows(9)]
    rows += [rows[1] | {"split": "test"}, rows[4] | {"split": "validation", "chosen": "other"}]
    shards = run(write(tmp_path / "rows.jsonl", rows), tmp_path / "pairs")
    assert shards.manifest["splits"] == {"train": 7, "validation": 2}
    assert shards.manifest["left_out"] == {"in_validation": 2}
    assert dropped(shards) == [(2, "in_validation"), (5, "in_validation")]


def test_a_split_column_can_be_left_out_or_mapped(tmp_path: Path) -> None:
    rows = [row | {"split": "test", "fold": "train"} for row in text_rows(3)]
    source = write(tmp_path / "rows.jsonl", rows)
    shards = run(source, tmp_path / "pairs", ignore_columns="split")
    assert shards.manifest["splits"] == {"train": 3, "validation": 0}
    shards = run(source, tmp_path / "pairs", map=("split={fold}",))
    assert shards.manifest["splits"] == {"train": 3, "validation": 0}
    with pytest.raises(UserError, match=r"split column, so --validation-fraction 0.5 holds out"):
        run(source, tmp_path / "pairs", validation_fraction=0.5)


def test_a_split_column_in_later_rows_alone_is_refused(tmp_path: Path) -> None:
    rows = [*text_rows(3), text_rows(1, 7)[0] | {"split": "test"}, *text_rows(3, 20)]
    with pytest.raises(UserError, match="'split' is in a later row but not in the first; give"):
        run(write(tmp_path / "rows.jsonl", rows), tmp_path / "pairs")


def test_a_validation_source_is_held_out_and_wins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = to_csv(tmp_path / "held", text_rows(4))
    rows = text_rows(10, 2)
    rows[1] |= {"chosen": "another answer"}  # to the prompt of a held-out pair
    source = write(tmp_path / "rows.jsonl", rows)
    shards = run(source, tmp_path / "pairs", validation_source=str(held_out))
    assert shards.manifest["splits"] == {"train": 8, "validation": 4}
    assert shards.manifest["left_out"] == {"in_validation": 2}
    assert dropped(shards) == [(1, "in_validation"), (2, "in_validation")]
    assert "left    2 in_validation: a training pair whose" in capsys.readouterr().out
    assert [source["name"] for source in shards.manifest["sources"]] == ["held", "rows"]
    ids = {pair.id for pair in all_pairs(run(source, tmp_path / "alone"))}
    assert {pair.id for pair in all_pairs(shards) if pair.split == "train"} < ids


def test_more_training_rows_leave_the_shards_before_them(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "validation_source": str(write(tmp_path / "held.jsonl", text_rows(7))),
        "shard_pairs": 5,
    }
    few = run(write(tmp_path / "rows.jsonl", text_rows(10, 5)), tmp_path / "few", **options)
    more = run(write(tmp_path / "rows.jsonl", text_rows(30, 5)), tmp_path / "more", **options)
    for name in few.names[:-1]:
        assert (few.path / name).read_bytes() == (more.path / name).read_bytes()


def test_a_source_that_is_held_out_too_leaves_nothing_to_train_on(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", text_rows(3))
    shards = run(source, tmp_path / "pairs", validation_source=str(source))
    assert shards.manifest["splits"] == {"train": 0, "validation": 3}
    assert shards.manifest["left_out"] == {"in_validation": 3}


def test_two_ways_to_hold_out_are_one_too_many(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", text_rows(3))
    with pytest.raises(UserError, match=r"fraction is 0\.1, but --validation-source"):
        run(source, tmp_path / "pairs", validation_source=str(source), validation_fraction=0.1)


# Groups


def dialogue_rows(count: int) -> list[dict[str, Any]]:
    """Dialogues of one, two and three user turns, each extending the one before."""
    rows = []
    for i in range(count):
        prompt = [{"role": "user", "content": f"q{i}"}]
        for turn in range(3):
            rows.append(chat_row("", "a", "b") | {"prompt": list(prompt)})
            prompt += [
                {"role": "assistant", "content": "x"},
                {"role": "user", "content": f"more {i} {turn}"},
            ]
    return rows


def sides(shards: PairShards) -> dict[str, set[str]]:
    """The splits in which each first user turn stands."""
    found: dict[str, set[str]] = {}
    for pair in all_pairs(shards):
        assert isinstance(pair.prompt, list)
        found.setdefault(pair.prompt[0]["content"], set()).add(pair.split)
    return found


def test_dialogues_that_extend_each_other_stay_on_one_side(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", dialogue_rows(60))
    shards = run(source, tmp_path / "pairs", validation_fraction=0.4)
    assert all(len(side) == 1 for side in sides(shards).values())
    assert min(shards.manifest["splits"].values()) > 30
    by_prompt = run(source, tmp_path / "old", validation_fraction=0.4, group_by="prompt")
    assert any(len(side) == 2 for side in sides(by_prompt).values())
    assert all_ids(by_prompt) == all_ids(shards)  # the split is no part of the id


def test_prompts_of_one_user_turn_are_drawn_as_before(tmp_path: Path) -> None:
    for rows in (text_rows(60), [chat_row(f"q{i}", "a", "b") for i in range(60)]):
        source = write(tmp_path / "rows.jsonl", rows)
        first = run(source, tmp_path / "a", validation_fraction=0.4)
        second = run(source, tmp_path / "b", validation_fraction=0.4, group_by="prompt")
        assert splits(first) == splits(second)


def test_a_validation_source_takes_out_dialogues_that_extend_its_own(tmp_path: Path) -> None:
    rows = dialogue_rows(4)
    held_out = write(tmp_path / "held.jsonl", [rows[1]])
    options = {"validation_source": str(held_out)}
    source = write(tmp_path / "rows.jsonl", rows)
    shards = run(source, tmp_path / "pairs", **options)
    assert shards.manifest["left_out"] == {"in_validation": 3}
    shards = run(source, tmp_path / "pairs", group_by="prompt", **options)
    assert shards.manifest["left_out"] == {"in_validation": 1}


def test_a_column_can_make_the_groups(tmp_path: Path) -> None:
    rows = [row | {"topic": {"id": i // 4}} for i, row in enumerate(text_rows(160))]
    for source in (to_jsonl(tmp_path / "rows", rows), to_parquet(tmp_path / "rows", rows)):
        shards = run(source, tmp_path / "pairs", validation_fraction=0.4, group_column="topic")
        held_out = [split == "validation" for split in splits(shards).values()]
        blocks = [held_out[start : start + 4] for start in range(0, 160, 4)]
        assert all(len(set(block)) == 1 for block in blocks)
        assert 5 < sum(block[0] for block in blocks) < 30
        assert shards.manifest["unused_columns"] == []


def test_labelled_responses_of_a_prompt_meet_across_splits_and_are_held_out(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completion": "a", "label": True, "split": "test"},
        {"prompt": "p", "completion": "b", "label": False, "split": "train"},
    ]
    shards = run(write(tmp_path / "rows.jsonl", rows), tmp_path / "pairs")
    assert splits(shards) == {"p": "validation"}


def test_of_a_source_that_a_command_prepares_first_a_part_is_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(write(tmp_path / "rows.jsonl", text_rows(400)))
    shards = prepare_module.open_pairs(str(tmp_path / "pairs"), source)
    expected = run(source, tmp_path / "expected", validation_fraction=0.05)
    assert splits(shards) == splits(expected)
    held_out = shards.manifest["splits"]["validation"]
    assert 5 < held_out < 40
    assert f"{400 - held_out} train, {held_out} validation" in capsys.readouterr().out
    assert "validation_fraction: 0.05" in (shards.path / "prepare.yaml").read_text()
    assert prepare_module.open_pairs(str(tmp_path / "pairs"), None).digest == shards.digest


@pytest.mark.parametrize("validation", [3, 0])
def test_where_a_column_says_what_is_held_out_nothing_else_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], validation: int
) -> None:
    rows = [row | {"split": "train"} for row in text_rows(100)]
    rows += [row | {"split": "test"} for row in text_rows(validation, 100)]
    shards = prepare_module.open_pairs(
        str(tmp_path / "pairs"), str(write(tmp_path / "rows.jsonl", rows))
    )
    assert shards.manifest["splits"] == {"train": 100, "validation": validation}
    out = capsys.readouterr().out
    assert ("held    nothing: no run can validate; see --validation-fraction" in out) == (
        validation == 0
    )
