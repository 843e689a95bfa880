"""`mrpo inspect`: what it prints for a pair, in color and without, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mrpo.data.config import InspectConfig, PrepareConfig
from mrpo.data.inspect import inspect
from mrpo.data.prepare import prepare
from mrpo.errors import UserError
from mrpo.tests.data.family_templates import GEMMA, VICUNA


def chat(prompt: str, chosen: str, rejected: str, system: str | None = None) -> dict[str, Any]:
    turns = [{"role": "system", "content": system}] if system else []
    return {
        "prompt": [*turns, {"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


@pytest.fixture
def folder(tmp_path: Path, tiny_references: dict[str, Path], monkeypatch: Any) -> Path:
    """A working folder with refs.yaml, three chat pairs in shards of two, and one text pair."""
    rows = [
        chat("Is it?", "Yes.\nIt is.", "No\x1b[2J."),
        chat("2+2?", "4", "5"),
        chat("Hi", "eggs", "Eggs", system="Be kind."),
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = {"prompt": "Say: ", "chosen": "yes", "rejected": "no"}
    (tmp_path / "text.jsonl").write_text(json.dumps(row))
    (tmp_path / "vicuna.jinja").write_text(VICUNA)
    (tmp_path / "gemma.jinja").write_text(GEMMA)
    (tmp_path / "refs.yaml").write_text(
        "".join(f"{name}: {{model: {path}}}\n" for name, path in tiny_references.items())
        + f"vicuna: {{model: {tiny_references['llama']}, chat_template: vicuna.jinja}}\n"
        + f"gemma: {{model: {tiny_references['mistral']}, chat_template: gemma.jinja}}\n"
    )
    monkeypatch.chdir(tmp_path)
    prepare(PrepareConfig(source="chat.jsonl", out="pairs", shard_pairs=2))
    prepare(PrepareConfig(source="text.jsonl", out="texts"))
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], **settings: Any) -> str:
    capsys.readouterr()
    given = {} if "templates" in settings else {"refs_config": "refs.yaml"}
    inspect(InspectConfig(**{**given, **settings}))
    return capsys.readouterr().out


def test_the_scored_span_and_the_end_of_turn_stand_in_brackets_without_color(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(capsys, ref="mistral,qwen", row=0)
    assert "<s>[INST] Is it? [/INST][[ Yes.↵\nIt is.]]{{</s>}}" in out
    assert "<|im_start|>assistant↵\n[[Yes.↵\nIt is.]]{{<|im_end|>}}" in out
    assert "\x1b" not in out  # a response's own control characters are escaped as well
    assert "No\\x1b[2J." in out


def test_color_marks_the_same_parts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, ref="mistral", row=1, color="always")
    assert "\x1b[2m<s>[INST] 2+2? [/INST]\x1b[0m\x1b[32m 4\x1b[0m\x1b[1;35m</s>\x1b[0m" in out
    plain = shown(capsys, ref="mistral", row=1)
    bare = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert bare == re.sub(r"<<|>>|\[\[|\]\]|\{\{|\}\}", "", plain)


def test_tokens_are_listed_with_id_piece_part_and_characters(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(capsys, ref="mistral", row=1, tokens=True)
    lines = [line.split() for line in out.splitlines() if re.match(r" +\d+ +\d+  ", line)]
    assert [line[2] for line in lines[-2:]] == ["response", "end"]
    assert lines[0][:4] == ["0", "0", "prompt", "<s>"]
    assert lines[-1][3:] == ["</s>", "'</s>'"]


def test_a_token_across_the_boundary_is_marked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(capsys, ref="vicuna", row=2, tokens=True)  # no system turn in this template
    chosen = out[out.index("chosen:") : out.index("rejected:")]
    assert "the first across the boundary" in chosen
    assert re.search(r"ASSISTANT:<< \w+>>", chosen)
    assert re.search(r"  boundary +Ġ\w+ +' \w+'", chosen)
    assert "ASSISTANT: [[Eggs]]" in out  # the other branch has none


def test_plain_text_shows_the_bos_and_eos_it_is_given(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(capsys, ref="mistral", pairs="texts")
    assert "plain text, though the model has a chat template" in out
    assert "<s>Say: [[yes]]{{</s>}}" in out
    assert "qwen" in shown(capsys, ref="qwen", pairs="texts")


def test_what_the_template_refuses_is_said_and_is_no_error(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(capsys, ref="gemma", row=2)
    assert "not scored, template_refused: TemplateError: system role not supported" in out
    assert "[[Yes." in shown(capsys, ref="gemma", row=0)


@pytest.mark.parametrize("row", [-1, 3])
def test_a_row_that_is_not_there_is_refused(folder: Path, row: int) -> None:
    with pytest.raises(UserError, match=f"--row {row}: pairs has rows 0 to 2"):
        inspect(InspectConfig(ref="llama", row=row, refs_config="refs.yaml"))


def test_the_way_to_the_response_and_an_own_end_are_said(
    folder: Path, capsys: pytest.CaptureFixture[str], tiny_references: dict[str, Path]
) -> None:
    assert "begins after the generation prompt" in shown(capsys, ref="llama")
    opens = (
        "{%- for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '</s>' }}{%- endfor %}"
        "{{ 'assistant: ' ~ ('<think>' if enable_thinking is not defined) "
        "if add_generation_prompt }}"
    )
    (folder / "opens.jinja").write_text(opens)
    with (folder / "refs.yaml").open("a") as file:
        file.write(f"opens: {{model: {tiny_references['mistral']}, chat_template: opens.jinja}}\n")
    out = shown(capsys, ref="opens", row=1)
    assert "where a sentinel in its place does" in out
    assert "chat_template_kwargs enable_thinking" in out
    assert "assistant: [[5]]{{</s>}}" in out
    row = {"prompt": "Say: ", "chosen": "yes</s>", "rejected": "no</s>\n"}
    (folder / "ended.jsonl").write_text(json.dumps(row))
    prepare(PrepareConfig(source="ended.jsonl", out="ended"))
    out = shown(capsys, ref="mistral", pairs="ended")
    assert "its text ends with its own '</s>'; none is added" in out
    assert "[[yes]]{{</s>}}" in out
    assert "[[no]]{{</s>}}" in out


def test_a_folder_of_templates_becomes_a_table(
    folder: Path, capsys: pytest.CaptureFixture[str], tiny_references: dict[str, Path]
) -> None:
    (folder / "broken.jinja").write_text("{% for m in messages %}")
    (folder / "users.jinja").write_text(
        "{% for m in messages if m.role != 'system' %}{{ m.role ~ ': ' ~ m.content }}</s>"
        "{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
    )
    for settings in ({}, {"tokenizer": str(tiny_references["llama"])}):
        lines = shown(capsys, templates=".", **settings).splitlines()
        rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in lines}
        assert rows["template"][:3] == ["one turn", "system", "many turns"]
        assert rows["broken"][0] == "unusable"
        assert rows["gemma"][:3] == ["prefix", "template_refused", "prefix"]
        assert rows["users"][:3] == ["prefix", "system message not shown", "prefix"]
    with pytest.raises(UserError, match=r"no \*\.jinja there"):
        inspect(InspectConfig(templates="pairs"))
    with pytest.raises(UserError, match="with --ref, or a folder with --templates"):
        InspectConfig()
