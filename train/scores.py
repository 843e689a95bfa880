"""Arrays between the joined scores and a `Method`: what goes in, and what comes out of it.

Plain numpy on the CPU, in float64. `PairScores` is a slice of the joined scores (a batch, or a
whole split); `ReferenceTargets` is all that a training step needs to know of the references.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .mathematics.arrays import present_in_both
from .mathematics.normalize import normalize_logps


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairScores:
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
