"""Checkpoints: everything a run needs to continue as if it had never stopped.

    checkpoints/step-00000100/state.json      where the run stands, and under which settings
    checkpoints/step-00000100/*.distcp        weights and optimizer (torch.distributed.checkpoint),
                                              readable by any number of processes

A checkpoint folder appears complete or not at all. It holds no state of random generators: each
step seeds them anew. On resume the settings that determine a run's numbers must be those of the
checkpoint; `MAY_CHANGE` lists the others.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn, optim
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from ..data.references import files_of
from ..data.shards import PairShards
from ..errors import UserError
from ..files import fits, new_folder, read_json, to_json, write_json
from ..method.weightings import OnlineWeights
from .config import TrainConfig
from .distributed import Ranks
from .run_folder import RunFolder
from .stream import START, Position

STATE_FILE = "state.json"
TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)
DIGEST = "pairs digest"  # its key among a checkpoint's settings
MAY_CHANGE = {
    "data", "device", "eval_pairs", "eval_steps", "gradient_checkpointing",
    "load_best_model_at_end", "logging_steps", "max_missing", "max_tokens", "output_dir", "pairs",
    "refs_config", "report_to", "resume", "run_name", "save_steps", "save_total_limit", "store",
    "torch_compile",
}  # fmt: skip
SINCE = {
    "f_alpha_divergence_coef": 0.5,
    "f_divergence_type": "reverse_kl",
    "label_noise": 0.0,
    "loss_weights": None,
    "shuffle": "rows",
    "train_subset": 0,
    "use_dora": False,
    "use_rslora": False,
}  # settings that runs of earlier versions lack: what these did


@dataclass(slots=True)
class TrainState:
    """Where a run stands, beside its weights and its optimizer."""

    step: int = 0
    position: Position = START
    dropped: dict[str, int] = field(default_factory=dict)  # pairs the policy can't take, by reason
    pairs: int = 0  # trained on so far
    tokens: int = 0  # computed by the decoder so far
    max_tokens: int | None = None  # the token budget in force
    asked_tokens: int | str | None = None  # --max-tokens as given
    sums: dict[str, float] = field(default_factory=dict)  # of the steps since the log's last line
    online: OnlineWeights | None = None  # of a method that learns its weights while training


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    state: TrainState
    settings: Mapping[str, Any]  # `numeric_settings`, and the policy's source
    accuracy: float | None  # on held-out pairs, if they were evaluated at this step
    log_bytes: int  # length of the log when it was written


def checkpoints(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    return [_read(path) for path in sorted(folder.glob(f"step-*/{STATE_FILE}"))]


def best(saved: Sequence[Checkpoint]) -> Checkpoint | None:
    """The checkpoint of best held-out accuracy, the earliest of equals."""
    evaluated = [checkpoint for checkpoint in saved if checkpoint.accuracy is not None]
    # In the order of their steps, and `max` gives the first of equals.
    return max(evaluated, key=attrgetter("accuracy"), default=None)


@contextmanager
def _no_single_process_warning() -> Iterator[None]:
    """Silences torch's warning, at each save, that torch.distributed is not in use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@_no_single_process_warning()
def save(
    new: Checkpoint, policy: nn.Module, optimizer: optim.Optimizer, ranks: Ranks, keep: int
) -> None:
    """Write a checkpoint, then remove all but the last `keep` and the best one."""
    with ExitStack() as complete:
        partial = ranks.on_first(lambda: complete.enter_context(new_folder(new.folder)))
        model, moments = get_state_dict(policy, optimizer, options=TRAINED_ONLY)
        dcp.save({"model": model, "optimizer": moments}, checkpoint_id=partial)
        if ranks.first:
            content = to_json(new)
            del content["folder"]
            write_json(partial / STATE_FILE, content)
    if ranks.first:
        _remove_old(new.folder.parent, keep)
    ranks.barrier()


@_no_single_process_warning()
def load(checkpoint: Checkpoint, policy: nn.Module, optimizer: optim.Optimizer) -> None:
    """Load a checkpoint's weights and optimizer, whatever number of processes wrote it."""
    model, moments = get_state_dict(policy, optimizer, options=TRAINED_ONLY)
    _load_in_place({"model": model, "optimizer": moments}, checkpoint.folder)
    set_state_dict(
        policy, optimizer, model_state_dict=model, optim_state_dict=moments, options=TRAINED_ONLY
    )


@_no_single_process_warning()
def load_weights(checkpoint: Checkpoint, policy: nn.Module) -> None:
    """Load a checkpoint's weights alone, for evaluation and export."""
    model = get_model_state_dict(policy, options=TRAINED_ONLY)
    _load_in_place({"model": model}, checkpoint.folder)
    set_model_state_dict(policy, model, options=TRAINED_ONLY)


def _load_in_place(state: dict[str, Any], folder: Path) -> None:
    way_out = "delete it to go on from an earlier checkpoint"
    with files_of(folder, "damaged", way_out):
        dcp.FileSystemReader(folder).read_metadata()  # `load` would log a traceback
    try:
        dcp.load(state, checkpoint_id=folder)
    except CheckpointException as error:  # no `Exception`: it joins those of all ranks
        with files_of(folder, "damaged", way_out):
            raise next(iter(error.failures.values()))[0] from None


def numeric_settings(config: TrainConfig, pairs: PairShards) -> dict[str, Any]:
    """The settings that determine a run's numbers, as JSON, with a digest of the pairs."""
    names = [field.name for field in fields(config) if field.name not in MAY_CHANGE]
    settings = {name: getattr(config, name) for name in names}
    return settings | {DIGEST: pairs.digest}


def checkpoint_to_resume(config: TrainConfig, settings: Mapping[str, Any]) -> Checkpoint | None:
    """The last complete checkpoint of --output-dir under --resume; None: start from scratch.

    Raises `UserError` if the folder holds a run and --resume is not given, or if one of
    `settings` is not that of the run.
    """
    folder = RunFolder(config.output_dir)
    saved = checkpoints(folder.checkpoints)
    if not config.resume:
        if saved or folder.finished:
            raise UserError(
                f"--output-dir {folder.path} holds a run; add --resume to go on with it, "
                "or name another folder"
            )
        return None
    if not saved:
        return None
    earlier = {**SINCE, **saved[-1].settings}
    for name, value in settings.items():
        if earlier.get(name) != value and name == DIGEST:
            way_out = (
                f"add --pairs {folder.pairs}, which has those" if folder.pairs.is_dir() else ""
            )
            raise UserError(
                f"--pairs {config.pairs} holds other pairs than those that the run in "
                f"{folder.path} was started with (digest {value}, then {earlier.get(name)}); "
                f"{way_out or 'prepare those again'}, or name another --output-dir"
            )
        if earlier.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} is {value}, and the run in {folder.path} was started with "
                f"{earlier.get(name)}; resume with that, or name another --output-dir"
            )
    return saved[-1]


def _read(path: Path) -> Checkpoint:
    state = {
        **{"step": int, "position": [int], "dropped": {}, "pairs": int, "tokens": int},
        **{"max_tokens": int | None, "asked_tokens": int | str | None, "sums": {}},
    }
    shape = {"state": state, "settings": {}, "accuracy": float | int | None, "log_bytes": int}
    way_out = f"delete {path.parent} to go on from an earlier checkpoint"
    content = read_json(path, shape, way_out)
    values = {name: content["state"][name] for name in state}
    values["position"] = Position(*values["position"][:3])
    if (online := content["state"].get("online")) is not None:  # earlier versions had none
        learned = {"weights": [float], "wins": [int], "losses": [int], "accuracy": float | None}
        if not fits(online, learned):
            raise UserError(f"{path}: damaged, the weights learned so far are not there; {way_out}")
        values["online"] = OnlineWeights(**{name: online[name] for name in learned})
    rest = {name: content[name] for name in shape if name != "state"}
    return Checkpoint(path.parent, TrainState(**values), **rest)


def _remove_old(folder: Path, keep: int) -> None:
    saved = checkpoints(folder)
    top = best(saved)
    for checkpoint in saved[:-keep]:
        if checkpoint is not top:  # renamed first: an incomplete checkpoint must never be found
            name = checkpoint.folder.name
            checkpoint.folder.rename(folder / f".{name}.partial")
    for leftover in folder.glob(".step-*.partial"):
        shutil.rmtree(leftover)
