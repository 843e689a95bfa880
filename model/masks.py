"""What a token of a packed row may attend to, in the form each attention kernel wants.

A token sees the shared prompt of its own pair and the earlier tokens of its own branch. A sliding
window counts position ids, not offsets in the row: the rejected branch lies behind the chosen one
but follows the prompt. Padding sees padding, so that no row of the mask is empty.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from .packing import SHARED, Batch

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def mask_mod(batch: Batch, window: int | None) -> MaskMod:
    """The rule as FlexAttention takes it: (row, head, query, key) -> may the query see the key."""
    pair, branch, position = batch.pair, batch.branch, batch.position_ids

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_pair = pair[row, query] == pair[row, key]
        key_branch = branch[row, key]
        own = (key_branch == SHARED) | (key_branch == branch[row, query])
        distance = position[row, query] - position[row, key]
        seen = same_pair & own & (distance >= 0)
        return seen if window is None else seen & (distance < window)

    return visible


def dense_mask(batch: Batch, window: int | None, start: int = 0, stop: int | None = None) -> Tensor:
    """The boolean mask [B, 1, l, l] of the row's tokens from `start` to `stop`, for sdpa."""
    rows, length = batch.input_ids.shape
    offsets = torch.arange(start, length if stop is None else stop, device=batch.pair.device)
    row = torch.arange(rows, device=batch.pair.device)[:, None, None, None]
    head = torch.zeros_like(row)
    return mask_mod(batch, window)(row, head, offsets[:, None], offsets[None, :])


def block_mask(batch: Batch, window: int | None) -> BlockMask:
    """FlexAttention's block mask: blocks that the rule hides entirely are never computed."""
    rows, length = batch.input_ids.shape
    device = batch.input_ids.device
    # Compiled, the [L, L] rule is never written out; not worth the wait where tests run.
    create = compiled_create() if device.type == "cuda" else create_block_mask
    return create(mask_mod(batch, window), rows, None, length, length, device=device)


@cache
def compiled_create() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask)
