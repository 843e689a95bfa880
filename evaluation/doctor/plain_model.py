"""An independent way to score: one sequence at a time, transformers' own forward, all logits.

Shares no code with stage one but the date that templates are shown, written as text in place of
each `strftime_now("…")` in the template (a format that is not a literal shows today's date). Prompt
and whole conversation go through transformers' `apply_chat_template`, each is tokenized by an
ordinary call, and the response begins where the two lists of ids differ; where the prompt's text is
not the beginning of the other, it begins where its own words are found. Reasoning is passed in all
fields that templates read at once. Slow, and meant for a few pairs (`probe.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...data.pairs import Message, Pair, Turns
from ...data.references import GGUF, ReferenceSpec, from_pretrained
from ...data.rendering import TODAY
from ...data.rendering.renderer import load_tokenizer
from ...model.load import with_adapter

DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
THOUGHTS = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)
ODD = "<think>odd</think>ly"  # as no template would write it
LOGITS_AT_ONCE = 512  # positions whose logits are float32 at a time


@dataclass(frozen=True, slots=True)
class PlainSequence:
    """Prompt and response as token ids; the response is `token_ids[start:]`."""

    token_ids: list[int]
    start: int
    end_start: int  # where the end of turn begins; len(token_ids) where there is none


@dataclass(frozen=True, slots=True, eq=False)
class TokenLogps:
    """A sequence with the log-prob of each token given all before it, nats; NaN for the first."""

    sequence: PlainSequence
    token_logps: np.ndarray

    @property
    def response(self) -> np.ndarray:
        return self.token_logps[self.sequence.start :]

    @property
    def logp(self) -> float:
        return float(self.response.sum())

    @property
    def content_logp(self) -> float:
        """Without the end of turn."""
        return float(self.token_logps[self.sequence.start : self.sequence.end_start].sum())

    @property
    def tokens(self) -> int:
        return len(self.response)


class PlainModel:
    """A causal LM as transformers' Auto class loads it."""

    def __init__(
        self,
        model: str,
        revision: str | None,
        dtype: str,
        adapter: str | None,
        adapter_revision: str | None = None,
    ) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded: Any = from_pretrained(
            AutoModelForCausalLM, model, revision, dtype=getattr(torch, dtype)
        )
        if adapter is not None:
            loaded = with_adapter(loaded, adapter, adapter_revision)
        self.model = loaded.to(self.device).eval()

    @torch.inference_mode()
    def score(self, sequence: PlainSequence) -> TokenLogps:
        """The log-prob of every token."""
        ids = torch.tensor([sequence.token_ids], device=self.device)
        logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1]
        targets = ids[0, 1:, None]
        parts = [
            rows.float().log_softmax(-1).gather(1, target)[:, 0].double().cpu()
            for rows, target in zip(logits.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE))
        ]
        return TokenLogps(sequence, np.concatenate([[np.nan], torch.cat(parts).numpy()]))

    def accepts(self, sequence: PlainSequence) -> bool:
        """Whether every id has an embedding."""
        return max(sequence.token_ids) < self.model.get_input_embeddings().num_embeddings


class PlainTokenizer:
    """A tokenizer with its own chat template or that of refs.yaml, as transformers uses them."""

    def __init__(self, model: str, revision: str | None, spec: ReferenceSpec) -> None:
        if Path(model).suffix == GGUF:  # which transformers alone does not read quite right
            self.tokenizer: Any = load_tokenizer(model)
        else:
            self.tokenizer = from_pretrained(AutoTokenizer, model, revision, mistral_format=False)
        self.template, self.kwargs = spec.chat_template, dict(spec.chat_template_kwargs or {})
        self._folds = spec.system_role == "fold"
        added = self.tokenizer.added_tokens_decoder
        special = {token_id for token_id, token in added.items() if token.special}
        self._special = special | set(self.tokenizer.all_special_ids)

    def sequence(self, pair: Pair, branch: int, template: str | None = None) -> PlainSequence:
        """A pair's chosen (0) or rejected (1) response; `template` in place of its own."""
        turns = pair.rejected if branch else pair.chosen
        if pair.is_chat:
            return self._chat(pair, turns, template or self.template)
        return self.text(str(pair.prompt), str(turns))

    def text(self, prompt: str, response: str, ended: bool = True) -> PlainSequence:
        """Text with the special tokens that the tokenizer adds, and EOS at the end."""
        ids: list[int] = self.tokenizer(prompt + response).input_ids
        before: list[int] = self.tokenizer(prompt).input_ids
        eos = self.tokenizer.eos_token_id
        stripped: list[int] = self.tokenizer(prompt + response.rstrip()).input_ids
        if stripped[-1] in self._special and response.strip():  # it brings its own end
            ids = stripped
        elif ended and eos is not None:
            ids = [*ids, eos]
        start = max(1, _common_prefix(before, ids))
        return PlainSequence(ids, start, len(ids) - (ids[-1] in self._special))

    def _chat(self, pair: Pair, turns: Turns, template: str | None) -> PlainSequence:
        assert isinstance(pair.prompt, list)
        assert isinstance(turns, list)
        variables = {"tools": pair.tools, **self.kwargs, **(pair.chat_template_kwargs or {})}
        prompt = _folded(pair.prompt) if self._folds else pair.prompt
        asked = self._rendered(prompt, template, variables, asks=True)
        text = self._rendered([*prompt, *turns], template, variables)
        words = [word for turn in turns for word in _words(turn)]
        shown = turns
        for form in (_everywhere, _in_content):  # until all is shown
            if not all(word in text for word in words):
                shown = [form(turn) for turn in turns]
                text = self._rendered([*prompt, *shown], template, variables)
        if not text.startswith(asked):
            content = str(shown[0].get("content") or "").strip()
            odd = {"role": "assistant", "content": ODD}
            if "</think>" in content and ODD in self._rendered([*prompt, odd], template, variables):
                words = [content]  # shown as it is: its tags are the response's own
            places = [text.rfind(word) for word in words if word in text]
            asked = text[: min(places, default=0)]
        ids = self._ids(text)
        start = max(1, _common_prefix(self._ids(asked), ids))
        end = self._end_of_turn(ids, start)
        if end is not None:
            return PlainSequence(ids[: end + 1], start, end)
        # No special token ends the turn: the response ends with its content.
        content = str(turns[-1].get("content") or "").strip()
        ids = self._ids(text[: text.rfind(content) + len(content)]) if content in text else ids
        return PlainSequence(ids, start, len(ids))

    def _rendered(
        self,
        messages: Sequence[Message],
        template: str | None,
        variables: Mapping[str, Any],
        asks: bool = False,
    ) -> str:
        source: str = self.tokenizer.get_chat_template(template, variables.get("tools"))
        text: str = self.tokenizer.apply_chat_template(
            list(messages),
            chat_template=DATE.sub(lambda call: repr(TODAY.strftime(call[2])), source),
            tokenize=False,
            add_generation_prompt=asks,
            **variables,
        )
        return text

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _end_of_turn(self, ids: list[int], start: int) -> int | None:
        """The first of the special tokens at the end; white space may stand between them."""
        first = None
        for index in range(len(ids) - 1, start - 1, -1):
            if ids[index] in self._special:
                first = index
            elif self.tokenizer.decode([ids[index]]).strip():
                break
        return first


def _words(turn: Message) -> list[str]:
    """The turn's reasoning and answer, without white space around them."""
    content = str(turn.get("content") or "")
    found = THOUGHTS.fullmatch(content)
    texts = [turn.get("reasoning_content"), turn.get("thinking"), turn.get("reasoning")]
    texts += found.groups() if found else [content]
    return [text.strip() for text in texts if text and text.strip()]


def _everywhere(turn: Message) -> Message:
    """The turn with its reasoning in every field that templates read, and out of its content."""
    *reasoning, content = _words(turn)
    if not reasoning:
        return turn
    fields = dict.fromkeys(("reasoning_content", "thinking", "reasoning"), reasoning[0])
    return {**turn, **fields, "content": content}


def _in_content(turn: Message) -> Message:
    """The turn with its reasoning in its content, as most models write it."""
    *reasoning, content = _words(turn)
    if not reasoning:
        return turn
    return {"role": turn["role"], "content": f"<think>\n{reasoning[0]}\n</think>\n\n{content}"}


def _folded(prompt: list[Message]) -> list[Message]:
    """A system message joined to the first user turn, as `system_role: fold` asks."""
    if len(prompt) < 2 or prompt[0]["role"] != "system" or prompt[1]["role"] != "user":
        return prompt
    text = f"{prompt[0]['content']}\n\n{prompt[1]['content']}"
    return [{**prompt[1], "content": text}, *prompt[2:]]


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of ids that both lists begin with."""
    pairs = enumerate(zip(first, second))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))
