"""Pairs to token ids, one function for references and policy alike.

A pair's text (a chat template's, or plain prompt and response) is tokenised whole, once, without
added special tokens, and split by character offset where the prompt ends:

    <s>[INST] What is 2 + 2? [/INST] It is 4.</s>
    |---------- prompt -----------||-- scored --|    "</s>" is the end of turn

A token across the boundary belongs to the response. Nothing is ever truncated. The text comes from
`rendering_template.py`, the characters under a token from `rendering_tokenizer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .template import ChatTemplate, Refusal, RenderedText
from .tokenizer import bare_backend, bos_in_use, load_tokenizer, spans, with_offsets

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

    from ..pairs import Pair

__all__ = ["RENDERING_VERSION", "Refusal", "RenderedPair", "RenderedSequence", "Renderer"]

RENDERING_VERSION = 1  # part of a score's identity: raise it when any token id would change


@dataclass(frozen=True, slots=True)
class RenderedSequence:
    """One branch of a pair as token ids; the scored tokens are `token_ids[start:]`."""

    token_ids: list[int]
    start: int  # index of the first scored token, at least 1
    end_start: int  # index of the first end-of-turn token; len(token_ids) where there is none
    boundary: bool  # the first scored token begins before the response does


@dataclass(frozen=True, slots=True)
class RenderedPair:
    """Both branches; `shared` counts their common first tokens, none of them scored in either."""

    chosen: RenderedSequence
    rejected: RenderedSequence
    shared: int


@dataclass(frozen=True, slots=True)
class ExplainedSequence:
    """One branch as `mrpo inspect` shows it: text, tokens and the characters under each token."""

    rendered: RenderedText
    sequence: RenderedSequence
    tokens: list[str]
    spans: list[tuple[int, int]]  # per token; empty at 0 and at the end for an added BOS and EOS


class Renderer:
    """Renders pairs for one model. Picklable; rendering one pair never depends on another."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises `UserError` for a tokenizer without offsets and a template that can't be used."""
        self.tokenizer = with_offsets(tokenizer)
        self.template = ChatTemplate(tokenizer, chat_template, chat_template_kwargs)
        self._backend = bare_backend(tokenizer)
        self._added = dict(tokenizer.added_tokens_decoder)
        self._bos = bos_in_use(tokenizer)
        self._eos = tokenizer.eos_token_id

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Renderer:
        """The renderer of a Hub model or a model folder; loads its tokenizer, never its weights."""
        return cls(
            load_tokenizer(str(model), revision),
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
        )

    @property
    def chat_template(self) -> str | None:
        """The template in force (for conversations without tools), or None."""
        return self.template.get()

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    @property
    def end_of_turn(self) -> str | None:
        """The text that ends a turn; None where the template has no special token there."""
        return self.template.tail().kept or None if self.has_chat_template else None

    def render(self, pair: Pair) -> RenderedPair | Refusal:
        """The pair as this model sees it, or a permanent reason why it can't be."""
        return self.render_many([pair])[0]

    def render_many(self, pairs: Sequence[Pair]) -> list[RenderedPair | Refusal]:
        """As `render`, for many pairs in one batched call of the tokenizer."""
        shown = [self.texts(pair) for pair in pairs]
        texts = [branch.text for both in shown if not isinstance(both, Refusal) for branch in both]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        rendered: list[RenderedPair | Refusal] = []
        for pair, both in zip(pairs, shown):
            if isinstance(both, Refusal):
                rendered.append(both)
            else:
                branches = [self._sequence(b, next(encodings), pair.is_chat) for b in both]
                rendered.append(_paired(*branches))
        return rendered

    def explain(self, pair: Pair) -> tuple[ExplainedSequence, ExplainedSequence] | Refusal:
        """Both branches with their text and the characters under each token."""
        texts, ids = self.texts(pair), self.render(pair)
        if isinstance(texts, Refusal):
            return texts
        if isinstance(ids, Refusal):
            return ids
        return self._explained(texts[0], ids.chosen), self._explained(texts[1], ids.rejected)

    def texts(self, pair: Pair) -> tuple[RenderedText, RenderedText] | Refusal:
        """Chosen and rejected as the text that is tokenised (plain text without BOS and EOS)."""
        if pair.is_chat:
            return self.template.render(pair)
        end = len(pair.prompt)
        chosen, rejected = (f"{pair.prompt}{turns}" for turns in (pair.chosen, pair.rejected))
        return RenderedText(chosen, end, len(chosen)), RenderedText(rejected, end, len(rejected))

    def _sequence(
        self, rendered: RenderedText, encoding: Encoding, is_chat: bool
    ) -> RenderedSequence | Refusal:
        ids = encoding.ids
        start = end_start = len(ids)
        boundary = False
        for index, begin, end in spans(rendered.text, encoding, self._added):
            if end <= rendered.prompt_end:
                break
            start, boundary = index, begin < rendered.prompt_end
            if begin >= rendered.content_end:
                end_start = index
        if not is_chat:
            ids, before = self._between_bos_and_eos(ids, start)
            start += before
            end_start = len(ids) if self._eos is None else len(ids) - 1
        if start == len(ids):
            return Refusal("empty_response_tokens", "the response has no tokens of its own")
        if start == 0:
            return Refusal("nothing_before_response", "no token stands before the response's first")
        return RenderedSequence(ids, start, end_start, boundary)

    def _between_bos_and_eos(self, ids: list[int], start: int) -> tuple[list[int], int]:
        """Plain text's ids with BOS in front and EOS behind where the tokenizer has them and the
        text doesn't; and how many went in front."""
        front = [self._bos] if self._bos is not None and ids[:1] != [self._bos] else []
        ended = start < len(ids) and ids[-1] == self._eos
        behind = [self._eos] if self._eos is not None and not ended else []
        return [*front, *ids, *behind], len(front)

    def _explained(self, rendered: RenderedText, sequence: RenderedSequence) -> ExplainedSequence:
        encoding = self._backend.encode(rendered.text, add_special_tokens=False)
        under = [(b, e) for _, b, e in spans(rendered.text, encoding, self._added)][::-1]
        ids, length = sequence.token_ids, len(rendered.text)
        front = next(n for n in (0, 1) if ids[n : n + len(under)] == encoding.ids)
        under = [(0, 0)] * front + under + [(length, length)] * (len(ids) - front - len(under))
        tokens = [self._backend.id_to_token(i) or "" for i in ids]
        return ExplainedSequence(rendered, sequence, tokens, under)


def _paired(
    chosen: RenderedSequence | Refusal, rejected: RenderedSequence | Refusal
) -> RenderedPair | Refusal:
    if isinstance(chosen, Refusal):
        return Refusal(chosen.reason, f"chosen: {chosen.detail}")
    if isinstance(rejected, Refusal):
        return Refusal(rejected.reason, f"rejected: {rejected.detail}")
    shared, most = 0, min(chosen.start, rejected.start)
    while shared < most and chosen.token_ids[shared] == rejected.token_ids[shared]:
        shared += 1
    return RenderedPair(chosen, rejected, shared)
