"""A pair's id is a digest of its content in one canonical form, worked here by hand."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrpo.data.pairs import Pair, canonical_json, response_bytes, without_nulls

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


def user(content: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def assistant(content: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": content}]


def test_the_id_of_a_text_pair_is_the_digest_of_its_json_by_hand() -> None:
    by_hand = '{"chosen":" Zürich","prompt":"Where?","rejected":" \\"東京\\"\\n"}'
    pair = Pair("Where?", " Zürich", ' "東京"\n')
    assert pair.id == sha256(by_hand.encode()).digest()[:16]


def test_the_id_of_a_chat_pair_is_the_digest_of_its_json_by_hand() -> None:
    pair = Pair(
        [{"role": "user", "content": "2+2?", "name": None}],
        assistant("4"),
        assistant("5"),
        tools=[{"type": "function", "function": {"name": "add", "strict": None}}],
        chat_template_kwargs={"enable_thinking": False},
        source="arithmetic",
        split="validation",
    )
    by_hand = (
        '{"chat_template_kwargs":{"enable_thinking":false},'
        '"chosen":[{"content":"4","role":"assistant"}],'
        '"prompt":[{"content":"2+2?","role":"user"}],'
        '"rejected":[{"content":"5","role":"assistant"}],'
        '"tools":[{"function":{"name":"add"},"type":"function"}]}'
    )
    assert pair.id == sha256(by_hand.encode()).digest()[:16]


def test_where_a_pair_comes_from_does_not_change_its_id_and_its_content_does() -> None:
    pair = Pair(user("q"), assistant("a"), assistant("b"))
    assert Pair(user("q"), assistant("a"), assistant("b"), source="x", split="validation").id == (
        pair.id
    )
    others = [
        Pair("q", "a", "b"),
        Pair(user("q"), assistant("b"), assistant("a")),
        Pair(user("q "), assistant("a"), assistant("b")),
        Pair(user("q"), assistant("a"), assistant("b"), tools=[{"name": "t"}]),
        Pair(user("q"), assistant("a"), assistant("b"), chat_template_kwargs={"x": 1}),
    ]
    assert len({pair.id, *(variant.id for variant in others)}) == 1 + len(others)


def test_unicode_is_not_normalized() -> None:
    assert Pair("q", "é", "b").id != Pair("q", "e\u0301", "b").id


def test_half_a_surrogate_pair_has_no_id() -> None:
    with pytest.raises(UnicodeEncodeError):
        _ = Pair("q", "\ud83d", "b").id


@given(JSON)
def test_canonical_json_is_json_without_nulls_in_one_order(value: Any) -> None:
    text = canonical_json(value)
    assert json.loads(text) == without_nulls(value)
    shuffled = json.loads(json.dumps(value, sort_keys=True))
    assert canonical_json(shuffled) == text
    assert canonical_json(json.loads(text)) == text


def test_null_fields_go_at_any_depth_and_nulls_in_lists_stay() -> None:
    assert canonical_json({"b": [None, {"c": None, "null": 1}], "a": None}) == (
        '{"b":[null,{"null":1}]}'
    )


def test_response_bytes_are_utf8_bytes_of_the_contents() -> None:
    assert response_bytes("") == 0
    assert response_bytes("Zürich") == 7
    assert response_bytes(assistant("東京")) == 6
    assert response_bytes([{"role": "assistant", "content": "ab", "name": "ignored"}]) == 2


def test_a_tool_call_has_a_length() -> None:
    calls = [{"name": "add", "id": None}]
    assert response_bytes([{"role": "assistant", "tool_calls": calls}]) == len('[{"name":"add"}]')
