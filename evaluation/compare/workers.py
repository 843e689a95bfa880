"""Run the cells of a comparison on worker processes that stay up, one for each device.

A worker (`worker.py`) trains and evaluates one cell after another. A worker that dies costs only
the cell it was running: a new worker tries that cell once more, from its last checkpoint, and the
other cells go on. A user's mistake is not tried again. The worker holds a lock on the cell's
folder, so that two comparisons never run the same cell at once.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from queue import SimpleQueue

from ...precompute.process import Event, WorkerProcess, worker_environment
from ..config import NO_TASKS, TaskSettings
from .cells import COMPARISON, SETTINGS, Cell, free_disk, to_job

WORKER = "mrpo.evaluation.compare.worker"
TRIES = 2
TAIL = 4  # lines of the log that explain a failure


@dataclass(frozen=True, slots=True)
class Failure:
    """A cell that could not be finished."""

    cell: Cell
    reason: str
    command: str  # to run by hand


@dataclass(slots=True)
class _Slot:
    """A device, the worker on it, and the cell that the worker is running."""

    device: str | None  # its CUDA_VISIBLE_DEVICES; None: there is no choice
    worker: WorkerProcess | None = None
    cell: Cell | None = None
    tries: int = 0


@dataclass(slots=True)
class CellRunner:
    """Runs cells, as many at once as there are devices."""

    base: str  # the reference that rewards are measured from
    devices: Sequence[str | None]  # for each worker its CUDA_VISIBLE_DEVICES; None: as it is
    keep_models: bool = True
    tasks: TaskSettings = NO_TASKS  # that the policies answer too
    _cells: Sequence[Cell] = ()  # of the run
    _queue: SimpleQueue[tuple[WorkerProcess, Event | None]] = field(default_factory=SimpleQueue)

    def run(self, cells: Sequence[Cell]) -> list[Failure]:
        """Finish every cell that is not, a soup after its parts; returns those that failed.

        Without `keep_models` a part's model goes when all its soups are made.
        On an interrupt, SIGTERM included, the workers end as soon as training has saved its
        checkpoints, and `KeyboardInterrupt` rises.
        """
        self._cells = cells
        todo = deque(cell for cell in cells if not cell.finished)
        total, done = len(todo), 0
        failures: list[Failure] = []
        slots = [_Slot(device) for device in self.devices]
        try:
            with _sigterm_as_interrupt():
                self._fill(slots, todo)
                while any(slot.cell for slot in slots):
                    worker, event = self._queue.get()
                    slot = next(slot for slot in slots if slot.worker is worker)
                    cell, reason = slot.cell, self._hear(slot, event)
                    if cell is None or reason is None:
                        continue
                    done += 1
                    if reason:
                        failures.append(Failure(cell, reason, self._by_hand(cell)))
                    outcome = f"FAILED: {reason}" if reason else "done"
                    print(f"[{done}/{total}] {cell}: {outcome}", file=sys.stderr, flush=True)
                    slot.cell = None
                    self._free_parts()
                    self._fill(slots, todo)
        except KeyboardInterrupt:
            self._let_save(slots)
            raise
        finally:
            for slot in slots:
                if slot.worker is not None:
                    slot.worker.stop()
        for cell in todo:
            part = next(part for part in cell.parts if not part.finished)
            failures.append(Failure(cell, f"its part failed: {part}", self._by_hand(cell)))
        self._free_parts()
        return failures

    def _keeps(self, cell: Cell) -> bool:
        """Whether the cell's model stays, if only until the soups that it is part of are made."""
        soups = (soup for soup in self._cells if cell in soup.parts)
        return self.keep_models or not all(soup.finished for soup in soups)

    def _free_parts(self) -> None:
        for part in dict.fromkeys(part for cell in self._cells for part in cell.parts):
            if part.finished and not self._keeps(part):
                free_disk(part, keep_model=False)

    def _fill(self, slots: Sequence[_Slot], todo: deque[Cell]) -> None:
        """Give every idle slot the first cell whose parts are all there."""
        for slot in slots:
            if slot.cell is not None:
                continue
            ready = (cell for cell in todo if all(part.finished for part in cell.parts))
            slot.cell, slot.tries = next(ready, None), 0
            if slot.cell is not None:
                todo.remove(slot.cell)
                self._try(slot, slot.cell)

    def _try(self, slot: _Slot, cell: Cell) -> None:
        """Send the cell to the slot's worker, a new one where there is none."""
        slot.tries += 1
        job = {
            "cell": to_job(cell),
            "base": self.base,
            "keep_model": self._keeps(cell),
            "tasks": asdict(self.tasks),
        }
        if slot.worker is not None:
            slot.worker.send(job)
            return
        environment = worker_environment(slot.device, len(self.devices))
        # The cell's log also shows what goes wrong while the worker starts.
        slot.worker = WorkerProcess(WORKER, job, self._queue, cell.log, environment)

    def _hear(self, slot: _Slot, event: Event | None) -> str | None:
        """The reason why the slot's cell failed, "" where it is finished, None while it runs."""
        worker = slot.worker
        assert worker is not None
        if event is not None:
            texts = {"finished": "", "error": event.get("text")}
            return texts.get(event["event"])
        slot.worker = None
        if slot.cell is None:
            return None
        if slot.tries < TRIES:
            self._try(slot, slot.cell)
            return None
        lines = slot.cell.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        end = " | ".join(line.split("\r")[-1].strip() for line in lines[-TAIL:])
        return f"{worker.how_it_ended}; the end of {slot.cell.log}: {end}"

    def _let_save(self, slots: Sequence[_Slot]) -> None:
        """SIGTERM to the workers: `train` saves a checkpoint first. Returns when all have ended."""
        running = {slot.worker for slot in slots if slot.worker is not None}
        for worker in running:
            worker.terminate()
        while running:
            worker, event = self._queue.get()
            if event is None:
                running.discard(worker)
        for slot in slots:
            slot.worker = None

    def _by_hand(self, cell: Cell) -> str:
        """The command that shows the failure again."""
        if cell.average:
            return f"mrpo compare --config {cell.folder.parents[3] / COMPARISON}"
        if not cell.run.finished:
            return f"mrpo train --config {cell.folder / SETTINGS}"
        out = cell.run.evaluation
        command = f"mrpo evaluate --runs {cell.folder} --base {self.base} --out {out}"
        return command + self.tasks.flags


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM raises `KeyboardInterrupt` as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread alone
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
