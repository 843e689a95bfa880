"""`mrpo compare`: several methods trained from one score store, and which of them does better.

    settings -> cells (cells.py) -> train and evaluate each (workers.py) -> outcome.py -> verdict.py
                soups and merges are not trained (averages.py)

Run again, the command goes on where it was: finished cells are kept, failed ones are tried again,
and further methods, seeds, fractions, noise levels, betas and epsilons only add cells.

    <output-dir>/compare.yaml   the settings in force
    <output-dir>/pairs/         the pairs that all runs use, as links
    <output-dir>/cells/         a folder of `mrpo train` for each run
    <output-dir>/compare.json   accuracies, gains, curves, cost, and the sentences
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ...data.prepare import open_pairs
from ...data.references import load_refs
from ...data.shards import PairShards
from ...data.store import Store, open_store
from ...errors import UserError
from ...files import write_json
from ...method.grammar import Average, epsilon_warning, parse_average
from ...precompute.process import visible_gpus
from ...settings import command, write_resolved
from ...train.dataset import method_of
from ..config import CompareConfig, TaskSettings
from ..score_table import scored_records
from ..tasks.harness import plan_tasks
from ..tasks.results import PinnedTask, kept_result
from .averages import mark_outdated, merge_folders, merge_sources
from .cells import (
    COMPARISON,
    PAIRS,
    Cell,
    aliases_over,
    cells_of,
    fractions_of,
    inputs_of,
    methods_of,
    noises_of,
    refuse_changed_inputs,
    runs_of,
    settings_for,
    write_inputs,
)
from .outcome import ComparisonPlan, outcome_of
from .results import Comparison, comparison_lines
from .workers import CellRunner

RESULT, SETTINGS = "compare.json", COMPARISON


@command(CompareConfig)
def compare(config: CompareConfig) -> Comparison:
    """Train and evaluate every cell that is not finished, then compare the methods.

    Prints the tables and sentences and writes them to compare.json. A failed cell is reported on
    stderr and listed in `Comparison.missing`. Raises `UserError` before any run for mistakes that
    can be seen beforehand, and where not a single cell could be finished.
    """
    pairs = open_pairs(config.pairs, config.data)
    store = open_store(config.store)
    plan = _plan(config, pairs, store)
    cells = cells_of(config)
    runs = runs_of(cells)
    refs = ",".join(plan.aliases)
    settings = {run: settings_for(config, run, refs, pairs) for run in runs}
    scored = {record.alias: record.identity for record in plan.records}
    inputs = {run: inputs_of(run, settings[run], pairs, scored) for run in runs}
    for run in runs:
        refuse_changed_inputs(run, inputs[run])
    mark_outdated(runs, lambda identity: _evaluated(identity, store, plan.tasks))
    devices = _devices(config)
    print(_summary(plan, runs, len(devices)), flush=True)
    for epsilon in dict.fromkeys(settings[run].epsilon for run in runs):
        if warning := epsilon_warning(epsilon):
            print(f"WARNING: {warning}", flush=True)
    out = Path(config.output_dir)
    try:  # all cells read these, whatever the folder of pairs holds later
        plan = replace(plan, pairs=pairs.linked(out / PAIRS))
    except OSError as error:
        raise UserError(f"--output-dir {out}: {error.strerror}; name another folder") from None
    for run in runs:
        if not run.finished:
            write_inputs(run, settings_for(config, run, refs, plan.pairs), inputs[run])
    write_resolved(config, out / SETTINGS)
    tasks = TaskSettings.of(config)
    failures = CellRunner(plan.base, devices, config.keep_models, tasks).run(runs)
    for failure in failures:
        print(f"FAILED: {failure.cell}: {failure.reason}", file=sys.stderr)
        print(f"  by hand: {failure.command}", file=sys.stderr)
    if not any(cell.finished for cell in cells):
        raise UserError(
            f"{out}: all {len(runs)} runs failed, there is nothing to compare; see the reasons "
            "above, and run the same command again"
        )
    comparison = outcome_of(plan, cells, store)
    print("\n".join(comparison_lines(comparison)))
    write_json(out / RESULT, comparison)
    print(out / RESULT)
    return comparison


def _evaluated(identity: str, store: Store, tasks: Sequence[PinnedTask]) -> bool:
    """Whether the store has a policy's scores and results; `mrpo store gc` may have taken them."""
    return bool(store.policies.names_of(identity)) and all(
        kept_result(store.policies, identity, pinned) is not None for pinned in tasks
    )


def _plan(config: CompareConfig, pairs: PairShards, store: Store) -> ComparisonPlan:
    """What is compared; raises `UserError` for every mistake that can be seen beforehand."""
    methods = methods_of(config.methods)
    aliases = aliases_over(config.refs, methods)
    if not pairs.manifest["splits"]["validation"]:
        raise UserError(
            f"{pairs.path}: no pair is held out to compare on; prepare the pairs with "
            "--validation-fraction"
        )
    references: dict[str, list[str]] = {}
    written: dict[str, str] = {}  # by the method in full, as the user wrote it
    merges: dict[str, Average] = {}
    for cell in cells_of(config):
        if cell.name in references:
            continue
        for run in (*cell.parts, cell):
            average = parse_average(run.method, aliases)
            method = average or method_of(settings_for(config, run, ",".join(aliases), pairs))
            earlier = written.setdefault(str(method), run.method)
            if earlier != run.method:
                raise UserError(f"--methods: {earlier} and {run.method} are the same ({method})")
        references[cell.name] = list(method.references)
        if average is not None and average.name == "merge":
            merges[cell.method] = average
    records = scored_records(pairs, store, aliases, config.refs_config)
    of_alias = dict(zip(aliases, records))
    for text, average in merges.items():
        merge_folders(text, merge_sources(average, of_alias, load_refs(config.refs_config)))
    return ComparisonPlan(
        pairs=pairs,
        records=records,
        references=references,
        fractions=fractions_of(config.fractions),
        label_noises=noises_of(config.label_noise),
        metric=config.metric,
        beta=config.beta,
        normalize=config.normalize,
        tasks=[planned.pinned for planned in plan_tasks(TaskSettings.of(config))],
    )


def _devices(config: CompareConfig) -> list[str | None]:
    """For each worker its CUDA_VISIBLE_DEVICES; None where there is no GPU to choose."""
    names = [] if config.device == "cpu" else visible_gpus()
    if not names:
        return [None] * (config.jobs or 1)
    return [names[number % len(names)] for number in range(config.jobs or len(names))]


def _summary(plan: ComparisonPlan, runs: Sequence[Cell], at_once: int) -> str:
    """What was derived from the settings, a line each."""
    finished = sum(run.finished for run in runs)
    parts = [run.name for run in runs if run.name not in plan.references]
    names = ", ".join(dict.fromkeys(parts))
    fractions = ", ".join(f"{fraction:g}" for fraction in plan.fractions)
    noises = ", ".join(f"{noise:g}" for noise in plan.label_noises)
    noise = [f"label noise {noises} of the training prompts have their labels turned round"]
    splits: Mapping[str, int] = plan.pairs.manifest["splits"]
    return "\n".join(
        [
            f"methods     {', '.join(plan.references)}",
            *([f"parts       {names}: trained for soups alone, no methods here"] if parts else []),
            f"base        {plan.base}: the policies start from it and rewards are measured from it",
            f"pairs       {splits['train']:,} for training, of these {fractions}; "
            f"{splits['validation']:,} held out to compare on; less those without a score",
            *(noise if plan.label_noises != [0] else []),
            *(f"task        {pinned}" for pinned in plan.tasks),
            f"runs        {len(runs):,}, of which {finished:,} are finished; {at_once} at once",
        ]
    )
