"""The references of the experiment on real pairs: what they read, and what they never see."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from mrpo.benchmarks.real_references import EPOCHS, FILES, OWN, all_pairs, corpus, is_read
from mrpo.data.pairs import Pair, canonical_json, in_fraction, is_validation


@pytest.fixture(scope="module")
def pairs(shared_data: Path) -> list[Pair]:
    return all_pairs(shared_data)


def test_every_usable_pair_of_the_three_sets_is_there(pairs: list[Pair]) -> None:
    counts = Counter(pair.source for pair in pairs)
    assert counts == {"hh": 2303, "gsm8k": 966, "truthfulqa": 2454}


def test_half_of_the_prompts_are_read_whatever_the_split(pairs: list[Pair]) -> None:
    """The halves must not depend on the bits that hold out pairs or choose a fraction."""
    for part in (
        pairs,
        [pair for pair in pairs if is_validation(pair.prompt, 0.25)],
        [pair for pair in pairs if in_fraction(pair.prompt, 0.2)],
    ):
        assert sum(map(is_read, part)) / len(part) == pytest.approx(0.5, abs=0.06)
    sides: dict[str, set[bool]] = {}
    for pair in pairs:
        sides.setdefault(canonical_json(pair.prompt), set()).add(is_read(pair))
    assert all(len(side) == 1 for side in sides.values())


@pytest.mark.parametrize("own", FILES)
def test_a_reference_reads_its_own_set_more_often_and_chosen_responses_alone(
    own: str, pairs: list[Pair]
) -> None:
    some = pairs[::50]
    rows = list(corpus(own, some, random.Random(0)))
    times = Counter(canonical_json(row["messages"]) for row in rows)
    for pair in some:
        assert isinstance(pair.prompt, list)
        assert isinstance(pair.chosen, list)
        expected = EPOCHS * (OWN if pair.source == own else 1)
        assert times[canonical_json(pair.prompt + pair.chosen)] >= expected
    assert sum(times.values()) == sum(EPOCHS * (OWN if p.source == own else 1) for p in some)
