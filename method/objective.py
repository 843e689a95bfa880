"""Arrays between the joined scores and a `Method`: what goes in, and what comes out of it.

Plain numpy on the CPU, in float64. `ReferenceLogps` is a slice of the joined scores (a batch, or a
whole split); `ReferenceTargets` is all that a training step needs to know of the references.


A training objective from several references: what a run and a comparison call.

`methods.py` makes a `Method` from text and flags. A run uses it in three steps:

    method = method.prepare(training_scores, held_out_scores)   # once: weights that need data
    targets = method.targets(scores_of_a_batch)                 # every batch: numpy, on the CPU
    losses = method.loss(policy_chosen_logps, policy_rejected_logps, targets, …)  # torch

`scores.py` has the arrays that go in and the targets that come out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from ..errors import UserError
from .arrays import normalized, present_in_both
from .fitted import FittedWeights, fit_weights
from .losses import margin_loss, sft_loss
from .normalization import normalize_logps
from .virtual_reference import ctro_clip, virtual_reference
from .weightings import FROM_HELD_OUT, PER_PAIR


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReferenceLogps:
    """Scores of N pairs under K references, one column for each alias of the run, in its order."""

    ref_chosen_logps: np.ndarray  # [N, K] nats, summed over the response; NaN where missing
    ref_rejected_logps: np.ndarray  # [N, K]
    ref_chosen_tokens: np.ndarray  # [N, K] tokens scored by each reference; any number if missing
    ref_rejected_tokens: np.ndarray  # [N, K]
    chosen_bytes: np.ndarray  # [N] UTF-8 bytes of the response's contents
    rejected_bytes: np.ndarray  # [N]
    prompts: np.ndarray  # [N] integers, equal for equal prompts; only `fitted` looks at them

    def __len__(self) -> int:
        return len(self.ref_chosen_logps)

    def reference_logps(self, columns: list[int], normalize: str) -> tuple[np.ndarray, np.ndarray]:
        """[N, len(columns)] each, normalized; a reference missing in one response is in both."""
        chosen = normalize_logps(
            self.ref_chosen_logps[:, columns],
            normalize,
            self.ref_chosen_tokens[:, columns],
            self.chosen_bytes,
        )
        rejected = normalize_logps(
            self.ref_rejected_logps[:, columns],
            normalize,
            self.ref_rejected_tokens[:, columns],
            self.rejected_bytes,
        )
        present = present_in_both(chosen, rejected)
        return np.where(present, chosen, np.nan), np.where(present, rejected, np.nan)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReferenceTargets:
    """What K references say about N pairs, normalized as the method asks; NaN where unusable."""

    virtual_chosen_logps: np.ndarray  # [N]
    virtual_rejected_logps: np.ndarray  # [N]
    margins: np.ndarray  # [N, K] after clipping; 0 where a reference is missing
    weights: np.ndarray  # [N, K], rows sum to 1; 0 where a reference is missing
    clipped: np.ndarray  # [N, K] share of the two responses that CTRO moved; NaN where missing
    chosen_bytes: np.ndarray  # [N]
    rejected_bytes: np.ndarray  # [N]


def to_tensor(array: np.ndarray, policy: torch.Tensor) -> torch.Tensor:
    """The array with the dtype and the device of the policy's log-probs."""
    return torch.as_tensor(array).to(dtype=policy.dtype).to(device=policy.device)


SEPARATE = "separate"  # the kind of multi-dpo: the losses are averaged, not the references


class PairLosses(NamedTuple):
    """What a step needs of each pair: [N] each; the rewards carry no gradient."""

    loss: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way to train on several references, fully resolved. Made by `parse_method`."""

    name: str
    references: tuple[str, ...]  # the first is the base
    columns: tuple[int, ...]  # where the references stand among the aliases given
    kind: str
    weighting: str
    epsilon: float | None  # CTRO's half-width; None: no clipping
    adaptive_epsilon: bool
    normalize: str
    beta: float
    loss_type: str
    label_smoothing: float
    sft_weight: float
    weights: tuple[float, ...] | None = None  # one vector for all pairs, once it is known
    fitted: FittedWeights | None = None

    def __str__(self) -> str:
        """The canonical text, with every reference named."""
        weighting = f"+{self.weighting}" if len(self.references) > 1 else ""
        return f"{self.name}:{'/'.join(self.references)}{weighting}"

    def prepare(
        self, training: ReferenceLogps, held_out: ReferenceLogps, bootstrap: int = 200
    ) -> Method:
        """The method with the weights that need data.

        vdw and vaw come from the held-out pairs; fitted comes from the training pairs, with
        intervals from `bootstrap` resamples of their prompts. Other weightings need nothing.
        """
        columns = list(self.columns)
        if self.weighting == "fitted":
            chosen, rejected = training.reference_logps(columns, self.normalize)
            fit = fit_weights(chosen - rejected, training.prompts, bootstrap=bootstrap)
            return replace(self, weights=tuple(fit.weights.tolist()), fitted=fit)
        if self.weighting in FROM_HELD_OUT:
            if len(held_out) == 0:
                raise UserError(
                    f"weighting {self.weighting} needs held-out pairs and there are none; prepare "
                    "the pairs with --validation-fraction, or use --weighting arwc"
                )
            logps = held_out.reference_logps(columns, self.normalize)
            return replace(self, weights=tuple(FROM_HELD_OUT[self.weighting](*logps).tolist()))
        return self

    def usable(self, scores: ReferenceLogps) -> np.ndarray:
        """[N] bool: pairs that the base has scored and that some weight is left for.

        Whether they are trained on or held out: with `fitted` the weights differ.
        """
        targets = [self.targets(scores, held_out) for held_out in (False, True)]
        missing = np.isnan(np.stack([each.virtual_chosen_logps for each in targets]))
        return np.logical_not(missing.any(axis=0))

    def targets(self, scores: ReferenceLogps, held_out: bool = False) -> ReferenceTargets:
        """What the references say about these pairs: float64, on the CPU.

        `held_out` pairs get the weights of the full fit, training pairs those of the fold that
        has not seen their label; without the weighting `fitted` it makes no difference.
        """
        raw_chosen, raw_rejected = scores.reference_logps(list(self.columns), self.normalize)
        # A pair without its base is unusable whatever the others say.
        present = ~np.isnan(raw_chosen) & ~np.isnan(raw_chosen[:, :1])
        weights = normalized(self._weights(scores, raw_chosen, raw_rejected, held_out), present)
        chosen, rejected = raw_chosen, raw_rejected
        if self.epsilon is not None:
            chosen, rejected = ctro_clip(chosen, rejected, self.epsilon, self.adaptive_epsilon)
        moved = 0.5 * (chosen != raw_chosen) + 0.5 * (rejected != raw_rejected)
        # Separate losses have no virtual reference; the geometric one gives the mean of their
        # rewards, which is what the log shows.
        kind = "geometric" if self.kind == SEPARATE else self.kind
        return ReferenceTargets(
            virtual_chosen_logps=virtual_reference(chosen, weights, kind),
            virtual_rejected_logps=virtual_reference(rejected, weights, kind),
            margins=np.where(present, chosen - rejected, 0.0),
            weights=weights,
            clipped=np.where(present, moved, np.nan),
            chosen_bytes=scores.chosen_bytes,
            rejected_bytes=scores.rejected_bytes,
        )

    def loss(
        self,
        policy_chosen_logps: torch.Tensor,
        policy_rejected_logps: torch.Tensor,
        targets: ReferenceTargets,
        chosen_tokens: torch.Tensor,
        rejected_tokens: torch.Tensor,
    ) -> PairLosses:
        """The loss of each pair, and its rewards for the log.

        Args:
            policy_chosen_logps: [N] nats, summed over the response; gradients flow through it.
            policy_rejected_logps: [N], likewise.
            targets: of the same N pairs.
            chosen_tokens: [N] tokens that the policy's sum runs over.
            rejected_tokens: [N], likewise.
        """
        chosen = normalize_logps(
            policy_chosen_logps, self.normalize, chosen_tokens, targets.chosen_bytes
        )
        rejected = normalize_logps(
            policy_rejected_logps, self.normalize, rejected_tokens, targets.rejected_bytes
        )
        virtual_chosen = to_tensor(targets.virtual_chosen_logps, chosen)
        virtual_rejected = to_tensor(targets.virtual_rejected_logps, chosen)
        loss = self._margin_loss(chosen - rejected, targets)
        if self.sft_weight:
            loss = loss + self.sft_weight * sft_loss(policy_chosen_logps, chosen_tokens)
        return PairLosses(
            loss,
            self.beta * (chosen.detach() - virtual_chosen),
            self.beta * (rejected.detach() - virtual_rejected),
        )

    def _margin_loss(self, policy_margins: torch.Tensor, targets: ReferenceTargets) -> torch.Tensor:
        """[N]. Margins of the references are taken in float64 before they meet the policy's."""
        how = (self.beta, self.loss_type, self.label_smoothing)
        if self.kind == SEPARATE:
            weights = to_tensor(targets.weights, policy_margins)
            margins = policy_margins[:, None] - to_tensor(targets.margins, policy_margins)
            return (weights * margin_loss(margins, *how)).sum(-1)
        virtual = targets.virtual_chosen_logps - targets.virtual_rejected_logps
        return margin_loss(policy_margins - to_tensor(virtual, policy_margins), *how)

    def _weights(
        self, scores: ReferenceLogps, chosen: np.ndarray, rejected: np.ndarray, held_out: bool
    ) -> np.ndarray:
        """[N, K], before they are renormalized over the references present."""
        if self.weighting in PER_PAIR:
            return PER_PAIR[self.weighting](chosen, rejected)
        assert self.weights is not None, f"{self} was not prepared"
        if self.fitted is not None and not held_out:
            return self.fitted.for_prompts(scores.prompts)
        return np.broadcast_to(np.asarray(self.weights), chosen.shape)
