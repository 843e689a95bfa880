"""Policies that are no plain text model: mixtures of experts and multimodal checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
)

from mrpo.errors import UserError
from mrpo.train.checkpoint import checkpoints
from mrpo.train.memory import Sizes
from mrpo.train.policy import PolicySource, load_config, refuse_untrainable
from mrpo.train.run import train

from .conftest import SMALL

VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def gemma3(write_policy: Callable[[PretrainedConfig], str]) -> str:
    text = SMALL | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    sizes = {"text_config": text, "vision_config": VISION, "mm_tokens_per_image": 4}
    tokens = {"image_token_index": 3, "boi_token_index": 4, "eoi_token_index": 5}
    folder = write_policy(AutoConfig.for_model("gemma3", **sizes, **tokens))
    (Path(folder) / "preprocessor_config.json").write_text('{"image_seq_length": 4}')
    return folder


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize(
    "changes",
    [{"max_tokens": 80}, {"gradient_checkpointing": True}, {"lora_rank": 2}],
    ids=["small budget", "checkpointing", "lora"],
)
def test_balancing_loss_does_not_depend_on_the_micro_batches(
    inputs: Any, tmp_path: Path, mixture: str, changes: dict[str, Any]
) -> None:
    changes = {"policy": mixture, "max_steps": 3, "warmup_ratio": 0.0} | changes
    lora = {"lora_rank": 2} if "lora_rank" in changes else {}
    whole = {"policy": mixture, "max_steps": 3, "warmup_ratio": 0.0, "max_tokens": 4096} | lora
    train(inputs.config(tmp_path / "whole", **whole))
    train(inputs.config(tmp_path / "parts", **whole | changes | {"max_tokens": 80}))
    for name in ("loss", "aux_loss", "grad_norm"):
        expected = [line[name] for line in log_of(tmp_path / "whole")]
        assert [line[name] for line in log_of(tmp_path / "parts")] == pytest.approx(
            expected, rel=2e-4
        )
    # E * sum(f * P) is 2 where 2 of 4 experts are chosen evenly, and part of the loss.
    line = log_of(tmp_path / "whole")[0]
    assert 1.8 < line["aux_loss"] < 3
    assert line["loss"] > 0.5 * line["aux_loss"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    assert again.config.model_type == "mixtral"


def test_multimodal_gemma3_trains_its_text_model_and_loads_again(
    inputs: Any, tmp_path: Path, gemma3: str
) -> None:
    changes = {"policy": gemma3, "method": "dpo:llama", "max_steps": 3, "save_steps": 1}
    train(inputs.config(tmp_path / "run", **changes, warmup_ratio=0.0))
    written = tmp_path / "run" / "model"
    model, loading = AutoModelForCausalLM.from_pretrained(written, output_loading_info=True)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert not any(loading.values())
    before, after = (load_file(Path(at) / "model.safetensors") for at in (gemma3, written))
    assert before.keys() == after.keys()
    for name in before:
        is_text = "language_model" in name or "lm_head" in name
        assert torch.equal(before[name], after[name]) != is_text, name
    assert (written / "preprocessor_config.json").is_file()
    # The written model computes what was trained: its logits come from the trained weights.
    ids = torch.tensor([[7, 8, 9, 10]])
    untrained = AutoModelForCausalLM.from_pretrained(gemma3)
    assert not torch.allclose(model(input_ids=ids).logits, untrained(input_ids=ids).logits)
    assert checkpoints(tmp_path / "run" / "checkpoints")[-1].state.step == 3


def test_lora_of_a_multimodal_model_leaves_its_vision_alone(
    inputs: Any, tmp_path: Path, gemma3: str
) -> None:
    changes = {"policy": gemma3, "method": "dpo:llama", "max_steps": 1, "lora_rank": 2}
    train(inputs.config(tmp_path / "run", **changes, warmup_ratio=0.0))
    names = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert names
    assert all("language_model" in name for name in names)
    base = AutoModelForCausalLM.from_pretrained(gemma3)
    peft.PeftModel.from_pretrained(base, str(tmp_path / "run" / "model"))
    sizes = Sizes.of(load_config(PolicySource(gemma3)))
    adapter = sum(tensor.numel() for tensor in names.values())
    assert sizes.lora(2, "all-linear") == adapter
    assert sizes.trainable < sizes.parameters


def test_qwen3_5_is_written_as_its_text_model(
    inputs: Any, tmp_path: Path, write_policy: Callable[[PretrainedConfig], str]
) -> None:
    linear = {f"linear_{name}": 2 for name in ("num_value_heads", "num_key_heads")}
    linear |= {f"linear_{name}_head_dim": 8 for name in ("key", "value")}
    text = SMALL | linear | {"layer_types": ["linear_attention", "full_attention"]}
    config = AutoConfig.for_model("qwen3_5", text_config=text)
    folder = write_policy(config)
    config.save_pretrained(folder)  # as on the Hub: the text model's weights under the whole config
    changes = {"policy": folder, "method": "dpo:llama", "max_steps": 2}
    train(inputs.config(tmp_path / "run", **changes))
    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "model", output_loading_info=True
    )
    assert model.config.model_type == "qwen3_5_text"
    assert not any(loading.values())


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("mllama", {}, "mllama is multimodal"),
        ("gemma4", {}, "gemma4 is multimodal"),
        ("phi4_multimodal", {}, "phi4_multimodal is multimodal"),
        ("gpt_oss", {}, "gpt_oss is a mixture of experts whose balancing loss is not tested"),
        ("phimoe", {}, "router_aux_loss_coef in its config.json to 0"),
    ],
)
def test_what_would_be_trained_wrong_is_refused_by_name(
    model_type: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        refuse_untrainable(AutoConfig.for_model(model_type, **changes), "mine")


def test_refusal_comes_before_anything_is_written(
    inputs: Any, tmp_path: Path, tiny_references: dict[str, Path]
) -> None:
    folder = tmp_path / "policy"
    AutoTokenizer.from_pretrained(tiny_references["llama"]).save_pretrained(folder)
    AutoConfig.for_model("mllama").save_pretrained(folder)
    with pytest.raises(UserError, match=r"policy .*: mllama is multimodal"):
        train(inputs.config(tmp_path / "run", policy=str(folder)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "deepseek_v3", "gemma3", "qwen3"])
def test_what_trains_right_is_not_refused(model_type: str) -> None:
    refuse_untrainable(AutoConfig.for_model(model_type), "mine")
