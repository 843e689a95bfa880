"""Chat templates as text: what the model is shown, and where the response ends in it.

A template is a model's own Jinja program. This module renders it the same on any day (templates
of the Llama 3.2 kind print today's date) and finds the end of turn by rendering a sentinel
response once. `rendering.py` turns the text into token ids; nothing else renders templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from .pairs import Message, Pair

# The date that Llama 3.2's own template falls back to. Part of the rendering version.
TODAY = datetime(2024, 7, 26, 12, 0, 0)
SENTINEL = "SENTINELxRESPONSE"
# Names that `apply_chat_template` takes itself: a template variable can't be called so.
RESERVED = frozenset(
    {
        *("conversation", "messages", "tools", "documents", "chat_template", "tokenize"),
        *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("tokenizer_kwargs", "strftime_now"),
    }
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a pair can't be rendered for a model: a permanent reason, and the particulars."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class RenderedText:
    """A whole sequence as text: prompt, response, end of turn; positions in characters."""

    text: str
    prompt_end: int  # where the rendered prompt, with its generation prompt, ends
    content_end: int  # where the kept tail begins; len(text) where there is none


@dataclass(frozen=True, slots=True)
class Tail:
    """The text a template puts behind a response: kept up to and with its first special token."""

    kept: str
    dropped: str


@dataclass(slots=True)
class ChatTemplate:
    """A tokenizer's chat template with the kwargs of its reference.

    `source` overrides the tokenizer's own template. A tokenizer may carry several by name, of
    which transformers takes `tool_use` for a conversation with tools.
    """

    tokenizer: PreTrainedTokenizerFast
    source: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    _tails: dict[str, Tail] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_kwargs(self.kwargs, "chat_template_kwargs of the reference")

    def get(self, tools: list[dict[str, Any]] | None = None) -> str | None:
        """The template's text for a conversation with or without tools; None without template."""
        if self.source is None and not self.tokenizer.chat_template:
            return None
        return self.tokenizer.get_chat_template(self.source, tools)

    def tail(self, tools: list[dict[str, Any]] | None = None) -> Tail:
        """What follows a response, found once per template with a sentinel response."""
        template = self.get(tools)
        assert template is not None
        if template not in self._tails:
            self._tails[template] = self._find_tail(template)
        return self._tails[template]

    def render(self, pair: Pair) -> tuple[RenderedText, RenderedText] | Refusal:
        """Chosen and rejected as text, or why the template can't show them."""
        kwargs = dict(self.kwargs)
        if pair.chat_template_kwargs:  # what a pair says goes over what its reference says
            _check_kwargs(pair.chat_template_kwargs, "chat_template_kwargs of a pair")
            kwargs |= pair.chat_template_kwargs
        template = self.get(pair.tools)
        if template is None:
            raise UserError(
                f"{self.tokenizer.name_or_path or 'this tokenizer'} has no chat template and the "
                "pairs are messages; give it one with chat_template in refs.yaml"
            )
        tail = self.tail(pair.tools)
        show = _shower(self.tokenizer, template, pair.tools, kwargs)
        try:
            prompt = show(pair.prompt, True)
            texts = [show([*pair.prompt, *turns], False) for turns in (pair.chosen, pair.rejected)]
        except _template_errors() as error:
            return Refusal("template_refused", " ".join(str(error).split()))
        rendered = []
        for text in texts:
            if not text.startswith(prompt):
                return Refusal("prompt_not_prefix", _first_difference(prompt, text))
            rendered.append(self._cut(text, len(prompt), tail))
        return rendered[0], rendered[1]

    def _cut(self, text: str, prompt_end: int, tail: Tail) -> RenderedText:
        """Drop what follows the end of turn. A turn that ends otherwise than the sentinel did
        (a tool call may) ends with its last special token if only white space follows it."""
        if text.endswith(tail.kept + tail.dropped):
            end = len(text) - len(tail.dropped)
            return RenderedText(text[:end], prompt_end, max(prompt_end, end - len(tail.kept)))
        *_, last = [None, *self._special_tokens().finditer(text, prompt_end)]
        if last is not None and not text[last.end() :].strip():
            return RenderedText(text[: last.end()], prompt_end, last.start())
        return RenderedText(text, prompt_end, len(text))

    def _find_tail(self, template: str) -> Tail:
        show = _shower(self.tokenizer, template, None, dict(self.kwargs))
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": SENTINEL}]
        try:
            text = show(turns, False)
        except _template_errors() as error:
            raise UserError(
                f"chat template of {self.tokenizer.name_or_path or 'this tokenizer'} can't show a "
                f"question and an answer: {' '.join(str(error).split())}; mend it or override it "
                "with chat_template in refs.yaml"
            ) from None
        _, found, after = text.rpartition(SENTINEL)
        if not found:
            raise UserError(
                f"chat template of {self.tokenizer.name_or_path or 'this tokenizer'} doesn't show "
                "the assistant's answer; override it with chat_template in refs.yaml"
            )
        special = self._special_tokens().search(after)
        end = special.end() if special else 0
        return Tail(after[:end], after[end:])

    def _special_tokens(self) -> re.Pattern[str]:
        tokens = {
            *self.tokenizer.all_special_tokens,
            *(t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special),
        }
        longest_first = sorted(filter(None, tokens), key=lambda token: (-len(token), token))
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _shower(
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    tools: list[dict[str, Any]] | None,
    kwargs: dict[str, Any],
) -> Callable[[Sequence[Message], bool], str]:
    """The template as a function of messages and whether the generation prompt follows them."""

    def show(messages: Sequence[Message], generation_prompt: bool) -> str:
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            chat_template=template,
            add_generation_prompt=generation_prompt,
            tokenize=False,
            strftime_now=TODAY.strftime,
            **kwargs,
        )
        assert isinstance(text, str)
        return text

    return show


def _template_errors() -> tuple[type[Exception], ...]:
    """What a template raises for messages it doesn't take: its own refusal, or a field of a type
    or name that it did not expect."""
    from jinja2.exceptions import TemplateError

    return (TemplateError, TypeError, KeyError)


def _check_kwargs(kwargs: Mapping[str, Any], what: str) -> None:
    if taken := RESERVED & set(kwargs):
        raise UserError(
            f"{what}: {', '.join(sorted(taken))} can't be set there; they may hold variables of "
            "the template only"
        )


def _first_difference(prompt: str, text: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, text)) if a != b), len(text))
    return (
        f"from character {at} the prompt alone reads {json.dumps(prompt[at : at + 30])}, with the "
        f"response {json.dumps(text[at : at + 30])}"
    )
