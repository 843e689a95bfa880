"""The mask of a packed row, drawn by hand, and the same rule through FlexAttention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_mask, flex_attention
from transformers.integrations import flex_attention as transformers_flex

from mrpo.data.rendering import RenderedPair, RenderedSequence
from mrpo.model.attention import block_mask, dense_mask, mask_mod
from mrpo.model.load import set_attention
from mrpo.model.logps import FLEX_BLOCK, SequenceLogps
from mrpo.model.packing import pack


def sequence(token_ids: list[int], start: int) -> RenderedSequence:
    return RenderedSequence(token_ids, start=start, end_start=len(token_ids), boundary=False)


TWO_PAIRS = [
    # Shared prompt 1 2 3, chosen 4 5, rejected 6; then shared prompt 7, chosen 8, rejected 9.
    RenderedPair(sequence([1, 2, 3, 4, 5], 3), sequence([1, 2, 3, 6], 3), shared=3),
    RenderedPair(sequence([7, 8], 1), sequence([7, 9], 1), shared=1),
]

FULL = """
x........
xx.......
xxx......
xxxx.....
xxxxx....
xxx..x...
......x..
......xx.
......x.x
"""

# With a window of 2 a token sees itself and the one before it in its own sequence: the rejected
# 6 sees the prompt's 3, which lies three tokens before it in the row.
WINDOW_OF_TWO = """
x........
xx.......
.xx......
..xx.....
...xx....
..x..x...
......x..
......xx.
......x.x
"""


@pytest.mark.parametrize(("window", "drawn"), [(None, FULL), (2, WINDOW_OF_TWO)])
def test_mask_is_as_drawn(window: int | None, drawn: str) -> None:
    expected = torch.tensor([[mark == "x" for mark in line] for line in drawn.split()])
    batch = pack(TWO_PAIRS)
    assert torch.equal(dense_mask(batch, window)[0, 0], expected)
    assert torch.equal(dense_mask(batch, window, 6, 9)[0, 0], expected[6:, 6:])


@pytest.mark.parametrize("window", [None, 4])
def test_flex_rule_is_the_dense_mask(pairs: list[RenderedPair], window: int | None) -> None:
    batch = pack(pairs, multiple=FLEX_BLOCK)
    length = batch.input_ids.shape[1]
    assert length % FLEX_BLOCK == 0
    assert length > sum(stop - start for start, stop in batch.spans or ())
    mask = create_mask(mask_mod(batch, window), 1, None, length, length, device="cpu")
    assert torch.equal(mask, dense_mask(batch, window))
    assert mask.any(-1).all()  # an empty row would be a softmax over nothing
    blocks = block_mask(batch, window).to_dense()[0, 0].bool()
    seen = mask[0, 0].unflatten(0, (-1, FLEX_BLOCK)).unflatten(-1, (-1, FLEX_BLOCK)).any(-1).any(1)
    assert torch.equal(blocks, seen)


@pytest.mark.parametrize("window", [None, 4])
def test_flex_attention_gives_the_log_probs_of_sdpa(
    pairs: list[RenderedPair],
    window: int | None,
    tiny_lm: Callable[..., nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def uncompiled(*args: object, training: bool, **kwargs: object) -> object:
        return flex_attention(*args, **kwargs)  # compiling takes half a minute on a CPU

    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", uncompiled)
    lm = tiny_lm("mistral", sliding_window=window, head_dim=16)
    logps = SequenceLogps(lm)
    with torch.no_grad():
        expected = logps(logps.collate(pairs, "cpu"))
        set_attention(lm, "flex_attention")
        batch = logps.collate(pairs, "cpu")
        assert batch.num_tokens % FLEX_BLOCK == 0
        assert torch.allclose(logps(batch), expected, atol=1e-5)
