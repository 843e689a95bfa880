"""Attention over packed rows: torch's sdpa response by response, or FlexAttention on a GPU.

A token sees what its own prompt's responses share and the earlier tokens of its own response. A
sliding window counts position ids, not offsets in the row: a second response comes after the first
one but follows the prompt. Padding sees padding, so that no row of the mask is empty.

Both functions are registered with transformers. Every packable architecture passes its attention
function the layer's sliding window and the keywords that the decoder was called with, so the masks
of a packed row go in as a keyword, `packed`, and each layer picks the mask of its window. Without
that keyword (generation, padded rows) these are transformers' own functions with one fix: its sdpa
omits the softcap of attention scores that Gemma 2 was trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import flex_attention_mask, sdpa_mask

from .packing import SHARED, Batch

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Heads = tuple[Tensor, ...]  # query, key, value: [B, H, L, D] each
# Names of the functions in transformers. Newer versions (5.24) refuse Gemma 2 and VaultGemma any
# name with "sdpa" in it, because their own sdpa omits the softcap; ours applies it.
SDPA, FLEX = "mrpo_dense", "mrpo_flex"
FLEX_BLOCK = 128  # tokens of a block of the mask
MOST_VARIANTS = 64  # that are compiled of a kernel: windows, dtypes, head sizes of several models


def mask_mod(batch: Batch, window: int | None) -> MaskMod:
    """The rule as FlexAttention takes it: (row, head, query, key) -> may the query see the key.

    It is the same code over tensors of the same shapes for every window, so that what compiles it
    for one layer has compiled it for all.
    """
    prompt, branch, position = batch.prompt, batch.branch, batch.position_ids
    earliest = position - (window - 1) if window is not None else torch.zeros_like(position)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_prompt = prompt[row, query] == prompt[row, key]
        key_branch = branch[row, key]
        own = (key_branch == SHARED) | (key_branch == branch[row, query])
        earlier = position[row, key] <= position[row, query]
        return same_prompt & own & earlier & (position[row, key] >= earliest[row, query])

    return visible


def dense_mask(batch: Batch, window: int | None, part: RowPart | None = None) -> Tensor:
    """The boolean mask [B, 1, q, k] of a part of the row, for sdpa; None: of the whole row."""
    rows, length = batch.input_ids.shape
    device = batch.input_ids.device
    queries = keys = torch.arange(length, device=device)
    if part is not None:
        queries = queries[part.start : part.stop]
        keys = torch.cat([keys[part.shared_start : part.shared_stop], queries])
    row = torch.arange(rows, device=device)[:, None, None, None]
    head = torch.zeros_like(row)
    return mask_mod(batch, window)(row, head, queries[:, None], keys[None, :])


def block_mask(batch: Batch, window: int | None) -> BlockMask:
    """FlexAttention's block mask: blocks that the rule hides completely are never computed."""
    rows, length = batch.input_ids.shape
    device = batch.input_ids.device
    create = _creator(device.type)
    return create(mask_mod(batch, window), rows, None, length, length, device=device)


@cache
def _creator(device_type: str) -> Callable[..., BlockMask]:
    # Compiled, the [L, L] rule is never materialized; on a CPU compiling takes too long.
    return never_eager(create_block_mask) if device_type == "cuda" else create_block_mask


@cache
def _kernel(device_type: str) -> Callable[..., Any]:
    # Uncompiled, FlexAttention materializes the [L, L] scores; on a CPU only tests use it.
    plain: Any = torch_flex_attention
    return never_eager(plain) if device_type == "cuda" else plain


def never_eager(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function compiled; an error where torch would give up and run it uncompiled.

    torch gives up after 8 variants. `padded_length` and `mask_mod` keep them few: a first length
    and then any length, with and without gradient.
    """
    compiled: Any = torch.compile  # its types lack recompile_limit
    return compiled(function, fullgraph=True, recompile_limit=MOST_VARIANTS, **options)


class RowPart(NamedTuple):
    """Tokens of a packed row that are computed together, from `start` to `stop`: what responses
    share, one response, or the padding. They see themselves and the shared ones, if any."""

    start: int
    stop: int
    shared_start: int = 0
    shared_stop: int = 0


class PackedMasks:
    """The masks of one packed row, created once for each sliding window of the layers.

    Block masks of the windows in `ahead` are created immediately, so that compiled layers only
    look them up.
    """

    def __init__(self, batch: Batch, ahead: Iterable[int | None] = ()) -> None:
        assert batch.bounds is not None, "the batch is not packed"
        self.batch = batch
        self.parts: list[RowPart] = []
        filled, length = 0, batch.input_ids.shape[1]
        for start, middle, *ends in batch.bounds:
            if start < middle:
                self.parts.append(RowPart(start, middle))
            self.parts += [RowPart(*own, start, middle) for own in pairwise([middle, *ends])]
            filled = ends[-1]
        if filled < length:
            self.parts.append(RowPart(filled, length))  # padding sees itself
        self._blocks = {window: block_mask(batch, window) for window in set(ahead)}
        self._dense: dict[int | None, list[Tensor]] = {}

    def blocks(self, window: int | None) -> BlockMask:
        """FlexAttention's mask of the whole row."""
        if window not in self._blocks:
            self._blocks[window] = block_mask(self.batch, window)
        return self._blocks[window]

    def dense(self, window: int | None) -> list[Tensor]:
        """The boolean masks [1, 1, q, k] of the parts."""
        if window not in self._dense:
            self._dense[window] = [dense_mask(self.batch, window, part) for part in self.parts]
        return self._dense[window]


def sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    packed: PackedMasks | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of queries [B, H, L, D] over keys and values [B, H_kv, L, D], as [B, L, H, D].

    Responses of a packed row never see each other, so each is computed alone with what it shares:
    the cost grows with their lengths, not with the row's (docs/log.md has times).
    """
    if packed is None and softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    heads = query, repeat_kv(key, groups), repeat_kv(value, groups)
    if packed is not None:
        output = _attend_parts(heads, packed, sliding_window, scaling, softcap)
    else:
        if attention_mask is None:
            attention_mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        output = _attend(heads, attention_mask, scaling, softcap)
    return output.transpose(1, 2).contiguous(), None


@torch.compiler.disable  # it would be recompiled for every number of responses
def _attend_parts(
    heads: Heads,
    packed: PackedMasks,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    # Split, not sliced: the gradient of a slice is as long as the row.
    sizes = [part.stop - part.start for part in packed.parts]
    split = zip(*(tensor.split(sizes, 2) for tensor in heads))
    outputs = []
    shared: list[Tensor] = []  # keys and values
    for part, (query, *own), mask in zip(packed.parts, split, packed.dense(window)):
        if part.shared_stop > part.shared_start:
            key, value = (torch.cat(both, 2) for both in zip(shared, own))
        else:
            key, value = shared = own
        outputs.append(_attend((query, key, value), mask, scaling, softcap))
    return torch.cat(outputs, 2)


def _attend(heads: Heads, mask: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
    """softmax(cap(q k^T * scaling) | mask) v; softmax in float32 as transformers' own."""
    query, key, value = heads
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    scores = scores.masked_fill(~mask, float("-inf"))
    accuracy = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=accuracy).to(value.dtype) @ value


def flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    packed: PackedMasks | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As `sdpa_attention`, through FlexAttention."""
    if packed is None:
        return flex_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, **kwargs
        )

    def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    heads = query.shape[1]
    if powers_of_two := heads & (heads - 1) == 0:
        groups = key, value
    else:  # the kernel does not group other numbers of heads
        groups = repeat_kv(key, heads // key.shape[1]), repeat_kv(value, heads // value.shape[1])
    # In a compiled layer the kernel is compiled with the layer.
    compiling = torch.compiler.is_compiling()
    kernel: Any = torch_flex_attention if compiling else _kernel(query.device.type)
    output = kernel(
        query,
        *groups,
        score_mod=None if softcap is None else capped,
        block_mask=packed.blocks(sliding_window),
        scale=scaling,
        enable_gqa=powers_of_two,
    )
    return output.transpose(1, 2).contiguous(), None


def padded_length(tokens: int) -> int:
    """The length to which a row is padded for FlexAttention, at most an eighth more than needed.

    Whole blocks, and 8 lengths from one power of two to the next: rows of many lengths share
    shapes, kernels and memory.

    >>> [padded_length(tokens) for tokens in (1, 129, 1500, 4000, 4097, 8192)]
    [128, 256, 1536, 4096, 4608, 8192]
    """
    step = max(FLEX_BLOCK, 1 << max(0, (tokens - 1).bit_length() - 4))
    return -(-tokens // step) * step


AttentionInterface.register(SDPA, sdpa_attention)
AttentionInterface.register(FLEX, flex_attention)
AttentionMaskInterface.register(SDPA, sdpa_mask)
AttentionMaskInterface.register(FLEX, flex_attention_mask)
