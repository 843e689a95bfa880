"""Rendering case by case: families, turns, tools, thoughts, boundaries, BOS and EOS, refusals."""

from __future__ import annotations

import gzip
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from mrpo.data.pairs import Pair
from mrpo.data.rendering import Refusal, RenderedPair, Renderer
from mrpo.errors import UserError
from mrpo.tests.data.families import BY_NAME, FAMILIES, PHI3, Family, message

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def pair_of(prompt: list[dict[str, Any]], chosen: str, rejected: str, **more: Any) -> Pair:
    return Pair(prompt, [message("assistant", chosen)], [message("assistant", rejected)], **more)


def ask(chosen: str = "Yes.", rejected: str = "No.", **more: Any) -> Pair:
    return pair_of([message("user", "Is it?")], chosen, rejected, **more)


def rendered(renderer: Renderer, pair: Pair) -> RenderedPair:
    result = renderer.render(pair)
    assert isinstance(result, RenderedPair), result
    return result


def split(renderer: Renderer, pair: Pair) -> tuple[str, str, str]:
    """The chosen branch's text: prompt, scored content, end of turn."""
    explained = renderer.explain(pair)
    assert not isinstance(explained, Refusal), explained
    text = explained[0].rendered
    at, end = text.prompt_end, text.content_end
    return text.text[:at], text.text[at:end], text.text[end:]


TURNS = [message("user", "Hi"), message("assistant", "Yes?"), message("user", "2+2?")]
# The families' published formats, written out by hand for a system message and two questions.
EXPECTED = {
    "llama2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yes? </s><s>[INST] 2+2? [/INST]",
        " 4.",
        " </s>",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
        "December 2023\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes?"
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>"
        "assistant<|end_header_id|>\n\n",
        "4.",
        "<|eot_id|>",
    ),
    "mistral": (
        "<s>[INST] Hi[/INST] Yes?</s>[INST] Be brief.\n\n2+2?[/INST]",
        " 4.",
        "</s>",
    ),
    "mistral-tekken": (
        "<s>[INST]Hi[/INST]Yes?</s>[INST]Be brief.\n\n2+2?[/INST]",
        "4.",
        "</s>",
    ),
    "qwen2.5": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>"
        "assistant\nYes?<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
        "4.",
        "<|im_end|>",
    ),
    "qwen3": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>"
        "assistant\nYes?<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\n4.",
        "<|im_end|>",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n"
        "<start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n",
        "4.",
        "<end_of_turn>",
    ),
    "phi3": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nYes?<|end|>\n"
        "<|user|>\n2+2?<|end|>\n<|assistant|>\n",
        "4.",
        "<|end|>",
    ),
    "phi4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Yes?<|im_end|><|im_start|>user<|im_sep|>2+2?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>",
        "4.",
        "<|im_end|>",
    ),
    "vicuna": ("USER: Hi ASSISTANT: Yes?</s>USER: 2+2? ASSISTANT: ", "4.", "</s>"),
    "alpaca": (
        "### Instruction:\nHi\n\n### Response:\nYes?\n\n### Instruction:\n2+2?\n\n### Response:\n",
        "4.",
        "",
    ),
}
EXPECTED |= {"llama2-real": EXPECTED["llama2"], "mistral-real": EXPECTED["mistral"]}


@every_family
def test_several_turns_read_as_the_family_publishes_them(family: Family) -> None:
    system = [message("system", "Be brief.")] if family.system else []
    pair = pair_of([*system, *TURNS], "4.", "5.")
    assert split(family.renderer(), pair) == EXPECTED[family.name]
    assert family.renderer().end_of_turn == family.end_of_turn


@every_family
def test_bos_is_never_doubled_and_the_turn_ends_once(family: Family) -> None:
    renderer = family.renderer()
    tokenizer = renderer.tokenizer
    for pair in (ask(), Pair("Is it?", " Yes.", " No.")):
        for branch in (rendered(renderer, pair).chosen, rendered(renderer, pair).rejected):
            ids = branch.token_ids
            if tokenizer.bos_token_id is not None:
                in_template = family.name not in ("phi3", "vicuna")
                assert ids.count(tokenizer.bos_token_id) == (in_template or not pair.is_chat)
            ends = ids[branch.end_start :]
            if pair.is_chat and family.end_of_turn is None:
                assert ends == []
            else:
                wanted = family.end_of_turn if pair.is_chat else tokenizer.eos_token
                assert tokenizer.decode(ends).strip() == wanted.strip()
                assert ends[-1] not in ids[branch.start : -1]


def test_plain_text_that_brings_its_own_bos_and_eos_gets_no_second() -> None:
    renderer = BY_NAME["llama2"].renderer()
    bare = rendered(renderer, Pair("Is it?", " Yes.", " No."))
    own = rendered(renderer, Pair("<s>Is it?", " Yes.</s>", " No.</s>"))
    assert own == bare
    assert own.chosen.end_start == len(own.chosen.token_ids) - 1


def test_plain_text_has_neither_where_the_tokenizer_uses_neither() -> None:
    tokenizer = BY_NAME["alpaca"].tokenizer()
    eos, tokenizer.eos_token = tokenizer.eos_token, None
    try:
        branch = rendered(Renderer(tokenizer), Pair("Is it?", " Yes.", " No.")).chosen
    finally:
        tokenizer.eos_token = eos
    assert branch.token_ids == tokenizer("Is it? Yes.").input_ids
    assert branch.end_start == len(branch.token_ids)


def test_the_date_is_the_same_on_any_day(monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    from transformers.utils import chat_template_utils

    class OtherDay(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> OtherDay:
            return cls(2031, 12, 24)

    renderer = BY_NAME["llama3"].renderer()
    today = renderer.render(ask())
    monkeypatch.setattr(chat_template_utils, "datetime", OtherDay)
    plain = renderer.tokenizer.apply_chat_template(
        ask().prompt, chat_template=renderer.chat_template, tokenize=False
    )
    assert "24 Dec 2031" in plain  # what rendering would follow without its own date
    assert renderer.render(ask()) == today
    assert "Today Date: 26 Jul 2024" in split(renderer, ask())[0]


def test_thoughts_are_scored_with_the_answer_and_forgotten_in_earlier_turns() -> None:
    renderer = BY_NAME["qwen3"].renderer()
    earlier = message("assistant", "<think>\nHm.\n</think>\n\nYes?")
    pair = pair_of([TURNS[0], earlier, TURNS[2]], "<think>\nSum.\n</think>\n\n4.", "5.")
    prompt, scored, _ = split(renderer, pair)
    assert "Hm." not in prompt
    assert prompt.endswith("<|im_start|>assistant\n")
    assert scored == "<think>\nSum.\n</think>\n\n4."


def test_an_empty_think_block_moves_to_the_prompt_when_thinking_is_off() -> None:
    family = BY_NAME["qwen3"]
    renderer = Renderer(
        family.tokenizer(),
        chat_template=family.template,
        chat_template_kwargs={"enable_thinking": False},
    )
    prompt, scored, _ = split(renderer, ask())
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert scored == "Yes."
    # What a pair asks for goes over what its reference says.
    on = ask(chat_template_kwargs={"enable_thinking": True})
    assert split(renderer, on)[1] == "<think>\n\n</think>\n\nYes."


def test_a_template_that_drops_what_its_own_prompt_opened_is_refused() -> None:
    opens = (
        "{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>' }}"
        "{%- endfor %}{{ '<|im_start|>assistant\\n<think>\\n' if add_generation_prompt }}"
    )
    renderer = Renderer(BY_NAME["qwen3"].tokenizer(), chat_template=opens)
    refusal = renderer.render(ask())
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "prompt_not_prefix"
    assert '"<think>\\n"' in refusal.detail


CALL = {"function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
PYTHON = {"function": {"name": "python", "arguments": {"code": "2+2"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds."}}]


@pytest.mark.parametrize(
    ("name", "call", "result"),
    [
        ("llama3", '{"name": "add", "parameters": {"a": 2, "b": 2}}', "ipython<|end_header_id|>"),
        (
            "qwen2.5",
            '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}',
            "<tool_response",
        ),
        ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2', "[TOOL_RESULTS] {"),
    ],
)
def test_tools_and_tool_messages_are_shown_in_the_prompt(name: str, call: str, result: str) -> None:
    renderer = BY_NAME[name].renderer()
    used = [
        message("user", "2+2?"),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        message("tool", "4"),
    ]
    prompt, scored, end = split(renderer, pair_of(used, "It is 4.", "It is 5.", tools=TOOLS))
    assert '"description": "Adds."' in prompt
    assert call in prompt
    assert result in prompt
    assert scored.strip() == "It is 4."
    assert end == renderer.end_of_turn
    without = split(renderer, pair_of(used, "It is 4.", "It is 5."))[0]
    assert "Adds." not in without


def test_a_tool_call_is_a_response_and_ends_with_the_token_its_template_gives_it() -> None:
    renderer = BY_NAME["llama3"].renderer()
    add, python = (
        [{"role": "assistant", "content": "", "tool_calls": [call]}] for call in (CALL, PYTHON)
    )
    pair = Pair([message("user", "2+2?")], add, python, tools=TOOLS)
    explained = renderer.explain(pair)
    assert not isinstance(explained, Refusal)
    ends = [branch.tokens[branch.sequence.end_start :] for branch in explained]
    assert ends == [["<|eot_id|>"], ["<|eom_id|>"]]


def test_of_several_templates_the_one_for_tools_renders_tools() -> None:
    tokenizer = pickle.loads(pickle.dumps(BY_NAME["qwen2.5"].tokenizer()))
    tokenizer.chat_template = {
        "default": "{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>",
        "tool_use": "{% for m in messages %}{{ m.content }}{% endfor %}<|endoftext|>\n",
    }
    renderer = Renderer(tokenizer)
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert renderer.chat_template == f"{plain}<|im_end|>"
    assert renderer.template.tail(TOOLS).kept == "<|endoftext|>"
    assert renderer.end_of_turn == "<|im_end|>"


@pytest.mark.parametrize(
    ("name", "prompt", "says"),
    [
        ("gemma", [message("system", "Be brief."), message("user", "Hi")], "system role not supp"),
        ("llama2", [message("user", "Hi"), message("user", "You there?")], "roles must alternate"),
        ("mistral", [message("user", "Hi"), message("critic", "No.")], "only user, assistant and"),
        ("llama3", [{"role": "user", "content": ["text"]}], "TypeError"),
    ],
)
def test_what_a_template_does_not_take_is_a_reason_not_an_error(
    name: str, prompt: list[dict[str, Any]], says: str
) -> None:
    family = BY_NAME[name]
    template = family.template.replace("| trim", "+ ''") if name == "llama3" else family.template
    renderer = Renderer(family.tokenizer(), chat_template=template)
    refusal, fine = renderer.render_many([pair_of(prompt, "Yes.", "No."), ask()])
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "template_refused"
    assert says in refusal.detail
    assert isinstance(fine, RenderedPair)


def test_a_token_across_the_boundary_is_scored_and_not_shared() -> None:
    renderer = BY_NAME["vicuna"].renderer()
    pair = ask("yes", "\nyes")  # the prompt ends in a space: " yes" is one token, "\n" stays apart
    result = rendered(renderer, pair)
    tokens = renderer.tokenizer.convert_ids_to_tokens
    assert tokens(result.chosen.token_ids[result.chosen.start :]) == ["Ġyes", "</s>"]
    assert tokens(result.rejected.token_ids[result.rejected.start :]) == ["Ċ", "yes", "</s>"]
    assert (result.chosen.boundary, result.rejected.boundary) == (True, False)
    assert result.rejected.start == result.chosen.start + 1  # its space is prompt, unscored
    assert result.shared == result.chosen.start


def test_a_character_of_several_tokens_is_scored_whole() -> None:
    renderer = BY_NAME["mistral-tekken"].renderer()
    pair = Pair("Say 漢", "字🙂", "字")
    branch = rendered(renderer, pair).chosen
    ids = branch.token_ids
    assert renderer.tokenizer.decode(ids[branch.start : branch.end_start]) == "字🙂"
    assert len(ids) - branch.start > 4


def test_an_accent_that_composes_with_the_prompts_last_letter_is_scored_in_that_letter() -> None:
    renderer = BY_NAME["qwen2.5"].renderer()
    branch = rendered(renderer, Pair("Cafe", "\u0301!", "!")).chosen
    assert branch.boundary
    assert "é" in renderer.tokenizer.decode(branch.token_ids[branch.start :])


def test_a_control_token_that_swallows_the_responses_first_spaces_stays_in_the_prompt() -> None:
    renderer = BY_NAME["phi3"].renderer()
    result = rendered(renderer, ask("  yes", "yes"))
    assert result.chosen == result.rejected  # swallowed: the model can't see a difference
    control = renderer.tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert result.chosen.token_ids[result.chosen.start - 1] == control
    assert not result.chosen.boundary


def test_a_control_token_written_half_by_prompt_half_by_response_is_across_the_boundary() -> None:
    renderer = BY_NAME["qwen2.5"].renderer()
    branch = rendered(renderer, Pair("Stop <|im_", "end|> now", " now")).chosen
    assert branch.boundary
    assert branch.token_ids[branch.start] == renderer.tokenizer.eos_token_id


def test_without_an_end_of_turn_the_response_ends_with_its_content() -> None:
    renderer = BY_NAME["alpaca"].renderer()
    result = rendered(renderer, ask("Yes.\n\n", "Yes."))
    assert renderer.end_of_turn is None
    assert renderer.tokenizer.decode(result.chosen.token_ids).endswith("Response:\nYes.\n\n")
    assert renderer.tokenizer.decode(result.rejected.token_ids).endswith("Response:\nYes.")
    assert result.chosen.end_start == len(result.chosen.token_ids)


def test_a_template_that_always_opens_the_next_turn_still_ends_with_the_end_of_turn() -> None:
    family = BY_NAME["qwen2.5"]
    always = family.template.replace("{%- if add_generation_prompt %}", "{%- if true %}")
    renderer = Renderer(family.tokenizer(), chat_template=always)
    assert renderer.end_of_turn == "<|im_end|>"
    assert renderer.render(ask()) == family.renderer().render(ask())


def test_nothing_before_a_response_that_could_predict_it_is_a_reason() -> None:
    refusal = BY_NAME["qwen2.5"].renderer().render(Pair("", "Yes.", "No."))
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "nothing_before_response"
    with_bos = rendered(BY_NAME["llama3"].renderer(), Pair("", "Yes.", "No."))
    assert with_bos.chosen.start == 1


def test_a_response_that_leaves_no_token_is_a_reason() -> None:
    template = PHI3.replace("~ '<|end|>\\n' }}", "}}").replace("else eos_token", "else ''")
    renderer = Renderer(BY_NAME["phi3"].tokenizer(), chat_template=template)
    refusal = renderer.render(ask(" \n", "Yes."))
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "empty_response_tokens"
    assert refusal.detail.startswith("chosen: ")


def test_truncation_padding_and_trimming_of_the_models_own_tokenizer_are_not_applied() -> None:
    family = BY_NAME["phi4"]
    tokenizer = pickle.loads(pickle.dumps(family.tokenizer()))
    before = tokenizer.backend_tokenizer.to_str()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=99)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    pair = Pair("Say ", "yes and no", " yes")
    assert Renderer(tokenizer).render(pair) == family.renderer().render(pair)
    assert rendered(family.renderer(), pair).chosen.boundary
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
            assert isinstance(result, RenderedPair), result
            scored = result.chosen.token_ids[result.chosen.start : result.chosen.end_start]
            content = pair.chosen if isinstance(pair.chosen, str) else pair.chosen[0]["content"]
            assert renderer.tokenizer.decode(scored).strip() == content.strip()


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "gemma2"])
def test_a_model_folder_without_tokenizer_is_refused(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError, match=r"no tokenizer.*save_pretrained") as caught:
        Renderer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for model in (tmp_path / "nowhere", "some-org/no-such-model"):
        with pytest.raises(UserError, match="no tokenizer to load") as caught:
            Renderer.load(model)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_without_offsets_is_refused(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"ByT5Tokenizer\) gives no character offsets"):
        Renderer.load(tmp_path)
    with pytest.raises(UserError, match="gives no character offsets"):
        Renderer(ByT5Tokenizer())


def test_messages_for_a_model_without_template_are_refused() -> None:
    renderer = Renderer(BY_NAME["alpaca"].tokenizer())
    assert not renderer.has_chat_template
    assert renderer.end_of_turn is None
    assert isinstance(renderer.render(Pair("Is it?", " Yes.", " No.")), RenderedPair)
    with pytest.raises(UserError, match="no chat template and the pairs are messages"):
        renderer.render(ask())


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}", "can't show a question and an answer .*TemplateSyntaxError"),
        ("{{ raise_exception('no') }}", "can't show a question and an answer .*no"),
        ("{{ messages[0].content }}", "doesn't show the assistant's answer"),
    ],
)
def test_a_template_of_no_use_is_refused_at_once(template: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Renderer(BY_NAME["alpaca"].tokenizer(), chat_template=template)


def test_template_kwargs_cannot_take_the_place_of_our_own_arguments() -> None:
    family = BY_NAME["alpaca"]
    with pytest.raises(UserError, match="of the reference: tokenize can't be set"):
        Renderer(
            family.tokenizer(),
            chat_template=family.template,
            chat_template_kwargs={"tokenize": True},
        )
    with pytest.raises(UserError, match="of a pair: tools can't be set"):
        family.renderer().render(ask(chat_template_kwargs={"tools": []}))
