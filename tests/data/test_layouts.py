"""People's files: one fixture a format, the pairs they become, and what is named or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mrpo.data.pairs import Pair
from mrpo.data.shards import PairShards
from mrpo.errors import UserError
from mrpo.tests.data.raw_rows import (
    all_pairs,
    answer,
    formats,
    prepared,
    run,
    said,
    scored,
    to_csv,
    to_jsonl,
    to_parquet,
    turns,
    write,
)


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


SYSTEM = [{"role": "system", "content": "s"}]
ALPACA = {"instruction": "Add.", "input": "1 and 2", "chosen": "3", "rejected": "4"}
FORMATS: dict[str, tuple[dict[str, Any], str, tuple[Any, Any, Any]]] = {
    "alpaca": (
        ALPACA,
        "Alpaca pairs (chosen, rejected)",
        (said("Add.\n1 and 2"), answer("3"), answer("4")),
    ),
    "alpaca without input": (
        ALPACA | {"input": ""},
        "Alpaca pairs (chosen, rejected)",
        (said("Add."), answer("3"), answer("4")),
    ),
    "alpaca with system and history": (
        ALPACA | {"system": "s", "history": [["q1", "a1"], ["q2", "a2"]]},
        "Alpaca pairs (chosen, rejected)",
        (
            SYSTEM + said("q1", "a1", "q2", "a2", "Add.\n1 and 2"),
            answer("3"),
            answer("4"),
        ),
    ),
    "question with system": (
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        "question pairs (chosen, rejected)",
        (SYSTEM + said("q"), answer("a"), answer("b")),
    ),
    "text with system": (
        {"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"},
        "preference pairs (chosen, rejected)",
        (SYSTEM + said("q"), answer("a"), answer("b")),
    ),
    "messages with system": (
        {"system": "s", "chosen": said("q", "a"), "rejected": said("q", "b")},
        "preference pairs (chosen, rejected)",
        (SYSTEM + said("q"), answer("a"), answer("b")),
    ),
    "text with history": (
        {"history": [["q1", "a1"]], "prompt": "q", "chosen": "a", "rejected": "b"},
        "preference pairs (chosen, rejected)",
        (said("q1", "a1", "q"), answer("a"), answer("b")),
    ),
    "ShareGPT": (
        {
            "conversations": [{"from": "system", "value": "s"}, human("q1"), gpt("x"), human("q")],
            "chosen": gpt("a"),
            "rejected": gpt("b"),
        },
        "ShareGPT pairs (chosen, rejected)",
        (SYSTEM + said("q1", "x", "q"), answer("a"), answer("b")),
    ),
    "ShareGPT dialogues": (
        {"chosen": [human("q"), gpt("a")], "rejected": [human("q"), gpt("b")]},
        "preference pairs (chosen, rejected)",
        (said("q"), answer("a"), answer("b")),
    ),
    "single messages": (
        {
            "prompt": {"role": "user", "content": "q"},
            "chosen": {"role": "assistant", "content": "a"},
            "rejected": {"role": "assistant", "content": "b"},
        },
        "preference pairs (chosen, rejected)",
        (said("q"), answer("a"), answer("b")),
    ),
    "OpenAI": (
        {
            "input": {"messages": said("q", system="s"), "tools": [], "parallel_tool_calls": True},
            "preferred_output": answer("a"),
            "non_preferred_output": answer("b"),
        },
        "OpenAI's preference pairs",
        (said("q", system="s"), answer("a"), answer("b")),
    ),
    "UltraFeedback": (
        {
            "source": "evol_instruct",
            "instruction": "q",
            "models": ["m", "n", "o"],
            "completions": [
                {"model": "m", "response": "b", "overall_score": 3.0, "fine-grained_score": 4.5},
                {"model": "n", "response": "c", "overall_score": 5.0, "fine-grained_score": 4.0},
                {"model": "o", "response": "a", "overall_score": 7.5, "fine-grained_score": 3.5},
            ],
        },
        "scored responses (completions by overall_score, best-worst)",
        (said("q"), answer("a"), answer("b")),
    ),
    "Nectar": (
        {
            "prompt": "\n\nHuman: q\n\nAssistant: ",
            "answers": [
                {"answer": "b", "model": "m", "rank": 3.0},
                {"answer": "c", "model": "n", "rank": 2.0},
                {"answer": "a", "model": "o", "rank": 1.0},
            ],
            "turns": 1,
            "source": ["x"],
        },
        "scored responses (answers by rank, best-worst)",
        (said("q"), answer("a"), answer("b")),
    ),
    "responses with ratings beside": (
        {"prompt": "q", "responses": ["b", "a"], "ratings": [1, 2]},
        "scored responses (responses by ratings, best-worst)",
        ("q", "a", "b"),
    ),
    "right and wrong answers": (
        {
            "question": "q",
            "answers": [
                {"solution": "b", "is_correct": False},
                {"solution": "a", "is_correct": True},
            ],
        },
        "scored responses (answers by is_correct, best-worst)",
        (said("q"), answer("a"), answer("b")),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_understood_and_named(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row, kind, expected = FORMATS[name]
    shards = prepared(tmp_path, row)
    assert turns(shards) == [expected]
    assert formats(shards) == [kind]
    assert capsys.readouterr().out.splitlines()[0] == f"rows    1: {kind}"


@pytest.mark.parametrize("name", FORMATS)
def test_parquet_gives_the_same_pairs(tmp_path: Path, name: str) -> None:
    row, kind, expected = FORMATS[name]
    shards = run(to_parquet(tmp_path / "rows", [row]), tmp_path / "pairs")
    assert turns(shards) == [expected]
    assert formats(shards) == [kind]


@pytest.mark.parametrize("name", ["alpaca", "ShareGPT", "single messages", "OpenAI", "Nectar"])
def test_csv_with_json_in_its_cells_gives_the_same_pairs(tmp_path: Path, name: str) -> None:
    row, _, expected = FORMATS[name]
    assert turns(run(to_csv(tmp_path / "rows", [row]), tmp_path / "pairs")) == [expected]


def test_function_calls_of_sharegpt_and_roles_of_tools(tmp_path: Path) -> None:
    call = {"name": "add", "arguments": {"x": 1}}
    row = {
        "conversations": [
            human("q"),
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "3"},
        ],
        "chosen": gpt("a"),
        "rejected": gpt("b"),
    }
    openai: dict[str, Any] = {
        "prompt": [
            *said("q"),
            {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "ipython", "content": "3"},
        ],
        "chosen": answer("a"),
        "rejected": answer("b"),
    }
    first = turns(prepared(tmp_path, row))
    assert first == turns(prepared(tmp_path, openai))
    openai["prompt"][2]["role"] = "function"
    assert first == turns(prepared(tmp_path, openai))
    assert first[0][0][1:] == [openai["prompt"][1], {"role": "tool", "content": "3"}]


def test_the_score_is_named_by_a_flag(tmp_path: Path) -> None:
    row, _, _ = FORMATS["UltraFeedback"]
    shards = prepared(tmp_path, row, score_column="fine-grained_score")
    assert turns(shards) == [(said("q"), answer("b"), answer("a"))]
    assert "completions.overall_score" in shards.manifest["unused_columns"]


# Columns that are not used


def test_unused_columns_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "id": 7}
    for source in (to_jsonl(tmp_path / "rows", [row]), to_parquet(tmp_path / "rows", [row])):
        shards = run(source, tmp_path / "pairs")
        assert shards.manifest["unused_columns"] == ["score_chosen", "id"]
        assert "unused  columns score_chosen, id\n" in capsys.readouterr().out


def test_unused_fields_of_responses_are_named(tmp_path: Path) -> None:
    shards = prepared(tmp_path, FORMATS["UltraFeedback"][0])
    assert shards.manifest["unused_columns"] == [
        "models",
        "completions.fine-grained_score",
        "completions.model",
    ]


def test_a_column_of_a_later_row_is_named_or_stops_too(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    assert prepared(tmp_path, *rows, rows[0] | {"x": 1}).manifest["unused_columns"] == ["x"]
    with pytest.raises(UserError, match=r"line 4, field 'context' looks like a part of the prompt"):
        prepared(tmp_path, *rows, rows[0] | {"context": "c"})


@pytest.mark.parametrize("name", ["input", "context", "Context", "instruction", "question"])
def test_a_part_of_the_prompt_must_be_used_or_left_out(tmp_path: Path, name: str) -> None:
    row = {"prompt": "q", name: "c", "chosen": "a", "rejected": "b"}
    for source in (to_jsonl(tmp_path / "rows", [row]), to_parquet(tmp_path / "rows", [row])):
        with pytest.raises(
            UserError, match=rf"{name}' looks .* --ignore-columns {name}$"
        ) as caught:
            run(source, tmp_path / "pairs")
        assert "\n" not in str(caught.value)
        shards = run(source, tmp_path / "pairs", ignore_columns=name)
        assert turns(shards) == [("q", "a", "b")]
        assert shards.manifest["unused_columns"] == [name]
        shards = run(source, tmp_path / "pairs", map=(f"prompt={{prompt}}\\n{{{name}}}",))
        assert turns(shards) == [("q\nc", "a", "b")]


def test_the_alpaca_input_is_not_lost_beside_a_named_prompt(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'input' looks like a part of the prompt"):
        prepared(tmp_path, ALPACA, prompt_column="instruction")


def test_an_ignored_column_that_is_nowhere_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"}, ignore_columns="x")
    assert (
        "WARNING: columns of --ignore-columns that the data has not: x" in capsys.readouterr().out
    )


# --map


def test_map_builds_any_field(tmp_path: Path) -> None:
    row = {"a": "x", "b": "", "n": {"good": ["1", "2"], "bad": said("x", "3")[1:]}, "k": 5}
    fields = (
        "prompt={a}\\n{b}",
        "chosen={n.good.1}",
        "rejected={n.bad.0.content}",
        "source=set {k}",
    )
    (pair,) = all_pairs(prepared(tmp_path, row, map=fields))
    assert pair == Pair("x", "2", "3", source="set 5")


def test_braces_of_the_text_are_written_twice_and_a_name_may_hold_anything_else(
    tmp_path: Path,
) -> None:
    row = {"a:b!r": "x {y}", "chosen": "1", "rejected": "2"}
    (pair,) = all_pairs(prepared(tmp_path, row, map=('prompt={{"q": "{a:b!r}"}}',)))
    assert pair.prompt == '{"q": "x {y}"}'


def test_a_template_of_a_column_alone_keeps_its_messages(tmp_path: Path) -> None:
    row = {"talk": said("q"), "good": answer("a"), "bad": answer("b")}
    fields = ("prompt={talk}", "chosen={good}", "rejected={bad}")
    assert turns(prepared(tmp_path, row, map=fields)) == [(said("q"), answer("a"), answer("b"))]


def test_map_on_the_command_line_and_in_yaml(tmp_path: Path, mrpo: Any) -> None:
    source = write(tmp_path / "rows.jsonl", [{"a": "x", "b": "y", "chosen": "1", "rejected": "2"}])
    out = tmp_path / "pairs"
    ran = mrpo("prepare", source, "--out", out, "--map", r"prompt={a}\n{b}", "--map", "source=s{a}")
    assert (ran.code, ran.err) == (0, "")
    (pair,) = all_pairs(PairShards(out))
    assert (pair.prompt, pair.source) == ("x\ny", "sx")
    config = out / "prepare.yaml"
    ran = mrpo("prepare", source, "--config", config, "--out", tmp_path / "again")
    assert ran.code == 0
    assert all_pairs(PairShards(tmp_path / "again")) == [pair]
    (tmp_path / "run.yaml").write_text('map: {prompt: "{a}\\n{b}", source: "s{a}"}')
    ran = mrpo("prepare", source, "--config", tmp_path / "run.yaml", "--out", tmp_path / "yaml")
    assert all_pairs(PairShards(tmp_path / "yaml")) == [pair]


PLAIN = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (PLAIN, {"map": ("x={chosen}",)}, "--map is 'x={chosen}'; it must be FIELD=TEMPLATE"),
        (PLAIN, {"map": ("prompt=text",)}, "'text' must name columns, as in {instruction}"),
        (PLAIN, {"map": ("prompt={a",)}, "'{a' is no template: .* a brace that is text twice"),
        (PLAIN, {"map": ("prompt={chosen}}",)}, "is no template: Single '}'.* text twice, {{ or"),
        (PLAIN, {"map": ('prompt={"q": {chosen}}',)}, "has a brace inside braces; write a brace"),
        (PLAIN, {"map": ("prompt={{chosen}}",)}, "must name columns, .* text twice"),
        (PLAIN, {"map": ("prompt={chosen:>9}",)}, "field 'chosen:>9' is missing; there are pro"),
        (PLAIN, {"map": ("prompt={chosen!r}",)}, "field 'chosen!r' is missing; there are pro"),
        (PLAIN, {"map": ("prompt={a}",)}, "'a' is missing; there are prompt, chosen, rejected; --"),
        (PLAIN, {"map": ("prompt={chosen}",) * 2}, "--map prompt is given twice; keep one"),
        (PLAIN, {"map": ("label={chosen}",)}, "--map label is not used: the rows are read as pref"),
        (PLAIN, {"map": ("prompt={chosen}",), "prompt_column": "prompt"}, "both given; keep one"),
        (PLAIN | {"x": [1]}, {"map": ("prompt={x}!",)}, "'prompt' must be text, not list"),
        (PLAIN, {"pairs_from": "all"}, "'completions' is missing; .* are for rows of scored"),
        (PLAIN, {"min_gap": -1.0}, "--min-gap is -1.0; it must be 0 or more"),
        (scored("good", "bad"), {}, r"completions\[0\].score' is 'good'; it must be a number"),
        (scored(1, 2) | {"completions": 3}, {}, "'completions' must be a list, not int"),
        (scored(1, 2, key="x"), {}, r"completions\[0\]' has no score; --score-column names"),
        (
            {"prompt": "q", "completions": [{"x": 1, "score": 1}]},
            {},
            r"completions\[0\]' has no text; it may be response, text",
        ),
        ({"completions": ["a"], "scores": [1]}, {}, "'prompt' is missing; there are completions"),
        (ALPACA | {"history": "text"}, {}, "'history' must be a message or .question, answer"),
        (PLAIN | {"system": 3}, {}, "'system' must be text, not int"),
        (
            ALPACA | {"history": '[{"role": "user", "role": "user"}]'},
            {},
            "'history' holds JSON in which key 'role' is there twice; keep one",
        ),
        (
            PLAIN | {"tools": '[{"a": 1, "a": 2}]'},
            {},
            "'tools' holds JSON in which key 'a' is there twice; keep one",
        ),
        (PLAIN | {"split": "gold"}, {}, "'split' is 'gold'; it must be train, validation or test"),
        (PLAIN, {"group_column": "g"}, "'g' is missing; .*--group-column names it"),
    ],
)
def test_what_fits_nothing_is_one_line(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        prepared(tmp_path, row, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pairs").exists()


def test_a_system_column_against_the_prompt_of_its_own(tmp_path: Path) -> None:
    rows = [
        {"system": own, "prompt": said(f"q{own}", system="s"), "chosen": "a", "rejected": "b"}
        for own in ("s", "", "t")
    ]
    shards = prepared(tmp_path, *rows, allow_dropped=True)
    assert [pair.prompt for pair in all_pairs(shards)] == [rows[0]["prompt"], rows[1]["prompt"]]
    assert shards.manifest["dropped"] == {"two_systems": 1}
