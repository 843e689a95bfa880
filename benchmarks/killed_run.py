"""A run of `mrpo precompute` that is killed: when, which process, and that nothing outlives it.

`kills.py` makes a list of kills and starts a run for each; `stopped.py` is the process that runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mrpo.benchmarks.stopped import WORKER, Stop
from mrpo.data.store import Store

RANDOM = 3.0  # seconds from which a random moment of starting or loading is drawn
PATIENCE = 300.0  # seconds to wait for a moment

Victim = Literal["both", "parent", "worker"]
VICTIMS: tuple[Victim, ...] = ("both", "parent", "worker")
# Where a run stops to be killed; at the other moments it is killed while it runs.
STOPS: dict[str, dict[str, Any]] = {
    "before the record's rename": {"process": "parent"},
    "after the record's rename": {"process": "parent", "when": "after"},
    "before a shard's flush": {"process": "worker", "call": "fsync"},
    "before a shard's rename": {"process": "worker"},
    "when a shard's file appears": {"process": "worker", "when": "after"},
}
# Moments at which there is no worker yet.
ALONE = ("starting", *list(STOPS)[:2])
MOMENTS = (*ALONE, "loading", "scoring", *list(STOPS)[2:])


@dataclass(frozen=True, slots=True)
class Kill:
    """A kill: its moment, at the `count`-th shard of the run where the moment concerns a shard."""

    moment: str
    victim: Victim
    count: int
    seconds: float  # after the moment, where this is random


def make_kills(count: int, seed: int = 0) -> list[Kill]:
    """All moments in turn, with alternating victims; counts and delays are random."""
    dice = random.Random(seed)
    kills = []
    for number in range(count):
        moment = MOMENTS[number % len(MOMENTS)]
        victim = VICTIMS[(number + number // len(MOMENTS)) % len(VICTIMS)]
        if moment in ALONE:
            victim = "parent"
        delay = dice.uniform(0, RANDOM) * (0.02 if moment == "scoring" else 1)
        kills.append(Kill(moment, victim, dice.randint(1, 3), delay))
    return kills


class Run:
    """A `mrpo precompute` in a process group of its own, as is its worker."""

    def __init__(
        self, folder: Path, name: str, store: str = "store", stop: dict[str, Any] | None = None
    ) -> None:
        self.scored = folder / f"{name}.scored"
        self.log = folder / f"{name}.log"
        where = Stop(scored=str(self.scored), store=str(folder / store), **(stop or {}))
        command = [sys.executable, "-P", "-m", "mrpo.benchmarks.stopped", json.dumps(asdict(where))]
        command += ["precompute", "--engine", "hf", "--refs", "tiny", "--store", where.store]
        command += ["--pairs", str(folder / "pairs"), "--refs-config", str(folder / "refs.yaml")]
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment = {**os.environ, **settings, "MRPO_CACHE": str(folder / "cache")}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def worker(self) -> int | None:
        """The worker's process id, once there is one."""
        with contextlib.suppress(OSError):
            pid = self.process.pid
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                if f"\0{WORKER}\0" in Path(f"/proc/{child}/cmdline").read_text():
                    return int(child)
        return None

    @property
    def shards_begun(self) -> int:
        return self.scored.read_bytes().count(b"\n") if self.scored.exists() else 0

    def is_stopped(self, process: str) -> bool:
        pid = self.worker if process == "worker" else self.process.pid
        return pid is not None and state(pid) == "T"

    def wait_for(self, moment: Callable[[], object]) -> None:
        """Poll every millisecond. An early end is an error of the kill test itself."""
        end = time.monotonic() + PATIENCE
        while not moment():
            assert self.process.poll() is None, f"ended too early:\n{self.log.read_text()}"
            assert time.monotonic() < end, f"took too long:\n{self.log.read_text()}"
            time.sleep(0.001)

    def kill(self, victim: Victim) -> None:
        """Kill the victims; the rest of the run must end by itself soon."""
        worker = self.strike(victim)
        code = self.process.wait(60)
        assert code == (1 if victim == "worker" else -signal.SIGKILL), self.log.read_text()
        end = time.monotonic() + 30
        while worker is not None and state(worker) != "Z":
            assert time.monotonic() < end, "the worker outlived its parent"
            time.sleep(0.01)

    def strike(self, victim: Victim) -> int | None:
        """Send the signals; the worker's process id, if there is one.

        A worker that stopped itself and is no victim goes on.
        """
        worker = self.worker
        with contextlib.suppress(ProcessLookupError):  # a worker ends quickly after its parent
            if victim != "worker":
                os.killpg(self.process.pid, signal.SIGKILL)
            if worker is not None:
                os.killpg(worker, signal.SIGCONT if victim == "parent" else signal.SIGKILL)
        return worker


def killed(folder: Path, number: int, kill: Kill) -> int:
    """Run until the kill; returns the number of damaged files in the store then."""
    stop = STOPS.get(kill.moment)
    if stop and stop["process"] == "worker":
        stop = {**stop, "count": kill.count}
    run = Run(folder, f"run-{number:03}", stop=stop)
    try:
        if stop:
            run.wait_for(lambda: run.is_stopped(stop["process"]))
        elif kill.moment == "loading":
            run.wait_for(lambda: run.worker)
        elif kill.moment == "scoring":
            run.wait_for(lambda: run.shards_begun >= kill.count)
        time.sleep(0 if stop else kill.seconds)
    except BaseException:  # no stopped process may stay behind
        run.strike("both")
        raise
    run.kill(kill.victim)
    print(f"kill {number + 1}: {kill.moment}, {kill.victim}", file=sys.stderr)
    store = Store(folder / "store")
    return sum(
        len(store.scores(identity).damaged()) + store.is_damaged(identity)
        for identity in store.identities()
    )


def finish(run: Run) -> None:
    code = run.process.wait(PATIENCE)
    assert code == 0, run.log.read_text()


def state(pid: int) -> str:
    """The process's state letter, T where it is stopped, Z where it is dead or gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"
