"""In place of a comparison's worker: notes each try, then does what the cell's name says."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from mrpo.errors import UserError
from mrpo.precompute.process import Report, serve


def handle(job: dict[str, Any], report: Report) -> None:
    folder = Path(job["cell"]["folder"])
    device, threads = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS")
    with (folder / "tries").open("a") as file:
        file.write(f"{os.getpid()} {device} {threads}\n")
    first = len((folder / "tries").read_text().splitlines()) == 1
    if folder.name == "raises":
        raise RuntimeError("out of luck")
    if folder.name == "exits":
        print("on its way out", file=sys.stderr, flush=True)
        os._exit(7)
    if folder.name == "killed-once" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    if folder.name == "mistake":
        raise UserError("--beta is 0; it must be above 0")
    if folder.name.startswith("slow"):
        wait_for_sigterm(folder)
    result = {"identity": "0" * 32, "seconds": {"train": 0, "evaluate": 0}}
    (folder / "result.json").write_text(json.dumps(result))


def wait_for_sigterm(folder: Path) -> None:
    """As `train`: saves when it is asked to stop, and ends."""

    def save(number: int, frame: FrameType | None) -> None:
        (folder / "saved").touch()
        sys.exit(143)

    signal.signal(signal.SIGTERM, save)
    (folder / "waiting").touch()
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(serve(handle))
