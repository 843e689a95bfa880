"""Chat templates as text: what the model is shown, and where the response ends in it.

A template is a model's own Jinja program. This module renders it with a fixed date (templates like
that of Llama 3.2 print today's) and finds the end of turn by rendering a sentinel response once.
`renderer.py` turns the text into token ids; nothing else renders templates.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from ...errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ..pairs import Message, Pair

# The date that Llama 3.2's own template falls back to. Part of the rendering version.
TODAY = datetime(2024, 7, 26, 12, 0, 0)
SENTINEL = "SENTINELxRESPONSE"
# What a template raises for messages it doesn't accept: an error of its own, or Python's for a
# field that is missing or has an unexpected type.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a pair can't be rendered for a model: a permanent reason, and details."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class RenderedText:
    """A whole sequence as text: prompt, response, end of turn; positions in characters."""

    text: str
    prompt_end: int  # where the rendered prompt, with its generation prompt, ends
    content_end: int  # where the end of turn begins; len(text) where there is none


@dataclass(frozen=True, slots=True)
class Tail:
    """The text a template puts after a response: kept up to and with its first special token."""

    kept: str
    dropped: str


class ChatTemplate:
    """A tokenizer's chat template with the kwargs of its reference.

    `source` overrides the tokenizer's own template. A tokenizer may carry several by name, of
    which transformers takes `tool_use` for a conversation with tools.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        source: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises `UserError` for a template that can't show a question and an answer."""
        self.tokenizer = tokenizer
        self.source = source
        self.kwargs = dict(kwargs or {})
        self._name = tokenizer.name_or_path or "this tokenizer"
        self._tails: dict[str, Tail] = {}
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved = {*parameters, "messages", "strftime_now"}
        self._check_kwargs(self.kwargs, "the reference")
        if self.get() is not None:
            self.tail()

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
        """Chosen and rejected as text, or why the template can't show them.

        Raises `UserError` where there is no template at all.
        """
        assert isinstance(pair.prompt, list)
        template = self.get(pair.tools)
        if template is None:
            raise UserError(
                f"{self._name} has no chat template and the pairs are messages; give it one with "
                "chat_template in refs.yaml, or prepare the pairs as text"
            )
        own = pair.chat_template_kwargs or {}  # a pair's own win over its reference's
        self._check_kwargs(own, "a pair")
        kwargs = {"tools": pair.tools, **self.kwargs, **own}
        try:
            prompt = self._show(template, pair.prompt, kwargs, add_generation_prompt=True)
            texts = [
                self._show(template, [*pair.prompt, *response], kwargs)
                for response in (pair.chosen, pair.rejected)
            ]
        except TEMPLATE_ERRORS as error:
            return Refusal("template_refused", _one_line(error))
        for text in texts:
            if not text.startswith(prompt):
                pairs = enumerate(zip(prompt, text))
                at = next((i for i, (a, b) in pairs if a != b), len(text))
                return Refusal(
                    "prompt_not_prefix",
                    f"from character {at} the prompt alone reads "
                    f"{json.dumps(prompt[at : at + 30])}, with the response "
                    f"{json.dumps(text[at : at + 30])}",
                )
        tail = self.tail(pair.tools)
        chosen, rejected = (self._cut(text, len(prompt), tail) for text in texts)
        return chosen, rejected

    def _show(
        self,
        template: str,
        messages: Sequence[Message],
        kwargs: Mapping[str, Any],
        add_generation_prompt: bool = False,
    ) -> str:
        text = self.tokenizer.apply_chat_template(
            list(messages),
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            strftime_now=TODAY.strftime,
            **kwargs,
        )
        assert isinstance(text, str)
        return text

    def _cut(self, text: str, prompt_end: int, tail: Tail) -> RenderedText:
        """The text without what follows the end of turn.

        A turn that doesn't end as the sentinel's did (one with a tool call may not) ends with its
        last special token if only white space follows it.
        """
        end = len(text) - len(tail.dropped)
        content_end = end - len(tail.kept)
        if content_end >= prompt_end and text.endswith(tail.kept + tail.dropped):
            return RenderedText(text[:end], prompt_end, content_end)
        *_, last = [None, *self._special_tokens.finditer(text, prompt_end)]
        if last is not None and not text[last.end() :].strip():
            return RenderedText(text[: last.end()], prompt_end, last.start())
        return RenderedText(text, prompt_end, len(text))

    def _find_tail(self, template: str) -> Tail:
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": SENTINEL}]
        way_out = "fix it, or override it with chat_template in refs.yaml"
        try:
            text = self._show(template, turns, self.kwargs)
        except TEMPLATE_ERRORS as error:
            raise UserError(
                f"chat template of {self._name} can't show a question and an answer "
                f"({_one_line(error)}); {way_out}"
            ) from None
        _, sentinel, after = text.rpartition(SENTINEL)
        if not sentinel:
            raise UserError(
                f"chat template of {self._name} doesn't show the assistant's answer; {way_out}"
            )
        special = self._special_tokens.search(after)
        end = special.end() if special else 0
        return Tail(after[:end], after[end:])

    def _check_kwargs(self, kwargs: Mapping[str, Any], of: str) -> None:
        """Refuse parameters of `apply_chat_template`, which no template variable can be called."""
        if taken := self._reserved & set(kwargs):
            raise UserError(
                f"chat_template_kwargs of {of}: {', '.join(sorted(taken))} can't be set there; "
                "they hold the template's own variables only"
            )

    @cached_property
    def _special_tokens(self) -> re.Pattern[str]:
        """Any special token's text, the longest where several begin alike."""
        added = self.tokenizer.added_tokens_decoder.values()
        texts = {*self.tokenizer.all_special_tokens, *(t.content for t in added if t.special)}
        longest_first = sorted(texts - {""}, key=lambda text: (-len(text), text))
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
