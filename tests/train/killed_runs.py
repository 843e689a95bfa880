"""Trains runs that are killed, each in a fork of this process, and resumes them.

    python killed_runs.py SETTINGS.json

A fork shares the imports, which would otherwise take most of the time. The settings map a run's
folder name to where its first part is killed: `{"step": n}` after n optimizer steps,
`{"save": n}` in the middle of the n-th checkpoint, `{"rename": n}` between its last byte and its
name, `{"finish": 1}` while the final model is written.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (so that no fork has to)
import transformers.models.llama.modeling_llama  # noqa: F401

from mrpo import files
from mrpo.train import checkpoint, loop, run
from mrpo.train.config import TrainConfig

PLACES: dict[str, tuple[Any, str]] = {
    "step": (loop, "optimizer_step"),
    "save": (checkpoint.dcp, "save"),
    "rename": (files, "sync"),
    "finish": (run, "write_model"),
}


def main() -> None:
    for name, (settings, kill) in json.loads(Path(sys.argv[1]).read_text()).items():
        if kill:
            assert in_fork(lambda: train(settings, kill)) == signal.SIGKILL, name  # noqa: B023
        assert in_fork(lambda: train(settings | {"resume": bool(kill)}, {})) == 0, name  # noqa: B023


def train(settings: dict[str, Any], kill: dict[str, int]) -> None:
    for place, count in kill.items():
        die_after(*PLACES[place], count)
    run.train(TrainConfig(**settings))


def die_after(module: Any, name: str, count: int) -> None:
    """Replace a function by one that ends the process after its `count`-th call.

    Of `sync` only the calls for a checkpoint's folder count: two for each checkpoint, one with the
    state and one just before the folder gets its name.
    """
    function: Callable[..., Any] = getattr(module, name)
    calls = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        result = function(*args, **kwargs)
        calls += name != "sync" or args[0].name.startswith(".step-")
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, deadly)


def in_fork(work: Callable[[], None]) -> int:
    """Do the work in a child process; the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


if __name__ == "__main__":
    main()
