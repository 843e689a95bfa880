"""Chat messages, tools and template arguments as they come from a file, checked and in one form.

What is checked is what every chat template relies on: known roles, contents of text. Fields that
are null are removed (Parquet fills every struct's missing fields with nulls), contents given as
text parts are joined, other fields stay as they are.


HH-RLHF's dialogue strings as messages: "\n\nHuman: …\n\nAssistant: …"."""

from __future__ import annotations

import json
import re
from typing import Any

from .pairs import Message, canonical_json, without_nulls

ROLES = ("system", "developer", "user", "assistant", "tool")


class Broken(ValueError):
    """Structure that is wrong: the field, and what is wrong with it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"field {field!r} {message}")
        self.field = field


def parse_messages(field: str, values: list[Any]) -> list[Message]:
    """The messages of a list; raises `Broken` naming the field, as in `chosen[2].role`."""
    return [_message(f"{field}[{index}]", value) for index, value in enumerate(values)]


def json_field(field: str, value: Any, kind: type) -> Any:
    """`tools` (list of objects) or `chat_template_kwargs` (object), also as JSON text.

    None where there is none or it is empty.
    """
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Broken(field, "is text but not JSON") from None
    if not value:
        return None
    expected = "a list of objects" if kind is list else "an object"
    if not isinstance(value, kind) or (
        isinstance(value, list) and not all(isinstance(item, dict) for item in value)
    ):
        raise Broken(field, f"must be {expected}")
    return _plain_json(field, value) or None


def _message(field: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise Broken(field, f"must be a message, not {type(value).__name__}")
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        known = ", ".join(ROLES)
        wrong = "is missing" if role is None else f"is {str(role)[:40]!r}"
        raise Broken(f"{field}.role", f"{wrong}; a role is one of {known}")
    message: Message = {"role": role}
    if isinstance(content, list):
        content = _joined(f"{field}.content", content)
    if isinstance(content, str):
        message["content"] = content
    elif content is not None:
        raise Broken(f"{field}.content", f"must be text, not {type(content).__name__}")
    elif role != "assistant":  # an assistant's message may be tool calls alone
        raise Broken(f"{field}.content", "is missing")
    if len(value) > 2:
        extra = {key: item for key, item in value.items() if key not in ("role", "content")}
        message.update(_plain_json(field, extra))
    return message


def _joined(field: str, parts: list[Any]) -> str:
    """A content of text parts as one text."""
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise Broken(f"{field}[{index}]", "is no text part; only text can be scored")
    return "".join(part["text"] for part in parts)


def _plain_json(field: str, value: Any) -> Any:
    """The value without null fields, once it is sure that JSON can hold it."""
    value = without_nulls(value)
    try:
        canonical_json(value)
    except (TypeError, ValueError, RecursionError):
        raise Broken(field, "holds a value that JSON cannot") from None
    return value


_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def opens_dialogue(text: str) -> bool:
    """Whether the text opens with a human turn."""
    return text.lstrip().startswith("Human:")


def is_dialogue(text: str) -> bool:
    """Whether the text opens with a human turn and comes to an assistant's."""
    return opens_dialogue(text) and "\n\nAssistant:" in text


def parse_dialogue(text: str) -> list[Message]:
    """The turns of a dialogue string; white space around a turn is the format's, not the text's."""
    parts = _TURN.split("\n\n" + text.lstrip())[1:]
    return [
        {"role": _ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2])
    ]
