"""What rendering promises for any text, over every family's tokenizer and template.

The characters under a token are taken from the tokenizer's own call, not from rendering's copy.
"""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mrpo.data.pairs import Pair
from mrpo.data.rendering import (
    Refusal,
    RenderedPrompt,
    RenderedSequence,
    RenderedText,
    Renderer,
)
from mrpo.tests.data.families import FAMILIES, Family, message, texts_of

# Random Unicode, and more often what tokenizers trip over: white space, accents that compose with
# the letter before, Hangul parts, emoji of several code points, characters of one to four bytes.
PIECES = [
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "e",
    "\u0301",
    "\u0323",
    "\u1100",
    "\u1161",
    "\u11a8",
    "🙂",
    "👩‍🚀",
]
PIECES += [
    "\u00a0",
    "\u3000",
    "\u200b",
    "é",
    "ß",
    "東京",
    "yes",
    " no",
    "18",
    "_",
    "▁",
    "<",
    "</s",
    "\x00",
]
TEXT = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
)
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
thorough = settings(max_examples=50, deadline=None)


def own_tokens(family: Family, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    tokenizer = (family.untrimmed or family.tokenizer)()
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


def brings_special_tokens(renderer: Renderer, *texts: str) -> bool:
    """Whether a text has a BOS or an end of its own, so that rendering adds none."""
    tokens = [*renderer.tokenizer.all_special_tokens, (renderer.end_of_turn or "").strip()]
    return any(token in text for token in filter(None, tokens) for text in texts)


def alike(pair: Pair, texts: list[RenderedText], ids: RenderedPrompt | Refusal) -> bool:
    """Whether the pair is refused since its responses differ in nothing that the model sees."""
    if not isinstance(ids, Refusal) or ids.reason != "responses_render_equal":
        return False
    assert pair.chosen != pair.rejected
    squeezed = [
        "".join(unicodedata.normalize("NFC", text.text).replace("▁", " ").split()) for text in texts
    ]
    assert squeezed[0] == squeezed[1]
    return True


def check_shared(prompt: RenderedPrompt) -> None:
    """As many first tokens are shared as are common to all responses and scored in none."""
    shared, responses = prompt.shared, prompt.responses
    most = min(response.start for response in responses)
    assert len({tuple(response.token_ids[:shared]) for response in responses}) == 1
    assert shared <= most
    assert shared == most or len({response.token_ids[shared] for response in responses}) > 1


def check_branch(family: Family, rendered: RenderedText, branch: RenderedSequence) -> None:
    """One branch against the tokenizer's own ids and offsets of the whole text."""
    text, prompt_end, tokenizer = rendered.text, rendered.prompt_end, family.tokenizer()
    ids, offsets = own_tokens(family, text)
    assert ids == tokenizer(text, add_special_tokens=False).input_ids
    in_front = branch.token_ids.index(ids[0]) if ids != branch.token_ids else 0
    assert branch.token_ids[in_front : in_front + len(ids)] == ids  # nothing lost, nothing twice
    extra = branch.token_ids[:in_front] + branch.token_ids[in_front + len(ids) :]
    assert set(extra) <= {tokenizer.bos_token_id, tokenizer.eos_token_id}

    start = branch.start - in_front
    scored, unscored = offsets[start:], offsets[:start]
    under = {at for begin, end in offsets for at in range(begin, end)}
    under_scored = {at for begin, end in scored for at in range(begin, end)}
    response = set(range(prompt_end, len(text)))
    swallowed = swallowed_by_control_tokens(tokenizer, ids[:start], unscored, text)
    dropped = set(range(len(text))) - under  # by a normalizer that joins characters
    # Scored: the whole response, and of the prompt a boundary token's earlier characters only.
    first = scored[0][0] if scored else len(text)
    assert under_scored - response == set(range(first, prompt_end)) - dropped
    assert under_scored & response == response - swallowed - dropped
    assert not response & {at for begin, end in unscored for at in range(begin, end)} - swallowed
    assert branch.boundary == (first < prompt_end)
    # The end of turn begins where the content ends, or behind the token that holds its last part.
    assert all(begin >= rendered.content_end for begin, _ in offsets[branch.end_start - in_front :])


def swallowed_by_control_tokens(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], offsets: list[tuple[int, int]], text: str
) -> set[int]:
    """Positions of white space that tokens with `rstrip` swallowed behind their own literal."""
    added = tokenizer.added_tokens_decoder
    return {
        at
        for token, (begin, end) in zip(ids, offsets)
        if token in added and added[token].rstrip
        for at in range(begin + len(text[begin:end].rstrip()), end)
    }


@every_family
@thorough
@given(prompt=TEXT, chosen=TEXT, rejected=TEXT)
@example(prompt="Yes e", chosen="\u0301\u0323 and \u1161", rejected="\u0301")
@example(prompt="Say", chosen=" \n yes", rejected="yes \n ")
def test_scored_tokens_hold_the_response_of_a_chat_and_nothing_else(
    family: Family, prompt: str, chosen: str, rejected: str
) -> None:
    renderer = family.renderer()
    pair = Pair(
        [message("user", prompt)], [message("assistant", chosen)], [message("assistant", rejected)]
    )
    texts, ids = texts_of(renderer, pair), renderer.render(pair)
    if alike(pair, texts, ids):
        return
    assert not isinstance(ids, Refusal)
    for content, rendered, branch in zip((chosen, rejected), texts, ids.responses):
        scored = rendered.text[rendered.prompt_end : rendered.content_end]
        assert scored == family.scored(content)
        assert rendered.text[rendered.content_end :] == (family.end_of_turn or "")
        check_branch(family, rendered, branch)
    check_shared(ids)


@every_family
@thorough
@given(prompt=TEXT, chosen=TEXT, rejected=TEXT)
@example(prompt="Q: e", chosen="\u0301 A", rejected="\u1161")
@example(prompt="\u1100", chosen="\u1161\u11a8", rejected=" x")
@example(prompt="Say ", chosen="yes", rejected=" yes")
def test_scored_tokens_hold_the_response_of_plain_text_and_nothing_else(
    family: Family, prompt: str, chosen: str, rejected: str
) -> None:
    renderer = family.renderer()
    assume(not brings_special_tokens(renderer, prompt + chosen, prompt + rejected))
    pair = Pair(prompt, chosen, rejected)
    texts, ids = texts_of(renderer, pair), renderer.render(pair)
    if alike(pair, texts, ids):
        return
    if isinstance(ids, Refusal):  # a prompt joined to the response whole, and no BOS before it
        assert ids.reason == "nothing_before_response"
        assert renderer.tokenizer("a").input_ids == own_tokens(family, "a")[0]
        return
    for rendered, branch in zip(texts, ids.responses):
        check_branch(family, rendered, branch)
        with_special = renderer.tokenizer(rendered.text).input_ids
        assert branch.token_ids == [*with_special, renderer.tokenizer.eos_token_id]
        assert branch.end_start == len(branch.token_ids) - 1


@every_family
def test_plain_text_ends_with_eos_once_whoever_wrote_it(family: Family) -> None:
    """The response, or the end of the prompt and the response together."""
    renderer = family.renderer()
    eos, number = str(renderer.tokenizer.eos_token), renderer.tokenizer.eos_token_id
    for prompt, response in (("Say: ", "yes"), ("Say: ", f"yes{eos}"), (f"a {eos[:2]}", eos[2:])):
        ids = renderer.render(Pair(prompt, response, "no"))
        assert isinstance(ids, RenderedPrompt)
        branch = ids.responses[0]
        assert (branch.token_ids.count(number), branch.token_ids[-1]) == (1, number)
        assert branch.end_start == len(branch.token_ids) - 1


@every_family
def test_pairs_render_alike_alone_and_in_any_company(family: Family) -> None:
    contents = [" ".join(PIECES[at:]) for at in range(8)]
    pairs = [
        Pair([message("user", "Say.")], [message("assistant", a)], [message("assistant", a + "!")])
        for a in contents
    ]
    pairs += [Pair("Say: ", a, a + "!") for a in contents]
    renderer = family.renderer()
    together = renderer.render_many(pairs)
    assert together == [renderer.render(pair) for pair in pairs]
    assert together[::-1] == renderer.render_many(pairs[::-1])
