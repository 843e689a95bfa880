"""Worker processes, both sides: the parent's `WorkerProcess` and the child's `serve`.

A worker is a module of ours, started as `python -P -m MODULE`, so that no folder of the user's
named `data` or `model` is imported in place of ours. It reads jobs as lines of JSON from stdin and
writes events as lines of JSON to what was its stdout; file descriptor 1 itself then points at
stderr, the log, so that nothing a library prints gets among the events.

Each worker has a process group of its own, which ends with it. When its stdin ends, the parent is
gone, and the worker kills its whole group: no engine outlives its run, and GPU memory is freed.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ..errors import UserError, at_path

PYTHON = (sys.executable, "-P", "-m")
GRACE = 30.0  # seconds a worker may take to exit after it closed its event stream
TAIL_LINES = 15  # of the log, shown when a worker failed
# torch's messages, from the worker itself or from a subprocess of vLLM's.
OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|CUDA out of memory|HIP out of memory")

Event = Mapping[str, Any]
Report = Callable[[dict[str, Any]], None]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",")[:count] if names and count else [str(number) for number in range(count)]


def worker_environment(devices: str | None, workers: int) -> dict[str, str]:
    """What a worker of so many finds set: its GPUs, or its part of the threads.

    Threads that the user has set stay.
    """
    if devices is not None:
        return {"CUDA_VISIBLE_DEVICES": devices}
    if workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    return {}


class WorkerProcess:
    """One running worker. Its events arrive in `queue` as (worker, event); the last one is None.

    Several workers may share a queue. `job` and every later `send` must be JSON.
    """

    def __init__(
        self,
        module: str,
        job: Mapping[str, Any],
        queue: SimpleQueue[tuple[WorkerProcess, Event | None]],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        self._queue = queue
        self._log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [*PYTHON, module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        self.send(job)
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, job: Mapping[str, Any]) -> None:
        """Hand over a job. A worker that has died meanwhile says so by its last event, None."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # ValueError: closed by `_listen`
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    @property
    def exit_code(self) -> int:
        """Blocks until the process has ended; negative where a signal ended it."""
        return self._process.wait()

    @property
    def ran_out_of_memory(self) -> bool:
        return OUT_OF_MEMORY.search(self._logged()) is not None

    @property
    def how_it_ended(self) -> str:
        """The exit code or the signal, in words. Blocks until the process has ended."""
        code = self.exit_code
        if code == -signal.SIGKILL:
            return "killed by SIGKILL (by the system, for lack of memory?)"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def why_it_failed(self) -> str:
        """How the process ended, with the tail of its log."""
        tail = "\n".join(f"  {line}" for line in self._logged().splitlines()[-TAIL_LINES:])
        return f"{self.how_it_ended}; the end of {self.log}:\n{tail}"

    def terminate(self) -> None:
        """Ask the worker to end (SIGTERM); its last event, None, says when it has."""
        self._process.terminate()

    def stop(self) -> None:
        """Kill the worker and everything it started."""
        assert self._process.stdin is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # a line cut short by `stop`
            for line in self._process.stdout:
                self._queue.put((self, json.loads(line)))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        self.stop()  # also subprocesses that outlived their worker
        self._queue.put((self, None))

    def _logged(self) -> str:
        """What this worker wrote to its log, where an earlier worker may have written too."""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")


def serve(handle: Callable[[dict[str, Any], Report], None], *, once: bool = False) -> int:
    """The main loop of a worker: run `handle(job, report)` for every job; returns the exit code.

    A job ends with the event `{"event": "finished"}`, or `{"event": "error", "text": …}` where it
    raised `UserError`; the worker then waits for the next job, and ends only with its parent or
    by `WorkerProcess.stop`. With `once` it returns after the first job: 0, or 2 for `UserError`.
    Any other exception ends the process, with its traceback in the log.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as events:
        os.dup2(2, 1)

        def report(event: dict[str, Any]) -> None:
            print(json.dumps(event), file=events, flush=True)

        jobs: SimpleQueue[dict[str, Any]] = SimpleQueue()
        threading.Thread(target=_read_jobs, args=(jobs,), daemon=True).start()
        while True:
            code, last = 0, {"event": "finished"}
            try:
                handle(jobs.get(), report)
            except (UserError, OSError) as error:
                mistake = at_path(error) if isinstance(error, OSError) else error
                code, last = 2, {"event": "error", "text": str(mistake)}
            report(last)
            if once:
                return code


def _read_jobs(jobs: SimpleQueue[dict[str, Any]]) -> None:
    """Jobs from stdin, until its end. Not through `sys.stdin`: its lock would outlive `main`."""
    line = b""
    while data := os.read(0, 2**16):
        *lines, line = (line + data).split(b"\n")
        for complete in lines:
            jobs.put(json.loads(complete))
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)
