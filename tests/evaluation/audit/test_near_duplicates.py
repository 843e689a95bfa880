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
    BANDS,
    ROWS,
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


def turned(pair: Pair) -> Pair:
    return Pair(pair.prompt, pair.rejected, pair.chosen)


def candidate_rows(pairs: list[Pair]) -> list[list[int]]:
    rows: list[list[int]] = candidates(np.array([signature(pair) for pair in pairs])).tolist()
    return rows


def contradictions(pairs: list[Pair]) -> set[tuple[int, int]]:
    """The rows that contradict each other, found as the audit finds them."""
    rows = candidate_rows(pairs)
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
    edited = [text(f"{seed} {at}", 1) if at < changed else word for at, word in enumerate(words)]
    first, second = (" ".join(words), " ".join(edited))
    similarity = jaccard(shingles(first), shingles(second))
    # Among 30 entries, 0.5 is five standard deviations.
    prompts = [signature(Pair(text, "yes", "no")) for text in (first, second)]
    same = prompts[0] == prompts[1]
    assert same.shape == (BANDS, 2 * ROWS)
    assert abs(same[:, :ROWS].mean() - similarity) < 0.5
    assert same[:, ROWS:].all()
    responses = [signature(Pair("why?", text, text)) for text in (first, second)]
    same = responses[0] == responses[1]
    assert same[:, :ROWS].all()
    assert abs(same[:, ROWS:].mean() - similarity) < 0.5


def test_signatures_depend_neither_on_the_label_nor_on_the_process() -> None:
    """The number is that of another process: hashes are seeded, not salted."""
    example = Pair("What is it?", "A blue stone.", "A red stone.")
    assert signature(example)[0, 0] == 1488648493830380352
    np.testing.assert_array_equal(signature(example), signature(turned(example)))


def test_nearly_all_pairs_that_are_four_fifths_alike_become_candidates() -> None:
    """A band agrees with probability 0.8 ** 6, one of ten with 0.95; unrelated pairs never."""
    rng = random.Random(0)
    pairs = [pair(seed) for seed in range(200)]
    similar, similarities = [], []
    for original in pairs:
        words = [
            str(part).split() for part in (original.prompt, original.rejected, original.chosen)
        ]
        for part in words:
            for at in rng.sample(range(len(part)), 3):
                part[at] = rng.choice(WORDS)
        edited = Pair(*(" ".join(part) for part in words))
        similarities.append(jaccard(shingles(str(original.prompt)), shingles(str(edited.prompt))))
        similar.append(edited)
    assert 0.7 < np.mean(similarities) < 0.85
    rows = candidate_rows([*pairs, *similar])
    hits = [second == first + 200 for first, second in rows]
    assert sum(hits) >= 170
    assert all(hits)
    assert rows == candidate_rows([*pairs, *similar])


def test_turned_pairs_are_found_exact_and_with_small_changes() -> None:
    pairs = [pair(seed) for seed in range(60)]
    exact, near = turned(pairs[3]), turned(pairs[7])
    near = Pair(
        str(near.prompt).upper(),
        f"{near.chosen} indeed",
        f"well, {near.rejected}".replace(" ", "  "),
    )
    assert contradictions([*pairs, exact, near]) == {(3, 60), (7, 61)}


def test_duplicates_with_the_same_label_are_no_contradiction() -> None:
    first = pair(0)
    again = Pair(first.prompt, f"{first.chosen} indeed", first.rejected)
    assert contradiction(first, again) is None
    # A response preferred here and not there: a ranking of three, not a contradiction.
    assert contradiction(first, Pair(first.prompt, first.rejected, text("third"))) is None


def test_other_numbers_or_another_prompt_ask_something_else() -> None:
    prompt = f"{text(1)} She has 16 eggs and sells 3. How many are left? {text(2)}"
    first, edited = Pair(prompt, "A.", "B."), Pair(prompt.replace("16", "17"), "B.", "A.")
    assert jaccard(*(shingles(str(pair.prompt)) for pair in (first, edited))) > ALIKE
    assert contradiction(first, edited) is None
    assert contradiction(first, Pair(prompt, "B.", "A.")) == 1
    assert contradiction(first, Pair(text(3), "B.", "A.")) is None


def test_many_alike_stay_affordable_and_exact_ones_are_still_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(near_duplicates, "LARGEST_GROUP", 10)
    system = text("system", 400)  # one long prompt for all, and answers of one word
    pairs = [Pair(f"{system} {text(n, 1)}", f"yes {n % 50}", "no") for n in range(300)]
    pairs[280] = turned(pairs[17])
    rows = candidate_rows(pairs)
    assert len(rows) < 300 * 10 * BANDS
    assert [17, 280] in rows


def test_messages_are_compared_with_their_roles() -> None:
    prompt = [{"role": "user", "content": text(1)}]
    answers = [[{"role": "assistant", "content": text(n)}] for n in (2, 3)]
    assert contradiction(Pair(prompt, *answers), Pair(prompt, *answers[::-1])) == 1
