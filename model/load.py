"""Load a causal LM, and know of each architecture whether its rows may hold several pairs.

The allow-list is what the tests compare with one response at a time through transformers' own
forward. Any other architecture runs one response a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..errors import UserError
from .attention import FLEX, SDPA

Attention = Literal["sdpa", "flex_attention"]

PACKABLE = frozenset(
    "gemma2 gemma3_text granite llama mistral olmo2 phi3 qwen2 qwen3 smollm3".split()
)


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    attn: Attention | None = None,
) -> PreTrainedModel:
    """The model in eval mode, with an attention that packed rows can use.

    `attn` is by default FlexAttention on a GPU and sdpa elsewhere. Raises `UserError` for a dtype
    that torch does not have.
    """
    kind = getattr(torch, dtype, None) if dtype != "auto" else dtype
    if dtype != "auto" and not isinstance(kind, torch.dtype):
        raise UserError(f"dtype {dtype!r} is not one of torch's; use float32, bfloat16 or float16")
    model = AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=kind)
    set_attention(model, attn or default_attention(device))
    return model.to(device).eval()


def default_attention(device: torch.device | str) -> Attention:
    return "flex_attention" if torch.device(device).type == "cuda" else "sdpa"


def packs(config: PretrainedConfig) -> bool:
    """Whether rows of this architecture may hold several pairs with shared prompts."""
    return config.get_text_config().model_type in PACKABLE


def set_attention(model: PreTrainedModel, attn: Attention) -> None:
    """Replace the attention of a packable architecture; others keep transformers' choice."""
    if packs(model.config):
        model.set_attn_implementation(FLEX if attn == "flex_attention" else SDPA)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal LM itself, without a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
