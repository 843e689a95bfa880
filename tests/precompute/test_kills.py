"""A real `mrpo precompute` is killed at every kind of moment, and nothing is lost or doubled.

`python benchmarks/kills.py` does the same a hundred times.
"""

from __future__ import annotations

from pathlib import Path

from mrpo.benchmarks.killed_run import MOMENTS, VICTIMS, make_kills
from mrpo.benchmarks.kills import kill_test


def test_eight_kills_lose_nothing_and_repeat_at_most_a_shard_each(tmp_path: Path) -> None:
    """Starting, loading, scoring, and around each flush and rename; two runs at a time."""
    kills = make_kills(8)
    assert {kill.moment for kill in kills} == set(MOMENTS)
    assert {kill.victim for kill in kills} == set(VICTIMS)
    assert kill_test(tmp_path, kills).broken() == []
