"""What a run logs while it trains: log.jsonl always, a progress bar, trackers on request.

Names are TRL's (`loss`, `grad_norm`, `rewards/accuracies`, `eval_loss`, …), with `perf/*` and
`refs/*` beside them. A line of log.jsonl is a JSON object with its `step`; an undefined value is
null. On resume the lines after the checkpoint are cut off, and the sums since the last line are
part of the checkpoint, so that the log of a killed run has neither a gap nor a line twice.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import UserError
from ..files import to_json, write_text
from ..method.objective import Method
from ..settings import comma_separated
from .checkpoint import TrainState
from .forward import MEASURES
from .run_folder import RunFolder
from .stream import Prefetch, StepBatch

GIB = 2**30
TRACKERS = ("tensorboard", "wandb", "trackio")


class RunLog:
    """The log of a run, written by the first process; on the others all methods do nothing."""

    def __init__(
        self, path: Path, trackers: list[Any], *, first: bool, step: int, total: int, length: int
    ) -> None:
        """The first `length` bytes of the file stay, those up to the checkpoint at `step`."""
        self.trackers, self._file = trackers, None
        if first:
            if path.exists() or length:
                os.truncate(path, length)
            self._file = path.open("a", encoding="utf-8")
        disable = None if first else True  # None: unless stderr is a terminal
        self._bar = tqdm(total=total, initial=step, unit="step", disable=disable)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Append a line, and send it to the trackers."""
        if self._file is None:
            return
        line = to_json({"step": step} | dict(values))
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        defined = {name: value for name, value in line.items() if value is not None}
        for tracker in self.trackers:
            tracker.log(defined, step=step)

    def show(self, step: int, loss: float, accuracy: float, tokens_per_second: float) -> None:
        """Update the progress bar."""
        self._bar.set_postfix_str(
            f"loss {loss:.4f}, accuracy {accuracy:.2f}, {tokens_per_second:,.0f} tokens/s",
            refresh=False,
        )
        self._bar.update(step - self._bar.n)

    def sync(self) -> int:
        """Bring the log to disk; returns its length in bytes, which checkpoints store."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()
        while self.trackers:
            self.trackers.pop().finish()


def check_trackers(report_to: str) -> list[str]:
    """The trackers that `--report-to` names.

    Raises `UserError` for an unknown name and for one whose package is not installed.
    """
    names = [name for name in comma_separated(report_to) if name != "none"]
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--report-to {name}: must be none or some of {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise UserError(f"--report-to {name}: it is not installed; run `pip install {name}`")
    return names


def open_trackers(
    report_to: str, run_name: str, folder: RunFolder, settings: Mapping[str, Any], step: int
) -> list[Any]:
    """The trackers of a run, each continuing after `step`.

    wandb and trackio are modules with `log` and `finish`; `TensorBoard` has the same two. A hosted
    run has an id of its own, whatever the name: wandb knows it by the id, trackio by the name.
    """
    trackers: list[Any] = []
    for name in check_trackers(report_to):
        if name == "tensorboard":
            trackers.append(TensorBoard(folder.path / name, step))
            continue
        own = _tracker_id(folder, step)
        details: dict[str, Any] = {"project": "mrpo", "config": dict(settings)}
        if name == "wandb":
            details |= {"name": run_name, "id": own, "dir": str(folder.path)}
        else:
            details |= {"name": f"{run_name.replace('/', '-')}-{own}"}
        trackers.append(import_module(name))
        trackers[-1].init(resume="allow", **details)
    return trackers


def _tracker_id(folder: RunFolder, step: int) -> str:
    """The id under which trackers know the run; a run that starts from scratch gets a new one."""
    path = folder.tracker_id
    if step == 0 or not path.is_file():
        write_text(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8")


class TensorBoard:
    """Event files in the run's folder; events after a resumed step are hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        self.finish = self._writer.close

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


class Meter:
    """Sums of the steps since the last line of the log, and the line made of them.

    The sums are in the run's state; times are those of this process.
    """

    def __init__(self, state: TrainState, method: Method, device: torch.device) -> None:
        self.state, self.method, self.device = state, method, device
        self.loss = self.accuracy = float("nan")  # of the last step
        self._restart()

    def wait_for(self, batches: Prefetch[StepBatch]) -> StepBatch | None:
        """The next batch; the time spent waiting is measured."""
        start = time.perf_counter()
        batch = batches.next()
        self._waited += time.perf_counter() - start
        return batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside the block out: an evaluation, a checkpoint."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def add(self, batch: StepBatch, totals: list[float]) -> None:
        """Add a step. `totals` are sums over all ranks, as `micro_batches` returns them."""
        *sums, balancing, tokens = totals
        values = dict(zip(MEASURES, sums)) | {"pairs": len(batch)} | self._references(batch)
        if balancing:
            values["aux_loss"] = balancing
        for name, value in values.items():
            self.state.sums[name] = self.state.sums.get(name, 0) + value
        self.state.tokens += int(tokens)
        self.loss, self.accuracy = sums[0] / len(batch), sums[3] / len(batch)
        self._steps += 1
        self._pairs += len(batch)
        self._tokens += int(tokens)

    def line(self) -> dict[str, float]:
        """Means over the pairs since the last line; starts the next one."""
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
        values = {f"refs/weight/{name}": float(total) for name, total in zip(names, weights)}
        if self.method.epsilon is not None:
            clipped = batch.targets.clipped.nansum(0)
            values |= {
                f"refs/clipped/{name}": float(total) for name, total in zip(names[1:], clipped[1:])
            }
        return values


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: allocated on the GPU, otherwise resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
