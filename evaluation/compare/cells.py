"""One run of a comparison: its settings, its folder, and whether it may be taken as it is.

<output-dir>/cells/mrpo/fraction-0.2/seed-43/     a folder of `mrpo train`, and besides
    cell.yaml       the settings handed to `mrpo train --config`
    cell.json       what makes its numbers: settings, pairs, references' identities
    cell.log        what the commands said
    evaluate.json   what `mrpo evaluate` measured
    result.json     seconds; it is there when the run is complete and evaluated
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...data.shards import PairShards
from ...errors import UserError
from ...settings import write_resolved
from ...train.checkpoint import numeric_settings
from ...train.config import TrainConfig
from ..config import CompareConfig
from ..results import write_json

CELLS = "cells"
SETTINGS, INPUTS, LOG, EVALUATION, RESULT = (
    "cell.yaml", "cell.json", "cell.log", "evaluate.json", "result.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cell:
    """A method trained on a fraction of the pairs with a seed."""

    method: str  # as the user wrote it
    fraction: float
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.method}, fraction {self.fraction:g}, seed {self.seed}"

    @property
    def finished(self) -> bool:
        return (self.folder / RESULT).is_file()


def cells_of(config: CompareConfig) -> list[Cell]:
    """Every combination, the small fractions first: what is wrong shows soon."""
    root = Path(config.output_dir) / CELLS
    return [
        Cell(
            method,
            fraction,
            seed,
            root / folder_name(method) / f"fraction-{fraction:g}" / f"seed-{seed}",
        )
        for fraction in fractions_of(config.fractions)
        for seed in range(config.seed, config.seed + config.seeds)
        for method in methods_of(config.methods)
    ]


def methods_of(text: str) -> list[str]:
    """The methods of a comma-separated list, each once."""
    methods = [method.strip() for method in text.split(",") if method.strip()]
    if not methods:
        raise UserError(f"--methods {text!r} names no method; give some, as dpo:llama,mrpo")
    for method in methods:
        if methods.count(method) > 1:
            raise UserError(f"--methods: {method!r} stands there twice; name each once")
    return methods


def fractions_of(text: str) -> list[float]:
    """The fractions of a comma-separated list, rising; each above 0, none above 1.

    >>> fractions_of("1, 0.05,0.2")
    [0.05, 0.2, 1.0]
    """
    try:
        fractions = sorted({float(part) for part in text.split(",") if part.strip()})
    except ValueError:
        fractions = []
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise UserError(f"--fractions {text}: must be numbers above 0, up to 1, as 0.05,0.2,1")
    return fractions


def folder_name(method: str) -> str:
    """A folder's name for a method; neither mark can stand in an alias or a weighting.

    >>> folder_name("mrpo:llama/qwen+fitted")
    'mrpo=llama~qwen+fitted'
    """
    return method.replace(":", "=").replace("/", "~")


def settings_for(config: CompareConfig, cell: Cell, refs: str, pairs: PairShards) -> TrainConfig:
    """The settings of the cell's `mrpo train`."""
    shared = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    own: dict[str, Any] = {
        "output_dir": str(cell.folder),
        "pairs": str(pairs.path),
        "data": None,
        "refs": refs,
        "method": cell.method,
        "train_fraction": cell.fraction,
        "seed": cell.seed,
    }
    return TrainConfig(**{**shared, **own})


def inputs_of(
    settings: TrainConfig, pairs: PairShards, identities: Mapping[str, str]
) -> dict[str, Any]:
    """What makes the numbers of a cell, as JSON."""
    return numeric_settings(settings, pairs) | {"identities of the references": dict(identities)}


def refuse_other(cell: Cell, inputs: Mapping[str, Any]) -> None:
    """Raise `UserError` where the folder has a run of other settings, pairs or scores."""
    path = cell.folder / INPUTS
    if not path.is_file():
        return
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for name, value in inputs.items():
        if earlier.get(name) != value:
            flag = name if " " in name else f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag}: {cell.folder} was made with {earlier.get(name)}, now it is {value}; "
                "compare with that, or name another --output-dir"
            )


def write_inputs(cell: Cell, settings: TrainConfig, inputs: Mapping[str, Any]) -> None:
    """Make the cell's folder, with what `mrpo train` is to do in it."""
    try:
        cell.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output-dir {cell.folder}: {error.strerror}; name another folder"
        ) from None
    write_resolved(settings, cell.folder / SETTINGS)
    write_json(cell.folder / INPUTS, inputs)
