"""From one raw row of preference data to one pair: TRL's formats and HH-RLHF's dialogues.

`sources.py` reads the rows, `prepare.py` writes the pairs. A row is read according to its content:

- text, with a prompt column or with the prompt as the common beginning of the two texts;
- message lists, which share their leading messages or come with a prompt column;
- HH-RLHF dialogues ("\\n\\nHuman: …\\n\\nAssistant: …"), which become message lists.

Two exceptions leave this module: `Broken` for invalid structure (the whole run stops), `Unusable`
for a well-formed row that is no preference pair (it is dropped and counted).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .config import ColumnSettings
from .pairs import Message, Pair, Turns, canonical_json, without_nulls
from .sources import SourceColumns

REASONS = {
    "empty_prompt": "the prompt has no text",
    "empty_response": "a response has no text",
    "responses_equal": "chosen and rejected are the same",
    "prompt_not_shared": "chosen and rejected differ before the last assistant turn",
    "prompt_mismatch": "the prompt column is not the prompt of the messages",
    "tool_turn_in_response": "a response contains a turn of a tool, which no model writes",
    "not_a_dialogue": "not an HH-RLHF dialogue, unlike the first row of this source",
    "not_unicode": "the text holds a lone surrogate, which UTF-8 cannot encode",
}

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}  # of HH-RLHF


class Broken(ValueError):
    """Invalid structure: the field, and what is wrong with it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"field {field!r} {message}")


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


def pair_columns(names: ColumnSettings) -> SourceColumns:
    """What `PairReader` needs; `prompt` and `source` where the data has them, unless named."""
    given = (names.prompt_column, names.chosen_column, names.rejected_column, names.source_column)
    required = [name for name in given if name is not None]
    defaults = {"prompt": names.prompt_column, "source": names.source_column}
    optional = [name for name, named in defaults.items() if named is None]
    optional += ["tools", "chat_template_kwargs"]
    return SourceColumns(
        required,
        [name for name in optional if name not in required],
        "name columns with --prompt-column, --chosen-column and --rejected-column",
    )


class PairReader:
    """Reads the rows of a source. After its first dialogue, any other text is unusable."""

    def __init__(self, names: ColumnSettings, source: str) -> None:
        self._names = names
        self._source_name = source
        self._dialogues = False

    def read(self, row: Mapping[str, Any]) -> tuple[Pair, bytes]:
        """The pair of a row, in the train split, and its id. Raises `Broken` and `Unusable`."""
        prompt = _turns(row, self._names.prompt_column or "prompt")
        chosen = _turns(row, self._names.chosen_column)
        rejected = _turns(row, self._names.rejected_column)
        if not chosen or not rejected:
            raise Unusable("empty_response")
        if isinstance(chosen, str) != isinstance(rejected, str):
            field = self._names.rejected_column
            raise Broken(field, "must be text or messages as the chosen one is")
        turns = self._split(prompt, chosen, rejected)
        column = self._names.source_column
        source = row.get(column or "source")
        if column and not isinstance(source, str | None):
            raise Broken(column, f"must be text, not {type(source).__name__}")
        pair = Pair(
            *turns,
            tools=json_field(row, "tools", list),
            chat_template_kwargs=json_field(row, "chat_template_kwargs", dict),
            source=source if source and isinstance(source, str) else self._source_name,
        )
        _check(pair)
        try:
            pair.source.encode()
            return pair, pair.id
        except UnicodeEncodeError:
            raise Unusable("not_unicode") from None

    def _split(
        self, prompt: Turns | None, chosen: Turns, rejected: Turns
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
                return self._split_text(prompt, chosen, rejected)
            if not all(map(is_dialogue, dialogues)):
                raise Unusable("not_a_dialogue")
            chosen, rejected = map(parse_dialogue, dialogues)
            if prompt is not None and opens_dialogue(prompt):
                prompt = None  # the dialogues contain it
        assert not isinstance(chosen, str)
        assert not isinstance(rejected, str)
        shared = _common_length(chosen, rejected)
        responses = chosen[shared:], rejected[shared:]
        return _join_prompt(prompt, chosen[:shared]), *responses

    def _split_text(
        self, prompt: str | None, chosen: str, rejected: str
    ) -> tuple[Turns, Turns, Turns]:
        if prompt is None:
            prompt, chosen, rejected = split_common_text(chosen, rejected)
            if self._names.chat:  # the space between prompt and response is no part of a message
                prompt, chosen, rejected = prompt.strip(), chosen.strip(), rejected.strip()
        elif not prompt.strip():
            raise Unusable("empty_prompt")
        if not self._names.chat:
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


def _turns(row: Mapping[str, Any], field: str) -> Turns | None:
    value = row.get(field)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        return [_message(f"{field}[{index}]", item) for index, item in enumerate(value)]
    raise Broken(field, f"must be text or a list of messages, not {type(value).__name__}")


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
            if "tool" in roles:
                raise Unusable("tool_turn_in_response")
            if roles and roles != ["assistant"]:
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


def json_field(row: Mapping[str, Any], field: str, kind: type) -> Any:
    """`tools` (list of objects) or `chat_template_kwargs` (object), also as JSON text.

    None where it is missing or empty.
    """
    value = row.get(field)
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
    """A message, checked for what every chat template relies on.

    Null fields are removed (Parquet fills the missing fields of a struct with nulls), contents
    given as text parts are joined, other fields stay as they are. Raises `Broken` naming the
    field, as in `chosen[2].role`.
    """
    if not isinstance(value, dict):
        raise Broken(field, f"must be a message, not {type(value).__name__}")
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        known = ", ".join(ROLES)
        wrong = "is missing" if role is None else f"is {str(role)[:40]!r}"
        raise Broken(f"{field}.role", f"{wrong}; a role is one of {known}")
    message: Message = {"role": role}
    if isinstance(content, list):
        for index, part in enumerate(content):
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                place = f"{field}.content[{index}]"
                raise Broken(place, "is not a text part; only text can be scored")
        content = "".join(part["text"] for part in content)
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


def _plain_json(field: str, value: Any) -> Any:
    """The value without null fields; raises `Broken` where JSON cannot hold it."""
    value = without_nulls(value)
    try:
        canonical_json(value)
    except (TypeError, ValueError, RecursionError):
        raise Broken(field, "holds a value that JSON cannot") from None
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
