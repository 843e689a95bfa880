"""Log-probs of known tokens straight from hidden states, so that full logits never exist.

With logits z = head(hidden) and the target t, logp = z_t - log sum_j exp(z_j), and its slope is
d logp / d z_j = [j = t] - p_j. The rows are processed in chunks, and of a chunk's logits only the
log-probs are kept and, within a budget of bytes, the slopes; slopes beyond it are recomputed in the
backward pass.

`benchmarks/head.py` on 2 idle cores, forward and backward, 1,536 rows, width 256, vocabulary
16,384, float32, with the peak memory added by the call: slopes kept 0.37 s and 255 MiB, recomputed
0.52 s and 97 MiB; log_softmax of all logits 0.49 s and 380 MiB, checkpointed chunks 0.56 s and
492 MiB, torch's linear_cross_entropy 0.49 s and 365 MiB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KEEP_BYTES = 128 * 2**20  # slopes kept from forward to backward, at most
CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**27}  # 16 MiB fit a CPU's cache; a GPU has bandwidth
CHUNK_ROWS = 256  # with fewer rows the matrix product is slow, whatever the vocabulary


@dataclass(frozen=True, slots=True)
class LogitRule:
    """What an architecture does to the logits of its head: z -> cap * tanh(scale * z / cap)."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        if self.softcap is not None:
            return torch.tanh(logits * (self.scale / self.softcap)) * self.softcap
        return logits if self.scale == 1.0 else logits * self.scale

    def apply_(self, logits: Tensor) -> Tensor:
        """`apply` in place."""
        if self.softcap is not None:
            return logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return logits if self.scale == 1.0 else logits.mul_(self.scale)

    def slope(self, logits: Tensor) -> Tensor | float:
        """d apply(z) / d z, from the logits after the rule."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - (logits / self.softcap).square())


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits exist at the same time."""
    return max(CHUNK_ROWS, CHUNK_LOGITS.get(device.type, 2**27) // vocabulary)


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rule: LogitRule,
    *,
    chunk: int,
    keep_bytes: int = KEEP_BYTES,
) -> Tensor:
    """hidden [R, D], weight [V, D], bias [V] or None, targets [R] -> log-probs [R] in nats.

    The product is computed in the autocast dtype if there is one, the rest in float32 at least.
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    bias = bias if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return _TokenLogps.apply(
            hidden.to(dtype), weight.to(dtype), bias, targets, rule, chunk, keep_bytes
        )


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rule: LogitRule,
        chunk: int,
        keep_bytes: int,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        logps, kept, ready = [], [], []
        scratch = _scratch(weight, min(chunk, len(hidden)))
        for rows, picks in zip(hidden.split(chunk), targets.split(chunk)):
            keep_bytes -= len(rows) * weight.shape[0] * weight.element_size()
            keep = (needs_weight or needs_bias) and keep_bytes >= 0
            out = None if keep else scratch()[: len(rows)]
            logp, slopes, factor = _logps_and_slopes(rows, weight, bias, picks, rule, out)
            logps.append(logp)
            if needs_weight or needs_bias:
                kept.append((slopes, factor) if keep else None)
            elif needs_hidden:  # a frozen head: its slopes are needed for this product alone
                ready.append(slopes @ weight * factor)
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(ready) if ready else None)
        ctx.rule, ctx.chunk, ctx.kept = rule, chunk, kept
        return torch.cat(logps) if logps else hidden.new_zeros(0, dtype=_wide(hidden.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, ready = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if ready is not None:
            return (ready * grad[:, None]).to(hidden.dtype), *[None] * 6
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Chunks are added up in float32: bfloat16 would lose the last digits of later ones.
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight.dtype)) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=_wide(bias.dtype)) if needs_bias else None
        scratch = _scratch(weight, min(ctx.chunk, len(hidden)))
        for number, start in enumerate(range(0, len(hidden), ctx.chunk)):
            part = slice(start, start + ctx.chunk)
            rows = hidden[part]
            if ctx.kept[number] is not None:
                slopes, factor = ctx.kept[number]
                ctx.kept[number] = None
            else:
                _, slopes, factor = _logps_and_slopes(
                    rows, weight, bias, targets[part], ctx.rule, scratch()[: len(rows)]
                )
            factor = factor * grad[part, None]
            if grad_hidden is not None:
                grad_hidden[part] = slopes @ weight * factor
            if grad_weight is not None:
                scaled_rows = (rows * factor).to(rows.dtype)
                if grad_weight.dtype == rows.dtype:
                    grad_weight.addmm_(slopes.T, scaled_rows)
                else:
                    grad_weight += slopes.T @ scaled_rows
            if grad_bias is not None:
                grad_bias += (slopes * factor).sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *[None] * 4,
        )


def _scratch(weight: Tensor, rows: int) -> Callable[[], Tensor]:
    """A buffer for the logits of one chunk after the other, created when it is first needed.

    Without it, freed and allocated again, such large blocks stay with the process: glibc's heap
    grew by a chunk each time.
    """
    return cache(lambda: weight.new_empty(rows, weight.shape[0], dtype=_wide(weight.dtype)))


def _logps_and_slopes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rule: LogitRule,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """For a chunk: log-probs [r], slopes [r, V] in the weight's dtype, and a factor [r, 1].

    d logp / d (head's output) = factor * slopes. The factor, the reciprocal of the softmax's
    denominator, is applied to the narrow products instead, which saves a pass over the vocabulary.
    The computation uses `out` [r, V] where it is given.
    """
    if out is None:
        out = hidden.new_empty(len(hidden), weight.shape[0], dtype=_wide(weight.dtype))
    if out.dtype == weight.dtype:
        torch.mm(hidden, weight.T, out=out)
    else:
        out.copy_(hidden @ weight.T)
    logits = rule.apply_(out if bias is None else out.add_(bias))
    picks = targets[:, None]
    at_target = logits.gather(-1, picks)
    rule_slope = rule.slope(logits)
    top = logits.amax(-1, keepdim=True)
    slopes = logits.sub_(top).exp_()
    total = slopes.sum(-1, keepdim=True)
    slopes.scatter_add_(-1, picks, -total)
    if isinstance(rule_slope, Tensor):
        slopes.mul_(rule_slope)
        rule_slope = 1.0
    logps = (at_target - top - total.log()).squeeze(-1)
    return logps, slopes.to(weight.dtype), -rule_slope / total


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
