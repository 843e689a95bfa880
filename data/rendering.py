"""Pairs to token ids, one function for references and policy alike.

A pair's text (a chat template's, or plain prompt and response) is tokenised whole, once, without
added special tokens, and split by character offset where the prompt ends:

    <s>[INST] What is 2 + 2? [/INST] It is 4.</s>
    |------------ prompt ----------||-- scored --|    "</s>" is the end of turn

A token across the boundary belongs to the response. Nothing is ever truncated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .rendering_template import ChatTemplate, Refusal, RenderedText

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

    from .pairs import Pair

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


class Renderer:
    """Renders pairs for one model. Picklable, and free of state that rendering would change."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises `UserError` for a tokenizer without offsets and a template that can't be used."""
        name = tokenizer.name_or_path or "the model"
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"tokenizer of {name} ({type(tokenizer).__name__}) gives no character offsets, "
                "which scoring needs; use a model with a fast tokenizer (tokenizer.json)"
            )
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, chat_template, dict(chat_template_kwargs or {}))
        self._backend = _bare(tokenizer.backend_tokenizer)
        self._special_ids = {
            *tokenizer.all_special_ids,
            *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special),
        }
        self._bos = _bos_in_use(tokenizer)
        if self.has_chat_template:
            self.template.tail()

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
            _load_tokenizer(str(model), revision),
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
                continue
            chosen, rejected = (
                self._sequence(text, next(encodings), plain=not pair.is_chat) for text in both
            )
            rendered.append(_paired(chosen, rejected))
        return rendered

    def texts(self, pair: Pair) -> tuple[RenderedText, RenderedText] | Refusal:
        """Chosen and rejected as the text that is tokenised (without plain text's BOS and EOS)."""
        if pair.is_chat:
            return self.template.render(pair)
        end = len(pair.prompt)
        chosen, rejected = (pair.prompt + turns for turns in (pair.chosen, pair.rejected))
        return RenderedText(chosen, end, len(chosen)), RenderedText(rejected, end, len(rejected))

    def _sequence(
        self, rendered: RenderedText, encoding: Encoding, *, plain: bool
    ) -> RenderedSequence | Refusal:
        ids, spans = encoding.ids, _covering(encoding.offsets, len(rendered.text))
        start = end_start = len(ids)
        for index in range(len(ids) - 1, -1, -1):
            begin, end = spans[index]
            special = ids[index] in self._special_ids
            if begin >= rendered.content_end or (special and end > rendered.content_end):
                end_start = index
            if begin < rendered.prompt_end and (special or end <= rendered.prompt_end):
                break
            start = index
        boundary = start < len(ids) and spans[start][0] < rendered.prompt_end
        if plain:
            if self._bos is not None and ids[:1] != [self._bos]:
                ids, start, end_start = [self._bos, *ids], start + 1, end_start + 1
            eos = self.tokenizer.eos_token_id
            if eos is not None and (start == len(ids) or ids[-1] != eos):
                ids = [*ids, eos]
            if eos is not None:
                end_start = len(ids) - 1
        if start == len(ids):
            return Refusal("empty_response_tokens", "the response has no tokens of its own")
        if start == 0:
            return Refusal("nothing_before_response", "no token stands before the response's first")
        return RenderedSequence(ids, start, end_start, boundary)


def _paired(
    chosen: RenderedSequence | Refusal, rejected: RenderedSequence | Refusal
) -> RenderedPair | Refusal:
    for name, branch in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(branch, Refusal):
            return Refusal(branch.reason, f"{name}: {branch.detail}")
    assert isinstance(chosen, RenderedSequence)
    assert isinstance(rejected, RenderedSequence)
    shared, most = 0, min(chosen.start, rejected.start)
    while shared < most and chosen.token_ids[shared] == rejected.token_ids[shared]:
        shared += 1
    return RenderedPair(chosen, rejected, shared)


def _covering(offsets: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Offsets stretched over the gaps between them, so that every character is under a token.

    A normaliser that joins characters (NFC: e and an accent) or drops some leaves those behind
    the first under no token; they belong to the token in front of them.
    """
    spans = []
    following = length
    for begin, end in reversed(offsets):
        spans.append((begin, max(end, following)))
        following = begin
    spans.reverse()
    return spans


def _bare(backend: Tokenizer) -> Tokenizer:
    """A copy that neither adds tokens, trims offsets, truncates nor pads, whatever the model's
    own tokenizer.json sets: its ids without special tokens are the same."""
    from tokenizers import Tokenizer

    bare = Tokenizer.from_str(backend.to_str())
    bare.post_processor = None
    bare.no_truncation()
    bare.no_padding()
    return bare


def _bos_in_use(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id that the tokenizer puts in front of plain text, if it puts BOS there."""
    ids = tokenizer("a").input_ids
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def _load_tokenizer(model: str, revision: str | None) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    way_out = "name a model with one, or save one there with tokenizer.save_pretrained"
    try:
        # With mistral-common installed, AutoTokenizer might return its tokenizer: no offsets.
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, mistral_format=False)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(f"model {model}: no tokenizer to load ({first_line}); {way_out}") from None
    # Of a folder without tokenizer files, transformers makes a tokenizer that knows no word.
    if not set(tokenizer("a", add_special_tokens=False).input_ids) - {*tokenizer.all_special_ids}:
        raise UserError(f"model {model}: no tokenizer there; {way_out}")
    return tokenizer
