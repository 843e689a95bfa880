"""Prompts as numbers: whatever goes by prompt, goes by a digest of it.

The held-out split, a training fraction, folds and bootstraps must keep equal prompts together and
must not move when data is added, shuffled or mixed. Each takes its own bits of one digest, so that
none depends on another: a training fraction is a fair sample of what is not held out.
"""

from __future__ import annotations

import hashlib

from .pairs import Turns, canonical_json


def prompt_number(prompt: Turns) -> int:
    """A number below 2**63 that equal prompts share."""
    return int.from_bytes(_digest(prompt)[:8]) >> 1


def is_validation(prompt: Turns, fraction: float) -> bool:
    """Whether a prompt is held out: its digest, as a number in [0, 1), is below the fraction.

    A prompt's side depends on nothing else, and a larger fraction only adds prompts.
    """
    return int.from_bytes(_digest(prompt)[:8]) < fraction * 2**64


def in_fraction(prompt: Turns, fraction: float) -> bool:
    """Whether a prompt is among those that a fraction of the training pairs is made of.

    Fractions are nested: a prompt in 5 % is also in 20 %, and 1 has all.
    """
    return int.from_bytes(_digest(prompt)[8:16]) < fraction * 2**64


def _digest(prompt: Turns) -> bytes:
    return hashlib.sha256(canonical_json(prompt).encode()).digest()
