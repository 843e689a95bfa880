"""What the steps since the last line of the log add up to.

Sums lie in the run's state, so that a resumed run writes the very line that the killed one would
have; times are this process's own.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from .checkpoint import TrainState
from .forward import MEASURES
from .objective import Method
from .stream import Prefetch, StepBatch

GIB = 2**30


class Meter:
    """Adds up steps, and gives the line that the log shows of them."""

    def __init__(self, state: TrainState, method: Method, device: torch.device) -> None:
        self.state, self.method, self.device = state, method, device
        self.loss = self.accuracy = float("nan")  # of the last step
        self._restart()

    def wait_for(self, batches: Prefetch[StepBatch]) -> StepBatch | None:
        """The next batch; the time until it is there is counted."""
        start = time.perf_counter()
        batch = batches.next()
        self._waited += time.perf_counter() - start
        return batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what happens inside: an evaluation, a checkpoint."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def add(self, batch: StepBatch, totals: list[float]) -> None:
        """A step's sums over all ranks: `MEASURES` of its pairs, then tokens computed."""
        *sums, tokens = totals
        values = dict(zip(MEASURES, sums)) | {"pairs": len(batch)} | self._references(batch)
        for name, value in values.items():
            self.state.sums[name] = self.state.sums.get(name, 0) + value
        self.state.tokens += int(tokens)
        self.loss, self.accuracy = sums[0] / len(batch), sums[3] / len(batch)
        self._steps += 1
        self._pairs += len(batch)
        self._tokens += int(tokens)

    def line(self) -> dict[str, float]:
        """Means over the pairs since the last line; the next one starts anew."""
        sums = self.state.sums
        pairs = sums.pop("pairs")
        seconds = time.perf_counter() - self._start
        line = {name: total / pairs for name, total in sums.items()} | {
            "num_tokens": self.state.tokens,
            "perf/step_seconds": seconds / self._steps,
            "perf/pairs_per_second": self._pairs / seconds,
            "perf/tokens_per_second": self._tokens / seconds,
            "perf/data_wait": self._waited / seconds,
            "perf/peak_memory_gib": peak_memory(self.device) / GIB,
        }
        self.state.sums = {}
        self._restart()
        return line

    @property
    def tokens_per_second(self) -> float:
        """Since the last line."""
        return self._tokens / (time.perf_counter() - self._start)

    def _restart(self) -> None:
        self._start, self._waited = time.perf_counter(), 0.0
        self._steps = self._pairs = self._tokens = 0

    def _references(self, batch: StepBatch) -> dict[str, float]:
        """Sums over the pairs of each reference's weight, and of how often it was clipped."""
        names = self.method.references
        weights = batch.targets.weights.sum(0)
        values = {f"refs/weight/{name}": float(one) for name, one in zip(names, weights)}
        if self.method.epsilon is not None:
            clipped = np.nansum(batch.targets.clipped, 0)
            values |= {f"refs/clipped/{name}": float(c) for name, c in zip(names[1:], clipped[1:])}
        return values


def peak_memory(device: torch.device) -> int:
    """Bytes at this process's peak: on the GPU, else its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
