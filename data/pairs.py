"""A preference pair, and the id by which every part of the project knows it.

A pair is a prompt with a chosen and a rejected response: all three are text, or all three are
lists of chat messages. The id is a digest of the content alone, so the same pair has the same id
in any file format, data set, order or shard, and its scores are found again everywhere.

The held-out split (by first user turn), a training fraction, label noise, folds and bootstraps (all
by prompt) must keep equal prompts together, and a prompt must not change sides when data is added,
shuffled or mixed. Each uses its own bits of a digest of the prompt, or a digest of its own, so that
they are independent of each other.

`EvaluationTexts` finds the prompts that contain a text which models will be evaluated on.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np

from ..errors import UserError
from .sources import Source, open_sources

Message = dict[str, Any]  # {"role": …, "content": …, further fields of the chat template}
Turns = str | list[Message]

ID_BYTES = 16
# Chinese and Japanese have no spaces between words: a character counts as one.
WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\\W_\u3040-\u30ff\u3400-\u9fff]+")
APOSTROPHES = str.maketrans("", "", "'\u2019")
RUN = 13  # words in a row that two texts share because both come from one
SHORT_RUN = 8  # words of a shorter text that counts wherever all of it stands
SHORTEST_TEXT = 3  # words of a text that counts where it is all that a prompt says
TEXTS_AT_ONCE = 4096

_ENCODER = json.JSONEncoder(
    ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a response answers: the turns before it, with the tools and the template's variables."""

    turns: Turns
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.turns, str)

    @classmethod
    def of(cls, pair: Pair) -> Prompt:
        """The prompt of both responses of a pair."""
        return cls(pair.prompt, pair.tools, pair.chat_template_kwargs)


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


# Contamination


class EvaluationTexts:
    """Texts that models will be evaluated on: every text in the rows of some files.

    A prompt contains one where 13 words in a row are equal, whatever their case and what stands
    between words. Of a text of 8 to 12 words all have to be there; one of 3 to 7 counts where it is
    all that a prompt says. Memory is about 12 bytes a word, and 70 while the files are read.
    """

    def __init__(self, files: str) -> None:
        """Comma-separated files or data sets. Raises `UserError` where they hold no such text."""
        self._factors = np.random.default_rng(0).integers(2**64, size=RUN, dtype=np.uint64) | 1
        self._sources: list[tuple[int, Source]] = []  # behind the number of its first text
        self._rows: list[int] = []  # by the text's number, in its source
        parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}  # by length: hash, number
        for source in open_sources(files):
            self._sources.append((len(self._rows), source))
            texts = ((n, text) for n, row in source.rows(_AllColumns()) for text in _texts(row))
            while batch := list(islice(texts, TEXTS_AT_ONCE)):
                words, text_of = _words([text for _, text in batch])
                lengths = np.minimum(np.bincount(text_of, minlength=len(batch)), RUN)
                for length in np.unique(lengths[lengths >= SHORTEST_TEXT]).tolist():
                    chosen = lengths[text_of] == length
                    hashes, texts_of = self._hashes(words[chosen], text_of[chosen], length)
                    numbers = (texts_of + len(self._rows)).astype(np.int32)
                    parts.setdefault(length, []).append((hashes, numbers))
                self._rows += [row for row, _ in batch]
        if not parts:
            raise UserError(f"--decontaminate {files}: no text of {SHORTEST_TEXT} or more words")
        self._runs: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # the same, sorted by hash
        for length in sorted(parts):
            hashes, numbers = map(np.concatenate, zip(*parts.pop(length)))
            hashes, firsts = np.unique(hashes, return_index=True)
            self._runs[length] = hashes, numbers[firsts]

    def find(self, prompts: Sequence[Turns]) -> list[str | None]:
        """For each prompt the file and row of a text that it contains, None where it has none."""
        turns: list[str] = []
        prompt_of: list[int] = []
        alone: list[bool] = []  # whether nothing else is said in the prompt
        for number, prompt in enumerate(prompts):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            said = sum(message["role"] != "system" for message in messages)
            turns += [message.get("content") or "" for message in messages]
            alone += [said == 1 and message["role"] != "system" for message in messages]
            prompt_of += [number] * len(messages)
        words, turn_of = _words(turns)
        sizes = np.bincount(turn_of, minlength=len(turns))
        places: list[str | None] = [None] * len(prompts)
        for length, (known, numbers) in self._runs.items():
            chosen = (
                (sizes >= length) if length >= SHORT_RUN else np.array(alone) & (sizes == length)
            )
            rows = chosen[turn_of]
            hashes, turns_of = self._hashes(words[rows], turn_of[rows], length)
            at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            for match in np.flatnonzero(known[at] == hashes).tolist():
                places[prompt_of[turns_of[match]]] = self._place(int(numbers[at[match]]))
        return places

    def _hashes(
        self, words: np.ndarray, text_of: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """A hash of every run of `length` words in each text, and the text that it is in."""
        count = max(len(words) - length + 1, 0)
        hashes = np.zeros(count, np.uint64)
        for place in range(length if count else 0):
            hashes += words[place : place + count] * self._factors[place]
        within = text_of[:count] == text_of[length - 1 :] if count else np.zeros(0, bool)
        return hashes[within], text_of[:count][within]

    def _place(self, number: int) -> str:
        index = bisect_right(self._sources, number, key=lambda entry: entry[0]) - 1
        source = self._sources[index][1]
        return f"{source.given}, {source.unit} {self._rows[number]}"


class _AllColumns:
    def choose(self, place: str, existing: Sequence[str]) -> list[str]:
        return list(existing)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a row, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _words(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The hash of each word of the texts, and the number of its text, [words] each."""
    split = [WORD.findall(text.translate(APOSTROPHES).casefold()) for text in texts]
    # Python's hashes differ between processes, but nothing is compared between two.
    hashes = np.array([hash(word) for words in split for word in words], np.int64)
    counts = np.array([len(words) for words in split], np.int64)
    return hashes.view(np.uint64), np.repeat(np.arange(len(split)), counts)
