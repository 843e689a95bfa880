"""The losses on top of a virtual reference, each a function of how far the policy is from it.

With u = log pi(y) − log pi~(y) of each response, and h = u_w − u_l, a loss is a function of h, or
of u_w and u_l (`loss_functions.py`), and gives one number a pair; [N], or [N, K] against K
references. `preference_loss` and `multi_dpo_loss` are the public entry points, and training calls
these two as well (`Method.loss`). Torch tensors and numpy arrays; gradients flow through the
policy's side.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..errors import UserError
from .arrays import (
    Array,
    accepts_numpy,
    check_choice,
    floating,
    in_float64,
    like,
    present_in_both,
    renormalized,
    weights_like,
)
from .loss_functions import (
    LOSS_TYPES,
    MARGIN_LOSSES,
    NEEDS_SMOOTHING,
    RESPONSE_LOSSES,
    SMOOTHED_LOSSES,
)

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


class LogRatios(NamedTuple):
    """u_w, u_l and h of some pairs, of one shape and in the policy's dtype."""

    chosen: Tensor
    rejected: Tensor
    margin: Tensor

    @classmethod
    def of(
        cls,
        policy: tuple[Tensor, Tensor],
        references: tuple[Tensor, Tensor],
        divergence: str = "reverse_kl",
        alpha: float = 0.5,
    ) -> LogRatios:
        """From log-probs of the policy and, in float64, of its reference, chosen and rejected."""
        dtype = floating(policy[0]).dtype
        wide = [in_float64(logps) for logps in policy]
        exact = [ours - like(theirs, ours) for ours, theirs in zip(wide, references)]
        chosen, rejected = (ratio.to(dtype) for ratio in exact)
        if divergence == "reverse_kl":
            margin = floating(policy[0] - policy[1])
            return cls(chosen, rejected, margin - like(references[0] - references[1], margin))
        scores = [divergence_score(ratio, divergence, alpha) for ratio in exact]
        return cls(chosen, rejected, (scores[0] - scores[1]).to(dtype))

    def turned(self) -> LogRatios:
        """The same pairs with their labels turned round."""
        return LogRatios(self.rejected, self.chosen, -self.margin)


@accepts_numpy
def preference_loss(
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    virtual_chosen_logps: Array,
    virtual_rejected_logps: Array,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float | Array = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Array:
    """The loss of each pair against one (virtual) reference; with "sigmoid" the loss of MRPO.

    −log sigmoid(beta [log pi(y_w) − log pi~(y_w) − log pi(y_l) + log pi~(y_l)])
    (Le et al., arXiv 2405.16388; DPO's, arXiv 2305.18290, where pi~ is one model).

    Args:
        policy_chosen_logps: [N] nats, summed over the response; gradients flow through it.
        policy_rejected_logps: [N], likewise.
        virtual_chosen_logps: [N] nats, from `virtual_reference`; better left in float64.
        virtual_rejected_logps: [N], likewise.
        beta: strength of the pull to the reference (for "ipo" its tau), > 0.
        loss_type: one of `LOSS_TYPES`, such as "sigmoid".
        label_smoothing: chance that a label is wrong: one for all pairs, in [0, 0.5), for
            "sigmoid", "sigmoid_norm", "robust" and "exo_pair", which needs one above 0; or [N],
            one a pair, in [0, 1], for all but "robust" and "exo_pair".
        f_divergence_type: what holds the policy to the reference, one of `DIVERGENCES`; any but
            "reverse_kl" changes the margin of the losses that are functions of it
            (`divergence_score`).
        f_alpha_divergence_coef: alpha of "alpha_divergence".

    Returns:
        [N] in the policy's dtype.

    MRPO by hand for K = 3, weights 1/2, 1/4, 1/4, beta 1. The references give the chosen
    response the probabilities 1/2, 1/4, 1/4 and the rejected one 1/4, 1/8, 1/8. Their harmonic
    means are 1/(1/2·2 + 1/4·4 + 1/4·4) = 1/3 and 1/(1/2·4 + 1/4·8 + 1/4·8) = 1/6, so the
    reference prefers the chosen one 2 : 1. The policy gives 1/2 and 1/12, that is 6 : 1. The
    margin is log(6/2) = log 3, sigmoid(log 3) = 3/4, and the loss is log(4/3).

    >>> import numpy as np
    >>> from mrpo import virtual_reference
    >>> weights = np.array([1/2, 1/4, 1/4])
    >>> chosen = virtual_reference(np.log([[1/2, 1/4, 1/4]]), weights)
    >>> rejected = virtual_reference(np.log([[1/4, 1/8, 1/8]]), weights)
    >>> loss = preference_loss(np.log([1/2]), np.log([1/12]), chosen, rejected, beta=1.0)
    >>> bool(np.isclose(loss[0], np.log(4/3)))
    True
    """
    policy = policy_chosen_logps, policy_rejected_logps
    virtual = in_float64(virtual_chosen_logps), in_float64(virtual_rejected_logps)
    divergence = f_divergence_type, f_alpha_divergence_coef
    return pair_loss(LogRatios.of(policy, virtual, *divergence), beta, loss_type, label_smoothing)


@accepts_numpy
def multi_dpo_loss(
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    weights: Array,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float | Array = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Array:
    """Multi-DPO, the baseline of the MRPO paper: Σ_k alpha_k · (DPO loss against reference k).

    Args:
        policy_chosen_logps: [N] nats; gradients flow through it.
        policy_rejected_logps: [N], likewise.
        ref_chosen_logps: [N, K] nats, NaN where missing.
        ref_rejected_logps: [N, K], likewise.
        weights: [K] or [N, K], ≥ 0; normalized over the references present.
        beta, loss_type, label_smoothing, f_divergence_type, f_alpha_divergence_coef: as in
            `preference_loss`.

    Returns:
        [N] in the policy's dtype.

    Policy margin log 3; one reference has margin 0 (loss log 4/3), the other log 3 (loss log 2):

    >>> import numpy as np
    >>> policy, refs = np.log([[3.0], [1.0]]), np.log([[1.0, 3.0]])
    >>> loss = multi_dpo_loss(*policy, refs, 0 * refs, np.array([0.5, 0.5]), beta=1.0)
    >>> bool(np.isclose(loss[0], (np.log(4/3) + np.log(2)) / 2))
    True
    """
    policy = policy_chosen_logps[..., None], policy_rejected_logps[..., None]
    chosen, rejected = in_float64(ref_chosen_logps), in_float64(ref_rejected_logps)
    present = present_in_both(chosen, rejected)
    references = torch.where(present, chosen, 0.0), torch.where(present, rejected, 0.0)
    ratios = LogRatios.of(policy, references, f_divergence_type, f_alpha_divergence_coef)
    alpha = like(renormalized(weights_like(weights, chosen), present), ratios.margin)
    if isinstance(label_smoothing, Tensor) and label_smoothing.ndim:
        label_smoothing = label_smoothing[..., None]  # a pair's is that of all its references
    return (alpha * pair_loss(ratios, beta, loss_type, label_smoothing)).sum(-1)


def pair_loss(ratios: LogRatios, beta: float, loss_type: str, label_smoothing: Any = 0.0) -> Tensor:
    """The named loss of pairs of any shape; see `preference_loss` for the arguments."""
    if isinstance(label_smoothing, Tensor) and label_smoothing.ndim:
        return expected_loss(ratios, beta, loss_type, label_smoothing)
    check_loss(loss_type, label_smoothing)
    if label_smoothing or loss_type not in PLAIN_LOSSES:
        return SMOOTHED_LOSSES[loss_type](ratios.margin, beta, label_smoothing)
    return _plain_loss(ratios, beta, loss_type)


def expected_loss(ratios: LogRatios, beta: float, loss_type: str, wrong: Tensor) -> Tensor:
    """(1 − s)·L(u_w, u_l) + s·L(u_l, u_w): the loss L to be expected where s is the chance that
    the label is wrong.

    Here s [N] is a pair's own, given all that is known of the pair, its label included. Above 1/2
    the pair counts more as turned round than as it stands. With L "sigmoid" and one s for all
    pairs it is `smoothed_sigmoid_loss`.
    """
    check_pair_loss(loss_type)
    share = like(wrong, ratios.margin)
    right = _plain_loss(ratios, beta, loss_type)
    return (1 - share) * right + share * _plain_loss(ratios.turned(), beta, loss_type)


def _plain_loss(ratios: LogRatios, beta: float, loss_type: str) -> Tensor:
    if loss_type in RESPONSE_LOSSES:
        return RESPONSE_LOSSES[loss_type](ratios.chosen, ratios.rejected, beta)
    return MARGIN_LOSSES[loss_type](ratios.margin, beta)


@accepts_numpy
def divergence_score(ratio: Array, divergence: str, alpha: float = 0.5) -> Array:
    """f'(e^u) of the divergence that holds the policy to its reference, up to a constant: f-DPO.

    u for "reverse_kl", 1 − e^(−u) for "forward_kl", log 2 + log sigmoid(u) for "js_divergence",
    (e^((alpha − 1) u) − 1) / (alpha − 1) for "alpha_divergence", whose limit at alpha = 1 is u
    (Wang et al., arXiv 2309.16240; constants as TRL has them).

    >>> import numpy as np
    >>> zero = np.array([0.0])
    >>> [float(divergence_score(zero, name)[0]) for name in DIVERGENCES]
    [0.0, 0.0, 0.0, 0.0]
    """
    check_choice("f-divergence type", divergence, DIVERGENCES)
    if divergence == "forward_kl":
        return -torch.expm1(-ratio)
    if divergence == "js_divergence":
        return math.log(2) + logsigmoid(ratio)
    if divergence == "alpha_divergence" and alpha != 1:
        return torch.expm1((alpha - 1) * ratio) / (alpha - 1)
    return ratio


@accepts_numpy
def sft_loss(policy_chosen_logps: Array, chosen_tokens: Array) -> Array:
    """−log pi(y_w) / |y_w|, the likelihood of the chosen response per token (arXiv 2404.19733).

    Each pair counts the same, however long, so that it does not depend on how pairs are batched.
    Args: sums [N] in nats and token counts [N]. Returns: [N].

    >>> import numpy as np
    >>> sft_loss(np.array([-6.0, -1.0]), np.array([3, 2])).tolist()
    [2.0, 0.5]
    """
    return -policy_chosen_logps / like(chosen_tokens, policy_chosen_logps)


PLAIN_LOSSES = (*MARGIN_LOSSES, *RESPONSE_LOSSES)  # those that need no label smoothing


def check_loss(loss_type: str, label_smoothing: float) -> None:
    """Raise `UserError` for an unknown loss, and for a smoothing that it does not take."""
    check_choice("loss type", loss_type, LOSS_TYPES)
    if not 0 <= label_smoothing < 0.5:
        raise UserError(
            f"label smoothing is {label_smoothing}; as a chance of a wrong label it must be "
            "0 or more and below 0.5"
        )
    if label_smoothing and loss_type not in SMOOTHED_LOSSES:
        raise UserError(
            f"label smoothing {label_smoothing} does not go with loss type {loss_type}; "
            f"use {' or '.join(SMOOTHED_LOSSES)}, or label smoothing 0"
        )
    if loss_type in NEEDS_SMOOTHING and not label_smoothing:
        raise UserError(
            f"loss type {loss_type} is infinite without label smoothing; add one, for example "
            "--label-smoothing 0.001"
        )


def check_pair_loss(loss_type: str) -> None:
    """Raise `UserError` for a loss that does not take a label smoothing of each pair's own."""
    check_choice("loss type", loss_type, LOSS_TYPES)
    if loss_type not in PLAIN_LOSSES:
        raise UserError(
            f"loss type {loss_type} has one chance of a wrong label for all pairs, and here each "
            f"pair has its own; use {', '.join(PLAIN_LOSSES)}"
        )
