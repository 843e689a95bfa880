"""What a run says while it trains: log.jsonl always, a progress bar, trackers on request.

Names are TRL's (`loss`, `grad_norm`, `rewards/accuracies`, `eval_loss`, …) with `perf/*` and
`refs/*` beside them. A line of log.jsonl is one JSON object with its `step`; a value that is not
defined is null. On resume the lines behind the checkpoint are cut off, so that the file of a
killed run has neither a gap nor a line twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from ..errors import UserError

LOG_FILE = "log.jsonl"
TRACKERS = ("tensorboard", "wandb", "trackio")

Values = Mapping[str, float | None]


class Tracker(Protocol):
    """Where lines go beside log.jsonl."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """The log of the first process; on every other one it writes nothing."""

    def __init__(
        self, folder: Path, trackers: list[Tracker], *, first: bool, step: int, total: int
    ) -> None:
        self.path = folder / LOG_FILE
        self.trackers = trackers
        self._file = self.path.open("a", encoding="utf-8") if first else None
        # None: not where nobody watches.
        hidden = None if first else True
        self._bar = tqdm(total=total, initial=step, unit="step", disable=hidden)

    def write(self, step: int, values: Values) -> None:
        """Append a line; everything in it goes to the trackers too."""
        if self._file is None:
            return
        line = {"step": step} | {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        defined = {name: value for name, value in line.items() if value is not None}
        for tracker in self.trackers:
            tracker.log(defined, step)

    def show(self, step: int, loss: float, accuracy: float, tokens_per_second: float) -> None:
        """Move the progress bar; the time left is its own."""
        if self._bar.disable:
            return
        self._bar.set_postfix_str(
            f"loss {loss:.4f}, accuracy {accuracy:.2f}, {tokens_per_second:,.0f} tokens/s",
            refresh=False,
        )
        self._bar.update(step - self._bar.n)

    def sync(self) -> int:
        """Bring the log to disk; its length in bytes, which a checkpoint keeps."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()
        for tracker in self.trackers:
            tracker.close()


def cut(folder: Path, length: int) -> None:
    """Keep the first `length` bytes of the log, what a checkpoint knows of."""
    path = folder / LOG_FILE
    if length or path.exists():
        os.truncate(path, length)


def check_trackers(report_to: str) -> list[str]:
    """The trackers that `--report-to` names.

    Raises `UserError` for a name that is none and for one whose package is not installed.
    """
    names = [name.strip() for name in report_to.split(",")]
    names = [name for name in names if name not in ("", "none")]
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--report-to {name}: must be none or some of {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise UserError(f"--report-to {name}: it is not installed; run `pip install {name}`")
    return names


def open_trackers(
    report_to: str, run_name: str, folder: Path, settings: Mapping[str, Any], step: int
) -> list[Tracker]:
    """The trackers of a run, each going on where `step` left it."""
    return [
        TensorBoard(folder / name, step)
        if name == "tensorboard"
        else HostedRun(name, run_name, folder, settings)
        for name in check_trackers(report_to)
    ]


class TensorBoard:
    """Event files in the run's folder; those behind a resumed step are hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class HostedRun:
    """Weights & Biases, or trackio, which took over its interface."""

    def __init__(
        self, package: str, run_name: str, folder: Path, settings: Mapping[str, Any]
    ) -> None:
        self._module = import_module(package)
        known: dict[str, Any] = {"project": "mrpo", "name": run_name, "config": dict(settings)}
        if package == "wandb":
            known |= {"dir": str(folder), "id": run_name.replace("/", "-")}
        self._module.init(resume="allow", **known)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
