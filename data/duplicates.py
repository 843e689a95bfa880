"""Which pairs came before: the ids seen so far, 16 bytes each, in sorted runs.

Runs merge as the digits of a binary counter do, so that each id is moved a logarithmic number of
times and few runs have to be searched, for 10 million ids as for ten.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .ids import IdArray, IdIndex


class SeenIds:
    """Tells new ids from known ones and remembers them."""

    def __init__(self) -> None:
        self._runs: list[IdArray] = []  # each sorted, the longest first

    def add(self, ids: IdArray) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether each id, [n], comes for the first time; of equal ones in a batch the first."""
        new = np.zeros(len(ids), dtype=bool)
        new[IdIndex(ids).firsts()] = True
        order = np.argsort(ids)  # sorted queries walk a run in order, which caches far better
        ordered = ids[order]
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, ordered), len(run) - 1)
            new[order[run[at] == ordered]] = False
        self._remember(ordered[new[order]])
        return new

    def _remember(self, run: IdArray) -> None:
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")
        if len(run):
            self._runs.append(run)
