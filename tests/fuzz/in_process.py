"""`mrpo WORDS…` in this process: without workers, without vLLM, and for a limited time."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from mrpo import cli

SECONDS = 120  # a case may take


@dataclasses.dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended; the code is None where an exception came out of it."""

    code: int | None
    out: str
    err: str


class TookTooLongError(BaseException):
    """Raised by the alarm; nothing in the program catches it."""


def run(folder: Path, words: Sequence[str]) -> Ran:
    """`mrpo WORDS…` in a folder, in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: int | None = None
    before, handlers = Path.cwd(), {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    environment = {"HOME": str(folder.parent), "MRPO_CACHE": str(folder.parent / "cache")}
    with (
        mock.patch.object(sys, "argv", ["mrpo", *words]),
        mock.patch.dict(os.environ, environment),
        _without_processes(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        os.chdir(folder)
        try:
            _with_alarm(cli.main)
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc(file=err)
        finally:
            os.chdir(before)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Ran(code, out.getvalue(), err.getvalue())


def _with_alarm(function: Callable[[], None]) -> None:
    def ring(*_: Any) -> None:
        raise TookTooLongError(f"more than {SECONDS} s")

    earlier = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        function()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


@contextlib.contextmanager
def _without_processes() -> Iterator[None]:
    """References and cells of a comparison in this process, without vLLM; no pretraining."""
    from mrpo.errors import UserError
    from mrpo.evaluation.compare import worker, workers
    from mrpo.precompute.reference_run import ReferenceRun

    def run_cells(runner: workers.CellRunner, cells: Any) -> list[workers.Failure]:
        failures = []
        for cell in cells:
            if cell.finished:
                continue
            try:
                with worker.process_state_kept():
                    worker._train_and_evaluate(cell, runner.base, runner.keep_models)
            except UserError as error:
                failures.append(workers.Failure(cell, str(error), "by hand"))
        return failures

    with (
        mock.patch.object(ReferenceRun, "run", lambda self, groups, logs: self.run_here()),
        mock.patch.object(workers.CellRunner, "run", run_cells),
        mock.patch("mrpo.precompute.reference_run.find_spec", return_value=None),
        mock.patch("mrpo.demo.run.write_data"),
        mock.patch("mrpo.demo.run.pretrain_all", return_value=1),
    ):
        yield
