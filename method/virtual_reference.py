"""Several references become one: clipping (CTRO) and the virtual reference.

Le et al., "Multi-Reference Preference Optimization", arXiv 2405.16388. Pure functions of cached
log-probs [N, K] (pairs, references; column 0 is the base), for torch tensors and numpy arrays.
A reference that could not score a pair is NaN there: it drops out of that pair, and the other
weights are renormalized.
"""

from __future__ import annotations

import torch

from ..errors import UserError
from .arrays import Array, accepts_numpy, in_float64, present_in_both, renormalized, weights_like


@accepts_numpy
def ctro_clip(
    ref_chosen_logps: Array, ref_rejected_logps: Array, epsilon: float, adaptive: bool = True
) -> tuple[Array, Array]:
    """Clip every reference into the trust region around the base (CTRO).

    For k ≥ 2 and each response y separately,
        r_k(y) ← clip(r_k(y), (1 + eps_y) r_1(y), (1 − eps_y) r_1(y)),
    and the first bound is the lower one, since log-probs are negative.

    Args:
        ref_chosen_logps: [N, K] nats, NaN where missing; column 0 is the base.
        ref_rejected_logps: [N, K], likewise.
        epsilon: half-width of the region, relative to the base's log-prob; ≥ 0.
        adaptive: split epsilon between the responses by `adaptive_epsilon`; otherwise both use it.

    Returns:
        The clipped [N, K] log-probs of chosen and rejected, in float64; NaN where the reference
        or the base is missing.

    With base log-probs −10 and −30 and a second reference of −8 and −60, the means are
    −9 and −45, so eps_w = 0.2 · 9/54 = 1/30 and eps_l = 1/6: −8 is too far above −10 and
    is held at (1 − 1/30)·(−10), and −60 at (1 + 1/6)·(−30).

    >>> import numpy as np
    >>> chosen, rejected = ctro_clip(np.array([[-10.0, -8.0]]), np.array([[-30.0, -60.0]]), 0.2)
    >>> chosen.round(4).tolist(), rejected.round(4).tolist()
    ([[-10.0, -9.6667]], [[-30.0, -35.0]])
    """
    if not epsilon >= 0:
        raise UserError(f"epsilon is {epsilon}; it must be 0 or more, or none for no clipping")
    chosen, rejected = in_float64(ref_chosen_logps), in_float64(ref_rejected_logps)
    if not adaptive:
        return _clip(chosen, epsilon), _clip(rejected, epsilon)
    eps_chosen, eps_rejected = adaptive_epsilon(chosen, rejected, epsilon)
    return _clip(chosen, eps_chosen[..., None]), _clip(rejected, eps_rejected[..., None])


@accepts_numpy
def adaptive_epsilon(
    ref_chosen_logps: Array, ref_rejected_logps: Array, epsilon: float
) -> tuple[Array, Array]:
    """Split epsilon between the responses in proportion to how improbable they are.

    eps_w = epsilon |b_w| / (|b_w| + |b_l|) and eps_l = epsilon − eps_w, with b_y the mean of the
    raw r_k(y) over the references present (the authors' code has K = 2; the mean is our reading
    for more). b_w = b_l = 0 gives epsilon / 2 each.

    Args: log-probs [N, K]. Returns: two arrays [N].

    >>> import numpy as np
    >>> adaptive_epsilon(np.array([[-10.0, -20.0]]), np.array([[-40.0, -50.0]]), 0.4)
    (array([0.1]), array([0.3]))
    """
    chosen, rejected = in_float64(ref_chosen_logps), in_float64(ref_rejected_logps)
    present = present_in_both(chosen, rejected)
    # Sums stand for means: the number of references present cancels in the ratio.
    size_chosen = torch.where(present, chosen, 0.0).sum(-1).abs()
    size_rejected = torch.where(present, rejected, 0.0).sum(-1).abs()
    total = size_chosen + size_rejected
    share = torch.where(total > 0, size_chosen / torch.where(total > 0, total, 1.0), 0.5)
    return epsilon * share, epsilon * (1 - share)


@accepts_numpy
def virtual_reference(ref_logps: Array, weights: Array, kind: str = "harmonic") -> Array:
    """The log-prob of one virtual reference made of K.

    harmonic: log pi~ = −logsumexp_k(log alpha_k − r_k), the MRPO paper's;
    geometric: Σ_k alpha_k r_k, the exact solution for reverse KL (Aminian et al., 2502.01203);
    arithmetic: logsumexp_k(log alpha_k + r_k), the mixture, for forward KL.
    Always harmonic ≤ geometric ≤ arithmetic.

    Args:
        ref_logps: [N, K] nats, NaN where missing.
        weights: [K] or [N, K], ≥ 0; normalized over the references present.
        kind: "harmonic", "geometric" or "arithmetic".

    Returns:
        [N] nats, in float64; NaN where no reference of positive weight is present.

    Probabilities 1/2 and 1/4 of equal weight have harmonic mean 1/3, geometric mean 1/√8 and
    arithmetic mean 3/8; without the second reference there is 1/2 alone.

    >>> import numpy as np
    >>> r = np.log([[0.5, 0.25], [0.5, np.nan]])
    >>> np.exp(virtual_reference(r, np.array([0.5, 0.5]))).round(6)
    array([0.333333, 0.5     ])
    >>> np.exp(virtual_reference(r, np.array([0.5, 0.5]), "geometric")).round(6)
    array([0.353553, 0.5     ])
    >>> np.exp(virtual_reference(r, np.array([0.5, 0.5]), "arithmetic")).round(6)
    array([0.375, 0.5  ])
    """
    if kind not in KINDS:
        raise UserError(f"reference kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    logps = in_float64(ref_logps)
    present = ~logps.isnan()
    alpha = renormalized(weights_like(weights, logps), present)
    filled = torch.where(present, logps, 0.0)  # its weight is 0: any finite number will do
    return KINDS[kind](filled, alpha)


@accepts_numpy
def pulls(ref_logps: Array, weights: Array, kind: str = "harmonic") -> Array:
    """How much each reference's log-prob moves the virtual one: the derivative, weights held.

    harmonic: ∝ alpha_k / pi_k, nearly all for the least likely; geometric: alpha_k; arithmetic:
    ∝ alpha_k pi_k. Args: as of `virtual_reference`. Returns: [N, K], rows summing to 1; 0 where a
    reference is missing, NaN where no reference of positive weight is present.

    >>> import numpy as np
    >>> r = np.log([[0.5, 0.25]])
    >>> pulls(r, np.array([0.5, 0.5])).round(6).tolist()
    [[0.333333, 0.666667]]
    >>> pulls(r, np.array([0.5, 0.5]), "arithmetic").round(6).tolist()
    [[0.666667, 0.333333]]
    """
    logps = in_float64(ref_logps).detach().clone().requires_grad_()
    with torch.enable_grad():
        virtual = virtual_reference(logps, weights, kind)
        [slopes] = torch.autograd.grad(virtual.sum(), logps)
    return torch.where(virtual.isnan()[..., None], torch.nan, slopes)


def harmonic(logps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """log (Σ_k alpha_k / pi_k)^(−1) of [N, K] log-probs and normalized weights -> [N]."""
    return -arithmetic(-logps, weights)


def geometric(logps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ_k alpha_k log pi_k of [N, K] log-probs and normalized weights -> [N]."""
    return (weights * logps).sum(-1)


def arithmetic(logps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """log Σ_k alpha_k pi_k of [N, K] log-probs and normalized weights -> [N]."""
    unused = weights == 0  # log 0, without its gradient
    log_weights = torch.where(unused, -torch.inf, torch.where(unused, 1.0, weights).log())
    return torch.logsumexp(log_weights + logps, dim=-1)


KINDS = {"harmonic": harmonic, "geometric": geometric, "arithmetic": arithmetic}


def _clip(logps: torch.Tensor, epsilon: torch.Tensor | float) -> torch.Tensor:
    """[N, K] into the region around column 0; NaN where either is missing."""
    base = logps[..., :1]
    return torch.maximum(torch.minimum(logps, (1 - epsilon) * base), (1 + epsilon) * base)
