"""Rendered text: families' formats, turns, dates, thoughts, tools, ends of turn."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from mrpo.data.pairs import Pair
from mrpo.data.rendering import Refusal, RenderedPrompt, Renderer
from mrpo.tests.data.families import (
    BY_NAME,
    FAMILIES,
    Family,
    ask,
    decode,
    message,
    pair_of,
    rendered,
    split,
)

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


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
        TURNS, chat_template=renderer.chat_template, tokenize=False
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


OPENS = (
    "{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>' }}"
    "{%- endfor %}{{ '<|im_start|>assistant\\n<think>\\n' if add_generation_prompt }}"
)


def test_what_a_prompt_opens_and_a_finished_turn_lacks_is_no_part_of_either() -> None:
    renderer = Renderer(BY_NAME["qwen3"].tokenizer(), chat_template=OPENS)
    assert renderer.template.place == "sentinel"
    prompt = "<|im_start|>user\nIs it?<|im_end|><|im_start|>assistant\n"
    assert split(renderer, ask()) == (prompt, "Yes.", "<|im_end|>")
    # Responses that share their first characters with each other and with a sentinel.
    same = ask("SENTINELx is the word.", "SENTINELxRESPONSE")
    assert split(renderer, same) == (prompt, "SENTINELx is the word.", "<|im_end|>")
    # A response that opens the block itself follows the prompt as it is.
    thinking = ask("<think>\nHm.</think>Yes.", "No.")
    assert split(renderer, thinking)[:2] == (f"{prompt}<think>\n", "Hm.</think>Yes.")
    assert BY_NAME["qwen3"].renderer().template.place == "prefix"


def test_a_prompt_that_changes_with_the_response_is_refused() -> None:
    counts = "{{ messages[-1].content | length if not add_generation_prompt else 'next' }}" + OPENS
    renderer = Renderer(BY_NAME["qwen3"].tokenizer(), chat_template=counts)
    refusal = renderer.render(ask("Yes, it is.", "No."))
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "prompt_not_prefix"
    assert '"next<|im_start|>user' in refusal.detail


def test_a_response_that_the_template_does_not_show_is_refused() -> None:
    family = BY_NAME["qwen2.5"]
    cuts = family.template.replace("content", "content[:20]")
    for template, kind in ((family.template, None), (cuts, "response_not_shown")):
        renderer = Renderer(family.tokenizer(), chat_template=template)
        result = renderer.render(ask("Yes, and I say so at length.", "No."))
        assert (result.reason if isinstance(result, Refusal) else None) == kind
    escapes = family.template.replace("message.content }}", "message.content | tojson }}")
    escapes = escapes.replace("~ message.content", "~ (message.content | tojson)")
    pair = ask('He said "no"\nand left.', "No.")
    assert isinstance(
        Renderer(family.tokenizer(), chat_template=escapes).render(pair), RenderedPrompt
    )


def test_different_responses_that_render_alike_are_refused() -> None:
    refusal = BY_NAME["llama3"].renderer().render(ask(" Yes.", "Yes.\n"))  # its template trims
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "responses_render_equal"


def test_a_system_message_that_a_template_refuses_goes_before_the_first_user_turn() -> None:
    family = BY_NAME["gemma"]
    pair = pair_of([message("system", "Be brief."), *TURNS], "4.", "5.")
    refusal = family.renderer().render(pair)
    assert isinstance(refusal, Refusal)
    assert "system_role: fold in refs.yaml" in refusal.detail
    folding = Renderer(family.tokenizer(), chat_template=family.template, system_role="fold")
    prompt, scored, end = EXPECTED["gemma"]
    folded = prompt.replace("user\nHi", "user\nBe brief.\n\nHi")
    assert split(folding, pair) == (folded, scored, end)
    without = pair_of(TURNS, "4.", "5.")
    assert folding.render(without) == family.renderer().render(without)


def test_of_several_turns_only_the_assistants_own_tokens_are_scored() -> None:
    renderer = BY_NAME["qwen2.5"].renderer()
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    chosen, rejected = (
        [call, message("tool", result), message("assistant", f"It is {result}.")]
        for result in ("four", "five")
    )
    pair = Pair([message("user", "2+2?")], chosen, rejected, tools=TOOLS)
    result = rendered(renderer, pair)
    branch = result.responses[0]
    ((begin, end),) = branch.context
    ids = branch.token_ids
    assert decode(renderer, ids[branch.start : begin]).startswith("<tool_call>")
    assert decode(renderer, ids[branch.start : begin]).endswith("</tool_call><|im_end|>")
    between = decode(renderer, ids[begin:end])
    assert between.strip().startswith("<|im_start|>user\n<tool_response>\nfour")
    assert between.endswith("<|im_start|>assistant\n")
    assert decode(renderer, ids[end:]) == "It is four.<|im_end|>"
    assert branch.end_start == len(ids) - 1
    assert branch.num_scored == len(ids) - branch.start - (end - begin)
    numbers = list(range(branch.start, len(ids)))
    assert branch.scored(numbers) == [*range(branch.start, begin), *range(end, len(ids))]
    assert result.shared == branch.start  # the calls are the same, and scored all the same


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
    used: list[dict[str, Any]] = [
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


def test_without_an_end_of_turn_the_response_ends_with_its_content() -> None:
    renderer = BY_NAME["alpaca"].renderer()
    result = rendered(renderer, ask("Yes.\n\n", "Yes."))
    assert renderer.end_of_turn is None
    chosen, rejected = result.responses
    assert decode(renderer, chosen.token_ids).endswith("Response:\nYes.\n\n")
    assert decode(renderer, rejected.token_ids).endswith("Response:\nYes.")
    assert chosen.end_start == len(chosen.token_ids)


def test_a_template_that_always_opens_the_next_turn_still_ends_with_the_end_of_turn() -> None:
    family = BY_NAME["qwen2.5"]
    always = family.template.replace("{%- if add_generation_prompt %}", "{%- if true %}")
    renderer = Renderer(family.tokenizer(), chat_template=always)
    assert renderer.end_of_turn == "<|im_end|>"
    assert renderer.render(ask()) == family.renderer().render(ask())
