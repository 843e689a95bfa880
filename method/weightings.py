"""How much each reference counts: one function a weighting.

Per pair, from that pair's own scores: `uniform_weights`, `arwc_weights`, `max_margin_weights`
-> [N, K]. One vector for all pairs, from held-out pairs: `vdw_weights`, `vaw_weights` -> [K]; the
user's own numbers: `fixed_weights` -> [K]. Weights learned from the labels are in `fitted.py`.
D_k = log pi_k(chosen) − log pi_k(rejected) on raw log-probs, before any clipping. Torch tensors
and numpy arrays alike; NaN marks a reference that could not score a pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from array_api_compat import array_namespace, device

from ..errors import UserError
from .arrays import Array, in_float64, like, normalized, present_in_both


def uniform_weights(ref_chosen_logps: Array, ref_rejected_logps: Array) -> Array:
    """The same weight for every reference present: [N, K] log-probs -> [N, K].

    >>> import numpy as np
    >>> r = np.array([[-1.0, -2.0], [-3.0, np.nan]])
    >>> uniform_weights(r, r).tolist()
    [[0.5, 0.5], [1.0, 0.0]]
    """
    chosen = in_float64(ref_chosen_logps)
    xp = array_namespace(chosen)
    return normalized(xp.ones_like(chosen), present_in_both(chosen, ref_rejected_logps))


def arwc_weights(ref_chosen_logps: Array, ref_rejected_logps: Array) -> Array:
    """Adaptive reference weights (ARWC, Le et al., arXiv 2405.16388).

    alpha_k = |D_k| / Σ_j |D_j| for each pair; uniform where every D is 0. In the authors' code
    the weights are crossed (the first reference's confidence goes to the second); here each
    reference gets its own.

    Args:
        ref_chosen_logps: [N, K] nats before clipping, NaN where missing.
        ref_rejected_logps: [N, K], likewise.

    Returns:
        [N, K], rows summing to 1; weight 0 where a reference is missing, NaN where all are.

    D = (3, −1, missing) and D = (0, 0, 0):

    >>> import numpy as np
    >>> chosen = np.array([[-1.0, -5.0, np.nan], [-2.0, -2.0, -2.0]])
    >>> rejected = np.array([[-4.0, -4.0, -9.0], [-2.0, -2.0, -2.0]])
    >>> arwc_weights(chosen, rejected).round(3).tolist()
    [[0.75, 0.25, 0.0], [0.333, 0.333, 0.333]]
    """
    chosen, rejected = in_float64(ref_chosen_logps), in_float64(ref_rejected_logps)
    xp = array_namespace(chosen)
    present = present_in_both(chosen, rejected)
    confidence = _absolute_margins(chosen, rejected, present)
    silent = xp.sum(confidence, axis=-1, keepdims=True) == 0
    confidence = xp.where(silent, like(1.0, confidence), confidence)
    return normalized(confidence, present)


def max_margin_weights(ref_chosen_logps: Array, ref_rejected_logps: Array) -> Array:
    """All weight on the reference with the largest |D_k| (InfiFPO, arXiv 2505.13878).

    [N, K] log-probs -> one-hot [N, K]; the first of equals; NaN where no reference is present.

    >>> import numpy as np
    >>> max_margin_weights(np.array([[-1.0, -9.0, -3.0]]), np.array([[-2.0, -4.0, -3.0]])).tolist()
    [[0.0, 1.0, 0.0]]
    """
    chosen, rejected = in_float64(ref_chosen_logps), in_float64(ref_rejected_logps)
    xp = array_namespace(chosen)
    present = present_in_both(chosen, rejected)
    margins = xp.where(present, xp.abs(chosen - rejected), like(-1.0, chosen))
    winner = xp.argmax(margins, axis=-1, keepdims=True)
    columns = xp.arange(margins.shape[-1], device=device(margins))
    one_hot = xp.astype(columns == winner, chosen.dtype)
    return normalized(one_hot, present)


def fixed_weights(weights: Sequence[float]) -> np.ndarray:
    """The user's own weights, normalized -> [K].

    >>> fixed_weights([1, 3])
    array([0.25, 0.75])
    """
    given = np.asarray(weights, dtype=np.float64)
    if given.ndim != 1 or not np.isfinite(given).all() or (given < 0).any() or given.sum() == 0:
        raise UserError(
            f"weights {', '.join(map(str, weights))}: they must be numbers of 0 or more, "
            "not all 0; for example --weights 0.5,0.3,0.2"
        )
    return given / given.sum()


def vdw_weights(ref_chosen_logps: Array, ref_rejected_logps: Array) -> Array:
    """Weights by validation confidence (VDW, Wu & Echarghaoui, arXiv 2512.10040).

    alpha_k ∝ Σ |D_k| over held-out pairs, as a mean over the pairs that reference k has scored, so
    that missing ones do not count against it; uniform where every D is 0.

    Args: [N, K] log-probs of held-out pairs, NaN where missing. Returns: [K].

    >>> import numpy as np
    >>> vdw_weights(np.array([[-1.0, -5.0], [-2.0, -6.0]]), np.array([[-2.0, -4.0], [-7.0, -4.0]]))
    array([0.66666667, 0.33333333])
    """
    chosen, rejected = in_float64(ref_chosen_logps), in_float64(ref_rejected_logps)
    present = present_in_both(chosen, rejected)
    return _shares(_absolute_margins(chosen, rejected, present), present)


def vaw_weights(ref_chosen_logps: Array, ref_rejected_logps: Array) -> Array:
    """Weights by validation accuracy (VAW, Wu & Echarghaoui, arXiv 2512.10040).

    alpha_k ∝ number of held-out pairs with D_k > 0, as a share of the pairs that reference k has
    scored; uniform where no reference gets any pair right.

    Args: [N, K] log-probs of held-out pairs, NaN where missing. Returns: [K].

    >>> import numpy as np
    >>> vaw_weights(np.array([[-1.0, -5.0], [-2.0, -3.0]]), np.array([[-2.0, -4.0], [-7.0, -4.0]]))
    array([0.66666667, 0.33333333])
    """
    chosen, rejected = in_float64(ref_chosen_logps), in_float64(ref_rejected_logps)
    xp = array_namespace(chosen)
    present = present_in_both(chosen, rejected)
    right = xp.astype(present & (chosen > rejected), chosen.dtype)
    return _shares(right, present)


PER_PAIR = {
    "uniform": uniform_weights,
    "arwc": arwc_weights,
    "max-margin": max_margin_weights,
}
FROM_HELD_OUT = {"vdw": vdw_weights, "vaw": vaw_weights}
WEIGHTINGS = (*PER_PAIR, *FROM_HELD_OUT, "fitted", "fixed")


def _absolute_margins(chosen: Array, rejected: Array, present: Array) -> Array:
    """|D| [N, K], 0 where missing."""
    xp = array_namespace(chosen)
    return xp.where(present, xp.abs(chosen - rejected), like(0.0, chosen))


def _shares(values: Array, present: Array) -> Array:
    """Column means over the pairs present, normalized -> [K]; uniform if all are 0."""
    xp = array_namespace(values)
    counts = xp.astype(xp.sum(present, axis=0), values.dtype)
    means = xp.sum(values, axis=0) / xp.where(counts > 0, counts, like(1.0, counts))
    means = xp.where(xp.sum(means) == 0, like(1.0, means), means)
    return normalized(means, counts > 0)
