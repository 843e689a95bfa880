"""Worker processes as their parent sees them: started with a job, heard through a queue, stopped.

A worker gets a process group of its own, so that whatever it started goes with it, and its stderr
is a log file whose tail explains a failure.
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
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

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
