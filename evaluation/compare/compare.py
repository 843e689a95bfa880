"""`mrpo compare`: several methods trained from one store, and what follows from how they do.

    settings -> cells (cells.py) -> train and evaluate each (grid.py) -> outcome -> words

Run again, the command goes on where it was: a finished cell is taken as it is, a failed one is
tried again, and further methods, seeds and fractions only add cells.

    <output-dir>/compare.yaml   the settings in force
    <output-dir>/cells/         a folder of `mrpo train` for each run
    <output-dir>/compare.json   accuracies, gains, curves, cost, and the sentences
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...data.join import precompute_line
from ...data.prepare import open_pairs
from ...data.references import load_refs
from ...data.shards import PairShards
from ...data.store import NotScored, ReferenceRecord, Store, open_store
from ...errors import UserError
from ...method.grammar import aliases_of, method_of, named_references
from ...settings import write_resolved
from ..config import CompareConfig
from ..results import write_json
from .cells import (
    EVALUATION,
    Cell,
    cells_of,
    fractions_of,
    inputs_of,
    methods_of,
    refuse_other,
    settings_for,
    write_inputs,
)
from .outcome import ComparisonPlan, outcome_of
from .results import comparison_lines
from .workers import Failure, Grid

RESULT, SETTINGS = "compare.json", "compare.yaml"


def compare(config: CompareConfig) -> int:
    """Train, evaluate, judge; returns 1 where a run failed, else 0."""
    pairs = open_pairs(config.pairs, config.data)
    store = open_store(config.store)
    plan = _plan(config, pairs, store)
    cells = cells_of(config)
    settings = {cell: settings_for(config, cell, ",".join(plan.aliases), pairs) for cell in cells}
    identities = {record.alias: record.identity for record in plan.records}
    inputs = {cell: inputs_of(settings[cell], pairs, identities) for cell in cells}
    for cell in cells:
        refuse_other(cell, inputs[cell])
    seats = _seats(config)
    print(_derived(plan, cells, len(seats)), flush=True)
    for cell in cells:
        if not cell.finished:
            write_inputs(cell, settings[cell], inputs[cell])
    out = Path(config.output_dir)
    write_resolved(config, out / SETTINGS)
    failures = _grid(config, plan, seats).run(cells)
    for failure in failures:
        _tell(failure)
    if not any(cell.finished for cell in cells):
        print("no run was finished: nothing to compare", file=sys.stderr)
        return 1
    comparison = outcome_of(plan, cells, store)
    print("\n".join(comparison_lines(comparison)))
    write_json(out / RESULT, comparison)
    print(out / RESULT)
    return int(bool(failures))


def _plan(config: CompareConfig, pairs: PairShards, store: Store) -> ComparisonPlan:
    """Methods over the references; raises `UserError` for all that can be seen beforehand."""
    methods = methods_of(config.methods)
    aliases = aliases_over(config.refs, methods)
    if not pairs.manifest["splits"]["validation"]:
        raise UserError(
            f"{pairs.path}: no pair is held out to compare on; prepare the pairs with "
            "--validation-fraction"
        )
    first = cells_of(config)[: len(methods)]
    references: dict[str, tuple[str, ...]] = {}
    canonical: dict[str, str] = {}
    for cell in first:
        method = method_of(settings_for(config, cell, ",".join(aliases), pairs))
        references[cell.method] = method.references
        same = canonical.setdefault(str(method), cell.method)
        if same != cell.method:
            raise UserError(f"--methods: {same} and {cell.method} are the same ({method})")
    return ComparisonPlan(
        pairs=pairs,
        records=_records(pairs, store, aliases, config.refs_config),
        references=references,
        fractions=fractions_of(config.fractions),
        metric=config.metric,
    )


def aliases_over(refs: str | None, methods: Sequence[str]) -> list[str]:
    """Those of --refs, the base first; without it all that the methods name, in their order."""
    named = dict.fromkeys(alias for method in methods for alias in named_references(method))
    return aliases_of(refs or ",".join(named), methods[0])


def _records(
    pairs: PairShards, store: Store, aliases: Sequence[str], refs_config: str
) -> list[ReferenceRecord]:
    """What the store has of each reference; `UserError` with the line to run where it lacks any."""
    specs = load_refs(refs_config)
    records, lacking = [], []
    for alias in aliases:
        try:
            record = store.resolve(alias, specs)
        except NotScored:
            lacking.append(alias)
            continue
        records.append(record)
        scores = store.scores(record.identity)
        shards = range(len(pairs.names))
        if any(scores.missing(pairs.pair_ids(shard)).any() for shard in shards):
            lacking.append(alias)
    if lacking:
        line = precompute_line(pairs, store, lacking, refs_config)
        raise UserError(f"{pairs.path}: pairs not yet scored in {store.root}; run: {line}")
    return records


def _seats(config: CompareConfig) -> list[str | None]:
    """For each run at once its CUDA_VISIBLE_DEVICES; None where there is nothing to choose."""
    import torch

    count = 0 if config.device == "cpu" else torch.cuda.device_count()
    if count == 0:
        return [None] * (config.jobs or 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return [names[at % len(names)] for at in range(config.jobs or len(names))]


def _grid(config: CompareConfig, plan: ComparisonPlan, seats: Sequence[str | None]) -> Grid:
    def evaluation(cell: Cell) -> list[str]:
        flags = {"--runs": cell.folder, "--base": plan.base, "--out": cell.folder / EVALUATION}
        return ["evaluate", *(str(part) for item in flags.items() for part in item)]

    prefix = [sys.executable, "-m", "mrpo.cli"]
    return Grid(evaluation, prefix, seats, config.keep_models)


def _derived(plan: ComparisonPlan, cells: Sequence[Cell], at_once: int) -> str:
    """What was derived from the settings, a line each."""
    done = sum(cell.finished for cell in cells)
    fractions = ", ".join(f"{fraction:g}" for fraction in plan.fractions)
    splits: Mapping[str, int] = plan.pairs.manifest["splits"]
    return "\n".join(
        [
            f"methods     {', '.join(plan.references)}",
            f"base        {plan.base}: where the policy starts, and rewards are measured from",
            f"pairs       {splits['train']:,} to train on, of these {fractions}; "
            f"{splits['validation']:,} held out to compare on",
            f"runs        {len(cells):,}, of which {done:,} are finished; {at_once} at once",
        ]
    )


def _tell(failure: Failure) -> None:
    print(f"FAILED: {failure.cell}: {failure.reason}", file=sys.stderr)
    if failure.command:
        print(f"  by hand: {failure.command}", file=sys.stderr)
