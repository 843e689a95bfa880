"""The mask of a packed row, drawn by hand, and the same rule through FlexAttention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from mrpo.data.rendering import RenderedPrompt, RenderedSequence
from mrpo.model.attention import (
    FLEX_BLOCK,
    PackedMasks,
    block_mask,
    dense_mask,
    mask_mod,
    never_eager,
    padded_length,
)
from mrpo.model.load import set_attention
from mrpo.model.logps import SequenceLogps
from mrpo.model.packing import pack


def sequence(token_ids: list[int], start: int) -> RenderedSequence:
    return RenderedSequence(token_ids, start=start, end_start=len(token_ids), boundary=False)


TWO_PROMPTS = [
    # Prompt 1 2 3 with responses 4 5 and 6; then prompt 7 with 8, 9 and 3 4.
    RenderedPrompt((sequence([1, 2, 3, 4, 5], 3), sequence([1, 2, 3, 6], 3)), shared=3),
    RenderedPrompt((sequence([7, 8], 1), sequence([7, 9], 1), sequence([7, 3, 4], 1)), shared=1),
]

FULL = """
x..........
xx.........
xxx........
xxxx.......
xxxxx......
xxx..x.....
......x....
......xx...
......x.x..
......x..x.
......x..xx
"""

# With a window of 2 a token sees itself and the one before it in its own sequence: the rejected
# 6 sees the prompt's 3, which lies three tokens before it in the row.
WINDOW_OF_TWO = """
x..........
xx.........
.xx........
..xx.......
...xx......
..x..x.....
......x....
......xx...
......x.x..
......x..x.
.........xx
"""


@pytest.mark.parametrize(("window", "drawn"), [(None, FULL), (2, WINDOW_OF_TWO)])
def test_mask_is_as_drawn(window: int | None, drawn: str) -> None:
    expected = torch.tensor([[mark == "x" for mark in line] for line in drawn.split()])
    batch = pack(TWO_PROMPTS)
    assert torch.equal(dense_mask(batch, window)[0, 0], expected)
    masks = PackedMasks(batch)
    assert [part[:2] for part in masks.parts] == [
        *((0, 3), (3, 5), (5, 6)),
        *((6, 7), (7, 8), (8, 9), (9, 11)),
    ]
    seen = torch.zeros_like(expected)
    for part, mask in zip(masks.parts, masks.dense(window), strict=True):
        keys = [*range(part.shared_start, part.shared_stop), *range(part.start, part.stop)]
        for query, row in zip(range(part.start, part.stop), mask[0, 0], strict=True):
            seen[query, keys] = row
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("window", [None, 4])
def test_flex_rule_is_the_dense_mask(prompts: list[RenderedPrompt], window: int | None) -> None:
    batch = pack(prompts, length=padded_length)
    length = batch.input_ids.shape[1]
    assert length % FLEX_BLOCK == 0
    assert batch.bounds is not None
    assert length > batch.bounds[-1][-1]
    mask = create_mask(mask_mod(batch, window), 1, None, length, length, device="cpu")
    assert torch.equal(mask, dense_mask(batch, window))
    assert mask.any(-1).all()  # an empty row would be a softmax over nothing
    blocks = block_mask(batch, window).to_dense()[0, 0].bool()
    seen = mask[0, 0].unflatten(0, (-1, FLEX_BLOCK)).unflatten(-1, (-1, FLEX_BLOCK)).any(-1).any(1)
    assert torch.equal(blocks, seen)


@pytest.mark.parametrize("window", [None, 4])
def test_flex_attention_gives_the_log_probs_of_sdpa(
    prompts: list[RenderedPrompt],
    window: int | None,
    tiny_lm: Callable[..., nn.Module],
) -> None:
    lm = tiny_lm("mistral", sliding_window=window, head_dim=16)
    logps = SequenceLogps(lm)
    with torch.no_grad():
        expected = logps(logps.collate(prompts, "cpu"))
        set_attention(lm, "flex_attention")
        batch = logps.collate(prompts, "cpu")
        assert batch.num_tokens % FLEX_BLOCK == 0
        assert torch.allclose(logps(batch), expected, atol=1e-5)


@pytest.mark.parametrize(("model_type", "heads"), [("gemma2", 4), ("mistral", 6)])
def test_flex_attention_has_softcaps_and_any_number_of_heads(
    prompts: list[RenderedPrompt], tiny_lm: Callable[..., nn.Module], model_type: str, heads: int
) -> None:
    sizes = {"num_attention_heads": heads, "hidden_size": 16 * heads, "head_dim": 16}
    caps = {"attn_logit_softcapping": 0.5} if model_type == "gemma2" else {}
    lm = tiny_lm(model_type, sliding_window=4, **sizes, **caps)
    logps = SequenceLogps(lm)
    with torch.no_grad():
        expected = logps(logps.collate(prompts, "cpu"))
        set_attention(lm, "flex_attention")
        assert torch.allclose(logps(logps.collate(prompts, "cpu")), expected, atol=1e-5)


def packs_of_all_lengths() -> list[list[RenderedPrompt]]:
    """Packed rows of 200 to 1,400 tokens."""
    responses = sequence([1] * 50, 40), sequence([1] * 45 + [2] * 10, 40)
    prompt = RenderedPrompt(responses, shared=40)
    return [[prompt] * count for count in range(3, 23, 3)]


def test_rows_of_all_lengths_and_windows_compile_two_masks() -> None:
    """The first length, and after the second any; windows are no reason to compile again."""
    compiled = CompileCounter()
    create = never_eager(create_block_mask, backend=compiled)
    lengths = set()
    for prompts in packs_of_all_lengths():
        batch = pack(prompts, length=padded_length)
        length = batch.input_ids.shape[1]
        lengths.add(length)
        for window in (None, 8):
            create(mask_mod(batch, window), 1, None, length, length, device="cpu")
    assert len(lengths) == 7
    assert compiled.frame_count <= 2


def test_rows_of_all_lengths_and_windows_compile_few_kernels() -> None:
    compiled = CompileCounter()
    kernel = never_eager(flex_attention, backend=compiled)
    for prompts in packs_of_all_lengths()[::2]:
        batch = pack(prompts, length=padded_length)
        heads = torch.randn(1, 1, batch.input_ids.shape[1], 16)
        for window in (None, 8):
            kernel(heads, heads, heads, block_mask=block_mask(batch, window))
    assert compiled.frame_count <= 2


def test_what_would_run_uncompiled_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, FlexAttention would materialize the scores of all pairs of tokens."""
    monkeypatch.setattr("mrpo.model.attention.MOST_VARIANTS", 2)
    compiled = never_eager(torch.add, backend=CompileCounter())
    for kind in (torch.float32, torch.float64):
        compiled(torch.zeros(2, dtype=kind), torch.ones(2, dtype=kind))
    integers = torch.ones(2, dtype=torch.int32)
    with pytest.raises(FailOnRecompileLimitHit):
        compiled(integers, integers)


def test_lengths_are_few_and_waste_little() -> None:
    lengths = {padded_length(tokens) for tokens in range(1, 16_385)}
    assert len(lengths) <= 8 + 8 * 4
    assert all(length % FLEX_BLOCK == 0 for length in lengths)
    for tokens in range(1024, 16_385):
        assert tokens <= padded_length(tokens) <= tokens * 1.125 + 1
