"""A preference pair, and the id by which every part of the project knows it.

A pair is a prompt with a chosen and a rejected response: all three are text, or all three are
lists of chat messages. The id is a digest of the content alone, so the same pair has the same id
in any file format, data set, order or shard, and its scores are found again everywhere.

The held-out split (by first user turn), a training fraction, label noise, folds and bootstraps (all
by prompt) must keep equal prompts together, and a prompt must not change sides when data is added,
shuffled or mixed. Each uses its own bits of a digest of the prompt, or a digest of its own, so that
they are independent of each other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

Message = dict[str, Any]  # {"role": …, "content": …, further fields of the chat template}
Turns = str | list[Message]

ID_BYTES = 16

_ENCODER = json.JSONEncoder(
    ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
)


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference pair: everything a renderer needs, and where the pair came from.

    `chosen` and `rejected` hold what follows the prompt only: a text, or assistant messages.
    `source` and `split` ("train" or "validation") do not belong to the id.
    """

    prompt: Turns
    chosen: Turns
    rejected: Turns
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    source: str = ""
    split: str = "train"

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)

    @property
    def id(self) -> bytes:
        """The first 16 bytes of SHA-256 over the canonical JSON of the pair's content.

        Computed at each access; shards have it in a column. Raises `UnicodeEncodeError` for text
        that UTF-8 cannot hold (lone surrogates), and `ValueError` for a number that JSON cannot.
        """
        names = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
        content = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return sha256(canonical_json(content).encode()).digest()[:ID_BYTES]


def parse_id(value: Any) -> bytes | None:
    """An id from its 16 bytes or 32 hexadecimal digits; None where the value is neither."""
    try:
        parsed = value if isinstance(value, bytes) else bytes.fromhex(value.strip())
    except (AttributeError, ValueError):
        return None
    return parsed if len(parsed) == ID_BYTES else None


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces, null fields removed, and text exactly as it is."""
    text = _ENCODER.encode(value)
    # Most values hold no null, and then the word does not occur and the walk is not needed.
    return _ENCODER.encode(without_nulls(value)) if "null" in text else text


def without_nulls(value: Any) -> Any:
    """The value with null fields of objects removed, at any depth; nulls in lists stay."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def response_bytes(turns: Turns) -> int:
    """UTF-8 bytes of a response's contents: the unit of `--normalize byte`.

    Tool calls count as their canonical JSON, so that a response of tool calls alone has a length;
    a tool's own turn counts nothing.
    """
    if isinstance(turns, str):
        return len(turns.encode())
    total = 0
    for message in turns:
        if message["role"] == "tool":
            continue  # context: no model writes it, and it is not scored
        total += len((message.get("content") or "").encode())
        if message.get("tool_calls"):
            total += len(canonical_json(message["tool_calls"]).encode())
    return total


def prompt_number(prompt: Turns) -> int:
    """A number below 2**63 that equal prompts share."""
    return int.from_bytes(_digest(prompt)[:8]) >> 1


def first_turn(prompt: Turns) -> Turns:
    """The first user turn of a prompt, which dialogues that extend each other share.

    A text is its own first turn, and so is a prompt without a user's turn.
    """
    if isinstance(prompt, list):
        for message in prompt:
            if message["role"] == "user":
                return [{"role": "user", "content": message.get("content", "")}]
    return prompt


def group_id(group: Turns) -> bytes:
    """The id of what must stay on one side of a split: 16 bytes of its digest."""
    return _digest(group)[:ID_BYTES]


def is_validation(prompt: Turns, fraction: float) -> bool:
    """Whether a prompt is held out: its digest, as a number in [0, 1), is below the fraction.

    That depends on nothing else, and a larger fraction only adds prompts. `mrpo prepare` asks it of
    the group that a pair belongs to: its first user turn, unless told otherwise.
    """
    return int.from_bytes(_digest(prompt)[:8]) < fraction * 2**64


def in_fraction(prompt: Turns, fraction: float, subset: int = 0) -> bool:
    """Whether a prompt belongs to a fraction of the training pairs.

    Fractions are nested: a prompt in 5 % is also in 20 %, and 1 has all. Another `subset` draws
    other prompts.
    """
    digest = _digest(prompt)[8:16]
    if subset:
        digest = sha256(f"subset {subset}\n{canonical_json(prompt)}".encode()).digest()[:8]
    return int.from_bytes(digest) < fraction * 2**64


def label_turned(prompt: Turns, share: float, seed: int) -> bool:
    """Whether a share of label noise turns the labels of a prompt's pairs round.

    Shares are nested: what is turned round at 0.15 is at 0.3 too. Another seed draws other prompts.
    """
    digest = sha256(f"label noise {seed}\n{canonical_json(prompt)}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def _digest(prompt: Turns) -> bytes:
    return sha256(canonical_json(prompt).encode()).digest()
