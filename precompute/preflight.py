"""What scoring will take, before any weights are loaded.

Every missing pair is rendered for every reference: refusals are counted, tokens and disk space
added up, time estimated. `make_plans` gives one `ReferencePlan` per reference, `print_plans` shows
them.
"""

from __future__ import annotations

import json
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

from ..data.rendering import Renderer
from ..data.store import ReferenceRecord, ScoreFiles, Store
from ..errors import UserError
from ..model.packing import packed_tokens, padded_tokens
from .engines import EngineName
from .identity import ResolvedReference
from .scoring import PairSelection, renderer_for, sort_out

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


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """What one reference is and what it has to do."""

    reference: ResolvedReference
    record: ReferenceRecord  # as the store will keep it
    context: int | None  # tokens of the longest sequence the model itself takes
    missing: MissingPairs
    damaged: tuple[str, ...]  # score files set aside (in a dry run: that would be)
    bytes: int  # of new score files, estimated


def make_plans(
    references: Sequence[ResolvedReference],
    selection: PairSelection,
    store: Store,
    *,
    limit: int | None,
    keep_token_logps: bool,
    dry_run: bool = False,
    processes: int | None = None,
) -> list[ReferencePlan]:
    """Plan the scoring of every reference's missing pairs.

    `limit` is the longest sequence (tokens) to score in this run, `processes` the most to render
    in (None: by the number of cores). Sets damaged score files aside unless it is a dry run, and
    changes nothing else. Raises `UserError` where the disk has no room.
    """
    scores = [store.scores(reference.identity) for reference in references]
    damaged = [tuple(s.damaged() if dry_run else s.check()) for s in scores]
    contexts = [model_context(reference) for reference in references]
    surveyed = _survey(references, contexts, scores, selection, limit, processes)
    plans = [
        ReferencePlan(
            reference=reference,
            record=ReferenceRecord(
                alias=reference.alias,
                entry=reference.spec.entry(),
                inputs=reference.inputs,
                resolved_commit=reference.revision,
            ),
            context=context,
            missing=missing,
            damaged=names,
            bytes=ROW_BYTES * (missing.todo + missing.refused.total())
            + 4 * missing.scored_tokens * keep_token_logps,
        )
        for reference, context, missing, names in zip(references, contexts, surveyed, damaged)
    ]
    _check_disk(store, sum(plan.bytes for plan in plans))
    return plans


def print_plans(
    plans: Sequence[ReferencePlan], selection: PairSelection, store: Store, engine: EngineName
) -> None:
    """What was derived, on stdout."""
    pairs = selection.pairs
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
            newest = ", ".join(
                f"{part} at {commit[:8]}" for part, commit in reference.moved.items()
            )
            print(f"  the Hub has newer commits ({newest}); --update-refs takes them")
        for name in plan.damaged:
            print(f"  damaged, set aside, its pairs are scored again: {name}")
        if pairs.kind == "text" and renderer_of(reference).chat_template is not None:
            print("  warning: the pairs are plain text and this model has a chat template;")
            print("  `mrpo prepare --chat` makes them messages")
        print("  " + "; ".join(_described(plan, selection, store, engine)))


def duration(seconds: float) -> str:
    """Seconds as text, rounded as an estimate may be."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def renderer_of(reference: ResolvedReference) -> Renderer:
    """The reference's renderer, loaded once in this process."""
    return renderer_for(
        reference.identity,
        reference.model,
        reference.revision,
        reference.spec.chat_template,
        json.dumps(dict(reference.spec.chat_template_kwargs)),
    )


def model_context(reference: ResolvedReference) -> int | None:
    """Tokens of the longest sequence that the model's configuration allows; None: no limit."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(reference.model, revision=reference.revision)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _described(
    plan: ReferencePlan, selection: PairSelection, store: Store, engine: EngineName
) -> list[str]:
    missing = plan.missing
    parts = [
        f"{selection.num_pairs - missing.num_pairs:,} pairs in the store",
        f"{missing.todo:,} to score",
    ]
    if missing.todo:
        seconds = _estimated_seconds(plan, store, engine)
        about = "time unknown" if seconds is None else f"about {duration(seconds)}"
        parts[-1] += (
            f" ({missing.tokens:,} tokens, the longest sequence {missing.longest:,}, {about}, "
            f"{plan.bytes / 1e6:.1f} MB)"
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


@dataclass(frozen=True, slots=True)
class _Task:
    """A shard's missing pairs under one reference."""

    number: int  # of the reference
    reference: ResolvedReference
    selection: PairSelection
    shard: int
    rows: list[int]
    context: int | None
    limit: int | None


def _survey(
    references: Sequence[ResolvedReference],
    contexts: Sequence[int | None],
    scores: Sequence[ScoreFiles],
    selection: PairSelection,
    limit: int | None,
    processes: int | None,
) -> list[MissingPairs]:
    """Render every missing pair for every reference, on all cores where there are many pairs."""
    tasks = [
        _Task(number, reference, selection, shard, rows, context, limit)
        for number, (reference, context) in enumerate(zip(references, contexts))
        for shard in selection.shards
        if (rows := selection.missing(shard, scores[number], refresh=shard == 0)[0])
    ]
    if sum(len(task.rows) for task in tasks) <= POOL_PAIRS:
        processes = 1
    processes = min(processes or os.cpu_count() or 1, 32, max(len(tasks), 1))
    totals = [MissingPairs() for _ in references]
    with (
        ProcessPoolExecutor(processes, get_context("spawn"))
        if processes > 1
        else nullcontext() as pool
    ):
        results: Iterable[MissingPairs] = (pool.map if pool else map)(_survey_shard, tasks)
        for task, result in zip(tasks, results):
            totals[task.number].add(result)
    return totals


def _survey_shard(task: _Task) -> MissingPairs:
    pairs = task.selection.pairs
    rendered = renderer_of(task.reference).render_many(pairs.pairs(task.shard, task.rows))
    work = sort_out(pairs.pair_ids(task.shard)[task.rows], rendered, task.context, task.limit)
    missing = MissingPairs(over_limit=work.over_limit)
    missing.refused.update(row["reason"] for row in work.refused)
    for pair in work.pairs:
        missing.todo += 1
        missing.tokens += packed_tokens(pair)
        missing.longest = max(missing.longest, padded_tokens(pair))
        for branch in (pair.chosen, pair.rejected):
            missing.scored_tokens += len(branch.token_ids) - branch.start
    return missing


def _estimated_seconds(plan: ReferencePlan, store: Store, engine: EngineName) -> float | None:
    """By the reference's last run on this engine, else by counting operations.

    None where neither is known: a server may run on any machine.
    """
    reference, tokens = plan.reference, plan.missing.tokens
    names = store.names_of(reference.identity)
    for run in reversed(names[0].runs if names else ()):
        if run.get("engine") == engine and run.get("tokens_per_second"):
            return tokens / float(run["tokens_per_second"])
    if engine == "server":
        return None
    operations = 2 * _num_parameters(reference.model, reference.revision) * tokens
    return operations / (EFFICIENCY * _matrix_rate())


@cache
def _num_parameters(model_name: str, revision: str | None) -> int:
    """Counted on a model without memory, so that no weights are read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_name, revision=revision)
    with torch.device("meta"):
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
