"""What a run of `mrpo precompute` ends with: its entry in the store's records, and the summary.

`mrpo precompute`: score what the store lacks, each reference in processes of its own.

    resolve references → preflight (render everything, estimate) → one run per reference → summary

A reference that fails costs the others nothing: they go on, the summary names it, and the exit
code says so.
"""

from __future__ import annotations

import platform
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from ..data.ids import IdIndex, ids_to_numpy
from ..data.prepare import open_pairs
from ..data.references import ReferenceSpec, load_refs, select_refs
from ..data.shards import PairShards
from ..data.store import ScoreFiles, Store, open_store
from ..errors import UserError
from ..settings import write_resolved
from .config import PrecomputeConfig
from .engines.protocol import EngineName, EngineSettings
from .identity import ResolvedReference, resolve_reference
from .placement import (
    choose_engine,
    device_groups,
    server_urls,
    tensor_parallel_size,
)
from .preflight import ReferencePlan, duration, make_plans, print_plans
from .reference_run import ReferenceOutcome, ReferenceRun
from .worker import Job


def record_run(
    store: Store, plan: ReferencePlan, outcome: ReferenceOutcome, pairs: PairShards
) -> None:
    """Keep how the scores were made beside them: engine, versions, machine, speed, date.

    And where the pairs are, for `mrpo store verify --rescore`.
    """
    if not outcome.pairs:
        return
    run = {
        **outcome.facts,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "pairs": outcome.pairs,
        "pairs_folder": str(pairs.path.resolve()),
        "tokens": outcome.tokens,
        "tokens_per_second": outcome.tokens_per_second,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    store.record(replace(plan.record, runs=(run,)))


def print_summary(
    plans: Sequence[ReferencePlan],
    outcomes: Sequence[ReferenceOutcome],
    pairs: PairShards,
    store: Store,
) -> list[int]:
    """A line per reference on stdout; returns how many pairs each lacks that it could have."""
    unscored = []
    for plan, outcome in zip(plans, outcomes):
        scores = store.scores(plan.reference.identity)
        lacking, reasons = _state(scores, pairs)
        left_out = min(lacking, max(plan.survey.over_limit, outcome.over_limit))
        unscored.append(lacking - left_out)
        parts = [
            f"{outcome.pairs:,} pairs scored",
            f"{pairs.num_pairs - plan.survey.missing:,} from the store",
        ]
        if outcome.tokens_per_second is not None:
            parts[0] += (
                f" ({outcome.tokens:,} tokens in {duration(outcome.seconds)}, "
                f"{outcome.tokens_per_second:,.0f} tokens/s)"
            )
        parts += [f"{count:,} {reason}" for reason, count in reasons.most_common()]
        if left_out:
            parts.append(f"{left_out:,} left out as too long for this run")
        if unscored[-1]:
            parts.append(f"{unscored[-1]:,} NOT SCORED")
        print(f"{plan.reference.alias}: " + "; ".join(parts))
    print(f"scores in {store.root}")
    return unscored


def _state(scores: ScoreFiles, pairs: PairShards) -> tuple[int, Counter[str]]:
    """Of the pairs: how many have no row, and the permanent reasons of those without a score."""
    table = scores.read(["pair_id", "reason"])
    refused = table.filter(table["reason"].is_valid())
    index, reasons = IdIndex(ids_to_numpy(refused["pair_id"])), refused["reason"].to_pylist()
    lacking, counts = 0, Counter[str]()
    for shard in range(len(pairs.names)):
        ids = pairs.pair_ids(shard)
        lacking += int(scores.missing(ids, refresh=shard == 0).sum())
        counts.update(reasons[place] for place in index.find(ids) if place >= 0)
    return lacking, counts


def precompute(config: PrecomputeConfig) -> int:
    """Fill the store. Returns 1 where a reference failed through no mistake of the user's.

    Raises `UserError` before any work for a mistake that preflight finds, and at the end for one
    that only scoring could find; what was scored until then is stored.
    """
    specs = select_refs(load_refs(config.refs_config), config.refs)
    engine = choose_engine(config)
    devices = device_groups(config, engine, specs)
    servers = server_urls(config, specs)
    pairs = open_pairs(config.pairs, config.data)
    store = open_store(config.store)
    references = [_resolve(spec, store, config, engine) for spec in specs]
    plans = make_plans(references, pairs, store, config, engine)
    print_plans(plans, pairs, store, engine)
    sys.stdout.flush()  # before hours of work, also where stdout is a file
    if config.dry_run:
        return 0
    logs = _logs(store)
    write_resolved(config, logs / "precompute.yaml")
    outcomes = []
    for plan in plans:
        store.record(plan.record)
        outcome = ReferenceOutcome()
        if plan.survey.todo or plan.survey.refused:
            groups = devices[plan.reference.alias]
            job = _job(plan, pairs, store, config, engine, servers)
            outcome = ReferenceRun(job, groups, plan.survey.todo, logs).run()
            record_run(store, plan, outcome, pairs)
            print(f"{plan.reference.alias}: scored {outcome.pairs:,} pairs", file=sys.stderr)
        outcomes.append(outcome)
    unscored = print_summary(plans, outcomes, pairs, store)
    return _verdict(plans, outcomes, unscored)


def _verdict(
    plans: Sequence[ReferencePlan], outcomes: Sequence[ReferenceOutcome], unscored: Sequence[int]
) -> int:
    """0 where nothing is left to do; what went wrong otherwise."""
    for plan, outcome, left in zip(plans, outcomes, unscored):
        who = "reference" if left else "a worker, whose part others did, of reference"
        for crash in outcome.crashes:
            print(f"{who} {plan.reference.alias} failed: {crash}", file=sys.stderr)
    if not any(unscored):
        return 0
    mistakes = dict.fromkeys(text for outcome in outcomes for text in outcome.mistakes)
    if mistakes and not any(outcome.crashes for outcome in outcomes):
        raise UserError("; ".join(mistakes))
    for text in mistakes:
        print(f"error: {text}", file=sys.stderr)
    return 1


def _resolve(
    spec: ReferenceSpec, store: Store, config: PrecomputeConfig, engine: EngineName
) -> ResolvedReference:
    reference = resolve_reference(spec, store.kept_commits(spec), update=config.update_refs)
    if config.bf16 and engine == "hf" and reference.dtype != "bfloat16":
        # Other numbers than the weights' own precision gives, so another identity.
        return replace(reference, inputs={**reference.inputs, "autocast": "bfloat16"})
    return reference


def _job(
    plan: ReferencePlan,
    pairs: PairShards,
    store: Store,
    config: PrecomputeConfig,
    engine: EngineName,
    servers: dict[str, str],
) -> Job:
    reference = plan.reference
    settings = EngineSettings(
        alias=reference.alias,
        model=reference.model,
        revision=reference.revision,
        dtype=reference.dtype,
        quantization=reference.spec.quantization,
        adapter=reference.adapter,
        adapter_revision=reference.adapter_revision,
        autocast="autocast" in reference.inputs,
        max_tokens=config.max_tokens,
        longest=plan.survey.longest,
        tensor_parallel_size=tensor_parallel_size(config, reference.spec),
        pipeline_parallel_size=config.pipeline_parallel_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
        server=servers.get(reference.alias),
        concurrency=config.concurrency,
    )
    return Job(
        engine=engine,
        settings=settings,
        pairs=str(pairs.path),
        store=store.root,
        identity=reference.identity,
        chat_template=reference.spec.chat_template,
        chat_template_kwargs=dict(reference.spec.chat_template_kwargs),
        context=plan.context,
        limit=config.max_model_len,
        keep_token_logps=config.keep_token_logps,
    )


def _logs(store: Store) -> Path:
    """A new folder for this run's logs, beside the scores where these are on this machine."""
    base = Path(store.root) if store.files.is_local else Path(tempfile.gettempdir()) / "mrpo"
    folder = base / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    return folder
