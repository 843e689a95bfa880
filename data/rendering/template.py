"""Chat templates as text: what the model is shown, and where the response lies in it.

`program.py` runs a template. This module finds the end of turn by rendering a sentinel response
once, and the beginning of the response in one of two ways: after the generation prompt where the
full text begins with it ("prefix"), else where sentinel responses in its place begin ("sentinel"),
since the generation prompt of a reasoning model may open a thinking block that a finished turn
lacks. What a template leaves out of a response is refused, never silently unscored.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from jinja2.exceptions import UndefinedError

from ...errors import UserError
from .program import TEMPLATE_ERRORS, run_template, template_variables
from .responses import (
    SENTINELS,
    Show,
    absent_part,
    common_beginning,
    reasoning_forms,
    sentinel_start,
    shows_reasoning,
    turn_end,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ..pairs import Message, Pair

Place = Literal["prefix", "sentinel"]  # the way in which the response's place was found
PLACES: dict[Place, str] = {
    "prefix": "the response begins after the generation prompt",
    "sentinel": "the response begins where a sentinel in its place does, since the generation "
    "prompt is not the beginning of a finished turn",
}
SYSTEM_ROLES = ("system", "developer")
# For templates that show nothing without a tool.
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Look a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "The word."}},
            "required": ["word"],
        },
    },
}


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
    context: tuple[tuple[int, int], ...] = ()  # [begin, end) of tool turns within the response
    place: Place = "prefix"


@dataclass(frozen=True, slots=True)
class Tail:
    """The text a template puts after a response: kept up to and with its first special token."""

    kept: str
    dropped: str
    place: Place = "prefix"  # of a plain answer to a plain question


class ChatTemplate:
    """A tokenizer's chat template with the kwargs of its reference.

    `source` overrides the tokenizer's own template. A tokenizer may carry several by name, of
    which transformers takes `tool_use` for a conversation with tools. With `system_role` "fold" a
    system message goes in front of the first user turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        source: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        system_role: str | None = None,
    ) -> None:
        """Raises `UserError` for a template that can't show a question and an answer."""
        self.tokenizer = tokenizer
        self.source = source
        self.kwargs = dict(kwargs or {})
        self.folds = system_role == "fold"
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

    @property
    def place(self) -> Place:
        """How the place of a plain answer is found; "prefix" where there is no template."""
        return "prefix" if self.get() is None else self.tail().place

    @property
    def thinking_kwargs(self) -> list[str]:
        """The template's own variables about thinking, for `chat_template_kwargs`."""
        names = template_variables(self.get() or "")
        return sorted(filter(re.compile(r"(?=.*(think|reason))(?!.*(content|text)$)").match, names))

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
        show = self._shower(template, {"tools": pair.tools, **self.kwargs, **own})
        prompt = folded(pair.prompt) if self.folds else pair.prompt
        try:
            asked = show(prompt, asks=True)
        except TEMPLATE_ERRORS as error:
            return Refusal("template_refused", _one_line(error) + self._fold_hint(show, prompt))
        branches = []
        for name in ("chosen", "rejected"):
            branch = self._branch(show, prompt, getattr(pair, name), asked, self.tail(pair.tools))
            if isinstance(branch, Refusal):
                return replace(branch, detail=f"{name}: {branch.detail}")
            branches.append(branch)
        return branches[0], branches[1]

    def question(self, messages: Sequence[Message]) -> str:
        """Turns without tools, the user's last, as text up to where the answer begins.

        Raises `UserError` where there is no template, or where it refuses these turns.
        """
        template = self.get()
        if template is None:
            raise UserError(
                f"{self._name} has no chat template; ask without --apply-chat-template, or save a "
                "tokenizer that has one"
            )
        turns = folded(list(messages)) if self.folds else messages
        try:
            return self._shower(template, {"tools": None, **self.kwargs})(turns, asks=True)
        except TEMPLATE_ERRORS as error:
            raise UserError(
                f"{self._name}: its chat template refuses the messages ({_one_line(error)}); ask "
                "without --apply-chat-template"
            ) from None

    def _shower(self, template: str, kwargs: Mapping[str, Any]) -> Show:
        variables = {"tools": None, **self.tokenizer.special_tokens_map, **kwargs}

        def show(messages: Sequence[Message], asks: bool = False) -> str:
            return run_template(template, messages, {**variables, "add_generation_prompt": asks})

        return show

    def _branch(
        self, show: Show, prompt: list[Message], response: list[Message], asked: str, tail: Tail
    ) -> RenderedText | Refusal:
        """The response as given, else with its reasoning in a field that the template reads."""
        refusals = []
        for turns in reasoning_forms(response):
            try:
                rendered = self._rendered(show, prompt, turns, asked, tail)
            except TEMPLATE_ERRORS as error:
                rendered = Refusal("template_refused", _one_line(error))
            if isinstance(rendered, RenderedText):
                return rendered
            refusals.append(rendered)
        return refusals[0]

    def _rendered(
        self, show: Show, prompt: list[Message], turns: list[Message], asked: str, tail: Tail
    ) -> RenderedText | Refusal:
        text = show([*prompt, *turns])
        place: Place = "prefix" if text.startswith(asked) else "sentinel"
        start = len(asked) if place == "prefix" else sentinel_start(show, prompt, turns, text)
        if start is None:
            at = len(common_beginning(asked, text))
            return Refusal(
                "prompt_not_prefix",
                f"from character {at} the prompt alone reads "
                f"{json.dumps(asked[at : at + 30])}, with the response "
                f"{json.dumps(text[at : at + 30])}, and no sentinel response shows its place"
                + self._thinking_hint(),
            )
        lacking = absent_part(turns, text[start:])
        if lacking is None and not shows_reasoning(show, prompt, turns):
            lacking = "its reasoning"
        if lacking is not None:
            return Refusal(
                "response_not_shown",
                f"the template leaves out {lacking}" + self._thinking_hint(),
            )
        context = self._context(show, prompt, turns, text, start, tail)
        if context is None:
            return Refusal(
                "prompt_not_prefix",
                "the response has several turns, and where one of them ends can't be told from "
                "what the template shows",
            )
        return replace(self._cut(text, start, tail), context=context, place=place)

    def _context(
        self,
        show: Show,
        prompt: list[Message],
        turns: list[Message],
        text: str,
        start: int,
        tail: Tail,
    ) -> tuple[tuple[int, int], ...] | None:
        """[begin, end) of what stands between the assistant's turns of a response.

        None where a turn's beginning or end can't be told.
        """
        context: list[tuple[int, int]] = []
        roles = [message["role"] for message in turns]
        for at in range(1, len(turns)):
            if roles[at] == "assistant" or roles[at - 1] != "assistant":
                continue
            following = roles.index("assistant", at)
            opened = [*prompt, *turns[:following]]
            before = self._cut(show([*prompt, *turns[:at]]), 0, tail).text
            begin: int | None = len(before)
            if not text.startswith(before):  # a template may show a last turn otherwise
                since = context[-1][1] if context else start
                args = [*prompt, *turns[:at]], turns[at], text, since
                begin = turn_end(show, *args, tail.kept.strip())
            asked = show(opened, asks=True)
            end: int | None = len(asked)
            if not text.startswith(asked):
                end = sentinel_start(show, opened, turns[following:], text)
            if begin is None or end is None or begin > end:
                return None
            context.append((begin, end))
        return tuple(context)

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
        question = [{"role": "user", "content": "Hello"}]
        answer = {"role": "assistant", "content": SENTINELS[0]}
        way_out = "fix it, or override it with chat_template in refs.yaml"
        show = self._shower(template, self.kwargs)
        try:
            text = show([*question, answer])
        except TEMPLATE_ERRORS as error:
            show = self._shower(template, {**self.kwargs, "tools": [TOOL]})
            try:
                text = show([*question, answer])  # a template for tools alone
            except TEMPLATE_ERRORS:
                if isinstance(error, UndefinedError):
                    way_out = "set what it lacks in chat_template_kwargs, or " + way_out
                raise UserError(
                    f"chat template of {self._name} can't show a question and an answer "
                    f"({_one_line(error)}); {way_out}"
                ) from None
        _, sentinel, after = text.rpartition(SENTINELS[0])
        if not sentinel:
            raise UserError(
                f"chat template of {self._name} doesn't show the assistant's answer; {way_out}"
            )
        try:
            place: Place = "prefix" if text.startswith(show(question, asks=True)) else "sentinel"
        except TEMPLATE_ERRORS:
            place = "prefix"  # every pair will be refused, as before
        special = self._special_tokens.search(after)
        end = special.end() if special else 0
        return Tail(after[:end], after[end:], place)

    def _fold_hint(self, show: Show, prompt: list[Message]) -> str:
        """The way out where a template takes no system message, else nothing."""
        if self.folds or not any(message["role"] in SYSTEM_ROLES for message in prompt):
            return ""
        try:
            show(folded(prompt), asks=True)
        except TEMPLATE_ERRORS:
            return ""
        return "; system_role: fold in refs.yaml puts a system message before the first user turn"

    def _thinking_hint(self) -> str:
        names = self.thinking_kwargs
        return f"; the template knows chat_template_kwargs {', '.join(names)}" if names else ""

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


def folded(messages: Sequence[Message]) -> list[Message]:
    """The messages with leading system messages put in front of the first user turn."""
    count = next((n for n, m in enumerate(messages) if m["role"] not in SYSTEM_ROLES), 0)
    rest = list(messages[count:])
    at = next((n for n, message in enumerate(rest) if message["role"] == "user"), None)
    if at is None:
        return list(messages)
    parts = [str(message.get("content") or "") for message in (*messages[:count], rest[at])]
    rest[at] = {**rest[at], "content": "\n\n".join(parts)}
    return rest


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
