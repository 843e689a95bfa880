"""One reference's scoring as the parent runs it: workers started, heard, replaced, summed up.

With `--data-parallel-size` several workers hold copies of the reference on GPUs of their own and
share the shards through the store's leases. A worker that ran out of memory is replaced by one
that computes fewer tokens at once; any other failure is reported at the end, and the other
references are scored all the same.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tqdm import tqdm

from .process import Event, WorkerProcess
from .worker import Job

WORKER = "mrpo.precompute.worker"
SMALLEST_BATCH = 256  # tokens; a device without room for these does not hold the model


@dataclass(slots=True)
class ReferenceOutcome:
    """What one reference's scoring gave."""

    pairs: int = 0  # scored
    over_limit: int = 0  # left out by a limit of this run or of its engine
    tokens: int = 0  # computed for them
    seconds: float = 0.0  # from the first engine's readiness to the last shard's end
    facts: dict[str, Any] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)  # of the user's
    crashes: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.tokens and self.seconds else None


@dataclass(slots=True)
class _Running:
    """What the parent knows of one worker."""

    job: Job
    group: int  # of devices
    batch: int = 0  # tokens that it computes at once
    ahead: int = 0  # pairs it reported as progress, before their shard was finished
    mistake: str | None = None  # of the user's


class ReferenceRun:
    """Runs a job on every group of devices; `devices` are groups for CUDA_VISIBLE_DEVICES."""

    def __init__(self, job: Job, devices: Sequence[str | None], todo: int, logs: Path) -> None:
        self._job = job
        self._devices = devices
        self._logs = logs
        self._queue: SimpleQueue[tuple[WorkerProcess, Event | None]] = SimpleQueue()
        self._workers: dict[WorkerProcess, _Running] = {}
        self._outcome = ReferenceOutcome()
        self._ready: float | None = None
        self._bar = tqdm(
            total=todo, desc=job.settings.alias, unit=" pairs", unit_scale=True, disable=None
        )

    def run(self) -> ReferenceOutcome:
        """Blocks until no worker is left. An interrupt stops them all."""
        try:
            with self._bar:
                self._bar.set_postfix_str("loading")
                for group in range(len(self._devices)):
                    self._start(self._job, group)
                while self._workers:
                    worker, event = self._queue.get()
                    if event is None:
                        self._ended(worker, self._workers.pop(worker))
                    else:
                        self._hear(event, self._workers[worker])
        finally:
            for worker in self._workers:
                worker.stop()
        return self._outcome

    def _start(self, job: Job, group: int) -> None:
        name = job.settings.alias if len(self._devices) == 1 else f"{job.settings.alias}-{group}"
        environment = _environment(self._devices[group], len(self._devices))
        log = self._logs / f"{name}.log"
        worker = WorkerProcess(WORKER, job.values(), self._queue, log, environment)
        self._workers[worker] = _Running(job, group)

    def _hear(self, event: Event, running: _Running) -> None:
        kind = event["event"]
        if kind in ("ready", "done"):
            self._outcome.facts = dict(event["facts"])
            running.batch = event["facts"].get("max_tokens", 0)
            self._ready = self._ready or time.monotonic()
            self._bar.set_postfix_str("")
        elif kind == "progress":
            self._bar.update(event["pairs"])
            running.ahead += event["pairs"]
        elif kind == "shard":
            self._bar.update(event["pairs"] - running.ahead)
            running.ahead = 0
            self._outcome.pairs += event["pairs"]
            self._outcome.tokens += event["tokens"]
            self._outcome.over_limit += event["over_limit"]
            if self._ready is not None:
                self._outcome.seconds = time.monotonic() - self._ready
        elif kind == "waiting":
            self._bar.set_postfix_str(f"waiting for {event['shards']} shards of another process")
        elif kind == "error":
            running.mistake = event["text"]

    def _ended(self, worker: WorkerProcess, running: _Running) -> None:
        """Note how a worker ended; one that ran out of memory is replaced by a smaller one."""
        if running.mistake is not None:
            self._outcome.mistakes.append(running.mistake)
        elif worker.exit_code != 0:
            smaller = _with_half_the_batch(running) if worker.ran_out_of_memory else None
            if smaller is None:
                self._outcome.crashes.append(worker.why_it_failed())
                return
            self._bar.update(-running.ahead)
            self._bar.write(
                f"{smaller.settings.alias}: out of memory; going on with "
                f"{smaller.settings.max_tokens} tokens at once",
                file=sys.stderr,
            )
            self._start(smaller, running.group)


def _with_half_the_batch(running: _Running) -> Job | None:
    tokens = (running.batch or running.job.settings.max_tokens or 0) // 2
    if tokens < SMALLEST_BATCH:
        return None
    return replace(running.job, settings=replace(running.job.settings, max_tokens=tokens))


def _environment(devices: str | None, workers: int) -> dict[str, str]:
    if devices is not None:
        return {"CUDA_VISIBLE_DEVICES": devices}
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        return {"OMP_NUM_THREADS": str(threads)}
    return {}
