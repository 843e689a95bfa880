"""Every known form of a row, and the pair it becomes; what is unusable, and what is broken."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mrpo.data.config import ColumnSettings, PrepareConfig
from mrpo.data.formats import Broken, PairReader, RawPair, Unusable, split_common_text
from mrpo.data.layouts import RowReader
from mrpo.data.pairs import Pair, response_bytes

Messages = list[dict[str, Any]]
WORDS = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


def system(content: str) -> Messages:
    return [{"role": "system", "content": content}]


def user(content: str) -> Messages:
    return [{"role": "user", "content": content}]


def assistant(content: str) -> Messages:
    return [{"role": "assistant", "content": content}]


def read(row: dict[str, Any], **names: Any) -> Pair:
    return read_with(ColumnSettings(**names), PairReader("file"), row)


def read_with(settings: ColumnSettings, reader: PairReader, row: dict[str, Any]) -> Pair:
    """The pair of a row that holds a single one."""
    (example,) = RowReader(settings).expand(row)
    assert isinstance(example, RawPair)
    return reader.read(example)[0]


def row(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_text_with_a_prompt_stays_as_it_is() -> None:
    pair = read(row("The sky is", " blue.\n", " green."))
    assert pair == Pair("The sky is", " blue.\n", " green.", source="file")


def test_messages_with_a_prompt_stay_as_they_are() -> None:
    pair = read(row(system("s") + user("q"), assistant("a"), assistant("b")))
    assert pair == Pair(system("s") + user("q"), assistant("a"), assistant("b"), source="file")


def test_leading_messages_that_both_share_are_the_prompt() -> None:
    shared = system("s") + user("q") + assistant("x") + user("more")
    pair = read({"chosen": shared + assistant("a"), "rejected": shared + assistant("b")})
    assert (pair.prompt, pair.chosen, pair.rejected) == (shared, assistant("a"), assistant("b"))


@pytest.mark.parametrize("prompt", ["q2", " q2\n", "", None, user("q1"), user("q2"), []])
def test_a_prompt_beside_whole_conversations_changes_nothing(prompt: Any) -> None:
    shared = user("q1") + assistant("x") + user("q2")
    pair = read(row(prompt, shared + assistant("a"), shared + assistant("b")))
    assert (pair.prompt, pair.chosen, pair.rejected) == (shared, assistant("a"), assistant("b"))


def test_a_prompt_column_may_hold_more_than_the_conversations() -> None:
    prompt = system("s") + user("q")
    pair = read(row(prompt, user("q") + assistant("a"), user("q") + assistant("b")))
    assert pair.prompt == prompt
    pair = read(row(system("s"), user("q") + assistant("a"), user("q") + assistant("b")))
    assert pair.prompt == prompt


@pytest.mark.parametrize("prompt", ["q1", user("other"), user("q1") + user("q2"), system("s")])
def test_a_prompt_that_is_another_one_is_unusable(prompt: Any) -> None:
    shared = system("t") + user("q1") + assistant("x") + user("q2")
    with pytest.raises(Unusable, match="prompt_mismatch"):
        read(row(prompt, shared + assistant("a"), shared + assistant("b")))


def test_text_beside_messages_becomes_a_message() -> None:
    expected = Pair(user("q"), assistant("a"), assistant("b"), source="file")
    assert read(row(user("q"), "a", "b")) == expected
    assert read(row("q", assistant("a"), assistant("b"))) == expected


def test_chat_wraps_text_and_leaves_messages_alone() -> None:
    expected = Pair(user("q"), assistant(" a"), assistant("b"), source="file")
    assert read(row("q", " a", "b"), chat=True) == expected
    assert read(row(user("q"), assistant(" a"), assistant("b")), chat=True) == expected
    implicit = read({"chosen": "Q: who?\nA: me", "rejected": "Q: who?\nA: you"}, chat=True)
    assert (implicit.prompt, implicit.chosen) == (user("Q: who?\nA:"), assistant("me"))


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),  # as TRL
        ("The sky is blue", "The sky is black", ("The sky is", " blue", " black")),
        ("The sky is", "The sky is blue", ("The sky", " is", " is blue")),
        ("Q?\nyes", "Q?\nno", ("Q?\n", "yes", "no")),
        ("Answer:A", "Answer:B", ("Answer:", "A", "B")),
        ("天空是蓝色", "天空是绿色", ("天空是", "蓝色", "绿色")),
    ],
)
def test_the_common_beginning_of_two_texts_is_the_prompt(
    chosen: str, rejected: str, expected: tuple[str, str, str]
) -> None:
    assert split_common_text(chosen, rejected) == expected


@given(WORDS, WORDS, WORDS)
def test_a_split_text_is_the_same_text(prompt: str, chosen: str, rejected: str) -> None:
    assume(chosen != rejected)
    try:
        start, first, second = split_common_text(prompt + chosen, prompt + rejected)
    except Unusable:  # where one word is all that they share
        assume(False)
    assert (start + first, start + second) == (prompt + chosen, prompt + rejected)
    assert prompt.split()[:-1] == start.split()[: len(prompt.split()) - 1]
    assert first
    assert second


def dialogue(*turns: str) -> str:
    speakers = ("Human", "Assistant")
    return "".join(f"\n\n{speakers[i % 2]}: {turn}" for i, turn in enumerate(turns))


def test_dialogue_strings_become_messages() -> None:
    expected = Pair(
        user("hi\n\nthere") + assistant("hello") + user("q"),
        assistant("a: b"),
        assistant("c"),
        source="file",
    )
    start = ("hi\n\nthere", "hello", "q")
    chosen, rejected = dialogue(*start, "a: b"), dialogue(*start, "c")
    assert read({"chosen": chosen, "rejected": rejected}) == expected
    assert read(row("q", chosen, rejected)) == expected
    prompt = dialogue(*start, "")
    assert read(row(prompt, "a: b", "c")) == expected
    assert read(row(prompt, chosen, rejected)) == expected
    assert read(row(dialogue(*start), "\n\nAssistant: a: b", "\n\nAssistant: c")) == expected


def test_dialogues_that_differ_before_the_last_turn_are_unusable() -> None:
    chosen = dialogue("hi", "a", "q1", "b")
    for rejected in (dialogue("hi", "a", "q2", "b"), dialogue("hi", "x\n\nAssistant: y")):
        with pytest.raises(Unusable, match="prompt_not_shared"):
            read({"chosen": chosen, "rejected": rejected})


def test_after_a_dialogue_text_that_is_none_is_unusable() -> None:
    reader = PairReader("file")
    reader.read(RawPair({"chosen": dialogue("q", "a"), "rejected": dialogue("q", "b")}))
    with pytest.raises(Unusable, match="not_a_dialogue"):
        reader.read(RawPair({"chosen": dialogue("q", "a"), "rejected": "just text"}))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (row("q", "a", "  \n"), "empty_response"),
        (row("q", None, "b"), "empty_response"),
        (row("q", [], assistant("b")), "empty_response"),
        (row(user("q"), assistant(""), assistant("b")), "empty_response"),
        (
            row(user("q"), [{"role": "assistant", "content": None}], assistant("b")),
            "empty_response",
        ),
        (row(None, user("q"), user("q") + assistant("b")), "empty_response"),
        (row(None, dialogue("q", ""), dialogue("q", "b")), "empty_response"),
        (row(" ", "a", "b"), "empty_prompt"),
        (row("q", "a", "a"), "responses_equal"),
        (row(None, "q a", "q a"), "responses_equal"),
        (row(None, user("q") + assistant("a"), user("q") + assistant("a")), "responses_equal"),
        (row(None, "I like", "In fact"), "prompt_not_shared"),
        (row(None, user("q") + assistant("a"), user("r") + assistant("b")), "prompt_not_shared"),
        (row([], "a", "b"), "prompt_not_shared"),
        (row(user("q"), assistant("a") + user("r"), assistant("b")), "prompt_not_shared"),
        (
            row(user("q"), [*assistant("a"), {"role": "tool", "content": "t"}], assistant("b")),
            "tool_turn_in_response",
        ),
    ],
)
def test_unusable_rows_say_why(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        read(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (row("q", 5, "b"), "'chosen' must be text or a list of messages, not int"),
        (row("q", {"role": "user"}, "b"), "'chosen.content' is missing"),
        (row("q", {"from": "me", "value": "x"}, "b"), "'chosen.from' is 'me'; it is one of human"),
        (row("q", "a", assistant("b")), "'rejected' must be text or messages as the chosen"),
        (row("q", ["a"], assistant("b")), r"'chosen\[0\]' must be a message, not str"),
        (row([{"role": "bot", "content": "x"}], "a", "b"), r"'prompt\[0\].role' is 'bot'; a role"),
        (row([{"content": "x"}], "a", "b"), r"'prompt\[0\].role' is missing"),
        (row([{"role": "user"}], "a", "b"), r"'prompt\[0\].content' is missing"),
        (row([{"role": "user", "content": 3}], "a", "b"), r"content' must be text, not int"),
        (
            row([{"role": "user", "content": [{"type": "image"}]}], "a", "b"),
            r"'prompt\[0\].content\[0\]' is not a text part",
        ),
        (row("q", "a", "b") | {"tools": "[oops"}, "'tools' is text but not JSON"),
        (row("q", "a", "b") | {"tools": {"name": "t"}}, "'tools' must be a list of objects"),
        (row("q", "a", "b") | {"tools": ["t"]}, "'tools' must be a list of objects"),
        (row("q", "a", "b") | {"chat_template_kwargs": [1]}, "kwargs' must be an object"),
        (row("q", "a", "b") | {"chat_template_kwargs": {"x": b""}}, "that JSON cannot"),
    ],
)
def test_broken_structure_names_the_field(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Broken, match=message):
        read(values)


def test_contents_of_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "1"}]
    assert read(row([{"role": "user", "content": parts}], "a", "b")).prompt == user("q1")


def tool(content: str) -> Messages:
    return [{"role": "tool", "content": content}]


def call(name: str) -> Messages:
    calls = [{"type": "function", "function": {"name": name, "arguments": {}}}]
    return [{"role": "assistant", "tool_calls": calls}]


def test_a_response_may_hold_calls_and_their_results() -> None:
    chosen = call("f") + tool("1") + tool("2") + assistant("a")
    pair = read(row(user("q"), chosen, assistant("b")))
    assert (pair.prompt, pair.chosen, pair.rejected) == (user("q"), chosen, assistant("b"))
    assert response_bytes(pair.chosen) == response_bytes(call("f")) + 1  # not the tools' words


def test_a_shared_call_stays_with_its_result_where_results_differ() -> None:
    first, second = (user("q") + call("f") + tool(n) + assistant(n) for n in "12")
    pair = read({"chosen": first, "rejected": second})
    assert (pair.prompt, pair.chosen, pair.rejected) == (user("q"), first[1:], second[1:])
    same = user("q") + call("f") + tool("1")
    pair = read({"chosen": same + assistant("a"), "rejected": same + assistant("b")})
    assert (pair.prompt, pair.chosen) == (same, assistant("a"))
    pair = read({"chosen": user("q") + call("f"), "rejected": same + assistant("b")})
    assert (pair.prompt, pair.chosen) == (user("q"), call("f"))


@pytest.mark.parametrize("wrong", [tool("t"), tool("t") + assistant("a"), call("f") + tool("t")])
def test_a_tool_neither_opens_nor_ends_a_response(wrong: Messages) -> None:
    with pytest.raises(Unusable, match="tool_turn_in_response"):
        read(row(user("q"), wrong, assistant("b")))


def test_a_call_without_a_content_is_kept() -> None:
    assert read(row(user("q"), call("f"), assistant("b"))).chosen == call("f")


def test_further_message_fields_stay_and_null_ones_go() -> None:
    call = {"name": "add", "arguments": {"x": 1, "y": None}}
    chosen = [{"role": "assistant", "content": None, "tool_calls": [call], "name": None}]
    pair = read(row(user("q"), chosen, assistant("b")))
    assert pair.chosen == [
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"x": 1}}]}
    ]


def test_tools_and_template_arguments_may_be_json_text() -> None:
    tools, kwargs = [{"name": "t", "strict": None}], {"enable_thinking": False, "x": None}
    plain = read(row("q", "a", "b") | {"tools": tools, "chat_template_kwargs": kwargs})
    assert plain.tools == [{"name": "t"}]
    assert plain.chat_template_kwargs == {"enable_thinking": False}
    text = {"tools": '[{"name":"t"}]', "chat_template_kwargs": '{"enable_thinking": false}'}
    assert read(row("q", "a", "b") | text) == plain
    empty: dict[str, Any] = {"tools": [], "chat_template_kwargs": {"enable_thinking": None}}
    assert read(row("q", "a", "b") | empty) == read(row("q", "a", "b") | {"tools": ""})


def test_other_column_names() -> None:
    names = PrepareConfig(
        source="file.jsonl",
        out="pairs",
        prompt_column="question",
        chosen_column="right",
        rejected_column="wrong",
        source_column="origin",
    )
    values = {"question": "q", "right": "a", "wrong": "b", "origin": "o", "prompt": 3, "source": 4}
    reader = PairReader("file")
    assert read_with(names, reader, values) == Pair("q", "a", "b", source="o")
    assert sorted(RowReader(names).choose("file: column", list(values))) == sorted(
        ["question", "right", "wrong", "origin"]
    )
    with pytest.raises(Broken, match="'origin' must be text, not int"):
        read_with(names, reader, values | {"origin": 5})


def test_the_source_is_the_column_or_the_name() -> None:
    values = row("q", "a", "b")
    assert read(values | {"source": "web"}).source == "web"
    for none in (None, "", ["not text"]):
        assert read(values | {"source": none}).source == "file"
