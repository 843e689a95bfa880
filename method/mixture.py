"""What `--loss-type` names: one loss or a weighted sum of several, over one divergence.

`sigmoid,bco_pair,sft` with the weights 0.8, 0.2, 1 is MPO (Wang et al., arXiv 2411.10442); the
grammar is TRL's. `sft` is the likelihood of the chosen response (`sft_loss`), which `--sft-weight`
adds as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import UserError
from .arrays import check_choice
from .loss_functions import PER_TOKEN, RESPONSE_LOSSES, SMOOTHED_LOSSES
from .losses import DIVERGENCES, check_loss, check_pair_loss

SFT = "sft"


@dataclass(frozen=True, kw_only=True, slots=True)
class LossMixture:
    """Losses with their weights, and what all of them share."""

    weights: dict[str, float]  # by the name of a loss, without `sft`
    sft_weight: float
    label_smoothing: float  # for the losses that take one
    f_divergence_type: str
    f_alpha_divergence_coef: float

    @classmethod
    def parse(
        cls,
        loss_type: str,
        loss_weights: Sequence[float] | None = None,
        *,
        sft_weight: float = 0.0,
        label_smoothing: float = 0.0,
        f_divergence_type: str = "reverse_kl",
        f_alpha_divergence_coef: float = 0.5,
    ) -> LossMixture:
        """Names with commas between them, and a weight for each; None: 1 each.

        Raises `UserError` for whatever is unknown or does not go together.
        """
        names = [name.strip() for name in loss_type.split(",")]
        given = (1.0,) * len(names) if loss_weights is None else tuple(loss_weights)
        if len(given) != len(names):
            raise UserError(
                f"{len(given)} loss weights for the loss type {loss_type}; give one for each of "
                f"its losses, {len(names)}"
            )
        named = [*((f"loss {name}", weight) for name, weight in zip(names, given))]
        for what, weight in [*named, ("the SFT term", sft_weight)]:
            if not 0 <= weight < float("inf"):
                raise UserError(f"{what} has the weight {weight}; it must be 0 or more")
        if repeated := [name for name in names if names.count(name) > 1]:
            raise UserError(f"loss type {loss_type} names {repeated[0]} twice; name each once")
        weights = dict(zip(names, given))
        if SFT in weights and (len(names) == 1 or sft_weight):
            why = "alone compares no responses" if len(names) == 1 else "has a weight of its own"
            raise UserError(
                f"loss type {loss_type}: {SFT} {why}; leave it out, and use --sft-weight"
            )
        mixture = cls(
            sft_weight=sft_weight + weights.pop(SFT, 0.0),
            weights=weights,
            label_smoothing=label_smoothing,
            f_divergence_type=f_divergence_type,
            f_alpha_divergence_coef=f_alpha_divergence_coef,
        )
        mixture._check()
        return mixture

    def smoothing_of(self, name: str) -> float:
        """The label smoothing of one of several losses: 0 for one that takes none."""
        alone = len(self.weights) == 1
        return self.label_smoothing if alone or name in SMOOTHED_LOSSES else 0.0

    def check_with(self, normalize: str, reliable: bool) -> None:
        """Raise `UserError` where a loss does not go with another part of a method."""
        for name in self.weights:
            if name in PER_TOKEN and normalize != "token":
                raise UserError(
                    f"loss type {name} works on log-probs per token; add --normalize token"
                )
            if reliable:
                check_pair_loss(name)
        if reliable and self.label_smoothing:
            raise UserError(
                f"label smoothing {self.label_smoothing} does not go with +reliable, which "
                "finds each pair's own; leave out one of the two"
            )
        if self.f_divergence_type != "reverse_kl" and normalize != "none":
            raise UserError(
                f"f-divergence type {self.f_divergence_type} is one of whole responses; leave out "
                f"--normalize {normalize}, or use reverse_kl"
            )

    def __call__(
        self, loss_of: Callable[..., Tensor], pair_smoothing: Tensor | None = None
    ) -> Tensor:
        """[N] the weighted sum over the losses, without `sft`.

        `loss_of` is `preference_loss` or `multi_dpo_loss` with all but its last four arguments;
        `pair_smoothing` [N] takes the place of `label_smoothing`.
        """
        total: Tensor | None = None
        for name, weight in self.weights.items():
            smoothing = self.smoothing_of(name) if pair_smoothing is None else pair_smoothing
            loss = loss_of(name, smoothing, self.f_divergence_type, self.f_alpha_divergence_coef)
            loss = loss if weight == 1 else weight * loss
            total = loss if total is None else total + loss
        assert total is not None
        return total

    def _check(self) -> None:
        for name in self.weights:
            check_loss(name, self.smoothing_of(name))
        if self.label_smoothing and not any(map(self.smoothing_of, self.weights)):
            check_loss(next(iter(self.weights)), self.label_smoothing)
        check_choice("f-divergence type", self.f_divergence_type, DIVERGENCES)
        of_responses = [name for name in self.weights if name in RESPONSE_LOSSES]
        if self.f_divergence_type != "reverse_kl" and of_responses:
            raise UserError(
                f"f-divergence type {self.f_divergence_type} has no effect on loss type "
                f"{of_responses[0]}, which is of each response alone; use reverse_kl, or sigmoid"
            )


def parse_loss_weights(text: str | None) -> tuple[float, ...] | None:
    """Read `--loss-weights`, such as "0.8,0.2,1".

    Raises `UserError` for a part that is no number.

    >>> parse_loss_weights("0.8, 0.2,1")
    (0.8, 0.2, 1.0)
    """
    if text is None:
        return None
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise UserError(
            f"--loss-weights {text}: must be numbers, one for each loss, as 0.8,0.2,1"
        ) from None
