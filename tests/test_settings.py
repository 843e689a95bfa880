"""Flags and YAML make the same settings; what does not fit is refused in one line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from mrpo.data.config import ImportConfig, InspectConfig, PrepareConfig, VerifyConfig
from mrpo.errors import UserError
from mrpo.settings import Also, Arg, Several, build, settings_of, write_resolved
from mrpo.train.config import TrainConfig

IMPORTED = {"source": "s", "alias": "a", "model": "m", "by_id": True}


@dataclass(kw_only=True, slots=True)
class Example:
    """An example of every kind of field."""

    source: Annotated[str, Arg("where from")]
    rate: Annotated[float, "a rate"] = 0.1
    steps: Annotated[int | None, "how many"] = None
    kind: Annotated[Literal["a", "b"], "which"] = "a"
    clip: Annotated[float | Literal["none"], "a number or none"] = 0.5
    fast: Annotated[bool, "quickly"] = False
    refs: Annotated[str | None, "a list"] = None
    several: Annotated[Several, "given several times"] = ()
    policy: Annotated[str, "a model", Also("model_name_or_path")] = "x"


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("source: here\nrate: 1e-5\nsteps: 3\nrefs: [a, b]\nclip: none\n")
    example = build(Example, {"steps": 4, "clip": "0.25"}, str(file))
    assert example == Example(source="here", rate=1e-5, steps=4, refs="a,b", clip=0.25)


def test_a_second_name_is_the_same_setting(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("source: here\nmodel-name-or-path: there\n")
    assert build(Example, {}, str(file)).policy == "there"


def test_written_settings_read_back_the_same(tmp_path: Path) -> None:
    example = Example(source="x", rate=2, kind="b", clip="none", fast=True)
    write_resolved(example, tmp_path / "deep" / "run.yaml")
    assert build(Example, {}, str(tmp_path / "deep" / "run.yaml")) == example


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sauce: x", ["unknown key 'sauce'", "source"]),
        ("source: x\nsteps: many", ["steps is 'many'", "int"]),
        ("source: x\nsteps: 1.5", ["steps is 1.5", "int"]),
        ("source: x\nkind: c", ["kind is 'c'", "a or b"]),
        ("source: x\nfast: 3", ["fast is 3", "bool"]),
        ("rate: 1", ["source is missing"]),
        ("- a list", ["mapping"]),
        ("a: [", ["not YAML"]),
        ("source: a\nsource: b", ["run.yaml", "key 'source' is there twice; keep one"]),
        ("several: {prompt: {a}}", ["several is {'prompt': {'a': None}}", "quote a text"]),
        ("several: 5", ["several is 5", "list or mapping of texts"]),
        ("several: [a=b, [c]]", ["several is ['a=b', ['c']]"]),
        ("source: &a [*a]", ["not YAML"]),
        ("source: !!int x", ["not YAML"]),
        ("source: 2024-13-45", ["not YAML"]),
        ("source: {a: b}", ["source is {'a': 'b'}", "str"]),
        ('source: "a\\0b"', ["source holds a NUL"]),
        (f"source: x\nsteps: {10**400}", ["steps is a number beyond 64 bits"]),
        ("gradient_accumulation_steps: 4", ["unknown key", "--batch-pairs"]),
        ("policy: a\nmodel_name_or_path: b", ["'policy' and 'model_name_or_path' are one"]),
        ("model_name_or_path: b\npolicy: a", ["'model_name_or_path' and 'policy' are one"]),
    ],
)
def test_what_does_not_fit_is_one_clear_line(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        build(Example, {}, str(file))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (VerifyConfig, {"pairs": "pairs"}, "--pairs is pairs, which has no effect without --resc"),
        (
            InspectConfig,
            {"templates": "t", "row": 2},
            "--row is 2, which has no effect with --temp",
        ),
        (InspectConfig, {"templates": "t", "tokens": True}, "--tokens is True"),
        (ImportConfig, {**IMPORTED, "chat": True}, "--chat is True, which has no effect with --by"),
        (ImportConfig, {**IMPORTED, "map": ("prompt={q}",)}, "--map is"),
        (
            TrainConfig,
            {"output_dir": "r", "lora_alpha": 8},
            "--lora-alpha is 8, which has no effec",
        ),
        (TrainConfig, {"output_dir": "r", "lora_dropout": 0.1}, "no effect without --lora-rank"),
        (
            TrainConfig,
            {"output_dir": "r", "lora_target_modules": "q"},
            "--lora-target-modules is q",
        ),
        (TrainConfig, {"output_dir": "r", "use_dora": True}, "no effect without --lora-rank"),
        (TrainConfig, {"output_dir": "r", "f_alpha_divergence_coef": 0.3}, "no effect without --f"),
        (TrainConfig, {"output_dir": "r", "run_name": "a"}, "no effect without --report-to"),
        (
            PrepareConfig,
            {"source": "s", "out": "o", "group_column": "c", "group_by": "prompt"},
            "--group-by is prompt, which has no effect with --group-column",
        ),
    ],
    ids=str,
)
def test_a_flag_that_has_no_effect_is_refused_by_name(
    config: type, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        config(**settings)


def test_a_folder_of_the_home_is_found_also_where_no_shell_expands_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert build(Example, {"source": "~/pairs"}).source == "/home/me/pairs"


def test_every_field_knows_its_help_and_default() -> None:
    settings = {setting.name: setting for setting in settings_of(Example)}
    assert settings["source"].positional
    assert settings["source"].required
    assert settings["rate"].help == "a rate"
    assert settings["rate"].default == 0.1
