"""Policies on tasks: what the store has, and the rest asked of the policies one after another.

harness.plan_tasks -> measure_tasks -> results in the store -> figures for evaluation.json
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch

from ...data.references import ReferenceSpec
from ...data.store import Store
from ...precompute.config import PrecomputeConfig
from ...precompute.identity import ResolvedReference, resolve_reference
from ...precompute.reference_run import place
from ..policies import Policy, references_of
from .harness import PlannedTask, load_answerer, run_task
from .results import PolicyTasks, TaskResult, figures_of, keep_result, kept_result


def measure_tasks(
    policies: Sequence[Policy], planned: Sequence[PlannedTask], store: Store, engine: str = "hf"
) -> list[PolicyTasks]:
    """The figures of every policy on every task; what `store.policies` has is not asked again.

    Raises `UserError` where a policy can't be loaded, or has no room for a question.
    """
    specs = references_of(policies)
    engine = _engine(engine, specs)
    measured = []
    for policy, spec in zip(policies, specs):
        kept = store.policies.kept_commits(spec)
        reference = resolve_reference(spec, kept, update=True)
        results = _results(reference, planned, store.policies, engine)
        figures = [figures_of(result) for result in results]
        measured.append(PolicyTasks(name=policy.name, identity=reference.identity, tasks=figures))
    return measured


def _results(
    reference: ResolvedReference, planned: Sequence[PlannedTask], store: Store, engine: str
) -> list[TaskResult]:
    """Of one policy, in the order of the tasks."""

    def kept() -> dict[str, TaskResult]:
        results = {
            entry.pinned.task: kept_result(store, reference.identity, entry.pinned)
            for entry in planned
        }
        return {task: result for task, result in results.items() if result is not None}

    before = kept()
    if before:
        print(f"{reference.alias}: the store has {', '.join(before)}")
    missing = [entry for entry in planned if entry.pinned.task not in before]
    if missing:
        store.record(reference.record())
        _ask(reference, missing, store, engine)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return list(kept().values())


def _ask(
    reference: ResolvedReference, missing: Sequence[PlannedTask], store: Store, engine: str
) -> None:
    """Ask the policy, and keep each task's result as soon as it is there."""
    model = load_answerer(engine, reference, chat=missing[0].pinned.chat_template)
    with model.resources:
        for entry in missing:
            keep_result(store, reference.identity, run_task(model, entry))


def _engine(engine: str, specs: Sequence[ReferenceSpec]) -> str:
    """The engine that is meant by auto. Raises `UserError` for one that is not installed."""
    aliases = ",".join(spec.alias for spec in specs)
    return place(PrecomputeConfig(refs=aliases, engine=engine), specs).engine
