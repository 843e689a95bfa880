"""Random prompts with responses as token ids, and tiny models of any architecture."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mrpo.data.rendering import RenderedPrompt, RenderedSequence

VOCAB = 97


def random_prompt(rng: random.Random, responses: int = 2, longest: int = 30) -> RenderedPrompt:
    """A prompt and responses; up to three prompt tokens are left to the responses, some shared."""
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(2, longest // 2))]

    def sequence() -> RenderedSequence:
        response = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, longest // 2))]
        ids = prompt + response
        end = rng.randrange(len(prompt), len(ids) + 1)
        return RenderedSequence(token_ids=ids, start=len(prompt), end_start=end, boundary=False)

    shared = max(1, len(prompt) - rng.randrange(4))
    return RenderedPrompt(tuple(sequence() for _ in range(responses)), shared)


@pytest.fixture
def prompts() -> list[RenderedPrompt]:
    """With two responses, as pairs have, with one and with more."""
    rng = random.Random(0)
    return [random_prompt(rng, responses) for responses in (2, 1, 3, 2, 4, 2)]


@pytest.fixture(scope="session")
def tiny_lm() -> Callable[..., nn.Module]:
    """A function of a model type and config changes: a two-layer float32 model, weights spread."""

    def build(model_type: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
        settings = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        config = AutoConfig.for_model(model_type, **(settings | changes))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return build


@pytest.fixture
def float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' norms and softmax keep float64; they round to float32 by default.

    The rounding is part of the model, not of the packing, and hides what is being compared: a
    gradient that is rounded token by token differs in the eighth digit from one rounded once.
    """
    to, softmax = torch.Tensor.to, nn.functional.softmax

    def wide_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.dtype == torch.float64:
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return to(self, *args, **kwargs)

    def wide_softmax(input: torch.Tensor, dim: int, dtype: Any = None, **_: Any) -> torch.Tensor:
        wide = input.dtype == torch.float64
        return softmax(input, dim, dtype=torch.float64 if wide else dtype)

    monkeypatch.setattr(torch.Tensor, "to", wide_to)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.to(torch.float32))
    monkeypatch.setattr(nn.functional, "softmax", wide_softmax)
