"""HH-RLHF's dialogue strings as messages: "\\n\\nHuman: …\\n\\nAssistant: …"."""

from __future__ import annotations

import re

from .pairs import Message

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
