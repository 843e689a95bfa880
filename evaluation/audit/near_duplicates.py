"""Pairs that ask nearly the same question and carry opposite labels.

Texts are compared as sets of overlapping byte windows (shingles, Jaccard similarity). Candidates
come from datasketch's MinHash by locality-sensitive hashing: pairs whose prompts and whose
responses agree in at least one band of hashes. The responses of a pair are hashed together, so
that the signature does not depend on which one was chosen. Every candidate is then compared
exactly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasketch import MinHash

from ...data.pairs import Pair, Turns

WINDOW = 8  # bytes of a shingle, as many as a 64-bit number holds
# Two pairs whose prompts and whose responses are each 0.8 alike share a band in 95 of 100 cases.
BANDS, ROWS = 10, 3
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
    for band in range(BANDS):
        _, bucket, size = np.unique(
            signatures[:, band], axis=0, return_inverse=True, return_counts=True
        )
        shared = np.flatnonzero(size[bucket] > 1)
        shared = shared[np.argsort(bucket[shared], kind="stable")]
        for members in np.split(shared, np.flatnonzero(np.diff(bucket[shared])) + 1):
            if len(members) > LARGEST_GROUP:  # equal pairs agree in every band, stay side by side
                values = signatures[members].reshape(len(members), -1)
                members = members[np.lexsort(values.T)]
            for step in range(1, min(len(members), LARGEST_GROUP)):
                rows.append(np.sort(np.stack([members[:-step], members[step:]], axis=1), axis=1))
    return np.unique(np.concatenate(rows), axis=0)


def signature(pair: Pair) -> np.ndarray:
    """MinHash values [BANDS, 2·ROWS] of a pair: in each band ROWS of the prompt and ROWS of the
    two responses together."""
    prompt, chosen, rejected = map(shingles, _texts(pair))
    sets = [prompt.tolist(), np.union1d(chosen, rejected).tolist()]
    sketches = MinHash.bulk(sets, hashfunc=int, **_SKETCH)
    return np.hstack([sketch.hashvalues.reshape(BANDS, ROWS) for sketch in sketches])


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


def _texts(pair: Pair) -> tuple[str, str, str]:
    return text_of(pair.prompt), text_of(pair.chosen), text_of(pair.rejected)
