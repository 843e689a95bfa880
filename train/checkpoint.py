"""Checkpoints: everything a run needs to go on as if it had never stopped.

    checkpoints/step-00000100/state.json      where the run stands, and under which settings
    checkpoints/step-00000100/*.distcp        weights and optimizer (torch.distributed.checkpoint),
                                              which any number of processes reads again

A checkpoint is written beside, brought to disk and renamed: one that is there is complete. The
random generators need no place in it: each step seeds them anew.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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
