"""Log-probs of known tokens straight from hidden states, so that full logits never exist.

logp_t = z_t - log sum_j exp(z_j) with logits z = head(hidden). The forward walks over the rows in
chunks and keeps one number a row; the backward walks again, from d logp_t / d z_j = [j = t] - p_j.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogitRule:
    """What an architecture does to logits behind its head: z -> cap * tanh(scale * z / cap)."""

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """In place."""
        if self.softcap is None:
            return logits if self.scale == 1.0 else logits.mul_(self.scale)
        return logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)

    def backward_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """The gradient in the head's own output, in place; `logits` are those after the rule."""
        if self.softcap is not None:
            grad.mul_(1 - (logits / self.softcap).square_())
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


class TokenLogps(torch.autograd.Function):
    """hidden [R, D], weight [V, D], bias [V] or None, targets [R] -> log-probs [R] in nats.

    Logits are upcast to float32 (float64 stays) before the log-softmax.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rule: LogitRule,
        chunk: int,
    ) -> Tensor:
        logps, norms = [], []
        for rows, picks in zip(hidden.split(chunk), targets.split(chunk)):
            logits = _logits(rows, weight, bias, rule)
            norms.append(logits.logsumexp(-1))
            logps.append(logits.gather(-1, picks[:, None])[:, 0] - norms[-1])
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(norms))
        ctx.rule, ctx.chunk = rule, chunk
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, norms = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = _logits(hidden[part], weight, bias, ctx.rule)
            slope = (logits - norms[part, None]).exp_().mul_(-grad[part, None])
            slope.scatter_add_(-1, targets[part, None], grad[part, None])
            slope = ctx.rule.backward_(slope, logits).to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(slope.T, hidden[part])
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, rule: LogitRule) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return rule.apply_(logits.to(torch.promote_types(logits.dtype, torch.float32)))
