"""Worker processes as their parent sees them: started with a job, heard through a queue, stopped.

A worker gets a process group of its own, so that whatever it started goes with it, and its stderr
is a log file whose tail explains a failure.


One reference's scoring as its parent runs it: workers started, heard, replaced, summed up.

With `--data-parallel-size` several workers hold copies of the reference on GPUs of their own and
share the shards through the store's leases. A worker that ran out of memory is replaced by one
that computes fewer tokens at once; any other failure is told at the end, and costs no other
reference anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tqdm import tqdm

from .worker import Job

COMMAND = (sys.executable, "-m", "mrpo.precompute.worker")
GRACE = 30.0  # seconds that a worker may take to put its engine away
TAIL_LINES = 15
# How torch says it, in this process or in one of vLLM's.
OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|CUDA out of memory|HIP out of memory")

Event = Mapping[str, Any]


class WorkerProcess:
    """One running job. Its events arrive in `queue` as (worker, event); the last event is None."""

    def __init__(
        self,
        job: Job,
        queue: SimpleQueue[tuple[WorkerProcess, Event | None]],
        log: Path,
        environment: Mapping[str, str],
    ) -> None:
        self.job = job
        self.log = log
        self.error: str | None = None  # a user's mistake that the worker told
        self._queue = queue
        self._log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # gone already: its exit code tells
            self._process.stdin.write(job.to_json().encode() + b"\n")
            self._process.stdin.flush()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def exit_code(self) -> int:
        return self._process.wait()

    @property
    def ran_out_of_memory(self) -> bool:
        return OUT_OF_MEMORY.search(self._logged()) is not None

    def why_it_failed(self) -> str:
        """How the process ended, with the tail of its log."""
        code = self.exit_code
        how = f"exit code {code}"
        if code < 0:
            how = f"killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += " (by the system, for want of memory?)"
        tail = "\n".join(f"  {line}" for line in self._logged().splitlines()[-TAIL_LINES:])
        return f"{how}; the end of {self.log}:\n{tail}"

    def stop(self) -> None:
        """End the worker and all that it started, now."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # closed by `stop`
            for line in self._process.stdout:
                self._queue.put((self, json.loads(line)))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):  # engines that outlived their worker
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._close()
        self._queue.put((self, None))

    def _close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _logged(self) -> str:
        """What this worker wrote to its log, which an earlier one may have begun."""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")


SMALLEST_BATCH = 256  # tokens; a device without room for these does not hold the model


@dataclass(slots=True)
class ReferenceOutcome:
    """What came of one reference."""

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


class ReferenceRun:
    """Runs a job on every group of devices; `devices` are groups for CUDA_VISIBLE_DEVICES."""

    def __init__(self, job: Job, devices: Sequence[str | None], todo: int, logs: Path) -> None:
        self._job = job
        self._logs = logs
        self._queue: SimpleQueue[tuple[WorkerProcess, Event | None]] = SimpleQueue()
        self._outcome = ReferenceOutcome()
        self._ready: float | None = None
        self._ahead: dict[WorkerProcess, int] = {}  # pairs told before their shard was
        self._batch: dict[WorkerProcess, int] = {}  # tokens that a worker computes at once
        self._bar = tqdm(
            total=todo, desc=job.settings.alias, unit=" pairs", unit_scale=True, disable=None
        )
        self._devices = devices

    def run(self) -> ReferenceOutcome:
        """Blocks until no worker is left. An interrupt ends them all at once."""
        workers = {self._start(self._job, seat): seat for seat in range(len(self._devices))}
        try:
            with self._bar:
                self._bar.set_postfix_str("loading")
                while workers:
                    worker, event = self._queue.get()
                    if event is not None:
                        self._hear(worker, event)
                        continue
                    seat = workers.pop(worker)
                    if (smaller := self._after(worker)) is not None:
                        workers[self._start(smaller, seat)] = seat
        finally:
            for worker in workers:
                worker.stop()
        return self._outcome

    def _start(self, job: Job, seat: int) -> WorkerProcess:
        name = job.settings.alias if len(self._devices) == 1 else f"{job.settings.alias}-{seat}"
        environment = _environment(self._devices[seat], len(self._devices))
        return WorkerProcess(job, self._queue, self._logs / f"{name}.log", environment)

    def _hear(self, worker: WorkerProcess, event: Event) -> None:
        kind = event["event"]
        if kind in ("ready", "done"):
            self._outcome.facts = dict(event["facts"])
            self._batch[worker] = event["facts"].get("max_tokens", 0)
            self._ready = self._ready or time.monotonic()
            self._bar.set_postfix_str("")
        elif kind == "progress":
            self._bar.update(event["pairs"])
            self._ahead[worker] = self._ahead.get(worker, 0) + event["pairs"]
        elif kind == "shard":
            self._bar.update(event["pairs"] - self._ahead.pop(worker, 0))
            self._outcome.pairs += event["pairs"]
            self._outcome.tokens += event["tokens"]
            self._outcome.over_limit += event["over_limit"]
            if self._ready is not None:
                self._outcome.seconds = time.monotonic() - self._ready
        elif kind == "waiting":
            self._bar.set_postfix_str(f"waiting for {event['shards']} shards of another process")
        elif kind == "error":
            worker.error = event["text"]

    def _after(self, worker: WorkerProcess) -> Job | None:
        """What to do when a worker has ended: the job to start in its place, if any."""
        if worker.error is not None:
            self._outcome.mistakes.append(worker.error)
        elif worker.exit_code == 0:
            return None
        elif worker.ran_out_of_memory and (job := self._smaller(worker)) is not None:
            self._bar.update(-self._ahead.pop(worker, 0))
            tokens = job.settings.max_tokens
            self._bar.write(
                f"{job.settings.alias}: out of memory; going on with {tokens} tokens at once",
                file=sys.stderr,
            )
            return job
        else:
            self._outcome.crashes.append(worker.why_it_failed())
        return None

    def _smaller(self, worker: WorkerProcess) -> Job | None:
        batch = self._batch.get(worker) or worker.job.settings.max_tokens or 0
        if batch // 2 < SMALLEST_BATCH:
            return None
        return replace(worker.job, settings=replace(worker.job.settings, max_tokens=batch // 2))


def _environment(devices: str | None, workers: int) -> dict[str, str]:
    if devices is not None:
        return {"CUDA_VISIBLE_DEVICES": devices}
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        return {"OMP_NUM_THREADS": str(threads)}
    return {}
