"""Going on with a run: from which checkpoint, and whether it is still the same run.

A checkpoint keeps the settings that make its numbers. What may change between two parts of a run
is listed here, everything else is refused by name.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from ..data.digests import identity_of
from ..data.shards import PairShards
from ..errors import UserError
from .checkpoint import Checkpoint, checkpoints
from .config import TrainConfig

CHECKPOINTS, MODEL = "checkpoints", "model"
MAY_CHANGE = {
    "data", "device", "eval_pairs", "eval_steps", "gradient_checkpointing",
    "load_best_model_at_end", "logging_steps", "max_missing", "max_tokens", "output_dir", "pairs",
    "refs_config", "report_to", "resume", "run_name", "save_steps", "save_total_limit", "store",
    "torch_compile",
}  # fmt: skip


def settings_of(config: TrainConfig, pairs: PairShards) -> dict[str, Any]:
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
