"""How often a policy is right about held-out pairs, by yardsticks that hold for every method.

    sum, token, byte    the chosen response is the likelier one: whole, per token, per byte
    reward              the policy prefers the chosen response more than the base reference does

The reward is DPO's implicit one up to beta: log pi(y) − log pi_base(y). Measured from one common
base, policies of all methods are on one scale; a method's own references do not enter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..train.mathematics.normalize import normalize_logps
from .figures import preferred
from .intervals import Interval, mean_intervals
from .score_table import ReferenceScores, ScoreTable

Yardstick = Literal["reward", "sum", "token", "byte"]
YARDSTICKS: tuple[Yardstick, ...] = ("reward", "sum", "token", "byte")
UNITS = {"sum": "none", "token": "token", "byte": "byte"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """A policy on some pairs."""

    pairs: int
    accuracy: dict[str, Interval]  # by yardstick
    margin: Interval  # mean of log pi(chosen) − log pi(rejected), nats
    reward_margin: Interval  # the same minus the base's, nats; times beta it is DPO's


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyFigures:
    """A policy on all pairs, and on those of each source."""

    name: str
    identity: str  # under which the store has its scores
    missing: dict[str, int]  # pairs left out, by reason: without a score of the policy or the base
    overall: Judgement
    by_source: dict[str, Judgement]


def policy_figures(table: ScoreTable, k: int, name: str) -> PolicyFigures:
    """The figures of the table's k-th entry; entry 0 is the base."""
    policy, base = table.references[k], table.references[0]
    usable = policy.scored & base.scored
    values = np.stack(
        [*right(table, k).values(), policy.margins, policy.margins - base.margins], axis=1
    )
    sources = sorted(set(table.sources[usable].tolist()))
    return PolicyFigures(
        name=name,
        identity=policy.record.identity,
        missing=_missing(policy, base),
        overall=_judgement(values[usable], table.prompts[usable]),
        by_source={
            source: _judgement(values[rows], table.prompts[rows])
            for source in sources
            for rows in [usable & (table.sources == source)]
        },
    )


def right(table: ScoreTable, k: int) -> dict[Yardstick, np.ndarray]:
    """[N] 1 where the k-th entry is right about a pair, 0 where not, NaN without a score, by
    yardstick; entry 0 is the base, whose own rewards are all 0."""
    policy, base = table.references[k], table.references[0]
    usable = policy.scored & base.scored
    logps = {"reward": policy.logps - base.logps} | {
        name: normalize_logps(policy.logps, unit, policy.tokens, table.response_bytes)
        for name, unit in UNITS.items()
    }
    return {name: np.where(usable, preferred(logps[name]), np.nan) for name in YARDSTICKS}


def _judgement(values: np.ndarray, prompts: np.ndarray) -> Judgement:
    """From columns [n, 6]: the yardsticks, the margin, the reward margin."""
    *accuracies, margin, reward_margin = mean_intervals(values, prompts)
    return Judgement(
        pairs=len(values),
        accuracy=dict(zip(YARDSTICKS, accuracies)),
        margin=margin,
        reward_margin=reward_margin,
    )


def _missing(policy: ReferenceScores, base: ReferenceScores) -> dict[str, int]:
    """Pairs without a score of either, the policy's reason before the base's."""
    reasons = np.where(policy.scored, base.reasons, policy.reasons)
    names: Sequence[str] = sorted(set(reasons[reasons != ""].tolist()))
    return {name: int((reasons == name).sum()) for name in names}
