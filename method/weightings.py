"""How much each reference counts: one function a weighting, registered at the end of the file.

Per pair, from that pair's own scores: `uniform_weights`, `arwc_weights`, `max_margin_weights`
-> [N, K]. One vector for all pairs, from held-out pairs: `vdw_weights`, `vaw_weights` -> [K]; the
user's own numbers: `fixed_weights` -> [K]. Learned while training (`OnlineWeights`): swcw from the
last batch, thompson from what each reference did for the policy. Weights learned from the labels
are in `fitted.py`. D_k = log pi_k(chosen) − log pi_k(rejected) on raw log-probs, before any
clipping. Torch tensors and numpy arrays alike; NaN marks a reference that could not score a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..errors import UserError
from .arrays import Array, accepts_numpy, in_float64, present_in_both, renormalized


@accepts_numpy
def uniform_weights(ref_chosen_logps: Array, ref_rejected_logps: Array) -> Array:
    """The same weight for every reference present: [N, K] log-probs -> [N, K].

    >>> r = np.array([[-1.0, -2.0], [-3.0, np.nan]])
    >>> uniform_weights(r, r).tolist()
    [[0.5, 0.5], [1.0, 0.0]]
    """
    chosen = in_float64(ref_chosen_logps)
    return renormalized(torch.ones_like(chosen), present_in_both(chosen, ref_rejected_logps))


@accepts_numpy
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

    >>> chosen = np.array([[-1.0, -5.0, np.nan], [-2.0, -2.0, -2.0]])
    >>> rejected = np.array([[-4.0, -4.0, -9.0], [-2.0, -2.0, -2.0]])
    >>> arwc_weights(chosen, rejected).round(3).tolist()
    [[0.75, 0.25, 0.0], [0.333, 0.333, 0.333]]
    """
    chosen, rejected = in_float64(ref_chosen_logps), in_float64(ref_rejected_logps)
    present = present_in_both(chosen, rejected)
    confidence = torch.where(present, (chosen - rejected).abs(), 0.0)
    no_preference = confidence.sum(-1, keepdim=True) == 0
    return renormalized(torch.where(no_preference, 1.0, confidence), present)


@accepts_numpy
def max_margin_weights(ref_chosen_logps: Array, ref_rejected_logps: Array) -> Array:
    """All weight on the reference with the largest |D_k| (InfiFPO, arXiv 2505.13878).

    [N, K] log-probs -> one-hot [N, K]; the first of equals; NaN where no reference is present.

    >>> max_margin_weights(np.array([[-1.0, -9.0, -3.0]]), np.array([[-2.0, -4.0, -3.0]])).tolist()
    [[0.0, 1.0, 0.0]]
    """
    chosen, rejected = in_float64(ref_chosen_logps), in_float64(ref_rejected_logps)
    present = present_in_both(chosen, rejected)
    confidence = torch.where(present, (chosen - rejected).abs(), -1.0)
    largest = confidence.argmax(-1, keepdim=True)
    columns = torch.arange(confidence.shape[-1], device=confidence.device)
    return renormalized((columns == largest).to(chosen.dtype), present)


def fixed_weights(weights: Sequence[float]) -> np.ndarray:
    """The user's own weights, normalized -> [K].

    Raises `UserError` where they are not finite numbers of 0 or more with a positive sum.

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


@accepts_numpy
def vdw_weights(ref_chosen_logps: Array, ref_rejected_logps: Array) -> Array:
    """Weights by validation confidence (VDW, Wu & Echarghaoui, arXiv 2512.10040).

    alpha_k ∝ Σ |D_k| over held-out pairs, as a mean over the pairs that reference k has scored, so
    that missing ones do not count against it; uniform where every D is 0.

    Args: [N, K] log-probs of held-out pairs, NaN where missing. Returns: [K].

    >>> vdw_weights(np.array([[-1.0, -5.0], [-2.0, -6.0]]), np.array([[-2.0, -4.0], [-7.0, -4.0]]))
    array([0.66666667, 0.33333333])
    """
    chosen, rejected = in_float64(ref_chosen_logps), in_float64(ref_rejected_logps)
    present = present_in_both(chosen, rejected)
    return _column_shares(torch.where(present, (chosen - rejected).abs(), 0.0), present)


@accepts_numpy
def vaw_weights(ref_chosen_logps: Array, ref_rejected_logps: Array) -> Array:
    """Weights by validation accuracy (VAW, Wu & Echarghaoui, arXiv 2512.10040).

    alpha_k ∝ number of held-out pairs with D_k > 0, as a share of the pairs that reference k has
    scored; uniform where no reference gets any pair right.

    Args: [N, K] log-probs of held-out pairs, NaN where missing. Returns: [K].

    >>> vaw_weights(np.array([[-1.0, -5.0], [-2.0, -3.0]]), np.array([[-2.0, -4.0], [-7.0, -4.0]]))
    array([0.66666667, 0.33333333])
    """
    chosen, rejected = in_float64(ref_chosen_logps), in_float64(ref_rejected_logps)
    present = present_in_both(chosen, rejected)
    return _column_shares((present & (chosen > rejected)).to(chosen.dtype), present)


@accepts_numpy
def base_weights(ref_chosen_logps: Array, ref_rejected_logps: Array) -> Array:
    """All weight on the base, column 0: the others only judge labels (`+reliable`).

    [N, K] log-probs -> one-hot [N, K]; NaN where the base is missing.

    >>> base_weights(np.array([[-1.0, -9.0]]), np.array([[-2.0, -4.0]])).tolist()
    [[1.0, 0.0]]
    """
    chosen = in_float64(ref_chosen_logps)
    columns = torch.arange(chosen.shape[-1], device=chosen.device)
    base = (columns == 0).to(chosen.dtype).expand(chosen.shape)
    return renormalized(base, present_in_both(chosen, in_float64(ref_rejected_logps)))


@dataclass(frozen=True, slots=True)
class OnlineWeights:
    """The weights of the next batch, and what they were learned from; part of a checkpoint.

    Draws depend on seed and step alone, so nothing else has to be kept for an exact resume.
    """

    weights: Sequence[float]  # [K]
    wins: Sequence[int] = ()  # thompson: [K] batches after which held-out accuracy had risen
    losses: Sequence[int] = ()  # [K] the others
    accuracy: float | None = None  # thompson: after the last batch, None before the first

    @classmethod
    def start(cls, references: int) -> OnlineWeights:
        """Uniform weights, and nothing learned."""
        return cls([1 / references] * references, [0] * references, [0] * references)

    def drawn(self, seed: int, step: int) -> OnlineWeights:
        """Thompson sampling: the reference whose draw from Beta(1 + wins, 1 + losses) is largest.

        >>> state = OnlineWeights([0.5, 0.5], wins=[0, 500], losses=[500, 0])
        >>> state.drawn(seed=0, step=3).weights
        [0.0, 1.0]
        """
        wins, losses = np.array(self.wins), np.array(self.losses)
        drawn = np.random.default_rng((seed, step, 1)).beta(1 + wins, 1 + losses)
        return replace(self, weights=np.eye(len(drawn))[drawn.argmax()].tolist())

    def rewarded(self, accuracy: float) -> OnlineWeights:
        """The reference of the last batch wins if accuracy has risen, and loses if it has not.

        >>> OnlineWeights([0.0, 1.0], [0, 0], [0, 0], accuracy=0.5).rewarded(0.75)
        OnlineWeights(weights=[0.0, 1.0], wins=[0, 1], losses=[0, 0], accuracy=0.75)
        """
        assert self.accuracy is not None, "no accuracy to compare with"
        rose = accuracy > self.accuracy
        wins = [count + int(rose and weight == 1) for count, weight in zip(self.wins, self.weights)]
        losses = [
            count + int(not rose and weight == 1)
            for count, weight in zip(self.losses, self.weights)
        ]
        return OnlineWeights(self.weights, wins, losses, accuracy)


PER_PAIR = {
    "uniform": uniform_weights,
    "arwc": arwc_weights,
    "max-margin": max_margin_weights,
    "base": base_weights,
}
FROM_HELD_OUT = {"vdw": vdw_weights, "vaw": vaw_weights}
ONLINE = ("swcw", "thompson")
WEIGHTINGS = (*PER_PAIR, *FROM_HELD_OUT, *ONLINE, "fitted", "fixed")


def _column_shares(values: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Column means over the pairs present, normalized -> [K]; uniform if all are 0."""
    pairs = present.sum(0).to(values.dtype)
    means = values.sum(0) / torch.where(pairs > 0, pairs, 1.0)
    means = torch.where(means.sum() == 0, 1.0, means)
    return renormalized(means, pairs > 0)
