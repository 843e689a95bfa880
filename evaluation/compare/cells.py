"""One run of a comparison: its settings, its folder, and whether it is finished.

<output-dir>/cells/mrpo/fraction-0.2/seed-43/     a folder of `mrpo train`, and besides
    cell.yaml         its settings, as `mrpo train --config` reads them
    cell.json         its inputs, which make its numbers: settings, pairs, references' identities
    cell.log          what training and evaluation printed
    evaluation.json   held-out figures of training and of the evaluation
    result.json       seconds and the policy's identity; there when the run is finished
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from ...data.shards import PairShards
from ...data.store.store import IDENTITY
from ...errors import UserError
from ...files import read_json, write_json
from ...settings import comma_separated, write_resolved
from ...train.checkpoint import DIGEST
from ...train.config import TrainConfig
from ...train.run_folder import RunFolder
from ..config import CompareConfig

CELLS, PAIRS, SETTINGS, INPUTS = "cells", "pairs", "cell.yaml", "cell.json"
SCORED = "identities of the references"  # by alias, in a cell's inputs


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
    def run(self) -> RunFolder:
        return RunFolder(self.folder)

    @property
    def log(self) -> Path:
        return self.folder / "cell.log"

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def identity(self) -> str | None:
        """Of the trained policy's scores in the store; None where the cell is not finished."""
        number = float | int
        shape = {"identity": str, "seconds": {"train": number, "evaluate": number}}
        way_out = "remove it to evaluate this run again"
        try:
            identity: str = read_json(self.result, shape, way_out)["identity"]
        except FileNotFoundError:
            return None
        if not IDENTITY.fullmatch(identity):
            raise UserError(f"{self.result}: damaged, identity {identity!r}; {way_out}")
        return identity

    @property
    def finished(self) -> bool:
        return self.identity is not None


def cells_of(config: CompareConfig) -> list[Cell]:
    """Every combination, small fractions first, so that mistakes show early."""
    cells = []
    seeds = range(config.seed, config.seed + config.seeds)
    for choice in product(fractions_of(config.fractions), seeds, methods_of(config.methods)):
        fraction, seed, method = choice
        name = method.replace(":", "=").replace("/", "~")  # not in aliases, nor in weightings
        folder = Path(config.output_dir) / CELLS / name / f"fraction-{fraction:g}" / f"seed-{seed}"
        cells.append(Cell(method, fraction, seed, folder))
    return cells


def methods_of(text: str) -> list[str]:
    """The methods of a comma-separated list; `UserError` for none, and for one given twice."""
    methods = comma_separated(text, "--methods")
    if not methods:
        raise UserError(f"--methods {text!r} names no method; give some, as dpo:llama,mrpo")
    return methods


def fractions_of(text: str) -> list[float]:
    """The fractions of a comma-separated list, ascending; each above 0 and at most 1.

    >>> fractions_of("1, 0.05,0.2")
    [0.05, 0.2, 1.0]
    """
    try:
        fractions = sorted({float(part) for part in comma_separated(text)})
    except ValueError:
        fractions = []
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise UserError(f"--fractions {text}: must be numbers above 0, up to 1, as 0.05,0.2,1")
    return fractions


def settings_for(config: CompareConfig, cell: Cell, refs: str, pairs: PairShards) -> TrainConfig:
    """The cell's settings for `mrpo train`."""
    shared = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    own: dict[str, Any] = {
        "output_dir": str(cell.folder),
        "pairs": str(pairs.path),
        "data": None,
        "refs": refs,
        "method": cell.method,
        "train_fraction": cell.fraction,
        "seed": cell.seed,
        "run_name": f"{Path(config.output_dir).resolve().name}: {cell}",  # in the trackers
    }
    return TrainConfig(**{**shared, **own})


def refuse_changed_inputs(cell: Cell, inputs: Mapping[str, Any]) -> None:
    """Raise `UserError` where the folder has a run of other settings, pairs or scores."""
    path = cell.folder / INPUTS
    if not path.is_file():
        return
    earlier = read_json(path, {}, f"remove {cell.folder} to run this cell again")
    for name, value in inputs.items():
        if earlier.get(name) != value:
            flag = name if " " in name else f"--{name.replace('_', '-')}"
            way_out = "compare with that"
            if name == DIGEST:
                way_out = f"compare with --pairs {cell.folder.parents[3] / PAIRS}"
            raise UserError(
                f"{flag}: {cell.folder} was made with {earlier.get(name)}, now it is {value}; "
                f"{way_out}, or name another --output-dir"
            )


def refuse_other_scores(cell: Cell, identities: Mapping[str, str]) -> None:
    """Raise `UserError` where an alias no longer means what it meant when the comparison began."""
    way_out = f"remove {cell.folder} to run this cell again"
    begun = read_json(cell.folder / INPUTS, {SCORED: dict[str, str]}, way_out)[SCORED]
    for alias, identity in identities.items():
        if begun[alias] != identity:
            raise UserError(
                f"{cell}: {alias} means {alias}@{identity[:12]} now, the comparison began with "
                f"{alias}@{begun[alias][:12]}; name that in --refs, or another --output-dir"
            )


def write_inputs(cell: Cell, settings: TrainConfig, inputs: Mapping[str, Any]) -> None:
    """Make the cell's folder with its settings."""
    try:
        write_resolved(settings, cell.folder / SETTINGS)
        write_json(cell.folder / INPUTS, inputs)
    except OSError as error:
        raise UserError(
            f"--output-dir {cell.folder}: {error.strerror}; name another folder"
        ) from None
