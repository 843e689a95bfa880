"""A response's messages before a template: sentinels in their place, reasoning, what must be shown.

Reasoning comes as a field (`reasoning_content`, `thinking`, `reasoning`) or as `<think>…</think>`
in the content, and templates read it in one of these places. `template.py` renders what this module
makes of a response.
"""

from __future__ import annotations

import contextlib
import html
import json
import re
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Any

from ..pairs import Message
from .program import TEMPLATE_ERRORS

Show = Callable[..., str]  # (messages, asks=False): the text, with a generation prompt if it asks
# Of different first characters, last characters and lengths; backwards they stand for reasoning.
SENTINELS = ("SENTINELxRESPONSE", "AnotherxSENTINELxOFxTHEM")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
# The generation prompt may have opened the block, so that the data only closes it.
THOUGHTS = re.compile(r"(\s*(?:<think>)?\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)


def sentinel_start(
    show: Show, prompt: list[Message], turns: list[Message], text: str
) -> int | None:
    """Where sentinels in place of the assistant's turns begin; None where `text` differs before.

    First the whole content is replaced, then only what is inside and behind its thoughts. A turn
    of tool calls alone begins where its text leaves that of a sentinel answer.
    """
    ways = [(False, False), (True, False), (False, True)]
    for way in ways[: 2 + (len(turns) > 1)]:  # a template may refuse a tool's result without a call
        try:
            shown = [show([*prompt, *_masked(turns, word, *way)]) for word in SENTINELS]
        except TEMPLATE_ERRORS:
            continue
        head = common_beginning(*shown)
        if not shown[0].startswith((SENTINELS[0], SENTINELS[0][::-1]), len(head)):
            continue
        if text.startswith(head):
            return len(head)
        if not turns[0].get("content") and turns[0].get("tool_calls"):
            end = len(_before_marker(common_beginning(head, text)))
            return end if end >= len(common_beginning(show(prompt), head)) else None
    return None


def turn_end(
    show: Show, opened: list[Message], tool_turn: Message, text: str, start: int, end_mark: str
) -> int | None:
    """Where the assistant's turn before a tool's turn ends: behind the last end mark before it.

    `opened` is the conversation up to the tool's turn, `start` where the assistant's begins.
    """
    shown = [show([*opened, {**tool_turn, "content": word}]) for word in SENTINELS]
    tool_begin = len(common_beginning(*shown))
    at = text.rfind(end_mark, start, tool_begin) if end_mark else -1
    return at + len(end_mark) if at >= 0 and text.startswith(shown[0][:tool_begin]) else None


def shows_reasoning(show: Show, prompt: list[Message], turns: list[Message]) -> bool:
    """Whether the template shows the reasoning of every turn, tried with sentinels.

    The text alone can't tell: short reasoning may stand in the answer too.
    """
    word = SENTINELS[0][::-1]
    count = sum(bool(_split(message)[1]) for message in turns)
    if not count:
        return True
    return show([*prompt, *_masked(turns, SENTINELS[0], True)]).count(word) >= count


def reasoning_forms(turns: list[Message]) -> Iterator[list[Message]]:
    """The turns as given, then with their reasoning in every place that templates read it from."""
    yield turns
    if any(_split(message)[1] for message in turns):
        for write in _WRITERS:
            form = [_rewritten(message, write) for message in turns]
            if form != turns:
                yield form


def common_beginning(first: str, second: str) -> str:
    """The text with which both begin."""
    return first[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))]


def _before_marker(text: str) -> str:
    """The text without a tag or control token that it ends within."""
    for opening, closing in ("<>", "[]"):
        if (at := text.rfind(opening)) > text.rfind(closing):
            text = text[:at]
    return text


def absent_part(turns: list[Message], text: str) -> str | None:
    """The part of the assistant's turns that is not in `text`, in words; None where all is.

    White space doesn't count, nor a template's own escaping as JSON or HTML.
    """
    squeezed = None
    for message in turns:
        if message["role"] != "assistant":
            continue
        for name, part in _parts(message):
            if part in text:
                continue
            squeezed = _squeeze(text) if squeezed is None else squeezed
            if not any(_squeeze(form) in squeezed for form in _escaped(part)):
                return name
    return None


def _masked(
    turns: list[Message], word: str, keeps_thoughts: bool, keeps_calls: bool = False
) -> list[Message]:
    """The turns with a sentinel for every content, and backwards for all reasoning.

    A call without content becomes content unless `keeps_calls`.
    """
    masked = []
    for message in turns:
        if message["role"] != "assistant":
            masked.append(message)
            continue
        content = message.get("content") or ""
        mask: dict[str, Any] = {
            field: word[::-1] for field in REASONING_FIELDS if message.get(field)
        }
        if isinstance(content, list):
            mask["content"] = [
                {**part, part["type"]: word[::-1] if part["type"] == "thinking" else word}
                for part in content
            ]
        elif keeps_thoughts and (found := THOUGHTS.fullmatch(content)):
            mask["content"] = f"{found[1]}{word[::-1]}{found[3]}{word}"
        else:
            mask["content"] = word
        masked.append({**message, **mask})
        if not content and not keeps_calls:
            masked[-1].pop("tool_calls", None)
    return masked


def _split(message: Message) -> tuple[Message, str]:
    """An assistant's message without its reasoning, and the reasoning; "" where there is none."""
    if message["role"] != "assistant":
        return message, ""
    rest = {key: value for key, value in message.items() if key not in REASONING_FIELDS}
    fields = (message.get(field) for field in REASONING_FIELDS)
    reasoning = next((value for value in fields if isinstance(value, str) and value.strip()), "")
    content = message.get("content") or ""
    if isinstance(content, list):
        thoughts = [part.get("thinking") or "" for part in content]
        return rest, reasoning or "".join(thoughts)
    if not reasoning and (found := THOUGHTS.fullmatch(content)):
        return {**rest, "content": found[4]}, found[2]
    return rest, reasoning


def _rewritten(message: Message, write: Callable[[str, str], dict[str, Any]]) -> Message:
    rest, reasoning = _split(message)
    return {**rest, **write(reasoning, rest.get("content") or "")} if reasoning else message


_WRITERS: tuple[Callable[[str, str], dict[str, Any]], ...] = (
    lambda reasoning, content: {"reasoning_content": reasoning},
    lambda reasoning, content: {"thinking": reasoning},
    lambda reasoning, content: {"reasoning": reasoning},
    lambda reasoning, content: {"content": f"<think>\n{reasoning}\n</think>\n\n{content}"},
    lambda reasoning, content: {
        "content": [
            {"type": "thinking", "thinking": reasoning},
            {"type": "text", "text": content},
        ]
    },
)


def _parts(message: Message) -> Iterator[tuple[str, str]]:
    """What of an assistant's message must be shown, each with its name; no outer white space."""
    content = message.get("content") or ""
    if isinstance(content, list):
        for part in content:
            yield f"its {part['type']}", str(part[part["type"]]).strip()
    elif found := THOUGHTS.fullmatch(content):
        yield "its reasoning", found[2]
        yield "its content", found[4].strip()
    else:
        yield "its content", content.strip()
    for field in REASONING_FIELDS:
        if isinstance(message.get(field), str):
            yield f"its {field}", message[field].strip()
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        yield "the name of a tool call", str(function.get("name") or "")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments)
        for leaf in _texts(arguments):
            yield "an argument of a tool call", leaf


def _texts(value: Any) -> Iterator[str]:
    """The texts in a JSON value, at any depth."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _escaped(part: str) -> Iterator[str]:
    yield part
    yield html.escape(part)
    for keeps_unicode in (True, False):
        once = json.dumps(part, ensure_ascii=not keeps_unicode)[1:-1]
        yield once
        yield json.dumps(once, ensure_ascii=not keeps_unicode)[1:-1]


def _squeeze(text: str) -> str:
    return "".join(text.split())
