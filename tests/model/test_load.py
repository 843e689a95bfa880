"""Loading a model: what is refused, what is taken out, which attention is set."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mrpo.data.references import from_pretrained
from mrpo.data.rendering.renderer import load_tokenizer
from mrpo.errors import UserError
from mrpo.model.attention import FLEX, SDPA
from mrpo.model.load import layer_windows, load_model, packs, rope_limit
from mrpo.model.logps import SequenceLogps


def test_loaded_model_is_ready_to_score(tiny_references: dict[str, Path]) -> None:
    for folder in tiny_references.values():
        model = load_model(folder, dtype="bfloat16")
        assert model.config._attn_implementation == SDPA
        assert model.dtype == torch.bfloat16
        assert not model.training
    assert load_model(folder, attn="flex_attention").config._attn_implementation == FLEX


def test_an_adapter_that_is_not_all_in_the_layers_is_refused(
    tiny_references: dict[str, Path], tmp_path: Path
) -> None:
    """The layers alone are run, so virtual tokens in front of a prompt would be left out."""
    base = AutoModelForCausalLM.from_pretrained(tiny_references["llama"])
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(base, config).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="of kind PROMPT_TUNING, part of which is not in"):
        load_model(tiny_references["llama"], adapter=tmp_path)


def test_an_adapter_of_another_model_is_refused(
    tiny_references: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT warns that its weights are not there, and leaves the model as it is."""
    base = AutoModelForCausalLM.from_pretrained(tiny_references["llama"])
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("v_proj", "k_proj"))
    with pytest.raises(UserError, match=r"does not fit its model .*missing adapter keys"):
        load_model(tiny_references["llama"], adapter=tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama9"}, "architecture 'llama9' is unknown to transformers"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
            "needs code of its own, and code that comes with a model is not run here",
        ),
    ],
    ids=["newer", "own code"],
)
def test_a_model_that_transformers_does_not_have_is_one_line_and_no_question(
    tmp_path: Path, config: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('it was run')")
    for load in (load_model, partial(from_pretrained, AutoConfig)):
        with pytest.raises(UserError, match=message) as raised:
            load(tmp_path)
        assert "\n" not in str(raised.value)


def test_a_tokenizer_with_code_of_its_own_is_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    named = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    (tmp_path / "own.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(UserError, match="needs code of its own"):
        load_tokenizer(str(tmp_path))


def test_no_code_that_comes_with_a_model_is_ever_run() -> None:
    """Everything is loaded by `from_pretrained`, or made with trust_remote_code=False."""
    root = Path(__file__).resolve().parents[2]
    for path in root.glob("*/**/*.py"):
        if path.relative_to(root).parts[0] in ("tests", "benchmarks", "demo", "build", ".venv"):
            continue
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"Auto\w+\.from_pretrained\(", text), path
        for call in re.findall(r"\.from_config\([^)]*\)", text):
            assert "trust_remote_code=False" in call, path
        assert "trust_remote_code=True" not in text, path


def test_own_attention_leaves_no_trace_in_a_saved_model(
    tiny_references: dict[str, Path], tmp_path: Path
) -> None:
    model = load_model(tiny_references["llama"])
    model.save_pretrained(tmp_path)
    assert "mrpo" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    assert again.config._attn_implementation == "sdpa"
    assert torch.allclose(again(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


def test_loaded_model_generates_as_transformers_does(tiny_references: dict[str, Path]) -> None:
    ids = torch.arange(5, 15).view(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    folder = tiny_references["mistral"]
    for model in (plain := AutoModelForCausalLM.from_pretrained(folder), load_model(folder)):
        model.generation_config.eos_token_id = None
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        if model is plain:
            expected = generated
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("model_type", ["gemma2", "vaultgemma"])
def test_softcapped_attention_is_set_and_computes_as_eager(
    model_type: str, tiny_lm: Callable[..., nn.Module], tmp_path: Path
) -> None:
    """Newer versions of transformers refuse these models an attention that is named after sdpa."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    tiny_lm(model_type, attn_logit_softcapping=0.2, **layers).save_pretrained(tmp_path)
    ids = torch.arange(24).view(2, 12)
    model = load_model(tmp_path)
    assert model.config._attn_implementation == SDPA
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.allclose(model(input_ids=ids).logits, eager(input_ids=ids).logits, atol=1e-5)
    eager.config.attn_logit_softcapping = None
    for layer in eager.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    far = (model(input_ids=ids).logits - eager(input_ids=ids).logits).abs().max()
    assert far > 1e-3, "the softcap makes no difference here"


def test_dropout_is_taken_out(tiny_lm: Callable[..., nn.Module], tmp_path: Path) -> None:
    rates = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5, "n_head": 4}
    for name, lm in {
        "gpt2": tiny_lm("gpt2", n_embd=32, n_layer=2, n_positions=64, **rates),
        "llama": tiny_lm("llama", attention_dropout=0.5),
        "starcoder2": tiny_lm("starcoder2", residual_dropout=0.5, embedding_dropout=0.5),
    }.items():
        lm.save_pretrained(tmp_path / name)
        model = load_model(tmp_path / name).train()
        ids = torch.arange(20)[None]
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_adapter_is_put_on_top(tiny_references: dict[str, Path], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(load_model(tiny_references["llama"]), config)
    adapted.save_pretrained(tmp_path)
    model = load_model(tiny_references["llama"], adapter=tmp_path)
    ids = torch.arange(12)[None]
    assert torch.allclose(model(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits)
    assert SequenceLogps(model).packs


@pytest.mark.parametrize("dtype", ["float33", "int8", "Tensor"])
def test_unknown_dtype_is_refused(dtype: str, tiny_references: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=f"dtype '{dtype}' is unknown; use float32"):
        load_model(tiny_references["llama"], dtype=dtype)


def test_folder_without_a_causal_lm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"model {tmp_path} could not be loaded"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(UserError, match="could not be loaded") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_embedding_models_with_attention_both_ways_do_not_pack(
    tiny_lm: Callable[..., nn.Module],
) -> None:
    assert packs(tiny_lm("gemma3_text").config)
    assert not packs(tiny_lm("gemma3_text", use_bidirectional_attention=True).config)


def test_rope_limit_is_for_rotary_kinds_that_look_at_the_length(
    tiny_lm: Callable[..., nn.Module],
) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    assert rope_limit(tiny_lm("llama").config) is None
    assert rope_limit(tiny_lm("llama", rope_parameters=yarn).config) is None
    assert rope_limit(tiny_lm("gpt2", n_embd=32, n_head=4).config) is None
    assert rope_limit(tiny_lm("gemma3_text").config) is None


@pytest.mark.parametrize(
    ("model_type", "changes", "windows"),
    [
        ("llama", {}, [None, None]),
        ("mistral", {"sliding_window": 4}, [4, 4]),
        ("mistral", {"sliding_window": None}, [None, None]),
        ("gemma2", {"sliding_window": 4}, [4, None]),
        ("qwen2", {"sliding_window": 4, "use_sliding_window": False}, [None, None]),
        ("qwen3_moe", {"sliding_window": 4, "use_sliding_window": True}, [4, 4]),
    ],
)
def test_windows_of_layers(
    model_type: str,
    changes: dict[str, Any],
    windows: list[int | None],
    tiny_lm: Callable[..., nn.Module],
) -> None:
    assert layer_windows(tiny_lm(model_type, **changes).config) == windows
