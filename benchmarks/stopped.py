"""`mrpo precompute` that records which rows it scores and stops itself at a given point.

    python -m mrpo.benchmarks.stopped STOP precompute …

`killed_run.py` starts it, waits for the stop (SIGSTOP) and kills it. STOP is a `Stop` as JSON. All
the rest is the command itself, including its worker, which this file runs too.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

from mrpo import cli
from mrpo.files import TEMPORARY
from mrpo.precompute import process, worker
from mrpo.precompute import scoring as loop

WORKER = "worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Where parent or worker stops: around the n-th file that it writes to the store."""

    scored: str  # file to which a line is added when the scoring of a shard begins
    store: str
    process: Literal["parent", "worker"] | None = None  # None: nowhere
    call: Literal["fsync", "replace"] = "replace"
    when: Literal["before", "after"] = "before"
    count: int = 1


def main() -> int:
    stop = Stop(**json.loads(sys.argv[1]))
    is_worker = sys.argv[2] == WORKER
    if stop.process == ("worker" if is_worker else "parent"):
        _stop_in_write(stop)
    if is_worker:
        _record_what_is_scored(stop.scored)
        return worker.main()
    # The name of the worker's own module follows as one more argument.
    process.PYTHON = (sys.executable, "-P", "-m", "mrpo.benchmarks.stopped", sys.argv[1], WORKER)  # type: ignore[assignment]
    del sys.argv[1]
    cli.main()
    return 0


def _record_what_is_scored(path: str) -> None:
    """Append {"time", "ids"} before each shard is scored; a written line survives any kill."""
    score_rows = loop.score_rows
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def recording(rows: Any, *arguments: Any, **options: Any) -> Any:
        line = {"time": time.time(), "ids": [row.tobytes().hex() for row in rows.ids]}
        os.write(file, json.dumps(line).encode() + b"\n")
        return score_rows(rows, *arguments, **options)

    loop.score_rows = recording


def _stop_in_write(stop: Stop) -> None:
    """Wrap a function of `os`; only calls on unfinished files of the store count."""
    real, calls = getattr(os, stop.call), 0

    def stopping(target: Any, *arguments: Any) -> None:
        nonlocal calls
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
        calls += path.startswith(stop.store) and TEMPORARY in path
        here = calls == stop.count and TEMPORARY in path
        if here and stop.when == "before":
            os.kill(os.getpid(), signal.SIGSTOP)
        real(target, *arguments)
        if here and stop.when == "after":
            os.kill(os.getpid(), signal.SIGSTOP)

    setattr(os, stop.call, stopping)


if __name__ == "__main__":
    sys.exit(main())
