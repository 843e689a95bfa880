"""Checks between what the store says and what the policy computes, before the first step."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from ..data.join import JoinedScores
from ..errors import UserError
from .budget import TokenBudget
from .forward import PairForward, PairLogps
from .scores import PairScores
from .stream import PairStream

FIRST_PAIRS = 64
TOLERANCE = {"float32": 1e-3, "other": 0.1}  # nats per token


def refuse_missing(scores: JoinedScores, max_missing: float) -> None:
    """Raise `UserError` where a reference lacks more than this share of the scores for good."""
    for reference in scores.references:
        count = sum(reference.missing.values())
        if count > max_missing * scores.num_pairs:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in reference.missing.items())
            raise UserError(
                f"reference {reference.alias} has no score for {count:,} of "
                f"{scores.num_pairs:,} pairs ({reasons}), above --max-missing {max_missing}; "
                "leave it out of --refs, prepare shorter pairs, or raise --max-missing"
            )


def compare_with_base(
    forward: PairForward, stream: PairStream, budget: TokenBudget, exact: bool
) -> str:
    """One line on how far the policy, which is the base reference, is from its stored scores.

    Args:
        stream: training pairs; its first 64 are scored anew, and compared with column 0.
        exact: both compute in float32.
    """
    # Sums over responses: absolute and signed difference, other tokens, responses.
    sums, left = torch.zeros(4, dtype=torch.float64), FIRST_PAIRS
    forward.policy.eval()
    for batch in islice(stream.batches(), -(-FIRST_PAIRS // stream.batch_pairs)):
        pairs = batch.pairs[:left]
        left -= len(pairs)
        for rows, counts in forward.shares(pairs, budget.tokens):
            with torch.no_grad():
                logps = forward([pairs[row] for row in rows])
            sums += counts * _differences(logps, batch.scores, rows)
    forward.policy.train()
    absolute, signed, other_tokens, responses = forward.ranks.sum(sums).tolist()
    absolute, signed = absolute / responses, signed / responses
    tolerance = TOLERANCE["float32" if exact else "other"]
    line = (
        f"{signed:+.1e} nats per token from the base's stored scores on {int(responses) // 2} "
        f"pairs, {absolute:.1e} in absolute value; up to {tolerance:g} is expected"
    )
    if absolute <= tolerance and not other_tokens:
        return line
    cause = f"{int(other_tokens)} responses have other tokens" if other_tokens else "other weights"
    return (
        f"{line}\nWARNING: the policy is NOT the base reference as it was scored ({cause}); "
        "check --policy, its revision and chat template, or score the base again"
    )


def _differences(logps: PairLogps, scores: PairScores, rows: list[int]) -> Tensor:
    """Per response: |difference| and difference per token, whether the tokens are others, 1."""
    policy = torch.cat([logps.chosen, logps.rejected]).double().cpu()
    tokens = torch.cat([logps.chosen_tokens, logps.rejected_tokens]).cpu()
    both = (scores.ref_chosen_logps, scores.ref_rejected_logps)
    stored = torch.cat([torch.from_numpy(one[rows, 0]) for one in both])
    both = (scores.ref_chosen_tokens, scores.ref_rejected_tokens)
    stored_tokens = torch.cat([torch.from_numpy(one[rows, 0]) for one in both])
    off = (policy - stored) / tokens
    return torch.stack([off.abs(), off, (tokens != stored_tokens).double(), off * 0 + 1]).sum(1)
