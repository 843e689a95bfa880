"""Checkpoints: everything a run needs to go on as if it had never stopped.

    checkpoints/step-00000100/state.json      where the run stands, and under which settings
    checkpoints/step-00000100/*.distcp        weights and optimizer (torch.distributed.checkpoint),
                                              which any number of processes reads again

A checkpoint is written beside, brought to disk and renamed: one that is there is complete. The
random generators need no place in it: each step seeds them anew.


Going on with a run: from which checkpoint, and whether it is still the same run.

A checkpoint keeps the settings that make its numbers. What may change between two parts of a run
is listed here, everything else is refused by name.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from ..data.ids import identity_of
from ..data.shards import PairShards
from ..errors import UserError
from .config import TrainConfig
from .distributed import Ranks
from .stream import START, Position

STATE_FILE = "state.json"
TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


@dataclass(slots=True)
class TrainState:
    """Where a run stands, beside its weights and its optimizer."""

    step: int = 0
    position: Position = START
    dropped: dict[str, int] = field(default_factory=dict)  # pairs the policy can't take
    pairs: int = 0  # trained on so far
    tokens: int = 0  # computed by the decoder so far
    max_tokens: int | None = None  # the token budget in force
    asked_tokens: int | str | None = None  # what --max-tokens said
    sums: dict[str, float] = field(default_factory=dict)  # of the steps since the log's last line


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    state: TrainState
    settings: dict[str, Any]  # those that make the numbers, see `resume.py`
    accuracy: float | None  # on held-out pairs, where they were evaluated at this very step
    log_bytes: int  # length of the log when it was written


def checkpoints(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    found = sorted(folder.glob(f"step-*/{STATE_FILE}"))
    return [_read(path) for path in found]


def best(found: list[Checkpoint]) -> Checkpoint | None:
    """The checkpoint of best held-out accuracy, the earliest of equals."""
    evaluated = [one for one in found if one.accuracy is not None]
    return max(evaluated, key=lambda one: (one.accuracy, -one.state.step), default=None)


def save(
    folder: Path,
    policy: nn.Module,
    optimizer: optim.Optimizer,
    state: TrainState,
    ranks: Ranks,
    *,
    settings: Mapping[str, Any],
    accuracy: float | None,
    log_bytes: int,
    keep: int,
) -> Path:
    """Write a checkpoint, then remove all but the last `keep` and the best one."""
    target = folder / f"step-{state.step:08d}"
    partial = folder / f".{target.name}.partial"
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    model, optimizer_state = get_state_dict(policy, optimizer, options=TRAINED_ONLY)
    with _alone_is_meant():
        dcp.save({"model": model, "optimizer": optimizer_state}, checkpoint_id=partial)
    if ranks.first:
        content = {
            "state": asdict(state),
            "settings": dict(settings),
            "accuracy": accuracy,
            "log_bytes": log_bytes,
        }
        (partial / STATE_FILE).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        partial.rename(target)
        _sync(folder)
        _prune(folder, keep)
    ranks.barrier()
    return target


def load(checkpoint: Checkpoint, policy: nn.Module, optimizer: optim.Optimizer) -> None:
    """Put a checkpoint's weights and optimizer in place, whatever number of processes wrote it."""
    model, optimizer_state = get_state_dict(policy, optimizer, options=TRAINED_ONLY)
    with _alone_is_meant():  # in place
        dcp.load({"model": model, "optimizer": optimizer_state}, checkpoint_id=checkpoint.folder)
    set_state_dict(
        policy,
        optimizer,
        model_state_dict=model,
        optim_state_dict=optimizer_state,
        options=TRAINED_ONLY,
    )


def load_weights(checkpoint: Checkpoint, policy: nn.Module) -> None:
    """Put a checkpoint's weights in place, for evaluation and export."""
    model = get_model_state_dict(policy, options=TRAINED_ONLY)
    with _alone_is_meant():
        dcp.load({"model": model}, checkpoint_id=checkpoint.folder)
    set_model_state_dict(policy, model, options=TRAINED_ONLY)


def _read(path: Path) -> Checkpoint:
    content = json.loads(path.read_text())
    state = TrainState(**content["state"])
    state.position = Position(*state.position)
    return Checkpoint(
        path.parent, state, content["settings"], content["accuracy"], content["log_bytes"]
    )


def _prune(folder: Path, keep: int) -> None:
    found = checkpoints(folder)
    kept = found[-keep:] + [one for one in [best(found)] if one is not None]
    for one in found:
        if one not in kept:  # out of sight first: half a checkpoint must never be found
            one.folder.rename(folder / f".{one.folder.name}.partial")
    for leftover in folder.glob(".step-*.partial"):
        shutil.rmtree(leftover)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _alone_is_meant() -> Iterator[None]:
    """Keeps torch from warning, at each save of a single process, that it is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


CHECKPOINTS, MODEL = "checkpoints", "model"
MAY_CHANGE = {
    "data", "device", "eval_pairs", "eval_steps", "gradient_checkpointing",
    "load_best_model_at_end", "logging_steps", "max_missing", "max_tokens", "output_dir", "pairs",
    "refs_config", "report_to", "resume", "run_name", "save_steps", "save_total_limit", "store",
    "torch_compile",
}  # fmt: skip


def numeric_settings(config: TrainConfig, pairs: PairShards) -> dict[str, Any]:
    """The settings that make a run's numbers, as JSON, with a digest of the pairs."""
    names = [field.name for field in fields(config) if field.name not in MAY_CHANGE]
    settings = {name: getattr(config, name) for name in names}
    return settings | {"pairs digest": identity_of(pairs.manifest["shards"])}


def checkpoint_to_resume(config: TrainConfig, settings: dict[str, Any]) -> Checkpoint | None:
    """The last complete checkpoint of --output-dir under --resume; None: from the start.

    Raises `UserError` where the folder has a run and --resume is not given, and for a setting that
    is not the run's own.
    """
    folder = Path(config.output_dir)
    found = checkpoints(folder / CHECKPOINTS)
    if not config.resume:
        if found or (folder / MODEL).exists():
            raise UserError(
                f"--output-dir {folder} holds a run; add --resume to go on with it, "
                "or name another folder"
            )
        return None
    if not found:
        return None
    earlier = found[-1].settings
    for name, value in settings.items():
        if earlier.get(name) != value:
            flag = name if " " in name else f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} is {value}, and the run in {folder} was started with "
                f"{earlier.get(name)}; resume with that, or name another --output-dir"
            )
    return found[-1]
