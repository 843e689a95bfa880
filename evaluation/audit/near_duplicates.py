"""Pairs that ask nearly the same and were labelled the other way round.

Texts are compared as sets of overlapping byte windows (shingles, Jaccard similarity). Candidates
come from MinHash signatures cut into bands: two pairs meet where, in one band, both their prompts
and their responses agree. The signature of the responses is that of their union, so that it does
not know which one was chosen. Every candidate is then compared exactly.

Numpy alone; about half a millisecond a pair.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...data.pairs import Pair, Turns

WINDOW = 8  # bytes of a shingle, as many as a number holds
BANDS, ROWS = 10, 3  # two prompts and two unions of responses, each 0.8 alike, meet in 95 of 100
ALIKE = 0.7  # Jaccard similarity from which two texts count as nearly the same
LARGEST_GROUP = 64  # of a larger one only neighbours are compared; equal texts are neighbours

Hashes = np.ndarray  # uint64

_NUMBERS = re.compile(r"\d+")
_DRAWN = np.random.default_rng(20_405).integers(0, 2**64, (2, BANDS * ROWS), np.uint64)
_FACTORS, _OFFSETS = _DRAWN[0] | np.uint64(1), _DRAWN[1]


@dataclass(frozen=True, slots=True)
class Opposites:
    """Two rows (first < second) whose labels contradict each other."""

    first: int
    second: int
    similarity: float  # of the less similar of the two crossed responses


def text_of(turns: Turns) -> str:
    """Messages as one text with the roles in front, text as it is."""
    if isinstance(turns, str):
        return turns
    return "\n\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in turns)


def shingles(text: str) -> Hashes:
    """The different windows of a text, sorted; case and white space do not count.

    >>> len(shingles("abcdefghi")), len(shingles("ABCD  efgh")), len(shingles("a"))
    (2, 2, 1)
    """
    data = np.frombuffer(" ".join(text.lower().split()).encode(errors="replace"), np.uint8)
    data = np.pad(data, (0, max(WINDOW - len(data), 0))).astype(np.uint64)
    windows = np.zeros(len(data) - WINDOW + 1, np.uint64)
    for place in range(WINDOW):
        windows |= data[place : len(windows) + place] << np.uint64(8 * place)
    return np.unique(windows)


def jaccard(first: Hashes, second: Hashes) -> float:
    """Share of the windows of either text that both have.

    >>> jaccard(shingles("abcdefghi"), shingles("abcdefgh"))
    0.5
    """
    both = len(np.intersect1d(first, second, assume_unique=True))
    return both / (len(first) + len(second) - both)


def signature(windows: Hashes) -> Hashes:
    """MinHash [BANDS * ROWS]: entries of two texts agree as often as the texts are similar."""
    mixed = windows ^ (windows >> np.uint64(17))
    return ((mixed * _FACTORS[:, None] + _OFFSETS[:, None]) >> np.uint64(24)).min(axis=1)


def band_keys(pair: Pair) -> Hashes:
    """[BANDS] numbers; pairs that share one at the same place are candidates."""
    prompt, chosen, rejected = map(shingles, _texts(pair))
    parts = signature(prompt), signature(np.union1d(chosen, rejected))
    keys = np.zeros(BANDS, np.uint64)
    for column in (
        np.concatenate(parts).reshape(2, BANDS, ROWS).transpose(0, 2, 1).reshape(-1, BANDS)
    ):
        keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


def candidates(keys: Hashes) -> np.ndarray:
    """Pairs of rows [C, 2] that share a band, first < second, from keys [N, BANDS]."""
    found = [np.empty((0, 2), np.int64)]
    for band in range(keys.shape[1]):
        order = np.argsort(keys[:, band], kind="stable")
        ordered = keys[order, band]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        sizes = np.diff(np.r_[starts, len(ordered)])
        for start, size in zip(starts[sizes > 1], sizes[sizes > 1]):
            members = order[start : start + size]
            if size > LARGEST_GROUP:  # equal pairs agree in every band, and stay side by side
                members = members[np.lexsort(keys[members].T)]
            for step in range(1, min(size, LARGEST_GROUP)):
                found.append(np.sort(np.stack([members[:-step], members[step:]], axis=1), axis=1))
    return np.unique(np.concatenate(found), axis=0)


def contradiction(first: Pair, second: Pair) -> float | None:
    """How alike the crossed responses are; None where the labels do not contradict each other.

    Prompts with other numbers ask something else, however alike they look.
    """
    prompts = [text_of(pair.prompt) for pair in (first, second)]
    if _NUMBERS.findall(prompts[0]) != _NUMBERS.findall(prompts[1]):
        return None
    if jaccard(*map(shingles, prompts)) < ALIKE:
        return None
    chosen, rejected = (shingles(text) for text in _texts(first)[1:])
    other_chosen, other_rejected = (shingles(text) for text in _texts(second)[1:])
    crossed = min(jaccard(chosen, other_rejected), jaccard(rejected, other_chosen))
    straight = min(jaccard(chosen, other_chosen), jaccard(rejected, other_rejected))
    return crossed if crossed >= ALIKE and crossed > straight else None


def opposites(rows: np.ndarray, first: Sequence[Pair], second: Sequence[Pair]) -> list[Opposites]:
    """Those of the candidates [C, 2] that contradict each other, the most alike first."""
    found = []
    for (one, other), *pair in zip(rows.tolist(), first, second):
        similarity = contradiction(*pair)
        if similarity is not None:
            found.append(Opposites(one, other, similarity))
    return sorted(found, key=lambda entry: -entry.similarity)


def _texts(pair: Pair) -> tuple[str, str, str]:
    return text_of(pair.prompt), text_of(pair.chosen), text_of(pair.rejected)
