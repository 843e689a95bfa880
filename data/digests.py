"""Digests that name things: canonical JSON for manifests, SHA-256 for bytes and sets of pair ids.

Used by the store for identities, units and file names, so that equal content has an equal name
whatever wrote it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from .ids import IdArray, halves


def canonical_json(value: Any) -> bytes:
    """UTF-8, sorted keys, no spaces, no NaN: the same bytes for the same value everywhere."""
    text = json.dumps(
        value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )
    return text.encode()


def digest_of(data: bytes | memoryview) -> str:
    """32 hex digits (128 bits) of SHA-256: enough to name content and to notice any flipped bit."""
    return hashlib.sha256(data).hexdigest()[:32]


def identity_of(inputs: Any) -> str:
    """The name of what makes a reference's scores: a digest of the inputs as canonical JSON."""
    return digest_of(canonical_json(inputs))


def unit_of(pair_ids: IdArray) -> str:
    """The name of a set of pairs: the same for any order of the same ids."""
    high, low = halves(pair_ids)
    order = np.lexsort((low, high))
    return digest_of(np.ascontiguousarray(pair_ids[order]).tobytes())
