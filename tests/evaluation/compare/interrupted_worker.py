"""A comparison's own worker, interrupted behind the third step as MRPO_TEST_INTERRUPT says.

kill: SIGKILL to itself, once. stop: SIGTERM to the command that started it, which is to send it
SIGTERM, once. kill-dpo: SIGKILL to itself in every cell of method dpo, each time. kill-average:
SIGKILL to itself when the weights of a mean are written and the folder has not yet its name, once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from mrpo.evaluation.compare import averages, worker
from mrpo.train import loop
from mrpo.train.loop import Run
from mrpo.train.stream import StepBatch

take_step, write_average = loop.optimizer_step, averages.average


def interrupted_step(run: Run, batch: StepBatch) -> dict[str, float]:
    values = take_step(run, batch)
    how, mark = os.environ["MRPO_TEST_INTERRUPT"], Path(run.config.output_dir) / "interrupted"
    if how == "kill-dpo":
        if run.config.method.startswith("dpo"):
            os.kill(os.getpid(), signal.SIGKILL)
    elif how in ("kill", "stop") and run.state.step == 3 and not mark.exists():
        mark.touch()
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        arrived, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup)
        os.kill(os.getppid(), signal.SIGTERM)
        os.read(arrived, 1)  # blocks until a signal is here, whichever thread has caught it
        signal.set_wakeup_fd(-1)
    return values


def interrupted_average(folders: Sequence[Path], weights: Sequence[float], out: Path) -> None:
    write_average(folders, weights, out)
    mark = out.parent / "interrupted"
    if os.environ["MRPO_TEST_INTERRUPT"] == "kill-average" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


loop.optimizer_step = interrupted_step
averages.average = interrupted_average

if __name__ == "__main__":
    sys.exit(worker.main())
