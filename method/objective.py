"""A training objective from several references: what a training run and a comparison call.

`grammar.py` makes a `Method` from text and flags. A run uses it in three steps:

    method = method.prepare(training_scores, held_out_scores)   # once: weights learned from data
    targets = method.targets(scores_of_a_batch)                 # every batch: float64, on the CPU
    losses = method.loss(policy_chosen_logps, policy_rejected_logps, targets, …)  # every step

`ReferenceLogps` is what goes in, a slice of the joined scores as numpy arrays; `ReferenceTargets`
is all that a training step needs to know of the references, as torch tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from . import losses
from .arrays import NORMALIZATIONS, check_choice, like, normalize_logps, renormalized
from .fitted import FittedWeights, Reliability, fit_reliability, fit_weights
from .mixture import LossMixture
from .virtual_reference import KINDS, ctro_clip, pulls, virtual_reference
from .weightings import FROM_HELD_OUT, ONLINE, PER_PAIR, WEIGHTINGS, vdw_weights

SEPARATE = "separate"  # the kind of multi-dpo: the losses are averaged, not the references


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReferenceLogps:
    """Scores of N pairs under K references, one column for each alias of the run, in its order."""

    ref_chosen_logps: np.ndarray  # [N, K] nats, summed over the response; NaN where missing
    ref_rejected_logps: np.ndarray  # [N, K]
    ref_chosen_tokens: np.ndarray  # [N, K] tokens scored by each reference; any number if missing
    ref_rejected_tokens: np.ndarray  # [N, K]
    chosen_bytes: np.ndarray  # [N] UTF-8 bytes of the response's contents
    rejected_bytes: np.ndarray  # [N]
    prompts: np.ndarray  # [N] integers, equal for equal prompts; see `reads_prompts`

    def __len__(self) -> int:
        return len(self.ref_chosen_logps)

    def of_rows(self, rows: np.ndarray) -> ReferenceLogps:
        """The scores of some of the pairs."""
        return ReferenceLogps(
            **{field.name: getattr(self, field.name)[rows] for field in fields(self)}
        )

    def reference_logps(self, columns: list[int], normalize: str) -> tuple[np.ndarray, np.ndarray]:
        """[N, len(columns)] each, normalized; a reference missing in one response is in both."""
        chosen, rejected = (
            normalize_logps(logps[:, columns], normalize, tokens[:, columns], response_bytes)
            for logps, tokens, response_bytes in (
                (self.ref_chosen_logps, self.ref_chosen_tokens, self.chosen_bytes),
                (self.ref_rejected_logps, self.ref_rejected_tokens, self.rejected_bytes),
            )
        )
        missing = np.isnan(chosen) | np.isnan(rejected)
        return np.where(missing, np.nan, chosen), np.where(missing, np.nan, rejected)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReferenceTargets:
    """What K references say about N pairs, normalized as the method asks; NaN where unusable."""

    virtual_chosen_logps: Tensor  # [N] float64, as all log-probs and weights here
    virtual_rejected_logps: Tensor  # [N]
    ref_chosen_logps: Tensor  # [N, K] after clipping; NaN where a reference is missing
    ref_rejected_logps: Tensor  # [N, K]
    weights: Tensor  # [N, K], rows sum to 1; 0 where a reference is missing
    clipped: Tensor  # [N, K] share of the two responses that CTRO moved; NaN where missing
    label_smoothing: Tensor  # [N] chance that the label is wrong, of a method with `reliable`
    chosen_bytes: Tensor  # [N]
    rejected_bytes: Tensor  # [N]

    def of_rows(self, rows: Sequence[int]) -> ReferenceTargets:
        """The targets of some of the pairs."""
        index = torch.as_tensor(rows)
        return ReferenceTargets(
            **{field.name: getattr(self, field.name)[index] for field in fields(self)}
        )


class PairLosses(NamedTuple):
    """What a step needs of each pair: [N] each; the rewards carry no gradient."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way to train on several references, fully resolved. Made by `parse_method`.

    Raises `UserError` for a part that is unknown, out of range, or does not go with another.
    """

    name: str
    references: tuple[str, ...]  # the first is the base
    columns: tuple[int, ...]  # the references' columns in `ReferenceLogps`
    kind: str  # of `KINDS`, or SEPARATE
    weighting: str  # of `WEIGHTINGS`
    epsilon: float | None  # CTRO's half-width; None: no clipping
    adaptive_epsilon: bool = True
    normalize: str = "none"
    beta: float = 0.1
    loss_type: str = "sigmoid"  # or several with commas between them: a weighted sum
    label_smoothing: float = 0.0
    loss_weights: tuple[float, ...] | None = None  # of several in `loss_type`; None: 1 each
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    sft_weight: float = 0.0
    weights: tuple[float, ...] | None = None  # one vector for all pairs, once it is known
    fitted: FittedWeights | None = None
    reliable: bool = False  # each pair's own label smoothing, learned from the references
    reliability: Reliability | None = None

    def __post_init__(self) -> None:
        if self.kind != SEPARATE:
            check_choice("reference kind", self.kind, KINDS)
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_choice("normalization", self.normalize, NORMALIZATIONS)
        if self.epsilon is not None and not 0 <= self.epsilon < float("inf"):
            raise UserError(f"epsilon is {self.epsilon}; it must be a number of 0 or more, or none")
        if not 0 < self.beta < float("inf"):
            raise UserError(f"beta is {self.beta}; it must be a positive number, for example 0.1")
        self.mixture.check_with(self.normalize, self.reliable)

    def __str__(self) -> str:
        """The canonical text, with every reference named."""
        weighted = len(self.references) > 1 and self.name != "dpo"
        parts = [f"+{self.weighting}"] * weighted + ["+reliable"] * self.reliable
        return f"{self.name}:{'/'.join(self.references)}{''.join(parts)}"

    def describe(self) -> list[str]:
        """Lines for the user on what was learned from the scores."""
        learned = [part for part in (self.fitted, self.reliability) if part is not None]
        return [line for part in learned for line in part.describe(self.references)]

    @property
    def mixture(self) -> LossMixture:
        """The losses that `loss_type` and the fields behind it name."""
        return LossMixture.parse(
            self.loss_type,
            self.loss_weights,
            sft_weight=self.sft_weight,
            label_smoothing=self.label_smoothing,
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
        )

    @property
    def reads_prompts(self) -> bool:
        """Whether `ReferenceLogps.prompts` must be filled."""
        return self.weighting == "fitted" or self.reliable

    @property
    def learns(self) -> bool:
        """Whether `prepare` has anything to do."""
        return self.reads_prompts or self.weighting in (*FROM_HELD_OUT, "thompson")

    @property
    def online(self) -> bool:
        """Whether the weights are learned while training, see `OnlineWeights`."""
        return self.weighting in ONLINE

    @property
    def virtual_kind(self) -> str:
        """Of `KINDS`. Separate losses have no virtual reference; the geometric one gives the mean
        of their rewards, which is what the log shows.
        """
        return "geometric" if self.kind == SEPARATE else self.kind

    def prepare(
        self, training: ReferenceLogps, held_out: ReferenceLogps, bootstrap: int = 200
    ) -> Method:
        """The method with what it learns from data before training.

        vdw and vaw come from the held-out pairs; fitted comes from the training pairs, with
        intervals from `bootstrap` resamples of their prompts, and so does the labels' reliability.
        """
        columns = list(self.columns)
        if self.reliable and self.reliability is None:
            chosen, rejected = training.reference_logps(columns, self.normalize)
            fit_labels = fit_reliability(chosen - rejected, training.prompts)
            return replace(self, reliability=fit_labels).prepare(training, held_out, bootstrap)
        if self.weighting in (*FROM_HELD_OUT, "thompson") and len(held_out) == 0:
            raise UserError(
                f"weighting {self.weighting} needs held-out pairs and there are none; prepare "
                "the pairs with --validation-fraction, or use --weighting arwc"
            )
        if self.weighting == "fitted":
            chosen, rejected = training.reference_logps(columns, self.normalize)
            fit = fit_weights(chosen - rejected, training.prompts, bootstrap=bootstrap)
            return replace(self, weights=tuple(fit.weights.tolist()), fitted=fit)
        if self.weighting in FROM_HELD_OUT:
            logps = held_out.reference_logps(columns, self.normalize)
            return replace(self, weights=tuple(FROM_HELD_OUT[self.weighting](*logps).tolist()))
        return self

    def usable(self, scores: ReferenceLogps) -> np.ndarray:
        """[N] bool: pairs that the base has scored and that some weight is left for.

        Usable means both for training and held out: with `fitted` the weights differ.
        """
        virtual = [self.targets(scores, held).virtual_chosen_logps for held in (False, True)]
        return ~torch.stack(virtual).isnan().any(0).numpy()

    def targets(
        self,
        scores: ReferenceLogps,
        held_out: bool = False,
        online: Sequence[float] | None = None,
    ) -> ReferenceTargets:
        """What the references say about these pairs: float64, on the CPU.

        `held_out` pairs get the weights of the full fit and no label smoothing, training pairs
        those of the fold that has not seen their label; without the weighting `fitted` and
        `reliable` it makes no difference. `online` [K] are the weights of a method that learns
        them while it trains; without them they are uniform, as for held-out pairs, whose figures
        then compare from step to step.
        """
        raw_chosen, raw_rejected = map(
            torch.from_numpy, scores.reference_logps(list(self.columns), self.normalize)
        )
        # A pair without its base is unusable whatever the others say.
        present = ~(raw_chosen.isnan() | raw_chosen[:, :1].isnan())
        weights = self._weights(scores, raw_chosen, raw_rejected, held_out)
        if self.online:
            weights = torch.tensor(online or [1.0] * len(self.columns), dtype=torch.float64)
            # Where no reference of positive weight has scored a pair, all that have count alike.
            none = torch.where(present, weights, 0.0).sum(-1, keepdim=True) == 0
            weights = torch.where(none, 1.0, weights)
        weights = renormalized(weights, present)
        chosen, rejected = raw_chosen, raw_rejected
        if self.epsilon is not None:
            chosen, rejected = ctro_clip(chosen, rejected, self.epsilon, self.adaptive_epsilon)
        moved = 0.5 * (chosen != raw_chosen) + 0.5 * (rejected != raw_rejected)
        return ReferenceTargets(
            virtual_chosen_logps=virtual_reference(chosen, weights, self.virtual_kind),
            virtual_rejected_logps=virtual_reference(rejected, weights, self.virtual_kind),
            ref_chosen_logps=chosen,
            ref_rejected_logps=rejected,
            weights=weights,
            clipped=torch.where(present, moved, torch.nan),
            label_smoothing=self._label_smoothing(scores, raw_chosen - raw_rejected, held_out),
            chosen_bytes=torch.tensor(scores.chosen_bytes),
            rejected_bytes=torch.tensor(scores.rejected_bytes),
        )

    def batch_weights(self, scores: ReferenceLogps) -> list[float]:
        """[K] swcw (Wu & Echarghaoui, arXiv 2512.10040): VDW's formula on one batch of pairs."""
        logps = scores.reference_logps(list(self.columns), self.normalize)
        return vdw_weights(*logps).tolist()

    def loss(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        targets: ReferenceTargets,
        chosen_tokens: Tensor,
        rejected_tokens: Tensor,
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
        loss = self._preference(chosen, rejected, targets)
        if weight := self.mixture.sft_weight:
            loss = loss + weight * losses.sft_loss(policy_chosen_logps, chosen_tokens)
        virtual = targets.virtual_chosen_logps, targets.virtual_rejected_logps
        rewards = [
            self.beta * (logps.detach() - like(reference, logps))
            for logps, reference in zip((chosen, rejected), virtual)
        ]
        return PairLosses(loss, *rewards)

    def initial_weights(self, scores: ReferenceLogps) -> np.ndarray:
        """[N] the weight with which a training pair's gradient starts, where policy = base.

        −1/beta times the slope of the pair's loss in the policy's margin, at the margin of the
        run's base (column 0 of `scores`). With the sigmoid loss and m the virtual margin it is
        sigmoid(beta·(m − D_1)), and (1 − s)·sigmoid(h) − s·sigmoid(−h) of the same h with
        `reliable`; negative where the pair is read as its opposite. NaN where a pair is unusable.
        The SFT term is no part of it.
        """
        targets = self.targets(scores)
        chosen, rejected = (
            torch.from_numpy(logps[:, 0]) for logps in scores.reference_logps([0], self.normalize)
        )
        with torch.enable_grad():
            loss = self._preference(chosen.requires_grad_(), rejected, targets)
            [slopes] = torch.autograd.grad(loss.sum(), chosen)
        return torch.where(loss.isnan(), torch.nan, -slopes / self.beta).numpy()

    def reference_shares(self, scores: ReferenceLogps) -> np.ndarray:
        """[N, K] how much each reference of the method is heard in the virtual one.

        Its pull (`pulls`), as a mean over both responses; what CTRO clips is a multiple of the
        base's log-prob, so its pull is the base's. Rows sum to 1; NaN where a pair is unusable.
        """
        targets = self.targets(scores)
        shares = torch.zeros_like(targets.weights)
        raw = map(torch.from_numpy, scores.reference_logps(list(self.columns), self.normalize))
        for logps, clipped in zip(raw, (targets.ref_chosen_logps, targets.ref_rejected_logps)):
            pull = pulls(clipped, targets.weights, self.virtual_kind)
            silenced = torch.where(clipped != logps, pull, 0.0)
            shares += (pull - silenced) / 2
            shares[:, 0] += silenced.sum(-1) / 2
        return shares.numpy()

    def _preference(self, chosen: Tensor, rejected: Tensor, targets: ReferenceTargets) -> Tensor:
        """[N] the loss on the preference alone, of the policy's normalized log-probs."""
        if self.kind == SEPARATE:
            references = targets.ref_chosen_logps, targets.ref_rejected_logps
            loss_of = partial(
                losses.multi_dpo_loss, chosen, rejected, *references, targets.weights, self.beta
            )
        else:
            virtual = targets.virtual_chosen_logps, targets.virtual_rejected_logps
            loss_of = partial(losses.preference_loss, chosen, rejected, *virtual, self.beta)
        return self.mixture(loss_of, targets.label_smoothing if self.reliable else None)

    def _weights(
        self, scores: ReferenceLogps, chosen: Tensor, rejected: Tensor, held_out: bool
    ) -> Tensor:
        """[N, K], before they are renormalized over the references present."""
        if self.weighting in PER_PAIR:
            return PER_PAIR[self.weighting](chosen, rejected)
        if self.online:
            return torch.ones_like(chosen)
        assert self.weights is not None, f"{self} was not prepared"
        if self.fitted is not None and not held_out:
            return torch.from_numpy(self.fitted.for_prompts(scores.prompts))
        return torch.tensor(self.weights, dtype=torch.float64).expand(chosen.shape)

    def _label_smoothing(self, scores: ReferenceLogps, margins: Tensor, held_out: bool) -> Tensor:
        """[N]: of training pairs, where the method estimates it; otherwise 0."""
        if not self.reliable or held_out:
            return torch.zeros(len(margins), dtype=torch.float64)
        assert self.reliability is not None, f"{self} was not prepared"
        return torch.from_numpy(self.reliability.chance_wrong(margins.numpy(), scores.prompts))
