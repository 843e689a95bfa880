"""`mrpo precompute`: score what the store lacks, each reference in processes of its own.

    resolve references → preflight (render everything, estimate) → one run per reference → summary

A reference that fails costs the others nothing: they go on, the summary names it, and the exit
code says so.
"""

from __future__ import annotations

import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..data.prepare import open_pairs
from ..data.references import ReferenceSpec, load_refs, select_refs
from ..data.shards import PairShards
from ..data.store import Store, open_store
from ..errors import UserError
from ..settings import write_resolved
from .config import PrecomputeConfig
from .engines.base import EngineName, EngineSettings
from .identity import ResolvedReference, resolve_reference
from .placement import (
    check_numbers,
    choose_engine,
    device_groups,
    server_urls,
    tensor_parallel_size,
)
from .plan import Plan, make_plans, print_plans
from .reference_run import Outcome, ReferenceRun
from .summary import print_summary, record_run
from .worker import Job


def precompute(config: PrecomputeConfig) -> int:
    """Fill the store. Returns 1 where a reference failed through no mistake of the user's.

    Raises `UserError` before any work for a mistake that preflight finds, and at the end for one
    that only scoring could find; what was scored until then is stored.
    """
    specs = select_refs(load_refs(config.refs_config), config.refs)
    check_numbers(config)
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
        outcome = Outcome()
        if plan.survey.todo or plan.survey.refused:
            groups = devices[plan.reference.alias]
            job = _job(plan, pairs, store, config, engine, servers)
            outcome = ReferenceRun(job, groups, plan.survey.todo, logs).run()
            record_run(store, plan, outcome, pairs)
            print(f"{plan.reference.alias}: scored {outcome.pairs:,} pairs", file=sys.stderr)
        outcomes.append(outcome)
    unscored = print_summary(plans, outcomes, pairs, store)
    return _verdict(plans, outcomes, unscored)


def _verdict(plans: Sequence[Plan], outcomes: Sequence[Outcome], unscored: Sequence[int]) -> int:
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
    plan: Plan,
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
