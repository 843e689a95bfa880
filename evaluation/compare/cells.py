"""One run of a comparison: its settings, its folder, and whether it is finished.

<output-dir>/cells/mrpo/fraction-0.2/seed-43/     a folder of `mrpo train`, and besides
<output-dir>/cells/merge=llama~qwen/untrained/once/   a mean of weights (averages.py), likewise

A subset, label noise, another beta than --beta and an epsilon of --epsilons are in the name of the
folder in the middle: `fraction-0.2-subset-43-noise-0.15-beta-0.5`. A run's folder has:

    cell.yaml         its settings, as `mrpo train --config` reads them
    cell.json         its inputs, which make its numbers: settings, pairs, references' identities
    cell.log          what training and evaluation printed
    evaluation.json   held-out figures of training and of the evaluation
    result.json       seconds and the policy's identity; there when the run is finished

A soup has parts, cells of the same comparison, that are run first, whether the user lists them as
methods or not. A merge is one cell for all fractions, noise levels and seeds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from math import inf
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ...data.shards import PairShards
from ...data.store.store import IDENTITY
from ...errors import UserError
from ...files import read_json, write_json
from ...method.grammar import (
    aliases_of,
    average_name,
    named_references,
    parse_average,
    parse_method,
)
from ...method.objective import Method
from ...settings import comma_separated, write_resolved
from ...train.checkpoint import DIGEST, SINCE, STATE_FILE, numeric_settings
from ...train.config import TrainConfig
from ...train.run_folder import RunFolder
from ..config import CompareConfig

CELLS, PAIRS, SETTINGS, INPUTS = "cells", "pairs", "cell.yaml", "cell.json"
COMPARISON = "compare.yaml"  # the settings of the comparison, beside `CELLS`
SCORED = "identities of the references"  # by alias, in a cell's inputs


@dataclass(frozen=True, slots=True)
class Cell:
    """A method trained on a fraction of the pairs with a seed."""

    method: str  # as the user wrote it
    fraction: float
    seed: int
    folder: Path
    label_noise: float = 0.0
    beta: float | None = None  # of --betas; None: without them
    epsilon: float | Literal["none"] | None = None  # of --epsilons, likewise
    subset: int = 0  # which draw of the fraction
    parts: tuple[Cell, ...] = ()  # of a soup

    @property
    def average(self) -> str | None:
        """soup or merge, where the model is a mean of weights and not trained."""
        return average_name(self.method)

    @property
    def name(self) -> str:
        """The method with what --betas and --epsilons add to it: a row of the tables."""
        axes = {"beta": self.beta, "epsilon": self.epsilon}
        words = [f" {axis}={_text(value)}" for axis, value in axes.items() if value is not None]
        return self.method + "".join(words)

    def __str__(self) -> str:
        if self.average == "merge":
            return self.name
        noise = f", label noise {self.label_noise:g}" if self.label_noise else ""
        return f"{self.name}, fraction {self.fraction:g}{noise}, seed {self.seed}"

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
    """Every combination of the user's methods, small fractions first, so that mistakes show early.

    All methods come before the next seed, noise level and fraction.
    """
    seeds = range(config.seed, config.seed + config.seeds)
    conditions = product(fractions_of(config.fractions), noises_of(config.label_noise), seeds)
    return [
        _cell(config, *condition, variant)
        for condition, variant in product(conditions, _variants(config))
    ]


def runs_of(cells: Iterable[Cell]) -> list[Cell]:
    """What has to run for these cells: each folder once, the parts of a soup before it."""
    runs = (run for cell in cells for run in (*cell.parts, cell))
    return list({run.folder: run for run in runs}.values())


class Variant(NamedTuple):
    """A method as the tables have it."""

    method: str  # as the user wrote it
    beta: float | None = None
    epsilon: float | Literal["none"] | None = None
    parts: tuple[str, ...] = ()  # of a soup: methods


def _variants(config: CompareConfig) -> list[Variant]:
    """The methods with each beta, and with each epsilon where they clip.

    A method with one reference never clips, and one that is not clipped by default only where
    --epsilon clips all. A merge is not trained, and has neither.
    """
    methods = methods_of(config.methods)
    aliases = aliases_over(config.refs, methods)
    averages = {text: parse_average(text, aliases) for text in methods}
    trained = {t: _method(config, t, aliases) for t, average in averages.items() if not average}
    written = {str(method): text for text, method in trained.items()}  # dpo may mean dpo:llama
    betas = betas_of(config.betas) if config.betas else [None]
    variants: list[Variant] = []
    for text, average in averages.items():
        if average is not None and average.name == "merge":
            variants.append(Variant(text))
            continue
        singles = [f"dpo:{reference}" for reference in average.references] if average else []
        parts = tuple(written.get(single, single) for single in singles)
        method = trained.get(text)
        clips = method and method.epsilon is not None and len(method.references) > 1
        epsilons = epsilons_of(config.epsilons) if config.epsilons and clips else [None]
        variants += [Variant(text, *axes, parts) for axes in product(betas, epsilons)]
    if config.epsilons and all(variant.epsilon is None for variant in variants):
        raise UserError(
            f"--epsilons {config.epsilons}: no method of {', '.join(methods)} clips; add mrpo with "
            "several references, or clip every method with --epsilon"
        )
    return variants


def _method(config: CompareConfig, text: str, aliases: Sequence[str]) -> Method:
    return parse_method(
        text,
        aliases,
        reference_kind=config.reference_kind,
        weighting=config.weighting,
        weights=config.weights,
        epsilon=config.epsilon,
    )


def _cell(
    config: CompareConfig, fraction: float, noise: float, seed: int, variant: Variant
) -> Cell:
    method, beta, epsilon, _ = variant
    name = method.replace(":", "=").replace("/", "~")  # not in aliases, nor in weightings
    cells = Path(config.output_dir) / CELLS / name
    if average_name(method) == "merge":
        return Cell(method, fraction, seed, cells / "untrained" / "once", noise)
    subset = seed if config.vary_subset and fraction < 1 else 0
    usual = {"subset": 0, "noise": 0.0, "beta": config.beta, "epsilon": None}
    axes = {"subset": subset, "noise": noise, "beta": beta, "epsilon": epsilon}
    words = [f"fraction-{fraction:g}"]
    words += [
        f"{axis}-{_text(value)}"
        for axis, value in axes.items()
        if value is not None and value != usual[axis]
    ]
    folder = cells / "-".join(words) / f"seed-{seed}"
    parts = tuple(
        _cell(config, fraction, noise, seed, Variant(part, beta)) for part in variant.parts
    )
    return Cell(method, fraction, seed, folder, noise, beta, epsilon, subset, parts)


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def aliases_over(refs: str | None, methods: Sequence[str]) -> list[str]:
    """The references of --refs, the base first; by default all that the methods name, in order."""
    named = dict.fromkeys(alias for method in methods for alias in named_references(method))
    return aliases_of(refs or ",".join(named), methods[0])


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
    rule = "numbers above 0, up to 1, as 0.05,0.2,1"
    return _numbers(text, "--fractions", lambda number: 0 < number <= 1, rule)


def noises_of(text: str) -> list[float]:
    """The shares of turned labels of a comma-separated list, ascending; each in [0, 1]."""
    rule = "numbers from 0 to 1, as 0,0.15,0.3"
    return _numbers(text, "--label-noise", lambda number: 0 <= number <= 1, rule)


def betas_of(text: str, flag: str = "--betas") -> list[float]:
    """The betas of a comma-separated list, ascending; each above 0."""
    rule = "numbers above 0, as 0.1,0.5"
    return _numbers(text, flag, lambda number: 0 < number < inf, rule)


def epsilons_of(text: str) -> list[float | Literal["none"]]:
    """The epsilons of a comma-separated list, ascending, `none` last.

    >>> epsilons_of("none,1,0.1")
    [0.1, 1.0, 'none']
    """
    parts = comma_separated(text)
    numbers = ",".join(part for part in parts if part != "none")
    rule = "numbers of 0 or more, or none, as 0.1,1,none"
    unclipped: list[float | Literal["none"]] = ["none"] if "none" in parts else []
    if unclipped and not numbers:
        return unclipped
    return [*_numbers(numbers, "--epsilons", lambda number: 0 <= number < inf, rule), *unclipped]


def _numbers(text: str, flag: str, admits: Callable[[float], bool], rule: str) -> list[float]:
    try:
        numbers = sorted({float(part) for part in comma_separated(text)})
    except ValueError:
        numbers = []
    if not numbers or not all(map(admits, numbers)):
        raise UserError(f"{flag} {text}: must be {rule}")
    if len(set(map(_text, numbers))) < len(numbers):  # their runs would share a folder
        raise UserError(f"{flag} {text}: two are equal to six digits; leave one of them out")
    return numbers


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
        "train_subset": cell.subset,
        "label_noise": cell.label_noise,
        "seed": cell.seed,
    }
    if config.report_to != "none":
        own["run_name"] = f"{Path(config.output_dir).resolve().name}: {cell}"
    own |= {} if cell.beta is None else {"beta": cell.beta}
    own |= {} if cell.epsilon is None else {"epsilon": cell.epsilon}
    return TrainConfig(**{**shared, **own})


def inputs_of(
    cell: Cell, settings: TrainConfig, pairs: PairShards, identities: Mapping[str, str]
) -> dict[str, Any]:
    """What makes the cell's numbers; `identities` of the references' scores, by alias."""
    inputs = numeric_settings(settings, pairs) | {SCORED: dict(identities)}
    if cell.average == "merge":  # whatever the others are trained on
        return {name: inputs[name] for name in ("method", "refs", DIGEST, SCORED)}
    return inputs


def refuse_changed_inputs(cell: Cell, inputs: Mapping[str, Any]) -> None:
    """Raise `UserError` where the folder has a run of other settings, pairs or scores."""
    path = cell.folder / INPUTS
    if not path.is_file():
        return
    earlier = SINCE | read_json(path, {}, f"remove {cell.folder} to run this cell again")
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


def free_disk(cell: Cell, keep_model: bool) -> None:
    """Remove a finished cell's checkpoints, which are several times its model.

    With the model their state files stay: from these `mrpo train` sees that the run is finished,
    and `mrpo evaluate` how its pairs are rendered.
    """
    if not keep_model:
        for folder in (cell.run.model, cell.run.checkpoints):
            if folder.is_dir():
                shutil.rmtree(folder)
        return
    for path in cell.run.checkpoints.glob("*/*"):
        if path.name != STATE_FILE:
            path.unlink()


def to_job(cell: Cell) -> dict[str, Any]:
    """The cell as JSON, for a worker."""
    parts = [to_job(part) for part in cell.parts]
    return asdict(cell) | {"folder": str(cell.folder), "parts": parts}


def from_job(values: Mapping[str, Any]) -> Cell:
    """The cell that `to_job` made this of."""
    parts = tuple(map(from_job, values["parts"]))
    return Cell(**{**values, "folder": Path(values["folder"]), "parts": parts})
