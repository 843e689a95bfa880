"""The process that runs cells of a comparison: `python -P -m mrpo.evaluation.compare.worker`.

It imports torch and transformers once and then runs one cell after another: `train`, or the mean
of a soup or a merge, then the figures of `mrpo evaluate`. `workers.py` starts it and sends it cells
(`precompute/process.py`).
After each of the two the state of the process is restored, so that a cell's numbers are those of
`mrpo train` and `mrpo evaluate` in processes of their own.

A user's mistake is reported, and the worker goes on; any other error ends the process.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from ...data.join import JoinedScores
from ...data.references import load_refs
from ...data.store import open_store
from ...errors import UserError
from ...files import locked, to_json, write_json
from ...method.grammar import aliases_of, parse_average
from ...precompute.process import Report, serve
from ...settings import build
from ...train.config import TrainConfig
from ...train.run import train
from ...train.run_folder import update_evaluation
from ..config import NO_TASKS, EvaluateConfig, TaskSettings
from ..evaluate import measure
from ..policies import policy_of_run
from ..tasks.harness import plan_tasks
from ..tasks.measure import measure_tasks
from .averages import make_merge, make_soup, merge_sources
from .cells import SETTINGS, Cell, free_disk, from_job, refuse_other_scores

TORCH_SEED = torch.initial_seed()  # of a new process


planned_tasks = functools.cache(plan_tasks)  # the questions are read once for all cells


def run_cell(cell: Cell, base: str, keep_model: bool, tasks: TaskSettings = NO_TASKS) -> None:
    """Train and evaluate a cell; this process prints to the cell's log from then on.

    `base` is the reference that rewards are measured from. Raises `UserError` for a user's
    mistake, and where another process holds the cell's lock.
    """
    with locked(cell.folder / ".lock") as ours:
        if not ours:
            raise UserError("another process is at work on it")
        sys.stdout.flush()
        with cell.log.open("ab") as log:  # also for what libraries print
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            _train_and_evaluate(cell, base, keep_model, tasks)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise
        except Exception:
            traceback.print_exc()
            sys.exit(1)


@contextlib.contextmanager
def process_state_kept() -> Iterator[None]:
    """Undo what the block changes in this process, and free its memory.

    Inside, torch's random generators start as in a new process.
    """
    with contextlib.ExitStack() as state, warnings.catch_warnings():
        state.callback(_free_memory)
        state.callback(os.chdir, Path.cwd())
        state.callback(os.environ.update, dict(os.environ))
        state.callback(os.environ.clear)  # first: callbacks are called in reverse
        state.callback(torch.set_num_threads, torch.get_num_threads())
        state.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
        state.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        state.callback(random.setstate, random.getstate())
        state.callback(np.random.set_state, np.random.get_state())
        torch.manual_seed(TORCH_SEED)
        with contextlib.suppress(OSError):  # Linux: start a new measurement of peak memory
            Path("/proc/self/clear_refs").write_text("5")
        yield


def _free_memory() -> None:
    if "torch._dynamo" in sys.modules:  # torch.compile has a limit of recompilations
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _train_and_evaluate(
    cell: Cell, base: str, keep_model: bool, tasks: TaskSettings = NO_TASKS
) -> None:
    started = time.monotonic()
    config = build(TrainConfig, {}, str(cell.folder / SETTINGS))
    store, specs = open_store(config.store), load_refs(config.refs_config)
    aliases = aliases_of(config.refs, config.method)
    records = [store.resolve(alias, specs) for alias in aliases]
    refuse_other_scores(cell, {record.alias: record.identity for record in records})
    mean = parse_average(cell.method, aliases)
    with process_state_kept():
        if mean is None:
            _train(cell, config)
        elif mean.name == "soup":
            make_soup(cell, mean, config)
        else:
            of_alias = dict(zip(aliases, records))
            make_merge(cell, mean, config, merge_sources(mean, of_alias, specs))
    trained = time.monotonic()
    settings = EvaluateConfig(
        runs=str(cell.folder),
        base=base,
        pairs=config.pairs,
        refs_config=config.refs_config,
        store=config.store,
    )
    noise = f"-noise-{cell.label_noise:g}" if cell.label_noise else ""
    condition = "" if cell.average == "merge" else f"-{cell.fraction:g}{noise}-{cell.seed}"
    policy = policy_of_run(cell.folder, f"{cell.name}{condition}")
    with process_state_kept():
        evaluation = measure([policy], settings, in_process=True)
    if tasks.names:
        with process_state_kept():
            evaluation = replace(
                evaluation, tasks=measure_tasks([policy], planned_tasks(tasks), store)
            )
    update_evaluation(cell.run.evaluation, to_json(evaluation))
    seconds = {"train": trained - started, "evaluate": time.monotonic() - trained}
    free_disk(cell, keep_model)
    write_json(cell.result, {"identity": evaluation.policies[0].identity, "seconds": seconds})


def _train(cell: Cell, config: TrainConfig) -> None:
    """`mrpo train` with the cell's settings; SIGTERM ends this process once it has saved."""
    print(f"$ mrpo train --config {cell.folder / SETTINGS}")
    if code := train(config).exit_code:
        sys.exit(code)
    joined = JoinedScores(cell.run.scores).references
    refuse_other_scores(cell, {reference.alias: reference.identity for reference in joined})


def _handle(values: dict[str, Any], report: Report) -> None:
    tasks = TaskSettings(**values["tasks"])
    run_cell(from_job(values["cell"]), values["base"], values["keep_model"], tasks)


def main() -> int:
    """Cells, until the parent ends this process."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return serve(_handle)


if __name__ == "__main__":
    sys.exit(main())
