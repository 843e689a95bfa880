"""Rendering on the real tokenizers of Llama 2, Llama 3, Qwen 2, Phi 3 and GPT-2.

Their token ids are those of the published test vectors, and what rendering promises for any text
(`test_properties.py`) holds on them, with real templates that use their special tokens and with
templates of plain words.
"""

from __future__ import annotations

from copy import copy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from mrpo.data.pairs import Pair
from mrpo.data.rendering import Refusal, RenderedPrompt, Renderer
from mrpo.data.rendering.template import ChatTemplate
from mrpo.tests.data import family_templates
from mrpo.tests.data.families import Family, message, texts_of
from mrpo.tests.data.rendering.test_properties import (
    PIECES,
    TEXT,
    brings_special_tokens,
    check_branch,
    check_shared,
)

Tokenizers = dict[str, PreTrainedTokenizerFast]

SEPARATOR = "\n__ggml_vocab_test__\n"
# The conversion of Llama 3's vocabulary merges these syllables otherwise.
MERGED_OTHERWISE = ["Cửa Việt"]

OWN = "its own"
# For each tokenizer, templates whose special tokens it has; the upper-case ones are those of
# `family_templates.py`. Vicuna's and Alpaca's are of plain words.
TEMPLATES = {
    "gpt-2": ["VICUNA", "ALPACA"],
    "llama-bpe": [
        "meta-llama-Llama-3.1-8B-Instruct",
        "meta-llama-Llama-3.3-70B-Instruct",
        "meetkai-functionary-medium-v3.1",
        "VICUNA",
    ],
    "llama-spm": ["LLAMA2", "VICUNA", "ALPACA"],
    "phi-3": [OWN, "microsoft-Phi-3.5-mini-instruct", "ALPACA"],
    "qwen2": [
        OWN,
        "Qwen-Qwen2.5-7B-Instruct",
        "Qwen-Qwen3-0.6B",
        "LFM2.5-Instruct",
        "VICUNA",
    ],
}
CASES = [(tokenizer, template) for tokenizer, names in TEMPLATES.items() for template in names]
every_case = pytest.mark.parametrize(("name", "template"), CASES)
every_tokenizer = pytest.mark.parametrize("name", TEMPLATES)
thorough = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="session")
def renderers(real_tokenizers: Tokenizers) -> dict[str, Renderer]:
    """A renderer of each tokenizer, with the tokenizer's own template where it has one."""
    return {name: Renderer(tokenizer) for name, tokenizer in real_tokenizers.items()}


@pytest.fixture
def renderer(
    name: str, template: str, renderers: dict[str, Renderer], shared_data: Path
) -> Renderer:
    """With a template; the tokenizer's copy, slow to make, is that of `renderers`."""
    if template == OWN:
        return renderers[name]
    source = getattr(family_templates, template, None)
    source = source or (shared_data / "templates" / f"{template}.jinja").read_text("utf-8")
    made = copy(renderers[name])
    made.template = ChatTemplate(made.tokenizer, source)
    return made


def vectors(folder: Path, name: str) -> list[tuple[str, list[int]]]:
    """The published texts with their token ids."""
    with (folder / f"{name}.inp").open(encoding="utf-8", newline="") as file:
        texts = file.read().split(SEPARATOR)
    lines = (folder / f"{name}.out").read_text(encoding="utf-8").split("\n")
    assert len(texts) == len(lines) == 47
    assert texts.pop() == lines.pop() == ""
    return [(text, [int(token) for token in line.split()]) for text, line in zip(texts, lines)]


@every_tokenizer
def test_token_ids_are_those_of_the_published_vectors(
    name: str, real_tokenizers: Tokenizers, renderers: dict[str, Renderer], shared_data: Path
) -> None:
    published = vectors(shared_data / "tokenizers", name)
    tokenizer, renderer = real_tokenizers[name], renderers[name]
    others = [
        text
        for text, ids in published
        if tokenizer(text, add_special_tokens=False).input_ids != ids
    ]
    # Llama 2's conversion puts no space in front of a text that begins with one.
    expected = {"llama-spm": [text for text, _ in published if text.startswith(" ")]}
    assert others == expected.get(name, MERGED_OTHERWISE if name == "llama-bpe" else [])
    assert len(published) - len(others) == {"llama-bpe": 45, "llama-spm": 31}.get(name, 46)
    # Rendering gives the tokenizer's ids for the whole text, and EOS behind it.
    for text, _ in published:
        rendered = renderer.render(Pair(text, " yes", " no"))
        if isinstance(rendered, Refusal):  # one token for text and response, and no BOS before it
            assert rendered.reason == "nothing_before_response"
            continue
        assert rendered.responses[0].token_ids == [
            *tokenizer(text + " yes").input_ids,
            tokenizer.eos_token_id,
        ]


@every_case
@thorough
@given(prompt=TEXT, chosen=TEXT, rejected=TEXT)
@example(prompt="Yes e", chosen="\u0301\u0323 and \u1161", rejected="\u0301")
@example(prompt="Say", chosen=" \n yes", rejected="  no \n ")
@example(prompt="👩‍🚀", chosen="👩", rejected="👩‍🚀 東京")
def test_a_chat_on_real_tokenizers(
    name: str, template: str, renderer: Renderer, prompt: str, chosen: str, rejected: str
) -> None:
    pair = Pair(
        [message("user", prompt)], [message("assistant", chosen)], [message("assistant", rejected)]
    )
    ids = renderer.render(pair)
    if isinstance(ids, Refusal):
        assert chosen.strip() == rejected.strip() or not (chosen.strip() and rejected.strip())
        return
    family = Family(name, lambda: renderer.tokenizer, template, None)
    texts = texts_of(renderer, pair)
    for content, rendered, branch in zip((chosen, rejected), texts, ids.responses):
        # The whole response is scored; templates may trim it, or open it with an empty thought.
        scored = rendered.text[rendered.prompt_end : rendered.content_end]
        assert scored.strip().endswith(content.strip())
        assert prompt.strip() in rendered.text[: rendered.prompt_end]
        check_branch(family, rendered, branch)
        check_decoding(renderer.tokenizer, rendered.text, branch.token_ids)
        assert branch.end_start < len(branch.token_ids) or renderer.end_of_turn is None
    check_shared(ids)


@every_tokenizer
@thorough
@given(prompt=TEXT, chosen=TEXT, rejected=TEXT)
@example(prompt="Q: e", chosen="\u0301 A", rejected="\u1161")
@example(prompt="Say ", chosen="yes", rejected=" yes")
def test_plain_text_on_real_tokenizers(
    name: str, renderers: dict[str, Renderer], prompt: str, chosen: str, rejected: str
) -> None:
    renderer, pair = renderers[name], Pair(prompt, chosen, rejected)
    assume(not brings_special_tokens(renderer, prompt + chosen, prompt + rejected))
    tokenizer = renderer.tokenizer
    texts, ids = texts_of(renderer, pair), renderer.render(pair)
    if isinstance(ids, Refusal):
        assert ids.reason == "nothing_before_response"
        assert tokenizer("a").input_ids == tokenizer("a", add_special_tokens=False).input_ids
        return
    family = Family(name, lambda: tokenizer, OWN, None)
    for rendered, branch in zip(texts, ids.responses):
        check_branch(family, rendered, branch)
        assert branch.token_ids == [*tokenizer(rendered.text).input_ids, tokenizer.eos_token_id]
        check_decoding(tokenizer, rendered.text, branch.token_ids)


@every_case
def test_pairs_on_real_tokenizers_render_alike_alone_and_together(
    name: str, template: str, renderer: Renderer
) -> None:
    contents = [f"{' '.join(PIECES[at:])}." for at in range(8)]
    pairs = [
        Pair([message("user", "Say.")], [message("assistant", a)], [message("assistant", a + "!")])
        for a in contents
    ]
    together = renderer.render_many(pairs)
    assert all(isinstance(rendered, RenderedPrompt) for rendered in together)
    assert together == [renderer.render(pair) for pair in pairs]


def check_decoding(tokenizer: PreTrainedTokenizerFast, text: str, ids: list[int]) -> None:
    """The token ids give the text back, in the normal form that the tokenizer works on.

    SentencePiece's tokenizers write a space as "▁", add one in front, and have special tokens that
    swallow white space behind them, so that there the text is compared without white space.
    """
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    # BOS and EOS, which plain text gets, are not in the text.
    if not text.startswith(str(tokenizer.bos_token)):
        decoded = decoded.removeprefix(str(tokenizer.bos_token))
    if not text.endswith(str(tokenizer.eos_token)):
        decoded = decoded.removesuffix(str(tokenizer.eos_token))
    if isinstance(tokenizer.backend_tokenizer.decoder, ByteLevel):
        normalizer = tokenizer.backend_tokenizer.normalizer
        assert decoded == (text if normalizer is None else normalizer.normalize_str(text))
    else:
        assert "".join(decoded.split()) == "".join(text.replace("▁", " ").split())
