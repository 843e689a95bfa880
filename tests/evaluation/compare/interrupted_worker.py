"""A comparison's own worker, interrupted behind the third step as MRPO_TEST_INTERRUPT says.

kill: SIGKILL to itself, once. stop: SIGTERM to the command that started it, which is to send it
SIGTERM, once. kill-dpo: SIGKILL to itself in every cell of method dpo, each time.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from mrpo.evaluation.compare import worker
from mrpo.train import loop
from mrpo.train.loop import Run
from mrpo.train.stream import StepBatch

take_step = loop.optimizer_step


def interrupted_step(run: Run, batch: StepBatch) -> dict[str, float]:
    values = take_step(run, batch)
    how, mark = os.environ["MRPO_TEST_INTERRUPT"], Path(run.config.output_dir) / "interrupted"
    if how == "kill-dpo":
        if run.config.method.startswith("dpo"):
            os.kill(os.getpid(), signal.SIGKILL)
    elif run.state.step == 3 and not mark.exists():
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


loop.optimizer_step = interrupted_step

if __name__ == "__main__":
    sys.exit(worker.main())
