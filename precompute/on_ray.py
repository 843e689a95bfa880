"""A reference's shards as tasks on a Ray cluster: `--engine ray`.

    with cluster("auto"):
        for event in score_on_ray(job, shards): …    # those of a worker process

The shards go through an actor pool of Ray Data. Each actor holds one loaded engine, is called with
the number of a shard, writes that shard's rows to the store as a worker process does, and returns
its events. Ray Data was taken, not Ray's own `ActorPool`: it starts an actor again that was lost
with its process or node, gives its shard to another one, lets the pool grow and shrink with the
cluster, and keeps a bounded number of shards under way; `ActorPool` has a fixed list of actors and
raises the error of a lost one. A shard that comes back finds in the store what is done, so nothing
is scored twice. The driver holds no scores: it may die and be started again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, at_path
from .engines import EngineName, load_engine
from .process import Event
from .scoring import Job, ReferenceScorer

IN_FLIGHT = 2  # shards that an actor has in hand or in front of it
OBJECT_STORE = 200 * 2**20  # bytes, of a cluster that is started here: events are all it holds
TIMEOUT = 10.0  # seconds that a cluster may take to answer
QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
FOREIGN = ("tests", "benchmarks", "docs")  # folders of a checkout that no worker needs


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Within the block this process belongs to a cluster; at its end the job's actors end.

    `address` names one that is there, which gets this package with the job; the packages that it
    depends on must be installed on its nodes. None starts one on this machine. Raises `UserError`
    where Ray is missing, no cluster answers, or this process belongs to one already.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns of what is as it should be
    try:
        import ray.data
    except ImportError as error:
        raise UserError(f"--engine ray: {error}; pip install 'mrpo[ray]'") from None
    if ray.is_initialized():
        raise UserError(
            "--engine ray: this process belongs to a Ray cluster already; call `ray.shutdown()` "
            "first, or run `mrpo precompute` as a process of its own"
        )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    try:
        if address is None:
            ray.init(include_dashboard=False, object_store_memory=OBJECT_STORE, **QUIET)
        else:
            _join(address)
        yield
    finally:
        ray.shutdown()


def _join(address: str) -> None:
    import ray

    try:
        _knock(address)
        with tempfile.TemporaryDirectory() as folder:
            shipped = {"py_modules": [str(package_copy(Path(folder) / "mrpo"))]}
            ray.init(address=address, runtime_env=shipped, **QUIET)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--ray-address {address}: {reason}; `ray status` on a node of the cluster shows its "
            "address, and without the flag a cluster is started here"
        ) from None


def _knock(address: str) -> None:
    """Raise `OSError` or `ValueError` where nothing listens at host:port; Ray would wait for it."""
    if address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if not (host and port.isdigit()):
            raise ValueError("is no address; give `auto` or host:port")
        socket.create_connection((host, int(port)), timeout=TIMEOUT).close()


def engine_on_ray(wanted: EngineName, address: str | None) -> EngineName:
    """The engine inside the actors: as asked, else vllm where the cluster has GPUs, else hf.

    "auto" where the cluster is to be this machine. Raises `UserError` as `cluster` does.
    """
    if address is None:
        return wanted
    with cluster(address):
        import ray

        found = "vllm" if ray.cluster_resources().get("GPU") else "hf"
    return found if wanted == "auto" else wanted


def score_on_ray(
    job: Job, shards: Sequence[int], *, most: int | None = None, others: int = 0
) -> Iterator[Event]:
    """Score shards of a job's pairs; the events of `scoring.py` and of `worker.py`, as they come.

    Args:
        shards: with missing responses.
        most: actors at once; None: as many as the cluster has room for.
        others: references that start at the same time, with which it shares at first.

    Closing the iterator stops the actors. An exception of the engine is raised. An actor whose
    process or node is lost starts again without end, as Ray Data has it.
    """
    import ray
    from ray.data import ActorPoolStrategy

    needs, fit = _resources(job)
    limit = max(1, min(most or len(shards), len(shards)))
    rows = ray.data.from_items([{"shard": n} for n in shards], override_num_blocks=len(shards))
    results = rows.map_batches(
        ShardScorer,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ActorPoolStrategy(
            min_size=1,
            max_size=limit,
            initial_size=min(limit, max(1, fit // (others + 1))),
            max_tasks_in_flight_per_actor=IN_FLIGHT,
        ),
        **needs,
    )
    for row in results.iter_rows():
        yield from json.loads(row["events"])


class ShardScorer:
    """The actor: a loaded reference, called with a shard's number."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._events: list[dict[str, Any]] = []
        self._scorer: ReferenceScorer | None = None
        self._facts: dict[str, Any] = {}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Score the shard of a batch of one; its events, as one line of JSON."""
        self._events.clear()
        try:
            # Loaded by the first call, so that a mistake is an event like any other.
            self._scorer = self._scorer or self._load()
            started = time.monotonic()
            self._scorer.run(batch["shard"].tolist())
            ago = time.monotonic() - started
            self._events.insert(0, {"event": "ready", "facts": self._facts, "ago": ago})
        except (UserError, OSError) as error:
            mistake = at_path(error) if isinstance(error, OSError) else error
            self._events.append({"event": "error", "text": str(mistake)})
        return {"events": [json.dumps(self._events)]}

    def _load(self) -> ReferenceScorer:
        job = self._job
        # Without a longest sequence every missing response is refused for good: no weights needed.
        engine = load_engine(job.engine, job.settings) if job.settings.longest else None
        self._facts = engine.facts if engine else {}
        return ReferenceScorer(job, engine, self._events.append)


def _resources(job: Job) -> tuple[dict[str, Any], int]:
    """What an actor asks for, and how many of them the cluster has room for now.

    An engine on GPUs asks for those and one CPU, so that all of them are on one node; engine hf
    without GPUs for all CPUs of the smallest node.
    """
    import ray

    totals = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    settings = job.settings
    gpus = settings.tensor_parallel_size * settings.pipeline_parallel_size
    if any(total.get("GPU") for total in totals):
        fit = sum(int(total.get("GPU", 0) // gpus) for total in totals)
        if not fit:
            raise UserError(
                f"reference {settings.alias}: its {gpus} GPUs must be on one node, and none of the "
                "cluster has so many; lower --tensor-parallel-size or --pipeline-parallel-size"
            )
        return {"num_cpus": 1, "num_gpus": gpus}, fit
    cpus = [total.get("CPU", 0) for total in totals if total.get("CPU")]
    each = min(cpus, default=1)
    return {"num_cpus": each}, sum(int(cpu // each) for cpu in cpus)


def package_copy(copy: Path) -> Path:
    """A copy of this package's code under its own name, to be sent."""
    root = Path(__file__).resolve().parents[1]
    copy.mkdir(parents=True)
    for path in root.glob("*.py"):
        shutil.copy(path, copy)
    for folder in root.iterdir():
        if (folder / "__init__.py").is_file() and folder.name not in FOREIGN:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(folder, copy / folder.name, ignore=ignored)
    return copy
