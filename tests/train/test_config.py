"""The settings of training: read somewhere, explained in configs/train.yaml, checked at once."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from mrpo.errors import UserError
from mrpo.method.grammar import parse_method
from mrpo.method.loss_functions import LOSS_TYPES
from mrpo.method.objective import Method
from mrpo.settings import build, settings_of
from mrpo.tests.needs import needed
from mrpo.train.checkpoint import MAY_CHANGE
from mrpo.train.config import ExportConfig, TrainConfig
from mrpo.train.dataset import method_of

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {field.name: field for field in fields(TrainConfig)}


def test_example_has_every_setting_with_its_default_and_a_comment() -> None:
    text = (ROOT / "configs" / "train.yaml").read_text()
    values = yaml.safe_load(text)
    assert set(values) == set(FIELDS)
    for name, field in FIELDS.items():
        if field.default is not MISSING:
            assert values[name] == field.default, name
        assert re.search(rf"^{name}: \S+ +# \S", text, re.MULTILINE), f"{name} has no comment"


def test_the_help_and_the_example_name_every_loss() -> None:
    (setting,) = (setting for setting in settings_of(TrainConfig) if setting.name == "loss_type")
    example = (ROOT / "configs" / "train.yaml").read_text()
    for text in (setting.help, example):
        assert [name for name in LOSS_TYPES if not re.search(rf"\b{name}\b", text)] == []


def test_example_is_a_config_file() -> None:
    config = build(TrainConfig, {"max_steps": 3}, str(ROOT / "configs" / "train.yaml"))
    assert config == TrainConfig(output_dir="runs/mrpo", max_steps=3)


@pytest.mark.parametrize("name", FIELDS)
def test_setting_is_read(name: str) -> None:
    sources = [
        path.read_text() for path in (ROOT / "train").glob("*.py") if path.name != "config.py"
    ]
    assert any(re.search(rf"\bconfig\.{name}\b", source) for source in sources)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reference_kind", "geometric"),
        ("weighting", "uniform"),
        ("weights", "0.5,0.5"),
        ("epsilon", 0.3),
        ("adaptive_epsilon", False),
        ("normalize", "byte"),
        ("beta", 0.7),
        ("loss_type", "hinge"),
        ("f_divergence_type", "js_divergence"),
        ("label_smoothing", 0.1),
        ("sft_weight", 0.2),
    ],
)
def test_setting_of_the_method_reaches_it(name: str, value: Any) -> None:
    expected = parse_method("mrpo", ["a", "b"], **{name: value})
    assert expected != parse_method("mrpo", ["a", "b"])
    assert method_of(TrainConfig(output_dir="run", refs="a,b", **{name: value})) == expected
    if name in {field.name for field in fields(ExportConfig)}:
        export = ExportConfig(pairs="pairs", out="out", refs="a,b", **{name: value})
        assert method_of(export) == expected


def test_a_sum_of_losses_reaches_the_method_with_its_weights() -> None:
    options = {"loss_type": "sigmoid,bco_pair,sft", "refs": "a,b", "output_dir": "run"}
    method = method_of(TrainConfig(**options, loss_weights="0.8, 0.2,1"))
    assert method.mixture.weights == {"sigmoid": 0.8, "bco_pair": 0.2}
    assert method.mixture.sft_weight == 1
    with pytest.raises(UserError, match="--loss-weights 1,x: must be numbers, one for each loss"):
        method_of(TrainConfig(**options, loss_weights="1,x"))
    alpha: dict[str, Any] = {
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.3,
    }
    method = method_of(TrainConfig(refs="a,b", output_dir="run", **alpha))
    assert method.mixture.f_alpha_divergence_coef == 0.3


def test_settings_and_method_have_the_same_defaults() -> None:
    for field in fields(Method):
        if field.name in FIELDS and field.default is not MISSING:
            assert FIELDS[field.name].default == field.default, field.name


def test_the_method_covers_exactly_the_references_that_it_uses() -> None:
    method = method_of(TrainConfig(output_dir="run", refs="a,b,c", method="mrpo:c/b"))
    assert (method.references, method.columns) == (("c", "b"), (0, 1))


def test_settings_that_may_change_exist() -> None:
    assert set(FIELDS) >= MAY_CHANGE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("batch_pairs", 0),
        ("max_steps", -1),
        ("max_tokens", 0),
        ("warmup_ratio", 1.5),
        ("lora_dropout", -0.1),
        ("max_grad_norm", -1.0),
        ("seed", -1),
        ("seed", 2**32),
        ("learning_rate", float("nan")),
    ],
)
def test_value_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is {value}"):
        TrainConfig(output_dir="run", **{name: value})


def test_rate_by_default_is_trls_for_all_weights_and_the_authors_for_lora() -> None:
    assert TrainConfig(output_dir="run").peak_rate == 1e-6
    assert TrainConfig(output_dir="run", lora_rank=8).peak_rate == 1e-5
    assert TrainConfig(output_dir="run", lora_rank=8, learning_rate=1e-6).peak_rate == 1e-6


def test_trls_default_rate_is_the_one_taken() -> None:
    dpo = needed("trl").DPOConfig
    (rate,) = (field.default for field in fields(dpo) if field.name == "learning_rate")
    assert TrainConfig(output_dir="run").peak_rate == rate
