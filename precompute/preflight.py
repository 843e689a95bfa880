"""What scoring will take, before any weights are loaded: every missing pair rendered for every
reference, refusals counted, tokens, time and disk estimated.


The plan that preflight makes and prints: for each reference what there is, what is missing, what
it costs.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ..data.rendering import Renderer
from ..data.shards import PairShards
from ..data.store import ReferenceRecord, ScoreFiles, Store
from ..errors import UserError
from ..model.packing import packed_tokens, padded_tokens
from .config import PrecomputeConfig
from .engines.protocol import EngineName
from .identity import ResolvedReference
from .scoring import sort_out

POOL_PAIRS = 20_000  # renderings from which further processes are worth their start
ROW_BYTES = 120  # of a pair in a score file, measured; token log-probs come on top
EFFICIENCY = 0.4  # of the device's matrix rate that scoring reaches


@dataclass(slots=True)
class Survey:
    """What one reference has to do for the pairs that the store lacks; sums add up."""

    todo: int = 0  # pairs to score
    tokens: int = 0  # to compute, a prompt once for both responses
    scored_tokens: int = 0  # of the responses
    longest: int = 0  # tokens of the longest sequence to score
    over_limit: int = 0  # pairs that --max-model-len leaves out
    refused: Counter[str] = field(default_factory=Counter)  # permanent reasons

    def add(self, other: Survey) -> None:
        self.todo += other.todo
        self.tokens += other.tokens
        self.scored_tokens += other.scored_tokens
        self.longest = max(self.longest, other.longest)
        self.over_limit += other.over_limit
        self.refused.update(other.refused)

    @property
    def missing(self) -> int:
        """Pairs without a row in the store."""
        return self.todo + self.over_limit + self.refused.total()


@dataclass(frozen=True, slots=True)
class _Task:
    """A shard's missing pairs under one reference."""

    reference: int
    pairs: PairShards
    shard: int
    places: list[int]
    renderer: tuple[Any, ...]
    context: int | None
    limit: int | None


def survey(
    references: Sequence[ResolvedReference],
    contexts: Sequence[int | None],
    scores: Sequence[ScoreFiles],
    pairs: PairShards,
    limit: int | None,
) -> list[Survey]:
    """Render every missing pair for every reference, on all cores where there are many."""
    tasks = [
        _Task(number, pairs, shard, places, _renderer_key(reference), context, limit)
        for number, (reference, context) in enumerate(zip(references, contexts))
        for shard, places in _missing(pairs, scores[number])
    ]
    surveys = [Survey() for _ in references]
    work = sum(len(task.places) for task in tasks)
    processes = min(os.cpu_count() or 1, 32, len(tasks)) if work > POOL_PAIRS else 1
    with (
        ProcessPoolExecutor(processes, get_context("spawn"))
        if processes > 1
        else nullcontext() as pool
    ):
        results: Iterable[Survey] = (pool.map if pool else map)(_survey_shard, tasks)
        for task, result in zip(tasks, results):
            surveys[task.reference].add(result)
    return surveys


def renderer_of(reference: ResolvedReference) -> Renderer:
    """The reference's renderer, loaded once in this process."""
    return _renderer(*_renderer_key(reference))


def model_context(reference: ResolvedReference) -> int | None:
    """Tokens of the longest sequence that the model's configuration allows; None: no limit."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(reference.model, revision=reference.revision)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def estimated_seconds(
    reference: ResolvedReference, tokens: int, runs: Sequence[Mapping[str, Any]], engine: str
) -> float | None:
    """Scoring time by this reference's last run on this engine, else by counting operations.

    None where neither can tell: a server's machine is unknown.
    """
    for run in reversed(runs):
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


def estimated_bytes(survey: Survey, keep_token_logps: bool) -> int:
    """Of the score files."""
    rows = survey.todo + survey.refused.total()
    return ROW_BYTES * rows + 4 * survey.scored_tokens * keep_token_logps


@cache
def _matrix_rate() -> float:
    """Floating-point operations a second of a matrix product on the device.

    A GPU is measured in a process of its own: a CUDA context here would hold memory for good.
    """
    import torch

    if torch.cuda.device_count() == 0:
        return _measure("cpu", 512)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_measure, "cuda", 8192).result()


def _measure(device: str, size: int) -> float:
    import torch

    kind = torch.float32 if device == "cpu" else torch.bfloat16
    matrix = torch.ones(size, size, dtype=kind, device=device)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _missing(pairs: PairShards, scores: ScoreFiles) -> Iterator[tuple[int, list[int]]]:
    for shard in range(len(pairs.names)):
        places = np.flatnonzero(scores.missing(pairs.pair_ids(shard), refresh=shard == 0)).tolist()
        if places:
            yield shard, places


def _survey_shard(task: _Task) -> Survey:
    rendered = _renderer(*task.renderer).render_many(task.pairs.pairs(task.shard, task.places))
    ids = task.pairs.pair_ids(task.shard)[task.places]
    rows = sort_out(ids, rendered, task.context, task.limit)
    counted = Survey(over_limit=rows.over_limit)
    counted.refused.update(row["reason"] for row in rows.refused)
    for pair in rows.pairs:
        counted.todo += 1
        counted.tokens += packed_tokens(pair)
        counted.longest = max(counted.longest, padded_tokens(pair))
        for branch in (pair.chosen, pair.rejected):
            counted.scored_tokens += len(branch.token_ids) - branch.start
    return counted


def _renderer_key(reference: ResolvedReference) -> tuple[Any, ...]:
    spec = reference.spec
    arguments = json.dumps(dict(spec.chat_template_kwargs))
    # The identity: a folder's tokenizer may change while this process lives.
    return (
        reference.identity,
        reference.model,
        reference.revision,
        spec.chat_template,
        arguments,
    )


@cache
def _renderer(
    identity: str,
    model: str,
    revision: str | None,
    chat_template: str | None,
    chat_template_kwargs: str,
) -> Renderer:
    return Renderer.load(
        model,
        revision=revision,
        chat_template=chat_template,
        chat_template_kwargs=json.loads(chat_template_kwargs),
    )


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """What one reference is and what it has to do."""

    reference: ResolvedReference
    record: ReferenceRecord  # as the store will keep it
    context: int | None  # tokens of the longest sequence the model itself takes
    survey: Survey
    damaged: tuple[str, ...]  # score files set aside (or, in a dry run, to be)
    seconds: float | None  # estimated
    bytes: int  # estimated, of score files


def make_plans(
    references: Sequence[ResolvedReference],
    pairs: PairShards,
    store: Store,
    config: PrecomputeConfig,
    engine: EngineName,
) -> list[ReferencePlan]:
    """Preflight. Sets damaged score files aside unless it is a dry run; changes nothing else."""
    scores = [store.scores(reference.identity) for reference in references]
    damaged = [tuple(s.damaged() if config.dry_run else s.check()) for s in scores]
    contexts = [model_context(reference) for reference in references]
    surveys = survey(references, contexts, scores, pairs, config.max_model_len)
    plans = []
    for reference, context, found, bad in zip(references, contexts, surveys, damaged):
        seconds = None
        if found.todo:
            runs = _earlier_runs(store, reference.identity)
            seconds = estimated_seconds(reference, found.tokens, runs, engine)
        record = ReferenceRecord(
            alias=reference.alias,
            entry=reference.spec.entry(),
            inputs=reference.inputs,
            resolved_commit=reference.revision,
        )
        size = estimated_bytes(found, config.keep_token_logps)
        plans.append(ReferencePlan(reference, record, context, found, bad, seconds, size))
    _check_disk(store, sum(plan.bytes for plan in plans))
    return plans


def print_plans(
    plans: Sequence[ReferencePlan], pairs: PairShards, store: Store, engine: EngineName
) -> None:
    """What was derived, on stdout."""
    print(f"{pairs.num_pairs:,} pairs of {pairs.path}, engine {engine}, store {store.root}")
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
            print(f"  the Hub has moved on ({newest}); --update-refs takes that")
        for name in plan.damaged:
            print(f"  damaged, set aside, its pairs are scored again: {name}")
        if pairs.kind == "text" and renderer_of(reference).has_chat_template:
            print("  warning: the pairs are plain text and this model has a chat template;")
            print("  `mrpo prepare --chat` makes them messages")
        print("  " + "; ".join(_parts(plan, pairs.num_pairs)))


def duration(seconds: float) -> str:
    """Rounded as an estimate deserves."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _parts(plan: ReferencePlan, num_pairs: int) -> list[str]:
    found = plan.survey
    parts = [f"{num_pairs - found.missing:,} pairs in the store", f"{found.todo:,} to score"]
    if found.todo:
        about = "time unknown" if plan.seconds is None else f"about {duration(plan.seconds)}"
        parts[-1] += (
            f" ({found.tokens:,} tokens, the longest sequence {found.longest:,}, {about}, "
            f"{plan.bytes / 1e6:.1f} MB)"
        )
    if found.refused:
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in found.refused.most_common())
        parts.append(f"{found.refused.total():,} that can't be ({reasons})")
    if found.over_limit:
        parts.append(f"{found.over_limit:,} left out by --max-model-len")
    return parts


def _earlier_runs(store: Store, identity: str) -> Sequence[dict[str, object]]:
    for record in store.references():
        if record.identity == identity:
            return [dict(run) for run in record.runs]
    return []


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
