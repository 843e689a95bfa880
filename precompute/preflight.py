"""What scoring will take, before any weights are loaded.

Every missing pair is rendered for every reference: refusals are counted, tokens and disk space
added up, time estimated. `survey` completes the references' plans, `print_plans` shows them.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path

from ..data.references import files_of, from_pretrained
from ..data.store import Store
from ..errors import UserError
from ..model.packing import padded_tokens
from .identity import ResolvedReference
from .scoring import Job, PairSelection, renderer_for, sort_out

POOL_PAIRS = 20_000  # renderings from which starting further processes pays
ROW_BYTES = 120  # of a pair in a score file, measured; token log-probs come on top
EFFICIENCY = 0.4  # of the device's matrix rate that scoring reaches


@dataclass(slots=True)
class MissingPairs:
    """The pairs that the store lacks under one reference, and what they cost; sums add up."""

    todo: int = 0  # pairs to score
    tokens: int = 0  # to compute, a prompt once for both responses
    scored_tokens: int = 0  # of the responses
    longest: int = 0  # tokens of the longest sequence to score
    over_limit: int = 0  # pairs that --max-model-len leaves out
    refused: Counter[str] = field(default_factory=Counter)  # permanent reasons

    def add(self, other: MissingPairs) -> None:
        self.todo += other.todo
        self.tokens += other.tokens
        self.scored_tokens += other.scored_tokens
        self.longest = max(self.longest, other.longest)
        self.over_limit += other.over_limit
        self.refused.update(other.refused)

    @property
    def num_pairs(self) -> int:
        return self.todo + self.over_limit + self.refused.total()


@dataclass(slots=True)
class ReferencePlan:
    """What one reference is and what it has to do."""

    reference: ResolvedReference
    job: Job
    damaged: list[str] = field(default_factory=list)  # score files (to be) set aside
    missing: MissingPairs = field(default_factory=MissingPairs)

    @property
    def num_bytes(self) -> int:
        """Of new score files, estimated."""
        rows = self.missing.todo + self.missing.refused.total()
        return ROW_BYTES * rows + 4 * self.missing.scored_tokens * self.job.keep_token_logps


def survey(
    plans: Sequence[ReferencePlan],
    selection: PairSelection,
    store: Store,
    *,
    dry_run: bool = False,
    many_processes: bool = True,
) -> None:
    """Find what the store lacks, and render every such pair for every reference.

    Where there are many pairs, it uses all cores if `many_processes`. Sets damaged score files
    aside unless it is a dry run, and changes nothing else. Raises `UserError` where the disk has no
    room.
    """
    tasks: list[tuple[ReferencePlan, int, list[int]]] = []
    for plan in plans:
        scores = store.scores(plan.job.identity)
        plan.damaged = scores.damaged() if dry_run else scores.check()
        for shard in selection.shards:
            if rows := selection.missing(shard, scores, refresh=shard == 0)[0]:
                tasks.append((plan, shard, rows))
    jobs = [(plan.job, selection, shard, rows) for plan, shard, rows in tasks]
    many = many_processes and sum(len(rows) for _, _, rows in tasks) > POOL_PAIRS
    processes = min(os.cpu_count() or 1, 32, len(tasks)) if many else 1
    pool = ProcessPoolExecutor(processes, get_context("spawn")) if processes > 1 else None
    with pool or nullcontext():
        results: Iterable[MissingPairs] = (pool.map if pool else map)(_survey_shard, jobs)
        for (plan, _, _), missing in zip(tasks, results):
            plan.missing.add(missing)
    _check_disk(store, sum(plan.num_bytes for plan in plans))


def print_plans(plans: Sequence[ReferencePlan], selection: PairSelection, store: Store) -> None:
    """What was derived, on stdout."""
    pairs, engine = selection.pairs, plans[0].job.engine
    print(f"{selection.num_pairs:,} pairs of {pairs.path}, engine {engine}, store {store.root}")
    for plan in plans:
        reference = plan.reference
        revision = f" at {reference.revision[:8]}" if reference.revision else ""
        adapter = f" with adapter {reference.adapter}" if reference.adapter else ""
        print(
            f"{reference.alias}: {reference.model}{revision}{adapter}, {reference.dtype}, "
            f"identity {reference.identity[:12]}"
        )
        if reference.moved:
            newest = ", ".join(f"{part} at {new[:8]}" for part, new in reference.moved.items())
            print(f"  the Hub has newer commits ({newest}); --update-refs takes them")
        for name in plan.damaged:
            print(f"  damaged, set aside, its pairs are scored again: {name}")
        if pairs.kind == "text" and renderer_for(plan.job).chat_template is not None:
            print("  warning: the pairs are plain text and this model has a chat template;")
            print("  `mrpo prepare --chat` makes them messages")
        print("  " + "; ".join(_described(plan, selection, store)))


def duration(seconds: float) -> str:
    """Seconds as text, rounded as an estimate may be."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def model_context(reference: ResolvedReference) -> int | None:
    """Tokens of the longest sequence that the model's configuration allows; None: no limit."""
    from transformers import AutoConfig

    config = from_pretrained(AutoConfig, reference.model, reference.revision)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _described(plan: ReferencePlan, selection: PairSelection, store: Store) -> list[str]:
    missing = plan.missing
    parts = [
        f"{selection.num_pairs - missing.num_pairs:,} pairs in the store",
        f"{missing.todo:,} to score",
    ]
    if missing.todo:
        seconds = _estimated_seconds(plan, store)
        about = "time unknown" if seconds is None else f"about {duration(seconds)}"
        parts[-1] += (
            f" ({missing.tokens:,} tokens, the longest sequence {missing.longest:,}, {about}, "
            f"{plan.num_bytes / 1e6:.1f} MB)"
        )
    if missing.refused:
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in missing.refused.most_common())
        parts.append(f"{missing.refused.total():,} that can't be ({reasons})")
    if missing.over_limit:
        parts.append(f"{missing.over_limit:,} left out by --max-model-len")
    return parts


def _check_disk(store: Store, needed: int) -> None:
    if not store.files.is_local:
        return
    folder = Path(store.root).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"--store {store.root}: about {needed / 1e9:.1f} GB of scores, but only "
            f"{free / 1e9:.1f} GB free; make room or use another store"
        )


def _survey_shard(task: tuple[Job, PairSelection, int, list[int]]) -> MissingPairs:
    """What some rows of a shard cost under one reference."""
    job, selection, shard, rows = task
    rendered = renderer_for(job).render_many(selection.pairs.pairs(shard, rows))
    ids = selection.pairs.pair_ids(shard)[rows]
    work = sort_out(ids, rendered, job.context, job.limit)
    branches = [branch for pair in work.pairs for branch in (pair.chosen, pair.rejected)]
    return MissingPairs(
        todo=len(work.pairs),
        tokens=work.tokens,
        scored_tokens=sum(branch.num_scored for branch in branches),
        longest=max(map(padded_tokens, work.pairs), default=0),
        over_limit=work.over_limit,
        refused=Counter(row["reason"] for row in work.refused),
    )


def _estimated_seconds(plan: ReferencePlan, store: Store) -> float | None:
    """By the reference's last run on this engine, else by counting operations.

    None where neither is known: a server may run on any machine.
    """
    job, tokens = plan.job, plan.missing.tokens
    names = store.names_of(job.identity)
    for run in reversed(names[0].runs if names else ()):
        if run.get("engine") == job.engine and run.get("tokens_per_second"):
            return tokens / float(run["tokens_per_second"])
    if job.engine == "server":
        return None
    operations = 2 * _num_parameters(job.settings.model, job.settings.revision) * tokens
    return operations / (EFFICIENCY * _matrix_rate())


@cache
def _num_parameters(model_name: str, revision: str | None) -> int:
    """Counted on a model without memory, so that no weights are read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = from_pretrained(AutoConfig, model_name, revision)
    with files_of(model_name, "no such architecture"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def _matrix_rate() -> float:
    """Floating-point operations per second of a matrix product on the device.

    A GPU is measured in a process of its own: a CUDA context here would keep its memory.
    """
    import torch

    if torch.cuda.device_count() == 0:
        return _measured_rate("cpu", 512)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_measured_rate, "cuda", 8192).result()


def _measured_rate(device: str, size: int) -> float:
    import torch

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
