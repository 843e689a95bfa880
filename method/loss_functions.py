"""The losses' formulas, under the names that TRL gives them.

With u = log pi − log pi~ of a response, u_w of the chosen and u_l of the rejected one, and their
difference h = u_w − u_l, the preference margin: a loss of `MARGIN_LOSSES` and `SMOOTHED_LOSSES` is
a function of h alone, one of `RESPONSE_LOSSES` of u_w and u_l. Each maps arrays of any shape to one
number a pair; torch tensors and numpy arrays. `losses.py` makes u and h of log-probs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import logsigmoid

from .arrays import Array, accepts_numpy, like

DISCOPOP_TAU = 0.05  # the paper's, and TRL's default


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
def discopop_loss(margin: Array, beta: float) -> Array:
    """(1 − m)·(−log sigmoid(z)) + m·exp(−z), z = beta h, m = sigmoid(z / 0.05): DiscoPOP.

    Found by a language model's search (arXiv 2406.08414, equation 5).

    >>> import numpy as np
    >>> bool(np.isclose(discopop_loss(np.array([0.0]), 0.1)[0], (np.log(2) + 1) / 2))
    True
    """
    logits = beta * margin
    modulation = logits / DISCOPOP_TAU
    logistic = -logsigmoid(logits) * torch.sigmoid(-modulation)
    # As one exponential: for a large negative margin the product would be infinity times 0.
    return logistic + (logsigmoid(modulation) - logits).exp()


@accepts_numpy
def exo_pair_loss(margin: Array, beta: float, label_smoothing: float) -> Array:
    """KL(p || q) of p = sigmoid(±beta h) and q = (1 − s, s): EXO's, for two responses.

    The reverse of the sigmoid loss's divergence (arXiv 2402.00856, equation 16); s > 0.

    >>> import numpy as np
    >>> loss = exo_pair_loss(np.array([np.log(3)]), 1.0, 0.25)[0]  # p = q = (3/4, 1/4)
    >>> bool(np.isclose(loss, 0))
    True
    """
    right, wrong = logsigmoid(beta * margin), logsigmoid(-beta * margin)
    smoothing = like(label_smoothing, margin)
    expected = right.exp() * (right - torch.log1p(-smoothing))
    return expected + wrong.exp() * (wrong - smoothing.log())


@accepts_numpy
def nca_pair_loss(chosen: Array, rejected: Array, beta: float) -> Array:
    """−log sigmoid(beta u_w) − [log sigmoid(−beta u_w) + log sigmoid(−beta u_l)] / 2: NCA.

    It holds the chosen response's likelihood up, not the margin alone (arXiv 2402.05369).

    >>> import numpy as np
    >>> zero = np.array([0.0])
    >>> bool(np.isclose(nca_pair_loss(zero, zero, 0.1)[0], 2 * np.log(2)))
    True
    """
    both = logsigmoid(-beta * chosen) + logsigmoid(-beta * rejected)
    return -logsigmoid(beta * chosen) - 0.5 * both


@accepts_numpy
def bco_pair_loss(chosen: Array, rejected: Array, beta: float) -> Array:
    """−log sigmoid(beta u_w) − log sigmoid(−beta u_l): a classifier of single responses.

    BCO (arXiv 2404.04656) without its shift of rewards, as TRL has it for pairs, where it is one
    of the losses of MPO (arXiv 2411.10442).

    >>> import numpy as np
    >>> three = np.array([np.log(3)])
    >>> bool(np.isclose(bco_pair_loss(three, -three, 1.0)[0], 2 * np.log(4/3)))
    True
    """
    return -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected)


@accepts_numpy
def sppo_hard_loss(chosen: Array, rejected: Array, beta: float) -> Array:
    """(u_w − 1/(2 beta))² + (u_l + 1/(2 beta))²: SPPO, the chosen one winning for certain.

    arXiv 2405.00675, equation 4.7 with the chances 1 and 0.

    >>> import numpy as np
    >>> sppo_hard_loss(np.array([5.0, 0.0]), np.array([-5.0, 0.0]), 0.1).tolist()
    [0.0, 50.0]
    """
    half = 0.5 / beta
    return (chosen - half) ** 2 + (rejected + half) ** 2


@accepts_numpy
def apo_zero_loss(chosen: Array, rejected: Array, beta: float) -> Array:
    """sigmoid(−beta u_w) + sigmoid(beta u_l): up with the chosen, down with the rejected response.

    For pairs whose chosen responses are better than the policy's own (arXiv 2408.06266,
    equation 7).

    >>> import numpy as np
    >>> three = np.array([np.log(3)])
    >>> bool(np.isclose(apo_zero_loss(three, three, 1.0)[0], 1/4 + 3/4))
    True
    """
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


@accepts_numpy
def apo_down_loss(chosen: Array, rejected: Array, beta: float) -> Array:
    """sigmoid(beta u_w) + sigmoid(−beta h): down with both, with the rejected response more.

    For pairs whose chosen responses are worse than the policy's own (arXiv 2408.06266,
    equation 8).

    >>> import numpy as np
    >>> three = np.array([np.log(3)])
    >>> bool(np.isclose(apo_down_loss(three, three, 1.0)[0], 3/4 + 1/2))
    True
    """
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


MARGIN_LOSSES: dict[str, Callable[[Array, float], Array]] = {
    "sigmoid": sigmoid_loss,
    "sigmoid_norm": sigmoid_loss,  # of log-probs per token
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "discopop": discopop_loss,
}
SMOOTHED_LOSSES: dict[str, Callable[[Array, float, float], Array]] = {
    "sigmoid": smoothed_sigmoid_loss,
    "sigmoid_norm": smoothed_sigmoid_loss,
    "robust": robust_loss,
    "exo_pair": exo_pair_loss,
}
RESPONSE_LOSSES: dict[str, Callable[[Array, Array, float], Array]] = {
    "nca_pair": nca_pair_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
}
LOSS_TYPES = tuple(MARGIN_LOSSES | SMOOTHED_LOSSES | RESPONSE_LOSSES)
PER_TOKEN = ("ipo", "sigmoid_norm")  # meant for log-probs per token, as TRL computes them
NEEDS_SMOOTHING = ("exo_pair",)
