"""Who ranks the held-out pairs rightly, and how sure that is.

A model is right about a pair where the chosen response has the higher log-prob, summed over its
tokens. References are judged by the scores in the store, policies by scoring them in the same
way here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.ids import IdArray, IdIndex, ids_to_numpy
from ..data.pairs import Pair
from ..data.rendering import Renderer
from ..data.shards import PairShards
from ..data.store import ReferenceScores
from ..precompute.engines.base import EngineSettings, load_engine

Z = 1.96  # standard deviations on either side that hold 95 % of a normal distribution
RESAMPLES = 2000

Right = np.ndarray  # [n] bool, whether a model ranks each held-out pair rightly


@dataclass(frozen=True, slots=True)
class HeldOutPairs:
    """The validation pairs, their ids and the domains they come from, in the shards' order."""

    pairs: list[Pair]
    ids: IdArray
    domains: np.ndarray  # [n] str

    @classmethod
    def of(cls, shards: PairShards) -> HeldOutPairs:
        pairs: list[Pair] = []
        ids = []
        for shard in range(len(shards.names)):
            split = shards.table(shard, ["split"])["split"].to_numpy(zero_copy_only=False)
            rows = np.flatnonzero(split == "validation")
            pairs += shards.pairs(shard, rows.tolist())
            ids.append(shards.pair_ids(shard)[rows])
        return cls(pairs, np.concatenate(ids), np.array([pair.source for pair in pairs]))


def reference_is_right(scores: ReferenceScores, ids: IdArray) -> Right:
    """By the scores that stage one stored; every pair must have its score."""
    table = scores.read(["pair_id", "chosen_logp", "rejected_logp"])
    rows = table.take(IdIndex(ids_to_numpy(table["pair_id"])).find(ids))
    return rows["chosen_logp"].to_numpy() > rows["rejected_logp"].to_numpy()


def policy_is_right(model: Path, pairs: Sequence[Pair]) -> Right:
    """By scoring a trained model's folder with engine hf, as stage one scores references."""
    rendered = Renderer.load(model).render_many(pairs)
    engine = load_engine("hf", EngineSettings(alias=model.parent.name, model=str(model)))
    scored = engine.score(rendered)  # type: ignore[arg-type]  # clean pairs: none is refused
    return np.array([s.chosen.sum() > s.rejected.sum() for s in scored])


def interval(right: Right) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, which also holds near 0 and 1."""
    n, share = len(right), right.mean()
    center = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return center - half, center + half


def difference(right: Right, other: Right, seed: int = 0) -> tuple[float, float, float]:
    """How much more often `right` than `other`, and a 95 % bootstrap interval over the pairs."""
    gain = right.astype(float) - other.astype(float)
    draws = np.random.default_rng(seed).integers(len(gain), size=(RESAMPLES, len(gain)))
    low, high = np.quantile(gain[draws].mean(1), [0.025, 0.975])
    return gain.mean(), low, high
