"""Tokenizers and chat templates of the model families, small enough for tests.

Each tokenizer is of its family's kind (pre-tokenizer, normalizer, special tokens and how they
treat the white space beside them), trained on a few lines; `real_sentencepiece` is Mistral's own.
The templates are in `family_templates.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mrpo.data.pairs import Pair, Prompt
from mrpo.data.rendering import RenderedPrompt, RenderedText, Renderer
from mrpo.data.rendering.renderer import with_offsets
from mrpo.tests.data import family_templates as templates

CORPUS = [
    "What is the capital of France? The capital of France is Paris. Paris is the answer.",
    "She has 16 - 3 - 4 = 9 eggs, and sells them for 18 dollars.\n\nThe answer is 18.",
    "You are a helpful assistant. USER: yes or no? ASSISTANT: yes, no, yes.</s>",
    "A naïve café in Zürich; 東京 and emoji 🙂 are spelled byte by byte. e\u0301 각 q\u0323",
    "### Instruction:\nAnswer.\n\n### Response:\nIt is 4.\n\nuser assistant system model tool",
] * 4

# The published pre-tokenizer patterns.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    """A tokenizer and a template; `scored` is what a response becomes between prompt and end.

    `untrimmed` is the same tokenizer without a post-processor that trims offsets.
    """

    name: str
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    template: str
    end_of_turn: str | None
    scored: Callable[[str], str] = str  # of the content, without the end of turn
    system: bool = True
    untrimmed: Callable[[], PreTrainedTokenizerFast] | None = None

    @cache  # noqa: B019 (families live as long as the tests)
    def renderer(self) -> Renderer:
        return Renderer(self.tokenizer(), chat_template=self.template)


@cache
def byte_level(
    split: str, special: tuple[str, ...], *, nfc: bool = False, bos: str = "", trim: bool = False
) -> PreTrainedTokenizerFast:
    """GPT-2's kind: bytes as characters, BPE within a pattern's pieces. The last of `special` is
    EOS. With `trim`, the post-processor leaves spaces out of the offsets, as GPT-2's own does."""
    raw = Tokenizer(models.BPE())
    if nfc:
        raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(raw, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet), special)
    level = processors.ByteLevel(trim_offsets=trim)
    raw.post_processor = processors.Sequence([level, _bos(raw, bos)]) if bos else level
    return _wrap(raw, bos or None, special[-1])


@cache
def sentencepiece_like(
    special: tuple[str, ...], *, kind: str, strips: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """A SentencePiece model as converted: "▁" for spaces, bytes for what has no token.

    `kind` is how the leading "▁" comes in: "legacy" by a normalizer at every stretch of text,
    "metaspace" where no space stands there, "none" never (Gemma). Special tokens in `strips`
    swallow the white space behind them. The first of `special` is BOS, the last is EOS.
    """
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    if kind == "legacy":
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    elif kind == "metaspace":
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    else:
        raw.normalizer = spaces
        raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    _train(raw, trainers.BpeTrainer(vocab_size=250), ("<unk>", *special))
    state = json.loads(raw.to_str())
    vocab = state["model"]["vocab"]
    state["model"]["vocab"] |= {byte: len(vocab) + i for i, byte in enumerate(bytes_)}
    raw = Tokenizer.from_str(json.dumps(state))
    raw.add_special_tokens([AddedToken(token, rstrip=True, normalized=False) for token in strips])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    raw.post_processor = _bos(raw, special[0])
    return _wrap(raw, special[0], special[-1])


@cache
def real_sentencepiece(version: str) -> PreTrainedTokenizerFast:
    """Mistral's own SentencePiece model, converted to a fast tokenizer by transformers.

    Its file comes with mistral-common. "v1" is of the Llama 2 kind ([INST] is ordinary text) and
    gets the normalizer of Llama 2's published tokenizer.json; "v3" has the control tokens.
    """
    import mistral_common

    names = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
    source = Path(mistral_common.__file__).parent / "data" / names[version]
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    with TemporaryDirectory() as folder:
        shutil.copy(source, Path(folder) / "tokenizer.model")
        Path(folder, "config.json").write_text('{"model_type": "llama"}')
        Path(folder, "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = with_offsets(AutoTokenizer.from_pretrained(folder, mistral_format=False))
    raw = tokenizer.backend_tokenizer
    if version == "v1":
        raw.pre_tokenizer = None
        raw.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    raw.post_processor = _bos(raw, "<s>")
    return tokenizer


def _train(raw: Tokenizer, trainer: trainers.BpeTrainer, special: tuple[str, ...]) -> None:
    trainer.show_progress = False
    trainer.special_tokens = [AddedToken(token, normalized=False) for token in special]
    raw.train_from_iterator(CORPUS, trainer)


def _bos(raw: Tokenizer, bos: str) -> processors.PostProcessor:
    return processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))]
    )


def _wrap(raw: Tokenizer, bos: str | None, eos: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )


_LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>")
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_PHI4_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>")
_MISTRAL_TOKENS = (
    *("<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "</s>"),
)


def _qwen_scored(content: str) -> str:
    return "<think>\n\n</think>\n\n" + content.lstrip("\n")


FAMILIES = [
    Family(
        "llama2",
        lambda: sentencepiece_like(("<s>", "</s>"), kind="legacy"),
        templates.LLAMA2,
        " </s>",
        scored=lambda content: " " + content.strip(),
    ),
    Family(
        "llama3",
        lambda: byte_level(LLAMA3_SPLIT, (*_LLAMA3_TOKENS, "<|eot_id|>"), bos="<|begin_of_text|>"),
        templates.LLAMA3,
        "<|eot_id|>",
        scored=str.strip,
    ),
    Family(
        "mistral",
        lambda: sentencepiece_like(_MISTRAL_TOKENS, kind="metaspace"),
        templates.MISTRAL.replace("SPACE", " "),
        "</s>",
        scored=lambda content: " " + content,
    ),
    Family(
        "mistral-tekken",
        lambda: byte_level(TEKKEN_SPLIT, _MISTRAL_TOKENS, bos="<s>"),
        templates.MISTRAL.replace("SPACE", ""),
        "</s>",
    ),
    Family(
        "qwen2.5",
        lambda: byte_level(QWEN_SPLIT, _CHATML, nfc=True),
        templates.QWEN25,
        "<|im_end|>",
    ),
    Family(
        "qwen3",
        lambda: byte_level(QWEN_SPLIT, _CHATML, nfc=True),
        templates.QWEN3,
        "<|im_end|>",
        scored=_qwen_scored,
    ),
    Family(
        "gemma",
        lambda: sentencepiece_like(
            ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"), kind="none"
        ),
        templates.GEMMA,
        "<end_of_turn>",
        scored=str.strip,
        system=False,
    ),
    Family(
        "phi3",
        lambda: sentencepiece_like(
            ("<s>", "<|endoftext|>"),
            kind="legacy",
            strips=("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        ),
        templates.PHI3,
        "<|end|>",
    ),
    Family(
        "phi4",
        lambda: byte_level(GPT2_SPLIT, _PHI4_TOKENS, trim=True),
        templates.PHI4,
        "<|im_end|>",
        untrimmed=lambda: byte_level(GPT2_SPLIT, _PHI4_TOKENS),
    ),
    Family(
        "vicuna",
        lambda: byte_level(GPT2_SPLIT, ("<s>", "</s>"), bos="<s>"),
        templates.VICUNA,
        "</s>",
        system=False,
    ),
    Family(
        "llama2-real",
        lambda: real_sentencepiece("v1"),
        templates.LLAMA2,
        " </s>",
        scored=lambda content: " " + content.strip(),
    ),
    Family(
        "mistral-real",
        lambda: real_sentencepiece("v3"),
        templates.MISTRAL.replace("SPACE", " "),
        "</s>",
        scored=lambda content: " " + content,
    ),
    Family(
        "alpaca",
        lambda: byte_level(GPT2_SPLIT, ("<|endoftext|>",)),
        templates.ALPACA,
        None,
        system=False,
    ),
]
BY_NAME = {family.name: family for family in FAMILIES}


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def pair_of(prompt: list[dict[str, Any]], chosen: str, rejected: str, **more: Any) -> Pair:
    return Pair(prompt, [message("assistant", chosen)], [message("assistant", rejected)], **more)


def ask(chosen: str = "Yes.", rejected: str = "No.", **more: Any) -> Pair:
    """One question with two answers."""
    return pair_of([message("user", "Is it?")], chosen, rejected, **more)


def rendered(renderer: Renderer, pair: Pair) -> RenderedPrompt:
    result = renderer.render(pair)
    assert isinstance(result, RenderedPrompt), result
    return result


def texts_of(renderer: Renderer, pair: Pair) -> list[RenderedText]:
    """The texts of both responses, none of them refused."""
    texts = []
    for text in renderer.texts(Prompt.of(pair), (pair.chosen, pair.rejected)):
        assert isinstance(text, RenderedText), text
        texts.append(text)
    return texts


def split(renderer: Renderer, pair: Pair) -> tuple[str, str, str]:
    """The chosen branch's text: prompt, scored content, end of turn."""
    chosen = texts_of(renderer, pair)[0]
    at, end = chosen.prompt_end, chosen.content_end
    return chosen.text[:at], chosen.text[at:end], chosen.text[end:]


def decode(renderer: Renderer, ids: list[int]) -> str:
    text = renderer.tokenizer.decode(ids)
    assert isinstance(text, str)
    return text
