"""Rendered tokens: boundaries, BOS and EOS, characters of several tokens, real dialogues."""

from __future__ import annotations

import gzip
import json
import pickle
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors

from mrpo.data.pairs import Pair, Prompt
from mrpo.data.rendering import Refusal, RenderedPrompt, RenderedSequence, Renderer
from mrpo.tests.data.families import (
    BY_NAME,
    FAMILIES,
    Family,
    ask,
    decode,
    message,
    pair_of,
    rendered,
)
from mrpo.tests.data.rendering.test_properties import check_shared

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@every_family
def test_bos_is_never_doubled_and_the_turn_ends_once(family: Family) -> None:
    renderer = family.renderer()
    tokenizer = renderer.tokenizer
    for pair in (ask(), Pair("Is it?", " Yes.", " No.")):
        for branch in rendered(renderer, pair).responses:
            ids = branch.token_ids
            if tokenizer.bos_token_id is not None:
                in_template = family.name not in ("phi3", "vicuna")
                assert ids.count(tokenizer.bos_token_id) == (in_template or not pair.is_chat)
            ends = ids[branch.end_start :]
            if pair.is_chat and family.end_of_turn is None:
                assert ends == []
            else:
                end = family.end_of_turn if pair.is_chat else tokenizer.eos_token
                assert decode(renderer, ends).strip() == str(end).strip()
                assert ends[-1] not in ids[branch.start : -1]


def test_plain_text_that_brings_its_own_bos_and_eos_gets_no_second() -> None:
    renderer = BY_NAME["llama2"].renderer()
    bare = rendered(renderer, Pair("Is it?", " Yes.", " No."))
    own = rendered(renderer, Pair("<s>Is it?", " Yes.</s>", " No.</s>"))
    assert own == bare
    chosen = own.responses[0]
    assert chosen.end_start == len(chosen.token_ids) - 1


def test_plain_text_that_ends_with_the_templates_end_of_turn_gets_no_eos() -> None:
    renderer = BY_NAME["gemma"].renderer()
    assert renderer.tokenizer.eos_token == "<eos>"
    end = renderer.end_of_turn
    pair = Pair("Is it?", f" Yes.{end}", f" No.{end}\n \n")
    result = rendered(renderer, pair)
    for branch, text in zip(result.responses, (" Yes.", " No.")):
        assert decode(renderer, branch.token_ids).endswith(f"{text}{end}")
        assert branch.end_start == len(branch.token_ids) - 1
    assert renderer.own_end(f" Yes.{end}\n") == end
    assert renderer.own_end(f" {end} Yes.") is None


def test_plain_text_has_neither_where_the_tokenizer_uses_neither() -> None:
    tokenizer = BY_NAME["alpaca"].tokenizer()
    eos, tokenizer.eos_token = tokenizer.eos_token, None
    try:
        branch = rendered(Renderer(tokenizer), Pair("Is it?", " Yes.", " No.")).responses[0]
    finally:
        tokenizer.eos_token = eos
    assert branch.token_ids == tokenizer("Is it? Yes.").input_ids
    assert branch.end_start == len(branch.token_ids)


def test_a_token_across_the_boundary_is_scored_and_not_shared() -> None:
    renderer = BY_NAME["vicuna"].renderer()
    pair = ask("yes", "\nyes")  # the prompt ends in a space: " yes" is one token, "\n" stays apart
    result = rendered(renderer, pair)
    chosen, rejected = result.responses
    tokens = renderer.tokenizer.convert_ids_to_tokens
    assert tokens(chosen.token_ids[chosen.start :]) == ["Ġyes", "</s>"]
    assert tokens(rejected.token_ids[rejected.start :]) == ["Ċ", "yes", "</s>"]
    assert (chosen.boundary, rejected.boundary) == (True, False)
    assert rejected.start == chosen.start + 1  # its space is prompt, unscored
    assert result.shared == chosen.start


def test_a_character_of_several_tokens_is_scored_whole() -> None:
    renderer = BY_NAME["mistral-tekken"].renderer()
    pair = Pair("Say 漢", "字🙂", "字")
    branch = rendered(renderer, pair).responses[0]
    ids = branch.token_ids
    assert decode(renderer, ids[branch.start : branch.end_start]) == "字🙂"
    assert len(ids) - branch.start > 4


def test_an_accent_that_composes_with_the_prompts_last_letter_is_scored_in_that_letter() -> None:
    renderer = BY_NAME["qwen2.5"].renderer()
    branch = rendered(renderer, Pair("Cafe", "\u0301!", "!")).responses[0]
    assert branch.boundary
    assert "é" in decode(renderer, branch.token_ids[branch.start :])


def test_a_syllable_composed_across_the_boundary_is_scored_with_all_its_tokens() -> None:
    renderer = BY_NAME["qwen2.5"].renderer()
    branch = rendered(renderer, Pair("Say \u1100", "\u1161!", "!")).responses[0]
    assert branch.boundary
    assert decode(renderer, branch.token_ids[branch.start : branch.end_start]) == "\uac00!"


def test_a_control_token_that_swallows_the_responses_first_spaces_stays_in_the_prompt() -> None:
    renderer = BY_NAME["phi3"].renderer()
    refusal = renderer.render(ask("  yes", "yes"))
    assert isinstance(refusal, Refusal)  # swallowed: the model can't see a difference
    assert refusal.reason == "responses_render_equal"
    result = rendered(renderer, ask("  yes", "no"))
    alone = rendered(renderer, ask("yes", "no"))
    assert result == alone
    control = renderer.tokenizer.convert_tokens_to_ids("<|assistant|>")
    chosen = result.responses[0]
    assert chosen.token_ids[chosen.start - 1] == control
    assert not chosen.boundary


def test_a_control_token_written_half_by_prompt_half_by_response_is_across_the_boundary() -> None:
    renderer = BY_NAME["qwen2.5"].renderer()
    branch = rendered(renderer, Pair("Stop <|im_", "end|> now", " now")).responses[0]
    assert branch.boundary
    assert branch.token_ids[branch.start] == renderer.tokenizer.eos_token_id


def test_truncation_padding_and_trimming_of_the_models_own_tokenizer_are_not_applied() -> None:
    family = BY_NAME["phi4"]
    tokenizer = pickle.loads(pickle.dumps(family.tokenizer()))
    before = tokenizer.backend_tokenizer.to_str()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=99)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    pair = Pair("Say ", "yes and no", " yes")
    assert Renderer(tokenizer).render(pair) == family.renderer().render(pair)
    assert rendered(family.renderer(), pair).responses[0].boundary
    again = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    again.no_truncation()
    again.no_padding()
    assert again.to_str() == before  # the tokenizer itself is saved with the model: untouched


def test_a_renderer_survives_pickling(tiny_references: dict[str, Path]) -> None:
    for folder in tiny_references.values():
        renderer = Renderer.load(folder)
        assert pickle.loads(pickle.dumps(renderer)).render(ask()) == renderer.render(ask())


def test_real_dialogues_render_for_every_tiny_reference(
    tiny_references: dict[str, Path], shared_data: Path
) -> None:
    pairs = []
    with gzip.open(shared_data / "hh_harmless_test.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in list(file)[:60]:
            row = json.loads(line)
            prompt, _, chosen = row["chosen"].rpartition("\n\nAssistant:")
            _, _, rejected = row["rejected"].rpartition("\n\nAssistant:")
            turns = re.findall(
                r"\n\n(Human|Assistant): ?(.*?)(?=\n\n(?:Human|Assistant):|$)", prompt, re.S
            )
            roles = {"Human": "user", "Assistant": "assistant"}
            pairs.append(pair_of([message(roles[r], t) for r, t in turns], chosen, rejected))
            pairs.append(Pair(f"{prompt}\n\nAssistant:", chosen, rejected))
    for folder in tiny_references.values():
        renderer = Renderer.load(folder)
        results = renderer.render_many(pairs)
        for pair, result in zip(pairs, results):
            assert isinstance(result, RenderedPrompt), result
            branch = result.responses[0]
            scored = branch.token_ids[branch.start : branch.end_start]
            content = pair.chosen if isinstance(pair.chosen, str) else pair.chosen[0]["content"]
            assert decode(renderer, scored).strip() == content.strip()


def test_responses_of_a_prompt_are_rendered_as_those_of_pairs() -> None:
    """Chat and text, any number of them; only pairs ask whether two render alike."""
    family = BY_NAME["qwen2.5"]
    renderer = family.renderer()
    contents = ["Yes.", "No.", " Yes. ", "Perhaps, or not."]
    turns = [[message("assistant", content)] for content in contents]
    chat = Prompt([message("user", "Is it?")])
    text = Prompt("Is it?")
    several, plain, none, one = renderer.render_responses(
        [(chat, turns), (text, contents), (chat, []), (chat, turns[:1])]
    )
    for prompt, responses, given in ((chat, several, turns), (text, plain, contents)):
        for number in range(1, len(given)):
            pair = Pair(prompt.turns, given[0], given[number])
            assert renderer.render(pair) == RenderedPrompt.of([responses[0], responses[number]])  # type: ignore[list-item]
    assert none == []
    assert one == several[:1]
    check_shared(RenderedPrompt.of(several))  # type: ignore[arg-type]


def test_tools_and_template_variables_belong_to_the_prompt() -> None:
    tokenizer = BY_NAME["qwen2.5"].tokenizer()
    tools, kwargs = [{"name": "add"}], {"mood": "cheerful"}
    show = "{{ tools }}{{ mood }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    renderer = Renderer(tokenizer, chat_template=show)
    question, pair = [message("user", "Is it?")], ask(tools=tools, chat_template_kwargs=kwargs)
    prompts = [Prompt(question), Prompt(question, tools), Prompt(question, tools, kwargs)]
    shown = renderer.render_responses([(prompt, [pair.chosen]) for prompt in prompts])
    assert Prompt.of(pair) == prompts[-1]
    assert shown[-1] == [rendered(renderer, pair).responses[0]]
    assert len({tuple(one.token_ids) for (one,) in shown}) == 3  # type: ignore[union-attr]


def test_refusals_are_of_a_response_or_of_all_responses_of_a_prompt() -> None:
    renderer = BY_NAME["gemma"].renderer()  # its template takes no system message and no calls
    user, system = message("user", "Is it?"), message("system", "Be brief.")
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    yes = [message("assistant", "Yes.")]
    calls = [message("assistant", "Yes.") | {"tool_calls": [call]}]
    (fine, hidden), refused = renderer.render_responses(
        [(Prompt([user]), [yes, calls]), (Prompt([system, user]), [yes, calls])]
    )
    assert isinstance(fine, RenderedSequence)
    assert isinstance(hidden, Refusal)
    assert [one.reason for one in refused if isinstance(one, Refusal)] == ["template_refused"] * 2
    of_prompt = renderer.render(Pair([system, user], yes, calls))
    of_chosen, of_rejected = (
        renderer.render(Pair([user], *both)) for both in ((calls, yes), (yes, calls))
    )
    assert of_prompt == refused[0]
    assert of_chosen == Refusal(hidden.reason, f"chosen: {hidden.detail}")
    assert of_rejected == Refusal(hidden.reason, f"rejected: {hidden.detail}")
