"""Counted operations against a sum by hand and against torch's own counter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mrpo.benchmarks.flops import forward_flops
from mrpo.data.rendering import RenderedPrompt, RenderedSequence
from mrpo.model.logps import SequenceLogps
from mrpo.model.packing import pack, unpacked


def attention_flops(prompt: RenderedPrompt) -> int:
    """Two layers of four heads of width 8 over the keys that each token of the packed row sees."""
    ends = [len(response.token_ids) for response in prompt.responses]
    shared = sum(range(1, prompt.shared + 1))
    keys = shared + sum(sum(range(prompt.shared + 1, end + 1)) for end in ends)
    return 2 * 4 * (4 * 8) * keys


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "phi3", "qwen3"])
def test_products_with_weights_are_those_that_torch_counts(
    model_type: str, tiny_lm: Callable[..., nn.Module], prompts: list[RenderedPrompt]
) -> None:
    logps, batch = SequenceLogps(tiny_lm(model_type)), pack(prompts)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logps(batch)
    kinds = counter.get_flop_counts()["Global"]
    products = sum(n for kind, n in kinds.items() if str(kind) in ("aten.mm", "aten.addmm"))
    assert forward_flops(logps, batch) == products + sum(map(attention_flops, prompts))


def test_prompt_counts_once_when_packed_and_padding_never(
    tiny_lm: Callable[..., nn.Module],
) -> None:
    logps = SequenceLogps(tiny_lm("llama"))
    branch = RenderedSequence([1] * 10, start=6, end_start=10, boundary=False)
    longer = RenderedSequence([1] * 14, start=6, end_start=14, boundary=False)
    both = RenderedPrompt((branch, longer), shared=6)
    # Six shared tokens see 1 + … + 6 = 21 keys.
    layers = sum(p.numel() for p in logps.decoder_layers.parameters() if p.ndim == 2)
    prompt = 2 * layers * 6 + 2 * 4 * 32 * 21
    once = forward_flops(logps, pack([both]))
    assert forward_flops(logps, unpacked([both])) - once == prompt
    assert forward_flops(logps, pack([both], length=lambda tokens: 64)) == once


def test_experts_count_as_many_as_a_token_visits(tiny_lm: Callable[..., nn.Module]) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    logps = SequenceLogps(tiny_lm("mixtral", **experts))
    sequence = RenderedSequence([1, 2], start=1, end_start=2, boundary=False)
    batch = pack([RenderedPrompt((sequence, sequence), shared=1)])
    attention_weights = 32 * 32 * 2 + 32 * 16 * 2
    layer = attention_weights + 4 * 32 + 2 * 3 * 32 * 40  # router; two experts of three matrices
    keys = 1 + 2 + 2
    expected = 2 * 2 * layer * 3 + 2 * 4 * 32 * keys + 2 * 32 * 97 * 2
    assert forward_flops(logps, batch) == expected
