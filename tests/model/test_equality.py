"""Packed rows against one response at a time through transformers' own forward.

Loss and gradient of every architecture that may pack, short sliding windows included: relative,
per tensor in the norm, 1e-5 in float32 and 1e-10 in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from mrpo.data.rendering import RenderedPrompt, RenderedSequence
from mrpo.model.load import PACKABLE
from mrpo.model.logps import SequenceLogps

WINDOW = {"sliding_window": 4}
SLIDING_FIRST = {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}
FROM_SECOND_LAYER = {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}
SOFTCAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
GEMMA = {"query_pre_attn_scalar": 8, **SLIDING_FIRST}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, **EXPERTS}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("arcee", {}),
    ("cohere", {"logit_scale": 0.3}),
    ("cohere2", {"logit_scale": 0.3, **SLIDING_FIRST}),
    ("ernie4_5", {}),
    ("exaone4", {"sliding_window_pattern": 2, **WINDOW}),
    ("gemma", {}),
    ("gemma2", {**GEMMA, **SOFTCAPS}),
    ("gemma2", {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma3_text", GEMMA),
    ("glm", {}),
    ("glm4", {}),
    ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    ("gpt_neox", {}),
    ("granite", {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5}),
    ("granitemoe", {"logits_scaling": 3.0, **EXPERTS}),
    ("helium", {}),
    ("hunyuan_v1_dense", {}),
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("ministral", SLIDING_FIRST),
    ("ministral3", {}),
    ("mistral", {"sliding_window": None}),
    ("mistral", WINDOW),
    ("mixtral", {**WINDOW, **EXPERTS}),
    ("nanochat", {}),
    ("olmo", {}),
    ("olmo2", {}),
    ("olmo3", SLIDING_FIRST),
    ("olmoe", EXPERTS),
    ("phi", {}),
    ("phi3", {}),
    ("phi3", WINDOW),
    ("qwen2", {}),
    ("qwen2", FROM_SECOND_LAYER),
    ("qwen2_moe", QWEN_EXPERTS),
    ("qwen3", {}),
    ("qwen3", FROM_SECOND_LAYER),
    ("qwen3_moe", {"use_sliding_window": True, **WINDOW, **QWEN_EXPERTS}),
    ("seed_oss", {}),
    ("smollm3", {"use_sliding_window": True, "no_rope_layer_interval": 2, **SLIDING_FIRST}),
    ("starcoder2", WINDOW),
    ("vaultgemma", {**GEMMA, **SOFTCAPS}),
]


def test_every_packable_architecture_is_compared() -> None:
    assert {model_type for model_type, _ in CASES} == PACKABLE


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_float32_loss_and_gradient(
    model_type: str,
    changes: dict[str, Any],
    tiny_lm: Callable[..., nn.Module],
    prompts: list[RenderedPrompt],
) -> None:
    compare(tiny_lm, model_type, changes, prompts, torch.float32, 1e-5)


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_float64_loss_and_gradient(
    model_type: str,
    changes: dict[str, Any],
    tiny_lm: Callable[..., nn.Module],
    prompts: list[RenderedPrompt],
) -> None:
    compare(tiny_lm, model_type, changes, prompts, torch.float64, 1e-10)


def compare(
    tiny_lm: Callable[..., nn.Module],
    model_type: str,
    changes: dict[str, Any],
    prompts: list[RenderedPrompt],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    plain = tiny_lm(model_type, dtype, **changes)
    packed = tiny_lm(model_type, dtype, **changes)
    # Eager attention is transformers' definition of the model, softcap and all.
    plain.set_attn_implementation("eager")
    for lm in (plain, packed):
        if hasattr(lm.config, "num_experts_per_tok"):
            lm.set_experts_implementation("eager")  # the grouped kernel has no float64
    expected = one_at_a_time(plain, prompts)
    expected.backward()
    logps = SequenceLogps(packed, chunk_tokens=16)
    total = in_packed_rows(logps, prompts)
    total.backward()
    assert abs(total - expected) <= tolerance * abs(expected)
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in packed.named_parameters():
        gradient = gradients[name]
        if gradient is None:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert (parameter.grad - gradient).norm() <= tolerance * gradient.norm(), name


def one_at_a_time(lm: nn.Module, prompts: list[RenderedPrompt]) -> Tensor:
    def logp(sequence: RenderedSequence) -> Tensor:
        ids = torch.tensor([sequence.token_ids])
        logps = (
            lm(input_ids=ids, use_cache=False).logits[0, sequence.start - 1 : -1].log_softmax(-1)
        )
        return logps.gather(1, ids[0, sequence.start :, None]).sum()

    losses = [loss(torch.stack([*map(logp, prompt.responses)])) for prompt in prompts]
    return torch.stack(losses).sum()


def loss(logps: Tensor) -> Tensor:
    """Of a prompt's responses, the first against each other one; of one response, itself."""
    margins = logps[0] - logps[1:] if len(logps) > 1 else logps
    return -logsigmoid(0.1 * margins).sum()


def in_packed_rows(logps: SequenceLogps, prompts: list[RenderedPrompt]) -> Tensor:
    rows = logps.plan(prompts, 150)
    assert 1 < len(rows) < len(prompts)
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        batch = logps.collate([prompts[index] for index in row], "cpu")
        assert batch.bounds is not None
        assert len(batch.bounds) == len(row)
        sums = torch.stack([part.sum() for part in logps(batch).split(batch.token_counts)])
        for own in sums.split([len(prompts[index].responses) for index in row]):
            total = total + loss(own)
    return total
