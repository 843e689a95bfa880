"""Pairs that ask nearly the same question and carry opposite labels.

Texts are compared as sets of overlapping byte windows (shingles, Jaccard similarity). Candidates
come from datasketch's MinHash LSH: two pairs become candidates where, in at least one band, both
their prompts and their responses agree. The responses of a pair are hashed together, so that the
signature does not depend on which one was chosen. Every candidate is then compared exactly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH

from ...data.pairs import Pair, Turns

WINDOW = 8  # bytes of a shingle, as many as a 64-bit number holds
# Two pairs whose prompts and whose responses are each 0.8 alike share a band in 95 of 100 cases.
BANDS, ROWS = 10, 3
INDEXED_BANDS = 2  # bands whose index is in memory at once, about 2 kB a pair
ALIKE = 0.7  # Jaccard similarity from which two texts count as nearly the same
LARGEST_GROUP = 64  # in a larger bucket only neighbors are compared; equal texts are neighbors

_NUMBERS = re.compile(r"\d+")
_SKETCH: dict[str, Any] = {"num_perm": BANDS * ROWS, "seed": 20_405, "scheme": "affine64"}


@dataclass(frozen=True, slots=True)
class Opposites:
    """Two rows (first < second) whose labels contradict each other."""

    first: int
    second: int
    similarity: float  # of the less similar of the two crossed pairs of responses


def candidates(signatures: np.ndarray) -> np.ndarray:
    """Rows [C, 2] that share a band, first < second, from signatures [N, BANDS, 2·ROWS]."""
    rows = [np.empty((0, 2), np.int64)]
    for start in range(0, BANDS, INDEXED_BANDS):
        for members in _buckets(signatures[:, start : start + INDEXED_BANDS]):
            size = len(members)
            if size > LARGEST_GROUP:  # equal pairs agree in every band, and stay side by side
                members = members[np.lexsort(signatures[members].reshape(size, -1).T)]
            for step in range(1, min(size, LARGEST_GROUP)):
                rows.append(np.sort(np.stack([members[:-step], members[step:]], axis=1), axis=1))
    return np.unique(np.concatenate(rows), axis=0)


def signature(pair: Pair) -> np.ndarray:
    """MinHash values [BANDS, 2·ROWS] of a pair: in each band ROWS of the prompt and ROWS of the
    two responses together."""
    prompt, chosen, rejected = map(shingles, _texts(pair))
    sets = [prompt.tolist(), np.union1d(chosen, rejected).tolist()]
    sketches = MinHash.bulk(sets, hashfunc=int, **_SKETCH)
    return np.hstack([sketch.hashvalues.reshape(BANDS, ROWS) for sketch in sketches])


def opposites(rows: np.ndarray, first: Sequence[Pair], second: Sequence[Pair]) -> list[Opposites]:
    """Those of the candidates [C, 2] that contradict each other, the most alike first."""
    contradictions = []
    for (row, other_row), *pair in zip(rows.tolist(), first, second):
        similarity = contradiction(*pair)
        if similarity is not None:
            contradictions.append(Opposites(row, other_row, similarity))
    return sorted(contradictions, key=lambda entry: -entry.similarity)


def contradiction(first: Pair, second: Pair) -> float | None:
    """How alike the crossed responses are; None where the labels do not contradict each other.

    Prompts with different numbers ask different questions, however alike they look.
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


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """The windows in both texts as a share of those in either.

    >>> jaccard(shingles("abcdefghi"), shingles("abcdefgh"))
    0.5
    """
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def shingles(text: str) -> np.ndarray:
    """The distinct windows of a text as sorted uint64; case and white space do not count.

    >>> len(shingles("abcdefghi")), len(shingles("ABCD  efgh")), len(shingles("a"))
    (2, 2, 1)
    """
    data = np.frombuffer(" ".join(text.lower().split()).encode(errors="replace"), np.uint8)
    data = np.pad(data, (0, max(WINDOW - len(data), 0))).astype(np.uint64)
    windows = np.zeros(len(data) - WINDOW + 1, np.uint64)
    for place in range(WINDOW):
        windows |= data[place : len(windows) + place] << np.uint64(8 * place)
    return np.unique(windows)


def text_of(turns: Turns) -> str:
    """Messages as one text with their roles; text unchanged."""
    if isinstance(turns, str):
        return turns
    return "\n\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in turns)


def _buckets(bands: np.ndarray) -> list[np.ndarray]:
    """The rows that share a band, in ascending order, from values [N, B, 2·ROWS]."""
    num_bands, width = bands.shape[1:]
    index = MinHashLSH(num_perm=num_bands * width, params=(num_bands, width))
    permutations = MinHash(num_bands * width, scheme="affine64").permutations
    for row, values in enumerate(bands.reshape(len(bands), -1)):
        sketch = MinHash(hashvalues=values, permutations=permutations, scheme="affine64")
        index.insert(row, sketch, check_duplication=False)
    buckets = [table.get(key) for table in index.hashtables for key in list(table.keys())]
    return [np.array(sorted(members)) for members in buckets if len(members) > 1]


def _texts(pair: Pair) -> tuple[str, str, str]:
    return text_of(pair.prompt), text_of(pair.chosen), text_of(pair.rejected)
