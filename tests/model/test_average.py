"""Means of weights against means computed here, tensor by tensor and logit by logit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrpo.data.references import load_refs, local_inputs
from mrpo.errors import UserError
from mrpo.model.average import average, refuse_special_adapter

TEXT = "What is the capital of France? The capital of France is Paris."


def changed(
    source: Path, out: Path, seed: int, dtype: torch.dtype = torch.float32, **options: Any
) -> Path:
    """A model with every weight of another moved a little at random, with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(out, **options)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return out


def adapter(source: Path, out: Path, seed: int, rank: int = 4, alpha: int = 8, **more: Any) -> Path:
    """A LoRA adapter of random numbers on a model."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=["q_proj", "down_proj"],
        **more,
    )  # fmt: skip
    adapted: Any = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(out)
    return out


def logits(model: Any, source: Path) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(source)(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        found: torch.Tensor = model.eval()(ids).logits
    return found


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("family", ["llama", "qwen"])  # qwen's embeddings are tied
def test_the_mean_of_models_is_that_of_their_safetensors(
    family: str, tiny_references: dict[str, Path], tmp_path: Path
) -> None:
    source = tiny_references[family]
    parts = [changed(source, tmp_path / str(seed), seed) for seed in range(3)]
    weights = [0.5, 0.2, 0.3]
    average(parts, weights, tmp_path / "mean")
    means, models = tensors(tmp_path / "mean"), [tensors(part) for part in parts]
    assert means.keys() == models[0].keys()
    for name, mean in means.items():
        expected = sum(w * model[name].astype(np.float64) for w, model in zip(weights, models))
        np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-7)
        assert mean.dtype == np.float32
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "mean")
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == (family == "qwen")
    embeddings = loaded.model.embed_tokens.weight.detach().numpy()
    np.testing.assert_array_equal(embeddings, means["model.embed_tokens.weight"])


def test_the_mean_of_one_model_or_of_equal_ones_is_that_model(
    tiny_references: dict[str, Path], tmp_path: Path
) -> None:
    source = tiny_references["llama"]
    for count in (1, 3):
        average([source] * count, [0.61] * count, tmp_path / str(count))
        for path in (tmp_path / str(count)).iterdir():
            assert path.read_bytes() == (source / path.name).read_bytes(), path.name
        (spec,) = load_refs({"mean": str(tmp_path / str(count))}).values()
        (whole,) = load_refs({"mean": str(source)}).values()
        assert local_inputs(spec) == local_inputs(whole)  # so its scores are those of the part


def test_shards_are_read_and_written_as_the_first_model_has_them(
    tiny_references: dict[str, Path], tmp_path: Path
) -> None:
    source = tiny_references["llama"]
    whole = [changed(source, tmp_path / f"whole-{seed}", seed) for seed in range(2)]
    sharded = [
        changed(source, tmp_path / f"sharded-{seed}", seed, max_shard_size=f"{size}KB")
        for seed, size in enumerate((100, 60))
    ]
    assert len(list(sharded[0].glob("*.safetensors"))) > 1
    average(whole, [1, 1], tmp_path / "from-whole")
    average(sharded, [1, 1], tmp_path / "from-shards")
    names = [path.name for path in sorted((tmp_path / "from-shards").glob("*.safetensors*"))]
    assert names == [path.name for path in sorted(sharded[0].glob("*.safetensors*"))]
    loaded = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("from-whole", "from-shards")
    ]
    assert all(torch.equal(tensor, loaded[1][name]) for name, tensor in loaded[0].items())


def test_bfloat16_is_averaged_in_float64_and_written_as_bfloat16(
    tiny_references: dict[str, Path], tmp_path: Path
) -> None:
    parts = [
        changed(tiny_references["llama"], tmp_path / str(seed), seed, torch.bfloat16)
        for seed in range(3)
    ]
    average(parts, [1, 1, 1], tmp_path / "mean")
    models = [AutoModelForCausalLM.from_pretrained(part, dtype="auto") for part in parts]
    mean = AutoModelForCausalLM.from_pretrained(tmp_path / "mean", dtype="auto").state_dict()
    for name, tensor in mean.items():
        exact = torch.stack([model.state_dict()[name].double() for model in models]).mean(0)
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, exact.bfloat16()), name


def test_the_mean_of_adapters_gives_the_logits_of_the_averaged_full_weights(
    tiny_references: dict[str, Path], tmp_path: Path
) -> None:
    """Ranks and scales differ: 8/√4 and 6/√2 (rsLoRA), and 4/8."""
    source, weights = tiny_references["llama"], [0.5, 0.2, 0.3]
    sizes = [(4, 8), (2, 6), (8, 4)]
    parts = [
        adapter(source, tmp_path / f"part-{seed}", seed, rank, alpha, use_rslora=seed < 2)
        for seed, (rank, alpha) in enumerate(sizes)
    ]
    average(parts, weights, tmp_path / "mean")
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    mean: Any = PeftModel.from_pretrained(base, str(tmp_path / "mean"))
    assert mean.peft_config["default"].r == 14

    merged = []
    for part in parts:
        fresh = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        whole: Any = PeftModel.from_pretrained(fresh, str(part))
        merged.append(whole.merge_and_unload().state_dict())
    full = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    full.load_state_dict(
        {
            name: sum(w * state[name].double() for w, state in zip(weights, merged)).float()  # type: ignore[union-attr]
            for name in merged[0]
        }
    )
    expected, found = logits(full, source), logits(mean, source)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    fresh = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert (logits(fresh, source) - expected).abs().max() > 0.01


def test_the_mean_of_one_adapter_is_that_adapter(
    tiny_references: dict[str, Path], tmp_path: Path
) -> None:
    part = adapter(tiny_references["llama"], tmp_path / "part", 0)
    average([part], [0.3], tmp_path / "mean")
    for path in (tmp_path / "mean").iterdir():
        if path.name == "adapter_config.json":
            found, expected = (json.loads(p.read_text()) for p in (path, part / path.name))
            assert found == expected
        else:
            assert path.read_bytes() == (part / path.name).read_bytes(), path.name


def test_what_has_no_mean_is_one_line(tiny_references: dict[str, Path], tmp_path: Path) -> None:
    llama, qwen = tiny_references["llama"], tiny_references["qwen"]
    with pytest.raises(UserError, match=r"the weights of .* differ: .* has .*, .* has not"):
        average([llama, qwen], [1, 1], tmp_path / "mean")
    smaller = AutoModelForCausalLM.from_pretrained(llama)
    smaller.resize_token_embeddings(100)
    smaller.save_pretrained(tmp_path / "smaller")
    with pytest.raises(UserError, match=r"lm_head.weight is \d+ x 48 in .*, 100 x 48 in .*smaller"):
        average([llama, tmp_path / "smaller"], [1, 1], tmp_path / "mean")
    broken = shutil.copytree(llama, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"broken/model.safetensors: can't be read"):
        average([llama, broken], [1, 1], tmp_path / "mean")
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"broken has no model.safetensors, and means are of"):
        average([llama, broken], [1, 1], tmp_path / "mean")
    special = adapter(llama, tmp_path / "special", 0, use_dora=True)
    with pytest.raises(UserError, match="use_dora True, and means are of plain LoRA adapters"):
        refuse_special_adapter("qwen", special)
    refuse_special_adapter("qwen", adapter(llama, tmp_path / "plain", 0))
