"""`mrpo prepare` as promised: ids, splits and shards that stay when data grows, what is dropped."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrpo.data import prepare as prepare_module
from mrpo.data.pairs import Pair, in_fraction, is_validation
from mrpo.errors import UserError
from mrpo.tests.data.raw_rows import (
    all_ids,
    all_pairs,
    chat_row,
    contents,
    dropped,
    run,
    text_rows,
    to_csv,
    to_jsonl,
    to_jsonl_gz,
    to_parquet,
    write,
)

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)
TEXT_ROWS = st.lists(
    st.tuples(WORDS, WORDS, WORDS).filter(lambda row: row[1] != row[2]), min_size=1, max_size=6
)


@settings(max_examples=25, deadline=None)
@given(TEXT_ROWS, st.booleans())
def test_a_pair_has_the_same_id_in_every_format(
    texts: list[tuple[str, str, str]], chat: bool
) -> None:
    rows = [
        chat_row(*row) if chat else dict(zip(("prompt", "chosen", "rejected"), row))
        for row in texts
    ]
    expected = list(dict.fromkeys(Pair(**row).id for row in rows))
    with tempfile.TemporaryDirectory() as folder:
        for write_format in (to_jsonl, to_jsonl_gz, to_csv, to_parquet):
            source = write_format(Path(folder) / "rows", rows)
            assert all_ids(run(source, Path(folder) / "pairs")) == expected


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(12)), st.integers(1, 12))
def test_ids_and_splits_depend_on_nothing_but_the_pair(order: list[int], shard_pairs: int) -> None:
    rows = text_rows(12)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        first = run(write(root / "a.jsonl", rows), root / "a", validation_fraction=0.4)
        shuffled = write(root / "b.jsonl", [rows[i] for i in order])
        second = run(shuffled, root / "b", validation_fraction=0.4, shard_pairs=shard_pairs)
        splits = [{pair.id: pair.split for pair in all_pairs(shards)} for shards in (first, second)]
        assert splits[0] == splits[1]


@pytest.mark.parametrize("chat", [False, True])
def test_the_implicit_and_the_explicit_prompt_are_the_same_pair(tmp_path: Path, chat: bool) -> None:
    if chat:
        explicit = chat_row("q", "a", "b")
        row = {name: explicit["prompt"] + explicit[name] for name in ("chosen", "rejected")}
    else:
        explicit = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
        row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    first = run(write(tmp_path / "a.jsonl", [explicit]), tmp_path / "a")
    assert all_ids(run(write(tmp_path / "b.jsonl", [row]), tmp_path / "b")) == all_ids(first)


TRL = "preference pairs (chosen, rejected)"


# What stays when data grows


def test_more_rows_leave_full_shards_and_splits_as_they_are(tmp_path: Path) -> None:
    options = {"shard_pairs": 10, "validation_fraction": 0.3}
    source = tmp_path / "rows.jsonl"
    few = run(write(source, text_rows(35)), tmp_path / "few", **options)
    grown = text_rows(35) + text_rows(5, 30) + text_rows(40, 100)  # some come again
    more = run(write(source, grown), tmp_path / "more", **options)
    assert few.rows == [10, 10, 10, 5]
    assert more.rows == [10] * 7 + [5]
    for name in few.names[:3]:
        assert (few.path / name).read_bytes() == (more.path / name).read_bytes()
    splits = {pair.id: pair.split for pair in all_pairs(more)}
    assert all(splits[pair.id] == pair.split for pair in all_pairs(few))


def test_preparing_again_into_the_same_folder_replaces_the_shards(tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    source = write(tmp_path / "rows.jsonl", text_rows(35))
    first = contents(run(source, out, shard_pairs=10).path)
    assert contents(run(source, out, shard_pairs=10).path) == first
    write(source, text_rows(12))
    (out / "notes.txt").write_text("mine")
    second = contents(run(source, out, shard_pairs=10).path)
    assert second["part-00000.parquet"] == first["part-00000.parquet"]
    assert sorted(second) == [
        "dropped.jsonl",
        "manifest.json",
        "notes.txt",
        "part-00000.parquet",
        "part-00001.parquet",
        "prepare.yaml",
    ]


# The split


def test_a_prompt_never_stands_on_both_sides(tmp_path: Path) -> None:
    rows = [chat_row(f"q{i % 40}", f"a{i}", f"b{i}") for i in range(200)]
    rows[50:60] = [row | {"tools": [{"name": "t"}]} for row in rows[50:60]]
    shards = run(write(tmp_path / "x.jsonl", rows), tmp_path / "x", validation_fraction=0.5)
    sides: dict[str, set[str]] = {}
    for pair in all_pairs(shards):
        sides.setdefault(str(pair.prompt), set()).add(pair.split)
    assert all(len(side) == 1 for side in sides.values())
    counts = {"train": 0, "validation": 0}
    for pair in all_pairs(shards):
        counts[pair.split] += 1
    assert shards.manifest["splits"] == counts
    assert min(counts.values()) > 0


@given(WORDS, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_only_adds_prompts(prompt: str, first: float, second: float) -> None:
    smaller, larger = sorted((first, second))
    for chosen in (is_validation, in_fraction):
        assert chosen(prompt, larger) or not chosen(prompt, smaller)
        assert not chosen(prompt, 0)
        assert chosen(prompt, 1)


def test_the_fraction_is_that_of_the_prompts() -> None:
    prompts = [f"prompt {i}" for i in range(10_000)]
    spread = 5 * (10_000 * 0.2 * 0.8) ** 0.5
    for chosen in (is_validation, in_fraction):
        assert abs(sum(chosen(prompt, 0.2) for prompt in prompts) - 2000) < spread
    # What is held out says nothing about which of the others a training fraction takes.
    training = [prompt for prompt in prompts if not is_validation(prompt, 0.5)]
    assert abs(sum(in_fraction(prompt, 0.4) for prompt in training) - 2000) < spread


# What is dropped


def test_duplicates_are_dropped_and_counted_and_the_order_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "BATCH_ROWS", 3)
    rows = text_rows(6)
    source = write(tmp_path / "a.jsonl", [rows[0], rows[1], rows[0], *rows, rows[2] | {"x": 1}])
    second = write(tmp_path / "b.jsonl", [rows[5], *text_rows(2, 50)])
    shards = run(f"{source},{second}", tmp_path / "pairs")
    assert [pair.prompt for pair in all_pairs(shards)] == [
        row["prompt"] for row in rows + text_rows(2, 50)
    ]
    assert shards.manifest["duplicates"] == 5
    assert shards.manifest["dropped"] == {}
    assert dropped(shards) == [(row, "duplicate") for row in (3, 4, 5, 10, 1)]


def test_unusable_rows_are_counted_by_reason_and_listed(tmp_path: Path) -> None:
    rows = text_rows(60)
    rows[4]["rejected"] = " "
    rows[7]["rejected"] = rows[7]["chosen"]
    rows[9]["chosen"] = "half \ud83d"
    shards = run(write(tmp_path / "x.jsonl", rows), tmp_path / "x")
    assert shards.manifest["rows"] == 60
    assert shards.num_pairs == 57
    assert shards.manifest["dropped"] == {
        "empty_response": 1,
        "not_unicode": 1,
        "responses_equal": 1,
    }
    assert dropped(shards) == [(5, "empty_response"), (8, "responses_equal"), (10, "not_unicode")]


def test_more_than_five_percent_unusable_needs_a_flag(tmp_path: Path) -> None:
    rows = text_rows(100)
    for row in rows[10:15]:
        row["chosen"] = ""
    source = write(tmp_path / "x.jsonl", rows)
    assert run(source, tmp_path / "x").num_pairs == 95
    rows[20]["chosen"] = rows[20]["rejected"]
    write(source, rows)
    before = contents(tmp_path)
    with pytest.raises(
        UserError,
        match=r"6 of 100 rows \(6\.0%\) cannot be used \(empty_response 5, responses_equal 1; "
        r"the first: .*x\.jsonl, line 11\); more than 5% needs --allow-dropped",
    ):
        run(source, tmp_path / "x")
    assert contents(tmp_path) == before
    assert run(source, tmp_path / "x", allow_dropped=True).num_pairs == 94


# Sources, columns, kinds


def test_several_sources_keep_their_names(tmp_path: Path) -> None:
    first = to_csv(tmp_path / "first", text_rows(2))
    rows = [text_rows(1, 10)[0] | {"source": "web"}, text_rows(1, 11)[0] | {"source": None}]
    second = to_parquet(tmp_path / "second", rows)
    shards = run(f"{first},{second}", tmp_path / "pairs")
    assert [pair.source for pair in all_pairs(shards)] == ["first", "first", "web", "second"]
    assert shards.manifest["sources"] == [
        {"given": str(first), "name": "first", "rows": 2, "format": [TRL], "unused": []},
        {"given": str(second), "name": "second", "rows": 2, "format": [TRL], "unused": []},
    ]


def test_other_column_names_are_given_by_flags(tmp_path: Path) -> None:
    rows = [{"q": "2+2?", "right": "4", "wrong": "5", "set": "sums"}]
    columns = {"prompt_column": "q", "chosen_column": "right", "rejected_column": "wrong"}
    for write_format in (to_jsonl, to_csv, to_parquet):
        source = write_format(tmp_path / "rows", rows)
        shards = run(source, tmp_path / "pairs", source_column="set", **columns)
        assert all_pairs(shards) == [Pair("2+2?", "4", "5", source="sums")]


def test_tools_and_template_arguments_survive_every_format(tmp_path: Path) -> None:
    tools = [{"name": "add", "parameters": {"x": {"type": "integer"}}}]
    rows = [chat_row("q1", "a", "b") | {"tools": tools, "chat_template_kwargs": {"think": True}}]
    rows += [chat_row("q2", "a", "b") | {"tools": [{"name": "now"}], "chat_template_kwargs": {}}]
    rows += [chat_row("q3", "a", "b") | {"tools": None, "chat_template_kwargs": None}]
    expected = [
        Pair(**rows[0], source="rows"),
        Pair(**(rows[1] | {"chat_template_kwargs": None}), source="rows"),
        Pair(**rows[2], source="rows"),
    ]
    for write_format in (to_jsonl, to_parquet):
        assert all_pairs(run(write_format(tmp_path / "rows", rows), tmp_path / "pairs")) == expected


def test_text_and_messages_do_not_mix_unless_text_is_wrapped(tmp_path: Path) -> None:
    text = write(tmp_path / "text.jsonl", text_rows(3))
    chat = write(tmp_path / "chat.jsonl", [chat_row("q", "a", "b")])
    with pytest.raises(
        UserError,
        match=r"chat\.jsonl, line 1 holds messages, but the first pair \(.*text\.jsonl, line 1\) "
        r"text; prepare them apart, or --chat",
    ):
        run(f"{text},{chat}", tmp_path / "pairs")
    shards = run(f"{text},{chat}", tmp_path / "pairs", chat=True)
    assert shards.kind == "messages"
    assert shards.num_pairs == 4


def test_chat_that_changes_nothing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "WARNING: --chat changed nothing: all pairs are messages already"
    chat = write(tmp_path / "chat.jsonl", [chat_row("q", "a", "b")])
    run(chat, tmp_path / "pairs")
    assert said not in capsys.readouterr().out
    run(chat, tmp_path / "pairs", chat=True)
    assert said in capsys.readouterr().out.splitlines()
    run(write(tmp_path / "text.jsonl", text_rows(3)), tmp_path / "pairs", chat=True)
    assert said not in capsys.readouterr().out


# What is told, and what it costs


def test_the_summary_and_the_settings_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*text_rows(30), text_rows(1)[0], {"prompt": "q", "chosen": "a", "rejected": ""}]
    source = write(tmp_path / "rows.jsonl", rows)
    shards = run(source, tmp_path / "pairs", validation_fraction=0.2, shard_pairs=20)
    train, held_out = (shards.manifest["splits"][name] for name in ("train", "validation"))
    assert capsys.readouterr().out.splitlines() == [
        f"rows    32: {TRL}",
        f"kept    30 pairs of text in 2 shards: {train} train, {held_out} validation",
        f"dropped 1 duplicates, 1 unusable (empty_response 1); see {tmp_path}/pairs/dropped.jsonl",
        f"pairs   {tmp_path}/pairs",
    ]
    assert "shard_pairs: 20" in (tmp_path / "pairs" / "prepare.yaml").read_text()
    assert shards.manifest["options"]["validation_fraction"] == 0.2


PEAK_MEMORY = r"""
import re, sys
from mrpo.data.config import PrepareConfig
from mrpo.data.prepare import prepare
prepare(PrepareConfig(source=sys.argv[1], out=sys.argv[2], shard_pairs=1000))
print(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.parametrize("kind", ["lines", "array", "labels"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, kind: str) -> None:
    peaks = []
    for count in (4_000, 40_000):
        source, rows = tmp_path / f"{count}.json", text_rows(count)
        if kind == "array":
            source.write_text(json.dumps(rows))  # a single line
        elif kind == "labels":  # all wait for the last one
            labelled = [{"completion": "x" * 500, "label": True} | row for row in rows]
            for row in labelled:
                del row["chosen"], row["rejected"]
            write(source, [*labelled, labelled[-1] | {"completion": "y", "label": False}])
        else:
            write(source, rows)
        command = [sys.executable, "-c", PEAK_MEMORY, str(source), str(tmp_path / str(count))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    # MB. The ids of 36,000 more pairs are 0.6; holding the pairs would be 30 and more.
    assert peaks[1] - peaks[0] < 15
