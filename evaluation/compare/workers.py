"""Run the cells of a comparison: each a process of its own, as many at once as there is room.

A cell is `mrpo train --config cell.yaml` and then `mrpo evaluate`, the very commands a user would
type; their output is the cell's log. A cell that fails is tried once more, from its last
checkpoint, unless the user's settings are at fault. The cell's folder is locked while a command
works in it, by a lock that the command inherits: where this process is killed, a second one finds
the cell taken until the command has ended.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import IO

from ...train.checkpoint import STATE_FILE
from ...train.run_folder import RunFolder
from ..results import write_json
from .cells import EVALUATION, LOG, RESULT, SETTINGS, Cell

TRIES = 2
USERS_FAULT = 2  # exit code of a command that its settings keep from working
TAIL = 4  # lines of the log that explain a failure

Command = Sequence[str]


@dataclass(frozen=True, slots=True)
class Failure:
    """A cell that could not be finished."""

    cell: Cell
    reason: str
    command: str  # that failed, to be run by hand


@dataclass(slots=True)
class Grid:
    """All that is needed to run cells, and what came of them."""

    evaluate: Callable[[Cell], Command]  # arguments of `mrpo` for a trained cell
    prefix: Command  # what starts `mrpo`: Python, or torchrun
    seats: Sequence[str | None]  # for each cell at once its CUDA_VISIBLE_DEVICES, None: no choice
    keep_models: bool
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def run(self, cells: Sequence[Cell]) -> list[Failure]:
        """Finish every cell that is not; returns those that failed. Stops all on an interrupt."""
        todo = [cell for cell in cells if not cell.finished]
        free: SimpleQueue[str | None] = SimpleQueue()
        for seat in self.seats:
            free.put(seat)
        failures: list[Failure] = []
        with _terminated_as_interrupt(), ThreadPoolExecutor(len(self.seats)) as pool:
            futures = {pool.submit(self._seated, cell, free): cell for cell in todo}
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    failure = future.result()
                    failures += [failure] if failure else []
                    how = f"FAILED: {failure.reason}" if failure else "done"
                    _say(f"[{done}/{len(todo)}] {futures[future]}: {how}")
            except BaseException:
                self._stop()
                raise
        return failures

    def _seated(self, cell: Cell, free: SimpleQueue[str | None]) -> Failure | None:
        seat = free.get()
        try:
            return None if self._stopped.is_set() else self._finish(cell, seat)
        finally:
            free.put(seat)

    def _finish(self, cell: Cell, seat: str | None) -> Failure | None:
        """Train and evaluate a cell, each at most `TRIES` times."""
        with _locked(cell.folder) as lock:
            if lock is None:
                return Failure(cell, "another process is at work on it", "")
            started = time.monotonic()
            failure = None
            if not RunFolder(cell.folder).finished:
                failure = self._try(
                    cell, ["train", "--config", str(cell.folder / SETTINGS)], seat, lock
                )
            trained = time.monotonic()
            if failure is None and not (cell.folder / EVALUATION).is_file():
                failure = self._try(cell, self.evaluate(cell), seat, lock)
            if failure is None:
                seconds = {"train": trained - started, "evaluate": time.monotonic() - trained}
                self._tidy(cell)
                write_json(cell.folder / RESULT, {"seconds": seconds})
            return failure

    def _try(self, cell: Cell, command: Command, seat: str | None, lock: int) -> Failure | None:
        line = [*self.prefix, *command]
        with (cell.folder / LOG).open("ab") as log:
            for _ in range(TRIES):
                log.write(f"$ mrpo {shlex.join(command)}\n".encode())
                log.flush()
                code = self._run(line, seat, lock, log)
                if code == 0:
                    return None
                if code == USERS_FAULT or self._stopped.is_set():
                    break
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        reason = f"{how}; the end of {cell.folder / LOG}: {_tail(cell.folder / LOG)}"
        return Failure(cell, reason, f"mrpo {shlex.join(command)}")

    def _run(self, line: Command, seat: str | None, lock: int, log: IO[bytes]) -> int:
        environment = dict(os.environ)
        if seat is not None:
            environment["CUDA_VISIBLE_DEVICES"] = seat
        elif len(self.seats) > 1:
            threads = max(1, (os.cpu_count() or 1) // len(self.seats))
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        process = subprocess.Popen(
            line, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, pass_fds=[lock]
        )
        self._running.add(process)
        if self._stopped.is_set():
            process.terminate()
        code = process.wait()
        self._running.discard(process)
        return code

    def _stop(self) -> None:
        """End all that runs; `mrpo train` saves a checkpoint first."""
        self._stopped.set()
        for process in list(self._running):
            process.terminate()

    def _tidy(self, cell: Cell) -> None:
        """Free the disk: a finished cell's checkpoints are several times its model, and not needed.

        What they know of the run stays, so that `mrpo train` still takes it for finished and
        `mrpo evaluate` shows its model the pairs as in training.
        """
        if not self.keep_models:
            shutil.rmtree(RunFolder(cell.folder).model)
            shutil.rmtree(RunFolder(cell.folder).checkpoints)
            return
        for path in RunFolder(cell.folder).checkpoints.glob("*/*"):
            if path.name != STATE_FILE:
                path.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[int | None]:
    """The folder's lock, for a child to inherit; None where another process has it."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM ends this process as an interrupt would: with its children."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " | ".join(line.split("\r")[-1].strip() for line in lines[-TAIL:])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
