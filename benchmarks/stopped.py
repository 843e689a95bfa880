"""`mrpo precompute` that tells which rows it scores and stops itself at a given place.

    python -m mrpo.benchmarks.stopped STOP precompute …

`kills.py` starts it, waits for the stop (SIGSTOP), and kills what it wants to. STOP is a `Stop` as
JSON. Everything else is the command itself, its worker included, which this file runs too.
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
    """Where one of the two processes stops: around the n-th file that it writes to the store."""

    scored: str  # the file that gets a line for each shard when its scoring begins
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
        _tell_what_is_scored(stop.scored)
        return worker.main()
    # The name of the worker's own module follows as one more argument.
    process.PYTHON = (sys.executable, "-m", "mrpo.benchmarks.stopped", sys.argv[1], WORKER)  # type: ignore[assignment]
    del sys.argv[1]
    cli.main()
    return 0


def _tell_what_is_scored(path: str) -> None:
    """Add {"time", "ids"} before each shard's scoring; a line that is there survives any kill."""
    score_rows = loop.score_rows
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def told(rows: Any, *arguments: Any, **options: Any) -> Any:
        line = {"time": time.time(), "ids": [row.tobytes().hex() for row in rows.ids]}
        os.write(file, json.dumps(line).encode() + b"\n")
        return score_rows(rows, *arguments, **options)

    loop.score_rows = told


def _stop_in_write(stop: Stop) -> None:
    """Wrap a call of `os`; only its uses on the store's unfinished files count."""
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
