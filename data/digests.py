"""Digests that name things in the store: identities, units of pairs, the bytes of files.

Equal content has an equal name, whatever wrote it. All are heads of SHA-256, printed as hex.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from .ids import IdArray, halves
from .pairs import canonical_json


def digest_of(data: bytes | memoryview) -> str:
    """32 hex digits (128 bits) of SHA-256: enough to name content and to notice any flipped bit."""
    return hashlib.sha256(data).hexdigest()[:32]


def identity_of(inputs: Any) -> str:
    """The name of what makes a reference's scores: a digest of the inputs as canonical JSON."""
    return digest_of(canonical_json(inputs).encode())


def unit_of(pair_ids: IdArray) -> str:
    """The name of a set of pairs: the same for any order of the same ids."""
    high, low = halves(pair_ids)
    order = np.lexsort((low, high))
    return digest_of(np.ascontiguousarray(pair_ids[order]).tobytes())
