"""From an example to a pair: TRL's formats, HH-RLHF's dialogues and ShareGPT's messages.

`sources.py` reads rows, `layouts.py` finds the examples in them: what is prompt, chosen and
rejected. Here these become a `Pair`, according to their content:

- text, with a prompt column or with the prompt as the common beginning of the two texts;
- message lists, which share their leading messages or come with a prompt column;
- HH-RLHF dialogues ("\\n\\nHuman: …\\n\\nAssistant: …"), which become message lists.

Two exceptions leave this module: `Broken` for invalid structure (the whole run stops), `Unusable`
for a well-formed example that is no preference pair (it is dropped and counted).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from ..files import JSON, KeyTwiceError
from .pairs import Message, Pair, Turns, canonical_json, without_nulls

REASONS = {
    "empty_prompt": "the prompt has no text",
    "empty_response": "a response has no text",
    "responses_equal": "chosen and rejected are the same",
    "prompt_not_shared": "chosen and rejected differ before the last assistant turn",
    "prompt_mismatch": "the prompt column is not the prompt of the messages",
    "two_systems": "the system column is not the system message of the prompt",
    "tool_turn_in_response": "a response begins or ends with a turn of a tool",
    "not_a_dialogue": "not an HH-RLHF dialogue, unlike the first row of this source",
    "not_unicode": "the text holds a lone surrogate, which UTF-8 cannot encode",
}

CHAT_UNUSED = "WARNING: --chat changed nothing: all pairs are messages already"
ROLES = ("system", "developer", "user", "assistant", "tool")
TOOL_ROLES = ("ipython", "function")  # what Llama and OpenAI's older format call a tool
SPEAKERS = {"Human": "user", "Assistant": "assistant"}  # of HH-RLHF
SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class Broken(ValueError):
    """Invalid structure: the field, and what is wrong with it."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"field {name!r} {message}")


class Unusable(Exception):
    """A row that is not a preference pair; `reason` is a key of `REASONS`."""

    def __init__(self, reason: str) -> None:
        assert reason in REASONS
        super().__init__(reason)
        self.reason = reason


def by_reason(counts: Mapping[str, int]) -> str:
    """How many rows were left out for each reason, as text."""
    parts = [f"{reason} {count:,}" for reason, count in sorted(counts.items()) if count]
    return ", ".join(parts) or "none"


@dataclass(frozen=True, slots=True)
class RawPair:
    """A pair as its row has it, not yet checked.

    `values` has TRL's names: prompt, chosen, rejected, tools, chat_template_kwargs, source, and
    beside them system, split and group. All may be missing but chosen and rejected.
    """

    values: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)  # other names for messages
    chat: bool = False  # whether text becomes messages

    def name(self, value: str) -> str:
        return self.names.get(value, value)


class PairReader:
    """Reads the examples of a source. After its first dialogue, any other text is unusable."""

    def __init__(self, source: str) -> None:
        self.wrapped = 0  # texts that became messages of user and assistant
        self._source_name = source
        self._dialogues = False

    def read(self, example: RawPair) -> tuple[Pair, bytes]:
        """The pair, in the train split, and its id. Raises `Broken` and `Unusable`."""
        values = example.values
        prompt, chosen, rejected = (
            _turns(example.name(name), values.get(name))
            for name in ("prompt", "chosen", "rejected")
        )
        if not chosen or not rejected:
            raise Unusable("empty_response")
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise Broken(example.name("rejected"), "must be text or messages as the chosen one is")
        source = values.get("source")
        pair = Pair(
            *self._split(prompt, chosen, rejected, example.chat),
            tools=json_field(values, "tools", list),
            chat_template_kwargs=json_field(values, "chat_template_kwargs", dict),
            source=source if source and isinstance(source, str) else self._source_name,
        )
        _check(pair)
        pair = _with_system(pair, example.name("system"), values.get("system"))
        try:
            pair.source.encode()
            return pair, pair.id
        except UnicodeEncodeError:
            raise Unusable("not_unicode") from None

    def _split(
        self, prompt: Turns | None, chosen: Turns, rejected: Turns, chat: bool
    ) -> tuple[Turns, Turns, Turns]:
        """Prompt, chosen and rejected; the common beginning of the responses joins the prompt."""
        if isinstance(chosen, str) and isinstance(rejected, str):
            if not chosen.strip() or not rejected.strip():
                raise Unusable("empty_response")
            if isinstance(prompt, list):
                return prompt, _said("assistant", chosen), _said("assistant", rejected)
            # Some data sets keep all of the dialogue but the response in the prompt column.
            dialogues = [
                text if prompt is None or is_dialogue(text) else prompt + text
                for text in (chosen, rejected)
            ]
            self._dialogues = self._dialogues or any(map(is_dialogue, dialogues))
            if not self._dialogues:
                self.wrapped += chat
                return _split_text(prompt, chosen, rejected, chat)
            if not all(map(is_dialogue, dialogues)):
                raise Unusable("not_a_dialogue")
            chosen, rejected = map(parse_dialogue, dialogues)
            if prompt is not None and opens_dialogue(prompt):
                prompt = None  # the dialogues contain it
        assert not isinstance(chosen, str)
        assert not isinstance(rejected, str)
        shared = _common_length(chosen, rejected)
        while shared and any(
            turns[shared:] and turns[shared]["role"] == "tool" for turns in (chosen, rejected)
        ):
            shared -= 1  # the call stays with its result: a response begins with the assistant
        responses = chosen[shared:], rejected[shared:]
        return _join_prompt(prompt, chosen[:shared]), *responses


def _split_text(
    prompt: str | None, chosen: str, rejected: str, chat: bool
) -> tuple[Turns, Turns, Turns]:
    if prompt is None:
        prompt, chosen, rejected = split_common_text(chosen, rejected)
        if chat:  # the space between prompt and response is no part of a message
            prompt, chosen, rejected = prompt.strip(), chosen.strip(), rejected.strip()
    elif not prompt.strip():
        raise Unusable("empty_prompt")
    if not chat:
        return prompt, chosen, rejected
    return _said("user", prompt), _said("assistant", chosen), _said("assistant", rejected)


def split_common_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt and responses of two texts whose common beginning is the prompt.

    As TRL's `extract_prompt` (one space before the difference goes to the responses), but the
    prompt never ends inside a word: "is b|lue" and "is b|lack" are split before " b".
    """
    if chosen == rejected:
        raise Unusable("responses_equal")
    end = _common_length(chosen, rejected)
    if end == min(len(chosen), len(rejected)):
        end -= 1  # one text is the beginning of the other: leave both a response
    while end and (_inside_word(chosen, end) or _inside_word(rejected, end)):
        end -= 1
    if end and chosen[end - 1] == " ":
        end -= 1
    if not chosen[:end].strip():
        raise Unusable("prompt_not_shared")
    return chosen[:end], chosen[end:], rejected[end:]


def _inside_word(text: str, at: int) -> bool:
    """Whether a cut before `text[at]` separates two letters or digits.

    From U+2E80 on, scripts such as Chinese have no spaces between words: any cut is allowed.
    """
    around = text[at - 1 : at + 1]
    return len(around) == 2 and all(char.isalnum() and char < "\u2e80" for char in around)


def _common_length(first: Turns, second: Turns) -> int:
    """How many leading characters or messages two sequences share."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # bisection: comparing slices is much faster than a loop over characters
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _turns(name: str, value: Any) -> Turns | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict):  # a single message in place of a list
        return [_message(name, value)]
    if isinstance(value, list):
        return [_message(f"{name}[{index}]", item) for index, item in enumerate(value)]
    raise Broken(name, f"must be text or a list of messages, not {type(value).__name__}")


def _with_system(pair: Pair, name: str, system: Any) -> Pair:
    """The pair with the text of a system column in front of its messages."""
    if not isinstance(system, str | None):
        raise Broken(name, f"must be text, not {type(system).__name__}")
    if not system or not system.strip():
        return pair
    assert isinstance(pair.prompt, list), "an example with a system column has messages"
    first = pair.prompt[0]
    if first["role"] not in ("system", "developer"):
        return replace(pair, prompt=_said("system", system) + pair.prompt)
    if first.get("content", "").strip() != system.strip():
        raise Unusable("two_systems")
    return pair


def _join_prompt(prompt: Turns | None, shared: list[Message]) -> list[Message]:
    """The prompt column and the common first messages of the responses, as one prompt."""
    if not prompt:
        return shared
    if isinstance(prompt, str):
        if not shared:
            return _said("user", prompt)
        asked = [message for message in shared if message["role"] == "user"]
        if not asked or asked[-1].get("content", "").strip() != prompt.strip():
            raise Unusable("prompt_mismatch")
        return shared
    if prompt in (shared[: len(prompt)], shared[-len(prompt) :]):
        return shared
    if not shared or prompt[-len(shared) :] == shared:
        return prompt
    # The responses continue the prompt column; a second opening would be another prompt.
    opening, last = shared[0]["role"], prompt[-1]["role"]
    if opening in ("system", "developer") or opening == last:
        raise Unusable("prompt_mismatch")
    return prompt + shared


def _check(pair: Pair) -> None:
    """Raises `Unusable` unless the pair has a prompt and two different responses."""
    if not pair.prompt:
        same = pair.chosen == pair.rejected
        raise Unusable("responses_equal" if same else "prompt_not_shared")
    if pair.is_chat:
        for response in (pair.chosen, pair.rejected):
            roles = [message["role"] for message in response]  # type: ignore[index]
            if "tool" in roles and (roles[0] == "tool" or roles[-1] == "tool"):
                raise Unusable("tool_turn_in_response")
            # Turns of the assistant with results of tools between them: call, result, answer.
            answers = [role for role in roles if role != "tool"]
            adjacent = any(first == second == "assistant" for first, second in pairwise(roles))
            if set(answers) - {"assistant"} or adjacent:
                raise Unusable("prompt_not_shared")
    if pair.chosen == pair.rejected:
        raise Unusable("responses_equal")
    if _is_empty(pair.chosen) or _is_empty(pair.rejected):
        raise Unusable("empty_response")


def _is_empty(turns: Turns) -> bool:
    if isinstance(turns, str):
        return not turns.strip()
    return not any(m.get("content", "").strip() or m.get("tool_calls") for m in turns)


def _said(role: str, content: str) -> list[Message]:
    return [{"role": role, "content": content}]


def json_field(row: Mapping[str, Any], name: str, kind: type) -> Any:
    """`tools` (list of objects) or `chat_template_kwargs` (object), also as JSON text.

    None where it is missing or empty.
    """
    value = row.get(name)
    if isinstance(value, str) and value:
        try:
            value = JSON.decode(value)
        except KeyTwiceError as error:
            raise Broken(name, f"holds JSON in which {error}") from None
        except (ValueError, RecursionError):
            raise Broken(name, "is text but not JSON") from None
    if not value:
        return None
    expected = "a list of objects" if kind is list else "an object"
    if not isinstance(value, kind) or (
        isinstance(value, list) and not all(isinstance(item, dict) for item in value)
    ):
        raise Broken(name, f"must be {expected}")
    return _plain_json(name, value) or None


def _message(name: str, value: Any) -> Message:
    """A message, checked for what every chat template relies on.

    Null fields are removed (Parquet fills the missing fields of a struct with nulls), contents
    given as text parts are joined, other fields stay as they are. ShareGPT's `from` and `value`
    become a role and a content. Raises `Broken` naming the field, as in `chosen[2].role`.
    """
    if not isinstance(value, dict):
        raise Broken(name, f"must be a message, not {type(value).__name__}")
    if value.get("role") is None and value.get("from") is not None:
        value = _from_sharegpt(name, value)
    role, content = value.get("role"), value.get("content")
    if role in TOOL_ROLES:
        role = "tool"
    if role not in ROLES:
        known = ", ".join(ROLES)
        wrong = "is missing" if role is None else f"is {str(role)[:40]!r}"
        raise Broken(f"{name}.role", f"{wrong}; a role is one of {known}")
    message: Message = {"role": role}
    if isinstance(content, list):
        for index, part in enumerate(content):
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                place = f"{name}.content[{index}]"
                raise Broken(place, "is not a text part; only text can be scored")
        content = "".join(part["text"] for part in content)
    if isinstance(content, str):
        message["content"] = content
    elif content is not None:
        raise Broken(f"{name}.content", f"must be text, not {type(content).__name__}")
    elif role != "assistant":  # an assistant's message may be tool calls alone
        raise Broken(f"{name}.content", "is missing")
    extra = {key: item for key, item in value.items() if key not in ("role", "content")}
    if extra:
        message.update(_plain_json(name, extra))
    return message


def _from_sharegpt(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """A message with `from` and `value` as one with a role, and content or tool calls."""
    speaker, content = value["from"], value.get("value")
    role = SHAREGPT.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(SHAREGPT)
        raise Broken(f"{name}.from", f"is {str(speaker)[:40]!r}; it is one of {known}")
    message = {key: item for key, item in value.items() if key not in ("role", "from", "value")}
    if speaker != "function_call":
        return {"role": role, "content": content} | message
    try:
        calls = JSON.decode(content) if isinstance(content, str) else content
    except KeyTwiceError as error:
        raise Broken(f"{name}.value", f"holds JSON in which {error}") from None
    except (ValueError, RecursionError):
        raise Broken(f"{name}.value", "is a function call but not JSON") from None
    calls = calls if isinstance(calls, list) else [calls]
    return {
        "role": role,
        "tool_calls": [{"type": "function", "function": c} for c in calls],
    } | message


def _plain_json(name: str, value: Any) -> Any:
    """The value without null fields; raises `Broken` where JSON cannot hold it."""
    value = without_nulls(value)
    try:
        canonical_json(value)
    except (TypeError, ValueError, RecursionError):
        raise Broken(name, "holds a value that JSON cannot") from None
    return value


_TURN = re.compile(r"\n\n(Human|Assistant):")


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
        {"role": SPEAKERS[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2])
    ]
