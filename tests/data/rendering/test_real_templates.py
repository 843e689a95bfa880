"""Real chat templates: our text is transformers' own, and the scored part is the response.

The text is compared with `apply_chat_template`'s of the installed transformers, whose
date is set to another day. What is scored is checked without rendering's own positions: from the
token ids alone.
"""

from __future__ import annotations

import datetime
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mrpo.data.inspect import TRIALS, template_table
from mrpo.data.pairs import Pair
from mrpo.data.references import ReferenceSpec
from mrpo.data.rendering import TODAY, Refusal, RenderedSequence, Renderer, byte_tokenizer
from mrpo.data.rendering.program import TEMPLATE_ERRORS, run_template
from mrpo.errors import UserError
from mrpo.evaluation.doctor.plain_model import PlainTokenizer
from mrpo.tests.data.families import message

NEEDS_TOOLS = {
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
}
NEEDS_VARIABLES = {"fireworks-ai-llama-3-firefunction-v2"}
DATE_FORMAT = re.compile(r"""strftime_now\(\s*['"](.*?)['"]""")


class OtherDay(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> OtherDay:
        return cls(2031, 12, 24, 18, 30)


@pytest.fixture(scope="module")
def sources(shared_data: Path) -> dict[str, str]:
    paths = sorted((shared_data / "templates").glob("*.jinja"))
    assert len(paths) == 54
    return {path.stem: path.read_text(encoding="utf-8") for path in paths}


@pytest.fixture(scope="module")
def renderers(sources: dict[str, str]) -> dict[str, Renderer]:
    usable = {name: source for name, source in sources.items() if name not in NEEDS_VARIABLES}
    return {
        name: Renderer(byte_tokenizer(source), chat_template=source)
        for name, source in usable.items()
    }


def conversations() -> list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None, bool]]:
    """(messages, tools, with a generation prompt)."""
    shown: list[Any] = []
    for pair in TRIALS.values():
        shown.append((pair.prompt, pair.tools, True))
        shown.append(([*pair.prompt, *pair.chosen], pair.tools, False))  # type: ignore[misc]
    odd = message("user", 'A "quote", <tag> & an ümlaut\n\tand {{ braces }} {% too %} 🙂 ')
    thoughts = dict.fromkeys(("reasoning_content", "thinking"), "Hm.\nWell.")
    answer = {**message("assistant", " Yes & no.\n"), **thoughts}
    shown.append(([odd, answer, message("user", "Sure?")], None, True))
    shown.append(([message("developer", "Be <brief>."), odd, answer], TRIALS["tools"].tools, False))
    return shown


def test_our_text_is_that_of_apply_chat_template(
    sources: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(chat_template_utils, "datetime", OtherDay)
    compared: Counter[str] = Counter()
    for name, source in sources.items():
        tokenizer = byte_tokenizer(source)
        for messages, tools, asks in conversations():
            if any("reasoning_content" in m and "thinking" not in m for m in messages):
                continue  # newer versions fill in the other names of the field
            variables = {**tokenizer.special_tokens_map, "tools": tools}
            try:
                ours = run_template(source, messages, {**variables, "add_generation_prompt": asks})
            except TEMPLATE_ERRORS as error:
                with pytest.raises(type(error)):
                    tokenizer.apply_chat_template(
                        messages, tools=tools, chat_template=source, tokenize=False
                    )
                compared["refused"] += 1
                continue
            theirs = tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=source,
                add_generation_prompt=asks,
                tokenize=False,
            )
            formats = set(DATE_FORMAT.findall(source))
            dated = [f for f in formats if OtherDay.now().strftime(f) in theirs]
            for form in dated:
                assert TODAY.strftime(form) in ours, (name, form)
                theirs = theirs.replace(OtherDay.now().strftime(form), TODAY.strftime(form))
            assert ours == theirs, name
            compared["dated" if dated else "equal"] += 1
    assert compared["equal"] > 450, compared
    assert compared["dated"] > 50, compared


def scored_text(renderer: Renderer, sequence: RenderedSequence) -> str:
    ids = sequence.scored(sequence.token_ids[sequence.start :])
    assert len(ids) == sequence.num_scored
    text = renderer.tokenizer.decode(ids)
    assert isinstance(text, str)
    return text


def test_what_is_scored_is_the_response_and_all_of_it(renderers: dict[str, Renderer]) -> None:
    taken: Counter[str] = Counter()
    for name, renderer in renderers.items():
        for kind, pair in TRIALS.items():
            rendered = renderer.render(pair)
            if isinstance(rendered, Refusal):
                assert rendered.reason in (
                    "template_refused",
                    "response_not_shown",
                    "prompt_not_prefix",
                ), (name, rendered)
                continue
            taken[kind] += 1
            assert rendered.responses[0].token_ids != rendered.responses[1].token_ids
            shared = renderer.tokenizer.decode(rendered.responses[0].token_ids[: rendered.shared])
            for turns, branch in (
                (pair.chosen, rendered.responses[0]),
                (pair.rejected, rendered.responses[1]),
            ):
                text = scored_text(renderer, branch)
                prompt = renderer.tokenizer.decode(branch.token_ids[: branch.start])
                assert rendered.shared <= branch.start
                for turn in turns:
                    answer = turn["content"]  # type: ignore[index]
                    thought = turn.get("reasoning_content", "")  # type: ignore[attr-defined]
                    assert answer not in shared or not answer
                    if turn["role"] == "assistant":  # type: ignore[index]
                        assert answer in text, (name, kind)
                        assert thought in text, (name, kind)
                        assert not answer or answer not in prompt, (name, kind)
                        if turn.get("tool_calls"):  # type: ignore[attr-defined]
                            assert "calculate" in text, (name, kind)
                            assert "17 + 25" in text, (name, kind)
                    else:
                        assert answer not in text, (name, kind)
            system = TRIALS["system"].prompt[0]["content"]  # type: ignore[index]
            assert (system in shared) == (kind == "system"), (name, kind)
    assert taken["one turn"] >= 51, taken
    assert taken["many turns"] >= 51, taken
    assert taken["tools"] >= 48, taken
    assert taken["tool turns in the answer"] >= 40, taken
    assert taken["reasoning in the answer"] >= 46, taken


def test_the_independent_way_of_doctor_gives_the_same_tokens(
    renderers: dict[str, Renderer], tmp_path: Path
) -> None:
    compared = 0
    for name, renderer in renderers.items():
        folder = tmp_path / name
        renderer.tokenizer.save_pretrained(folder)
        spec = ReferenceSpec(name, str(folder), chat_template=renderer.template.source)
        plain = PlainTokenizer(str(folder), None, spec)
        written = [
            message("assistant", f"<think>\n{t}\n</think>\n\nIt is.") for t in ("Hm.", "So.")
        ]
        pairs = {
            kind: TRIALS[kind]
            for kind in ("one turn", "system", "many turns", "reasoning in the answer")
        }
        pairs["thoughts"] = Pair(pairs["one turn"].prompt, written[:1], written[1:])
        for kind, pair in pairs.items():
            rendered = renderer.render(pair)
            if isinstance(rendered, Refusal):
                continue
            for number, branch in enumerate(rendered.responses):
                sequence = plain.sequence(pair, number)
                if renderer.end_of_turn is not None:
                    assert sequence.token_ids == branch.token_ids, (name, kind)
                assert sequence.start == branch.start, (name, kind)
                compared += 1
    assert compared > 350


def test_the_table_in_the_docs_is_what_the_command_prints(shared_data: Path) -> None:
    docs = Path(__file__).resolve().parents[3] / "docs" / "rendering.md"
    lines = list(template_table(shared_data / "templates"))
    assert len(lines) == 2 + 54
    assert "\n".join(lines) in docs.read_text(encoding="utf-8")


def test_reasoning_that_a_template_drops_is_refused_and_its_way_out_named(
    renderers: dict[str, Renderer],
) -> None:
    kind = TRIALS["reasoning in the answer"]
    for name, says in (
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "leaves out its reasoning"),
        ("deepseek-ai-DeepSeek-V3.1", "chat_template_kwargs enable_thinking, thinking"),
    ):
        written = [
            [message("assistant", f"<think>\n{thought}\n</think>\n\nFour.")]
            for thought in ("By counting.", "By guessing.")
        ]
        for pair in (kind, replace(kind, chosen=written[0], rejected=written[1])):
            refusal = renderers[name].render(pair)
            assert isinstance(refusal, Refusal)
            assert refusal.reason == "response_not_shown"
            assert says in refusal.detail


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning", "content"])
def test_reasoning_reaches_the_field_that_the_template_reads(
    renderers: dict[str, Renderer], field: str
) -> None:
    def answer(thought: str, text: str) -> list[dict[str, Any]]:
        if field == "content":
            return [message("assistant", f"<think>{thought}</think>{text}")]
        return [{**message("assistant", text), field: thought}]

    prompt = TRIALS["one turn"].prompt
    pair = Pair(prompt, answer("Count.", "Four."), answer("Guess.", "Five."))
    for name in ("Qwen-Qwen3-0.6B", "openai-gpt-oss-120b", "GLM-4.7-Flash", "tencent-Hy3"):
        rendered = renderers[name].render(pair)
        assert not isinstance(rendered, Refusal), (name, rendered)
        text = scored_text(renderers[name], rendered.responses[0])
        assert text.index("Count.") < text.index("Four."), name


def test_a_template_that_lacks_a_variable_says_so_and_takes_it(sources: dict[str, str]) -> None:
    (name,) = NEEDS_VARIABLES
    tokenizer = byte_tokenizer(sources[name])
    with pytest.raises(UserError, match=r"'functions' is undefined.*in chat_template_kwargs"):
        Renderer(tokenizer, chat_template=sources[name])
    given = {"functions": "[]", "datetime": "today"}
    renderer = Renderer(tokenizer, chat_template=sources[name], chat_template_kwargs=given)
    assert not isinstance(renderer.render(TRIALS["one turn"]), Refusal)


def test_thinking_turned_off_leads_a_reasoning_model_to_the_prefix(
    renderers: dict[str, Renderer], sources: dict[str, str]
) -> None:
    changed = []
    for name, renderer in renderers.items():
        if renderer.template.place == "prefix":
            continue
        if "enable_thinking" in renderer.template.thinking_kwargs:
            off = {"enable_thinking": False}
            other = Renderer(
                renderer.tokenizer, chat_template=sources[name], chat_template_kwargs=off
            )
            if other.template.place == "prefix":
                changed.append(name)
            assert not isinstance(other.render(TRIALS["one turn"]), Refusal)
    assert changed
