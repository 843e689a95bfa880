"""refs.yaml: what it may say, what counts as the same entry, and one clear line otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from mrpo.data.references import load_refs, select_refs
from mrpo.errors import UserError


def refs(folder: Path, text: str) -> Path:
    path = folder / "refs.yaml"
    path.write_text(text)
    return path


def test_the_shipped_refs_yaml_names_three_hub_models() -> None:
    specs = load_refs(Path(__file__).parents[2] / "configs" / "refs.yaml")
    assert list(specs) == ["llama", "mistral", "qwen"]
    assert all(spec.model_path is None and spec.dtype == "bfloat16" for spec in specs.values())


def test_every_key_is_read(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    path = refs(
        tmp_path,
        "a: {model: org/name, revision: v1, dtype: float16, quantization: fp8, adapter: org/lora,"
        " chat_template: chat.jinja, chat_template_kwargs: {deep: true}, tensor_parallel_size: 2}",
    )
    spec = load_refs(path)["a"]
    assert (spec.revision, spec.quantization, spec.adapter) == ("v1", "fp8", "org/lora")
    assert (spec.chat_template, spec.tensor_parallel_size) == ("{{ messages }}", 2)
    assert spec.entry() == {
        "model": "org/name",
        "revision": "v1",
        "dtype": "float16",
        "quantization": "fp8",
        "adapter": "org/lora",
        "chat_template": "{{ messages }}",
        "chat_template_kwargs": {"deep": True},
    }


@pytest.mark.parametrize("name", ["tpl.j2", "vicuna", "chat.txt", "{{ x }}.j2"])
def test_a_template_without_a_brace_is_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{{ messages }}")
    spec = load_refs(refs(tmp_path, f"a: {{model: org/name, chat_template: '{name}'}}"))["a"]
    assert spec.chat_template == (name if "{" in name else "{{ messages }}")


def test_defaults_written_out_and_parallel_size_leave_the_entry_equal(tmp_path: Path) -> None:
    path = refs(
        tmp_path,
        "a: org/name\nb: {model: org/name, dtype: auto, adapter: null, tensor_parallel_size: 8}",
    )
    specs = load_refs(path)
    assert specs["a"].entry() == specs["b"].entry() == {"model": "org/name"}


def test_a_local_folder_is_relative_to_the_file_and_its_entry_survives_its_removal(
    tmp_path: Path,
) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    path = refs(tmp_path, "a: {model: models/tiny}")
    spec = load_refs(path)["a"]
    assert spec.model_path == (tmp_path / "models" / "tiny").resolve()
    entry = spec.entry()
    (tmp_path / "models").rename(tmp_path / "away")
    assert load_refs(path)["a"].entry() == entry == {"model": "models/tiny"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("a: org/name\nb: org/name\na: org/other", "key 'a' is there twice; keep one"),
        ("a: {model: org/name, model: org/other}", "key 'model' is there twice; keep one"),
        ("[]", "must map aliases"),
        ("a: {}", "needs a 'model'"),
        ("../a: org/name", "alias '../a' is not allowed"),
        ("a/b: org/name", "is not allowed"),
        ("a@1: org/name", "is not allowed"),
        ("a: {model: org/name, temperature: 1}", "unknown key 'temperature'; known: model"),
        ("a: {model: 7}", "must be text"),
        ("a: {model: org/name, dtype: int3}", "must be one of auto, float32"),
        ("a: {model: org/name, tensor_parallel_size: 0}", "whole number from 1"),
        ("a: {model: org/name, chat_template_kwargs: [1]}", "must map names"),
        ("a: {model: org/name, system_role: user}", "must be fold, or left out"),
        ("a: {model: org/name, chat_template: gone.jinja}", "can't be read"),
        ("a: {model: org/name, chat_template: gone.j2}", "'gone.j2' has no brace, so it is not a"),
        ("a: {model: org/name, chat_template: templates/vicuna}", "can't be read"),
        ('a: {model: org/name, chat_template: "a\\0b"}', "can't be read"),
        ("a: {model: ~nobody/model, chat_template: ~nobody/x}", "can't be read"),
        ("a: {model: 'https://user:secret@host/m'}", "is a URL"),
    ],
)
def test_a_mistake_is_one_line_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_refs(refs(tmp_path, text))
    line = str(caught.value)
    assert message in line
    assert "refs.yaml" in line
    assert "\n" not in line
    assert "secret" not in line


def test_a_working_folder_without_refs_yaml_has_the_packaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(load_refs("configs/refs.yaml")) == ["llama", "mistral", "qwen"]
    (tmp_path / "configs").mkdir()
    refs(tmp_path / "configs", "mine: org/name")
    assert list(load_refs("configs/refs.yaml")) == ["mine"]
    with pytest.raises(UserError, match="--refs-config"):
        load_refs("other/refs.yaml")


def test_a_mapping_is_read_as_a_file_that_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    path = refs(
        tmp_path, "a: org/name\nb: {model: tiny, dtype: float16, chat_template: chat.jinja}"
    )
    specs = load_refs(
        {
            "a": "org/name",
            "b": {"model": "tiny", "dtype": "float16", "chat_template": "chat.jinja"},
        }
    )
    assert specs == load_refs(path)
    assert specs["b"].model_path == tmp_path.resolve() / "tiny"
    with pytest.raises(UserError, match=r"^references: a: needs a 'model'"):
        load_refs({"a": {}})


def test_a_missing_file_says_which_flag_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--refs-config"):
        load_refs(tmp_path / "none.yaml")


def test_selection_keeps_the_order_given_and_refuses_what_is_not_there(tmp_path: Path) -> None:
    specs = load_refs(refs(tmp_path, "a: org/a\nb: org/b\nc: org/c"))
    assert [spec.alias for spec in select_refs(specs, "c, a")] == ["c", "a"]
    with pytest.raises(UserError, match="unknown reference 'd'; known: a, b, c"):
        select_refs(specs, "a,d")
    with pytest.raises(UserError, match="'a' is given twice"):
        select_refs(specs, "a,b,a")
    with pytest.raises(UserError, match="names no reference"):
        select_refs(specs, " , ")
