"""Policies as stage one scores references: each becomes an entry like those of refs.yaml.

A policy is a model folder, a PEFT adapter's folder, a Hub id or a finished run. `score_policies`
hands them to `precompute`, so that their scores stand in the store under identities of their own:
a policy whose weights did not change is never scored again.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from ..data.references import load_refs
from ..data.shards import PairShards, ShardWriter
from ..data.store import ReferenceRecord, Store
from ..errors import UserError
from ..precompute.config import PrecomputeConfig
from ..precompute.run import precompute
from ..settings import build
from ..train.checkpoint import checkpoints
from ..train.config import TrainConfig
from ..train.run_folder import RunFolder
from ..train.start import POLICY

ADAPTER_CONFIG, RESOLVED = "adapter_config.json", "train.yaml"
SHARD_PAIRS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """A model to evaluate."""

    name: str
    model: str  # a folder or a Hub id
    revision: str | None = None
    adapter: str | None = None  # a folder
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        """As refs.yaml would have it."""
        parts = {
            "model": self.model,
            "revision": self.revision,
            "adapter": self.adapter,
            "chat_template": _template_of(self.adapter),
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        return {key: value for key, value in parts.items() if value}


def policy_at(path: str, name: str | None = None, kwargs: dict[str, Any] | None = None) -> Policy:
    """The policy that a path or a Hub id names; a folder with an adapter needs its base model."""
    folder = Path(path).expanduser()
    name = name or path
    if not folder.is_dir():
        return Policy(name=name, model=path, chat_template_kwargs=kwargs or {})
    if not (folder / ADAPTER_CONFIG).is_file():
        return Policy(name=name, model=str(folder.resolve()), chat_template_kwargs=kwargs or {})
    adapter = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    below = adapter["base_model_name_or_path"]
    return Policy(
        name=name,
        model=str(Path(below).resolve()) if Path(below).is_dir() else below,
        revision=adapter.get("revision"),
        adapter=str(folder.resolve()),
        chat_template_kwargs=kwargs or {},
    )


def run_settings(run: str) -> TrainConfig:
    """The settings in force of a run, or `UserError` where the folder is none."""
    path = Path(run) / RESOLVED
    if not path.is_file():
        raise UserError(f"--runs {run}: no {RESOLVED} there; name folders that `mrpo train` made")
    return build(TrainConfig, {}, str(path))


def run_names(runs: Sequence[str]) -> list[str]:
    """The end of each run's path, as long as it takes to tell them apart.

    >>> run_names(["/runs/dpo", "/runs/mrpo"]), run_names(["/dpo/seed-1", "/mrpo/seed-1"])
    (['dpo', 'mrpo'], ['dpo/seed-1', 'mrpo/seed-1'])
    """
    paths = [Path(run).resolve().parts for run in runs]
    longest = max(map(len, paths), default=1)
    ends = (["/".join(path[-length:]) for path in paths] for length in range(1, longest + 1))
    names = next(ends, [])
    while len(set(names)) < len(set(paths)):
        names = next(ends)
    return names


def policy_of_run(run: str, name: str) -> Policy:
    """A finished run's model, shown pairs as in training."""
    folder = RunFolder(Path(run))
    if not folder.finished:
        raise UserError(
            f"--runs {run}: no {folder.model.name}/ there yet; finish the run with "
            "`mrpo train --resume`"
        )
    found = checkpoints(folder.checkpoints)
    kwargs = found[-1].settings[POLICY]["chat_template_kwargs"] if found else {}
    return policy_at(str(folder.model), name, kwargs)


def score_policies(
    policies: Sequence[Policy],
    pairs: PairShards,
    store: Store,
    *,
    split: str | None = None,
    engine: Literal["hf", "vllm", "auto"] = "hf",
    max_tokens: int | None = None,
) -> list[ReferenceRecord]:
    """See to it that the store has every policy's scores of a split (None: of all pairs).

    What `precompute` says goes to stderr. Raises `UserError` where a policy can't be scored.
    """
    aliases = _aliases(policies)
    with _only(pairs, split) as folder, tempfile.TemporaryDirectory() as temporary:
        refs_config = Path(temporary) / "refs.yaml"
        entries = {alias: one.entry() for alias, one in zip(aliases, policies)}
        refs_config.write_text(yaml.safe_dump(entries), encoding="utf-8")
        config = PrecomputeConfig(
            refs=",".join(aliases),
            pairs=str(folder),
            refs_config=str(refs_config),
            store=store.root,
            engine=engine,
            max_tokens=max_tokens,
            update_refs=True,  # a policy on the Hub is what it is now
        )
        with redirect_stdout(sys.stderr):
            failed = precompute(config)
        if failed:
            raise UserError("not all policies could be scored; see the lines above")
        specs = load_refs(refs_config)
        return [store.resolve(alias, specs) for alias in aliases]


@contextmanager
def _only(pairs: PairShards, split: str | None) -> Iterator[Path]:
    """A folder that holds the pairs of a split; the pairs' own where that is all of them."""
    splits = [
        pairs.table(shard, ["split"])["split"].to_numpy(zero_copy_only=False)
        for shard in range(len(pairs.names))
    ]
    if split is None or all((names == split).all() for names in splits):
        yield pairs.path
        return
    rows = [np.flatnonzero(names == split).tolist() for names in splits]
    if not any(rows):
        raise UserError(
            f"{pairs.path} has no pairs of split {split}; prepare them with "
            "--validation-fraction, or take --split all"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / str(split)
        folder.mkdir()
        writer = ShardWriter(folder, SHARD_PAIRS)
        for shard, wanted in enumerate(rows):
            for pair in pairs.pairs(shard, wanted) if wanted else []:
                writer.add(pair, pair.id)
        writer.finish({"source": str(pairs.path)})
        yield folder


def _aliases(policies: Sequence[Policy]) -> list[str]:
    """A name in the store for each policy: its own as far as an alias may have it."""
    aliases: list[str] = []
    for policy in policies:
        short = re.sub(r"[^A-Za-z0-9._-]+", "-", policy.name).strip("-")[-48:]
        alias, number = f"policy-{short}", 2
        while alias in aliases:
            alias, number = f"policy-{short}-{number}", number + 1
        aliases.append(alias)
    return aliases


def _template_of(adapter: str | None) -> str | None:
    """The chat template saved beside an adapter: its base model may have another or none."""
    path = Path(adapter or "") / "chat_template.jinja"
    return path.read_text(encoding="utf-8") if adapter and path.is_file() else None
