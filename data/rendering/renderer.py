"""Pairs to token ids, the same way for references and policy.

A pair's text (from a chat template by `template.py`, or plain prompt and response) is tokenized as
a whole, once, without added special tokens, and split by character offset where the prompt ends:

    <s>[INST] What is 2 + 2? [/INST] It is 4.</s>
    |---------- prompt -----------||-- scored --|    "</s>" is the end of turn

A token across the boundary belongs to the response. Nothing is ever truncated. Tokenizers differ in
how characters lie under tokens; `spans` brings all of them to the same form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ..references import GGUF, ReferenceSpec, files_of, from_pretrained
from .template import ChatTemplate, Refusal, RenderedText

if TYPE_CHECKING:
    from tokenizers import AddedToken, Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

    from ..pairs import Pair

LONG_ID = re.compile(rb'(?<!\\)":\s*\d{8}')  # tokenizers counts up to the largest id, for minutes
RENDERING_VERSION = 1  # part of a score's identity: raise it when any token id changes


@dataclass(frozen=True, slots=True)
class RenderedSequence:
    """One branch of a pair as token ids; scored is `token_ids[start:]` without its `context`."""

    token_ids: list[int]
    start: int  # index of the first scored token, at least 1
    end_start: int  # index of the first end-of-turn token; len(token_ids) where there is none
    boundary: bool  # the first scored token begins before the response does
    context: tuple[tuple[int, int], ...] = ()  # index ranges of tool turns, none at the end

    @property
    def num_scored(self) -> int:
        return len(self.token_ids) - self.start - sum(end - begin for begin, end in self.context)

    def scored(self, values: Any) -> Any:
        """Of a list or array with a value for each of `token_ids[start:]`, the scored ones'."""
        if not self.context:
            return values
        begins = [self.start, *(end for _, end in self.context)]
        ends = [*(begin for begin, _ in self.context), len(self.token_ids)]
        kept = [i - self.start for begin, end in zip(begins, ends) for i in range(begin, end)]
        return [values[i] for i in kept] if isinstance(values, list) else values[kept]


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
        system_role: str | None = None,
    ) -> None:
        """Raises `UserError` for a tokenizer without offsets and a template that can't be used."""
        self.tokenizer = with_offsets(tokenizer)
        self.template = ChatTemplate(tokenizer, chat_template, chat_template_kwargs, system_role)
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
        system_role: str | None = None,
    ) -> Renderer:
        """The renderer of a Hub model, a model folder or a GGUF file; never loads weights."""
        return cls(
            load_tokenizer(str(model), revision),
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            system_role=system_role,
        )

    @classmethod
    def of_reference(cls, spec: ReferenceSpec, commit: str | None = None) -> Renderer:
        """As a reference's scores are rendered, of a Hub model at `commit` where it is given."""
        return cls.load(
            spec.model_path or spec.model,
            revision=commit or spec.revision,
            chat_template=spec.chat_template,
            chat_template_kwargs=spec.chat_template_kwargs,
            system_role=spec.system_role,
        )

    @property
    def chat_template(self) -> str | None:
        """The template for conversations without tools, or None."""
        return self.template.get()

    @property
    def end_of_turn(self) -> str | None:
        """The text that ends a turn; None where the template has no special token there."""
        return None if self.chat_template is None else self.template.tail().kept or None

    def render(self, pair: Pair) -> RenderedPair | Refusal:
        """The pair as this model sees it, or a permanent reason why it can't be."""
        return self.render_many([pair])[0]

    def render_many(self, pairs: Sequence[Pair]) -> list[RenderedPair | Refusal]:
        """As `render`, for many pairs in one batched call of the tokenizer."""
        shown = [self.texts(pair) for pair in pairs]
        kept = [branches for branches in shown if not isinstance(branches, Refusal)]
        texts = [branch.text for branches in kept for branch in branches]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        rendered: list[RenderedPair | Refusal] = []
        for pair, branches in zip(pairs, shown):
            if isinstance(branches, Refusal):
                rendered.append(branches)
                continue
            sequences = (self._sequence(b, next(encodings), pair.is_chat) for b in branches)
            rendered.append(_paired(*sequences, alike=pair.chosen == pair.rejected))
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
        chosen, rejected = (
            self._plain(str(pair.prompt), str(turns)) for turns in (pair.chosen, pair.rejected)
        )
        return chosen, rejected

    def own_end(self, text: str) -> str | None:
        """The end of turn or EOS with which a plain text ends by itself, so that none is added."""
        text = text.rstrip()
        return next((end for end in self._ends if text.endswith(end)), None)

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        """The texts that end a turn: EOS, and the template's end of turn."""
        ends = (self.tokenizer.eos_token, (self.end_of_turn or "").strip())
        return tuple(str(end) for end in ends if end)

    def _plain(self, prompt: str, response: str) -> RenderedText:
        """A text that brings its own end ends there, as a chat does: without white space after."""
        text = prompt + response
        if (end := self.own_end(response)) is None:
            return RenderedText(text, len(prompt), len(text))
        text = text.rstrip()
        return RenderedText(text, len(prompt), len(text) - len(end))

    def _sequence(
        self, rendered: RenderedText, encoding: Encoding, is_chat: bool
    ) -> RenderedSequence | Refusal:
        ids = encoding.ids
        start = end_start = len(ids)
        boundary = False
        context: list[tuple[int, int]] = []
        between = list(rendered.context)  # taken from the last to the first, as the tokens are
        for index, begin, end in spans(rendered.text, encoding, self._added):
            if end <= rendered.prompt_end:
                break
            start, boundary = index, begin < rendered.prompt_end
            if begin >= rendered.content_end:
                end_start = index
            while between and end <= between[-1][0]:
                between.pop()
            if between and between[-1][0] <= begin and end <= between[-1][1]:
                stop = context.pop()[1] if context and context[-1][0] == index + 1 else index + 1
                context.append((index, stop))
        if not is_chat:  # plain text gets BOS and EOS where the tokenizer has them and it doesn't
            if self._bos is not None and ids[:1] != [self._bos]:
                ids, start, end_start = [self._bos, *ids], start + 1, end_start + 1
            if self._eos is not None and rendered.content_end == len(rendered.text):
                end_start = len(ids)
                if start < len(ids) and ids[-1] == self._eos:  # written by prompt and response
                    end_start -= 1
                else:
                    ids = [*ids, self._eos]
        if start == len(ids):
            return Refusal("empty_response_tokens", "the response has no tokens of its own")
        if start == 0:
            return Refusal(
                "nothing_before_response", "no token comes before the first of the response"
            )
        return RenderedSequence(ids, start, end_start, boundary, tuple(context[::-1]))

    def _explained(self, rendered: RenderedText, sequence: RenderedSequence) -> ExplainedSequence:
        encoding = self._backend.encode(rendered.text, add_special_tokens=False)
        under = [(b, e) for _, b, e in spans(rendered.text, encoding, self._added)][::-1]
        ids, length = sequence.token_ids, len(rendered.text)
        front = next(n for n in (0, 1) if ids[n : n + len(under)] == encoding.ids)
        under = [(0, 0)] * front + under + [(length, length)] * (len(ids) - front - len(under))
        tokens = [self._backend.id_to_token(i) or "" for i in ids]
        return ExplainedSequence(rendered, sequence, tokens, under)


def _paired(
    chosen: RenderedSequence | Refusal, rejected: RenderedSequence | Refusal, *, alike: bool
) -> RenderedPair | Refusal:
    """Both branches with their shared part; `alike` where the data's responses are the same."""
    if isinstance(chosen, Refusal):
        return Refusal(chosen.reason, f"chosen: {chosen.detail}")
    if isinstance(rejected, Refusal):
        return Refusal(rejected.reason, f"rejected: {rejected.detail}")
    if chosen.token_ids == rejected.token_ids and not alike:
        return Refusal("responses_render_equal", "the responses differ, and their token ids do not")
    shared, most = 0, min(chosen.start, rejected.start)
    while shared < most and chosen.token_ids[shared] == rejected.token_ids[shared]:
        shared += 1
    return RenderedPair(chosen, rejected, shared)


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a Hub model, a folder or a GGUF file, or `UserError` without one."""
    from transformers import AutoTokenizer

    way_out = "name a model with one, or save one there with tokenizer.save_pretrained"
    file = Path(model) / "tokenizer.json"
    if file.is_file() and LONG_ID.search(file.read_bytes()):
        raise UserError(f"{file}: damaged, it has a token id of 8 or more digits; restore it")
    try:
        # With mistral-common installed, AutoTokenizer may return its tokenizer, without offsets.
        loaded = from_pretrained(AutoTokenizer, model, revision, mistral_format=False)
    except UserError as error:
        if error.__cause__ is None or Path(model).suffix == GGUF:
            raise  # it says what to do
        first_line = str(error.__cause__).strip().partition("\n")[0]
        raise UserError(f"model {model}: no tokenizer to load ({first_line}); {way_out}") from None
    tokenizer = with_offsets(loaded)
    if Path(model).suffix == GGUF:
        tokenizer = _as_in_gguf(tokenizer, model)
    # For a folder without tokenizer files, transformers makes a tokenizer without any word.
    with files_of(model):
        words = {*tokenizer("a", add_special_tokens=False).input_ids}
    if not words - {*tokenizer.all_special_ids}:
        raise UserError(f"model {model}: no tokenizer there; {way_out}")
    return tokenizer


def _as_in_gguf(tokenizer: PreTrainedTokenizerFast, path: str) -> PreTrainedTokenizerFast:
    """The tokenizer that transformers made of a GGUF file, with what it got wrong put right.

    It adds GPT-2's own "<|endoftext|>" to a vocabulary that lacks it, so behind the last row of the
    embeddings, and it does not read whether BOS comes first.
    """
    from gguf import GGUFReader
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    size = len(state["model"]["vocab"])
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]
    raw = Tokenizer.from_str(json.dumps(state))
    fields = GGUFReader(path).fields
    kind, flag = (fields.get(f"tokenizer.ggml.{key}") for key in ("model", "add_bos_token"))
    bos, spm = tokenizer.bos_token, kind is not None and kind.contents() == "llama"
    first = flag.contents() if flag else spm
    single = f"{bos} $A" if first and bos else "$A"
    tokens = [(bos, raw.token_to_id(bos))] if first and bos else []
    raw.post_processor = TemplateProcessing(single=single, special_tokens=tokens)
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        name_or_path=path,
        clean_up_tokenization_spaces=False,
        **{name: getattr(tokenizer, name) for name in names},
    )


# What special tokens look like in templates: <|im_end|>, <｜User｜>, <turn|>, </s>, [INST], [e~[, …
MARKERS = re.compile(
    r"<[|｜][^<>\n'\"{}]{1,40}[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>|</?[a-z_]+_of_[a-z_]+>|<[a-z]+:[a-z]+>"
    r"|<sep>|</?s>|<SPECIAL_\d+>|\[/?[A-Z_]{3,}\]|\]~!?b\[|\]~b\]|\[e~\["
)


def byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, and of what looks like special tokens in a template: to try it on."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    markers = {"<s>": 0, "</s>": 0} | dict.fromkeys(MARKERS.findall(template))
    raw.add_special_tokens([AddedToken(marker, normalized=False) for marker in markers])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def with_offsets(tokenizer: Any) -> PreTrainedTokenizerFast:
    """The tokenizer itself; `UserError` where it gives no character offsets."""
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    name = getattr(tokenizer, "name_or_path", None) or "the model"
    raise UserError(
        f"tokenizer of {name} ({type(tokenizer).__name__}) gives no character offsets, which "
        "scoring needs; use a model with a fast tokenizer (tokenizer.json)"
    )


def bare_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy that adds no tokens, trims no offsets, and neither truncates nor pads, whatever the
    model's tokenizer.json says; ids without special tokens are the same."""
    from tokenizers import Tokenizer

    bare = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bare.post_processor = None
    bare.no_truncation()
    bare.no_padding()
    return bare


def bos_in_use(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id of BOS where the tokenizer puts it before plain text, else None."""
    ids = tokenizer("a").input_ids
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def spans(
    text: str, encoding: Encoding, added: dict[int, AddedToken]
) -> Iterator[tuple[int, int, int]]:
    """(token index, begin, end) from the last token to the first, in characters of `text`.

    A character of several bytes may lie under several tokens. Characters that a normalizer dropped
    or joined to others (under NFC an accent to its letter) lie under none according to the
    tokenizer; here the token before them holds them. An added token is taken literally: without
    the white space that it swallows, and with nothing more.
    """
    following, last_end, last_stretched = len(text), -1, len(text)
    offsets, ids = encoding.offsets, encoding.ids
    for index in range(len(ids) - 1, -1, -1):
        begin, end = offsets[index]
        stretched = last_stretched if end == last_end else max(end, following)
        following, last_end, last_stretched = begin, end, stretched
        if (token := added.get(ids[index])) is not None and token.content.strip():
            if token.rstrip:
                end = begin + len(text[begin:end].rstrip())
            if token.lstrip:
                begin = end - len(text[begin:end].lstrip())
            yield index, begin, end
        else:
            yield index, begin, stretched
