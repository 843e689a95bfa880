"""The losses on top of a virtual reference, each a function of the preference margin.

With h = [log pi(y_w) − log pi(y_l)] − [log pi~(y_w) − log pi~(y_l)], every loss here maps h [N]
(or [N, K] against K references) to one number a pair. `preference_loss` and `multi_dpo_loss` are
the public entry points, and training calls these two as well (`Method.loss`). Torch tensors and
numpy arrays; gradients flow through the policy's side.
"""

from __future__ import annotations

import torch
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


@accepts_numpy
def preference_loss(
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    virtual_chosen_logps: Array,
    virtual_rejected_logps: Array,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float | Array = 0.0,
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
        loss_type: "sigmoid", "ipo", "hinge" or "robust".
        label_smoothing: chance that a label is wrong: one for all pairs, in [0, 0.5), for
            "sigmoid" and "robust"; or [N], one a pair, in [0, 1], for all but "robust".

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
    policy = floating(policy_chosen_logps - policy_rejected_logps)
    virtual = in_float64(virtual_chosen_logps) - in_float64(virtual_rejected_logps)
    return margin_loss(policy - like(virtual, policy), beta, loss_type, label_smoothing)


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
) -> Array:
    """Multi-DPO, the baseline of the MRPO paper: Σ_k alpha_k · (DPO loss against reference k).

    Args:
        policy_chosen_logps: [N] nats; gradients flow through it.
        policy_rejected_logps: [N], likewise.
        ref_chosen_logps: [N, K] nats, NaN where missing.
        ref_rejected_logps: [N, K], likewise.
        weights: [K] or [N, K], ≥ 0; normalized over the references present.
        beta, loss_type, label_smoothing: as in `preference_loss`.

    Returns:
        [N] in the policy's dtype.

    Policy margin log 3; one reference has margin 0 (loss log 4/3), the other log 3 (loss log 2):

    >>> import numpy as np
    >>> policy, refs = np.log([[3.0], [1.0]]), np.log([[1.0, 3.0]])
    >>> loss = multi_dpo_loss(*policy, refs, 0 * refs, np.array([0.5, 0.5]), beta=1.0)
    >>> bool(np.isclose(loss[0], (np.log(4/3) + np.log(2)) / 2))
    True
    """
    policy = floating(policy_chosen_logps - policy_rejected_logps)[..., None]
    chosen, rejected = in_float64(ref_chosen_logps), in_float64(ref_rejected_logps)
    present = present_in_both(chosen, rejected)
    alpha = like(renormalized(weights_like(weights, chosen), present), policy)
    margins = policy - like(torch.where(present, chosen - rejected, 0.0), policy)
    if isinstance(label_smoothing, torch.Tensor) and label_smoothing.ndim:
        label_smoothing = label_smoothing[..., None]  # a pair's is that of all its references
    return (alpha * margin_loss(margins, beta, loss_type, label_smoothing)).sum(-1)


@accepts_numpy
def margin_loss(
    margin: Array,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float | Array = 0.0,
) -> Array:
    """The named loss of margins of any shape; see `preference_loss` for the arguments."""
    if isinstance(label_smoothing, torch.Tensor) and label_smoothing.ndim:
        return expected_loss(margin, beta, loss_type, label_smoothing)
    check_loss(loss_type, label_smoothing)
    if loss_type in PLAIN_LOSSES and label_smoothing == 0:
        return PLAIN_LOSSES[loss_type](margin, beta)
    return SMOOTHED_LOSSES[loss_type](margin, beta, label_smoothing)


@accepts_numpy
def sigmoid_loss(margin: Array, beta: float) -> Array:
    """−log sigmoid(beta h) (DPO, arXiv 2305.18290, equation 7).

    >>> import numpy as np
    >>> bool(np.isclose(sigmoid_loss(np.array([0.0]), 0.1)[0], np.log(2)))
    True
    """
    return -logsigmoid(beta * margin)


@accepts_numpy
def smoothed_sigmoid_loss(margin: Array, beta: float, label_smoothing: float) -> Array:
    """(1 − s)·(−log sigmoid(beta h)) + s·(−log sigmoid(−beta h)): conservative DPO.

    Labels wrong with chance s (Mitchell, "A note on DPO with noisy preferences", 2023).

    >>> import numpy as np
    >>> loss = smoothed_sigmoid_loss(np.array([np.log(3)]), 1.0, 0.25)[0]
    >>> bool(np.isclose(loss, 0.75 * np.log(4/3) + 0.25 * np.log(4)))
    True
    """
    right, wrong = sigmoid_loss(margin, beta), sigmoid_loss(-margin, beta)
    return (1 - label_smoothing) * right + label_smoothing * wrong


@accepts_numpy
def expected_loss(margin: Array, beta: float, loss_type: str, wrong: Array) -> Array:
    """(1 − s)·L(h) + s·L(−h): the loss L to be expected where the label is wrong with chance s.

    Here s is a pair's own, given all that is known of the pair, its label included. Above 1/2 the
    pair counts more as turned round than as it stands. With L "sigmoid" and one s for all pairs
    it is `smoothed_sigmoid_loss`. Args: h, of any shape, and s [N], which goes with that shape.

    >>> import numpy as np
    >>> margin = np.full(3, np.log(3))
    >>> loss = expected_loss(margin, 1.0, "sigmoid", np.array([0, 0.25, 1]))
    >>> right, wrong = np.log(4/3), np.log(4)
    >>> bool(np.allclose(loss, [right, 0.75 * right + 0.25 * wrong, wrong]))
    True
    """
    check_pair_loss(loss_type)
    share, plain = like(wrong, margin), PLAIN_LOSSES[loss_type]
    return (1 - share) * plain(margin, beta) + share * plain(-margin, beta)


@accepts_numpy
def robust_loss(margin: Array, beta: float, label_smoothing: float) -> Array:
    """[(1 − s)·(−log sigmoid(beta h)) − s·(−log sigmoid(−beta h))] / (1 − 2s): robust DPO.

    Unbiased for the clean labels when a share s is flipped (arXiv 2403.00409).

    >>> import numpy as np
    >>> loss = robust_loss(np.array([np.log(3)]), 1.0, 0.25)[0]
    >>> bool(np.isclose(loss, (0.75 * np.log(4/3) - 0.25 * np.log(4)) / 0.5))
    True
    """
    right, wrong = sigmoid_loss(margin, beta), sigmoid_loss(-margin, beta)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


@accepts_numpy
def hinge_loss(margin: Array, beta: float) -> Array:
    """max(0, 1 − beta h) (SLiC, arXiv 2305.10425, as RSO, arXiv 2309.06657, writes it).

    >>> import numpy as np
    >>> hinge_loss(np.array([0.0, 5.0, 20.0]), 0.1).tolist()
    [1.0, 0.5, 0.0]
    """
    return torch.maximum(1 - beta * margin, torch.zeros_like(margin))


@accepts_numpy
def ipo_loss(margin: Array, beta: float) -> Array:
    """(h − 1/(2 beta))² (IPO, arXiv 2310.12036, equation 17; beta is its tau).

    Meant for log-probs per token, as TRL has it.

    >>> import numpy as np
    >>> ipo_loss(np.array([0.0, 5.0, 6.0]), 0.1).tolist()
    [25.0, 0.0, 1.0]
    """
    return (margin - 1 / (2 * beta)) ** 2


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


PLAIN_LOSSES = {"sigmoid": sigmoid_loss, "ipo": ipo_loss, "hinge": hinge_loss}
SMOOTHED_LOSSES = {"sigmoid": smoothed_sigmoid_loss, "robust": robust_loss}
LOSS_TYPES = tuple(PLAIN_LOSSES | SMOOTHED_LOSSES)


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


def check_pair_loss(loss_type: str) -> None:
    """Raise `UserError` for a loss that does not take a label smoothing of each pair's own."""
    check_choice("loss type", loss_type, LOSS_TYPES)
    if loss_type not in PLAIN_LOSSES:
        raise UserError(
            f"loss type {loss_type} corrects for one noise rate of all labels, and here each pair "
            f"has its own chance of a wrong label; use {', '.join(PLAIN_LOSSES)}"
        )
