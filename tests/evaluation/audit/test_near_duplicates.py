"""Near duplicates with opposite labels are found, whatever else is alike."""

from __future__ import annotations

import doctest
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrpo.data.pairs import Pair
from mrpo.evaluation.audit import near_duplicates
from mrpo.evaluation.audit.near_duplicates import (
    ALIKE,
    band_keys,
    candidates,
    contradiction,
    jaccard,
    shingles,
    signature,
)

STARTS, ENDS = (
    ["ba", "da", "ke", "li", "mo", "nu", "pa", "re", "so", "tu"],
    ["nar", "pel", "stin", "vok", "gem", "zuf", "lort"],
)
WORDS = [start + middle + end for start in STARTS for middle in STARTS for end in ENDS]


def text(seed: object, words: int = 40) -> str:
    return " ".join(random.Random(str(seed)).choices(WORDS, k=words))


def pair(seed: int) -> Pair:
    return Pair(text(f"{seed} prompt"), text(f"{seed} chosen"), text(f"{seed} rejected"))


def turned(one: Pair) -> Pair:
    return Pair(one.prompt, one.rejected, one.chosen)


def found(pairs: list[Pair]) -> set[tuple[int, int]]:
    """The rows that contradict each other, found as the audit finds them."""
    rows = candidates(np.array([band_keys(one) for one in pairs])).tolist()
    return {
        (first, second)
        for first, second in rows
        if contradiction(pairs[first], pairs[second]) is not None
    }


def test_the_examples_give_what_they_say() -> None:
    assert doctest.testmod(near_duplicates) == (0, 2)  # failed, attempted


def test_similarity_by_hand() -> None:
    # abcdefgh bcdefghi cdefghij against abcdefgh bcdefghi cdefghix: two of four are shared.
    assert jaccard(shingles("abcdefghij"), shingles("ABCDEFGHIX")) == 0.5
    assert jaccard(shingles("same  text\n"), shingles("Same text")) == 1
    assert jaccard(shingles("yes"), shingles("no")) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 35))
def test_signatures_agree_as_often_as_texts_are_alike(seed: int, changed: int) -> None:
    words = text(seed, 60).split()
    other = [text(f"{seed} {at}", 1) if at < changed else word for at, word in enumerate(words)]
    sets = [shingles(" ".join(one)) for one in (words, other)]
    same = np.mean(signature(sets[0]) == signature(sets[1]))
    assert abs(same - jaccard(*sets)) < 0.5  # 30 entries: five standard deviations


def test_turned_pairs_are_found_exact_and_with_small_changes() -> None:
    pairs = [pair(seed) for seed in range(60)]
    exact, near = turned(pairs[3]), turned(pairs[7])
    near = Pair(
        str(near.prompt).upper(),
        f"{near.chosen} indeed",
        f"well, {near.rejected}".replace(" ", "  "),
    )
    assert found([*pairs, exact, near]) == {(3, 60), (7, 61)}


def test_duplicates_with_the_same_label_are_no_contradiction() -> None:
    one = pair(0)
    again = Pair(one.prompt, f"{one.chosen} indeed", one.rejected)
    assert contradiction(one, again) is None
    # One response preferred here and not there: a ranking of three, not a contradiction.
    assert contradiction(one, Pair(one.prompt, one.rejected, text("third"))) is None


def test_other_numbers_or_another_prompt_ask_something_else() -> None:
    prompt = f"{text(1)} She has 16 eggs and sells 3. How many are left? {text(2)}"
    one, other = Pair(prompt, "A.", "B."), Pair(prompt.replace("16", "17"), "B.", "A.")
    assert jaccard(*(shingles(str(each.prompt)) for each in (one, other))) > ALIKE
    assert contradiction(one, other) is None
    assert contradiction(one, Pair(prompt, "B.", "A.")) == 1
    assert contradiction(one, Pair(text(3), "B.", "A.")) is None


def test_many_alike_stay_affordable_and_exact_ones_are_still_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(near_duplicates, "LARGEST_GROUP", 10)
    system = text("system", 400)  # one long prompt for all, and answers of one word
    pairs = [Pair(f"{system} {text(n, 1)}", f"yes {n % 50}", "no") for n in range(300)]
    pairs[280] = turned(pairs[17])
    rows = candidates(np.array([band_keys(one) for one in pairs]))
    assert len(rows) < 300 * 10 * near_duplicates.BANDS
    assert [17, 280] in rows.tolist()


def test_messages_are_compared_with_their_roles() -> None:
    prompt = [{"role": "user", "content": text(1)}]
    answers = [[{"role": "assistant", "content": text(n)}] for n in (2, 3)]
    assert contradiction(Pair(prompt, *answers), Pair(prompt, *answers[::-1])) == 1
