"""Policies to evaluate: a model folder, a PEFT adapter's folder, a Hub id or a finished run.

They are scored as stage one scores references.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data.references import ReferenceSpec
from ..errors import UserError
from ..files import read_json, read_text
from ..settings import build
from ..train.checkpoint import checkpoints
from ..train.config import TrainConfig
from ..train.run_folder import RunFolder
from ..train.start import recorded_source

ADAPTER_CONFIG, TEMPLATE = "adapter_config.json", "chat_template.jinja"
RENDERING = "rendering"  # its key in an average.json
ALIAS_LENGTH = 48  # characters of a policy's name that become its alias


@dataclass(frozen=True, slots=True)
class Policy:
    """A model to evaluate, as a reference that stage one can score."""

    name: str
    reference: ReferenceSpec  # its alias is set by `references_of`


def policy_at(
    path: str,
    name: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    system_role: str | None = None,
) -> Policy:
    """The policy at a path or on the Hub; `kwargs` are for its chat template.

    A folder that holds a PEFT adapter also needs the adapter's base model.
    """
    if "://" in path:  # a URL could carry a token, so it is not repeated
        raise UserError("--policies: one of them is a URL; name a folder or a Hub id (org/name)")
    folder = Path(path).expanduser()
    model = str(folder.resolve()) if folder.is_dir() else path
    reference = ReferenceSpec(
        "policy", model, chat_template_kwargs=kwargs or {}, system_role=system_role
    )
    if (folder / ADAPTER_CONFIG).is_file():
        shape = {"base_model_name_or_path": str}
        adapter = read_json(folder / ADAPTER_CONFIG, shape, "restore the adapter")
        base = adapter["base_model_name_or_path"]
        template = folder / TEMPLATE  # its base model may have another one, or none
        reference = replace(
            reference,
            model=str(Path(base).resolve()) if Path(base).is_dir() else base,
            revision=adapter.get("revision"),
            adapter=model,
            chat_template=read_text(template) if template.is_file() else None,
        )
    return Policy(name or path, reference)


def policy_of_run(run: str | Path, name: str) -> Policy:
    """The model of a finished run, with pairs rendered as in training."""
    folder = RunFolder(Path(run))
    if not folder.finished:
        raise UserError(
            f"--runs {run}: no {folder.model.name}/ there yet; finish the run with "
            "`mrpo train --resume`"
        )
    if folder.average.is_file():
        shape = {"chat_template_kwargs": dict[str, Any], "system_role": str | None}
        way_out = f"remove {folder.path} and run `mrpo compare` again"
        rendering = read_json(folder.average, {RENDERING: shape}, way_out)[RENDERING]
        return policy_at(str(folder.model), name, *(rendering[key] for key in shape))
    saved = checkpoints(folder.checkpoints)
    if not saved:
        return policy_at(str(folder.model), name)
    source = recorded_source(saved[-1])
    return policy_at(str(folder.model), name, source.chat_template_kwargs, source.system_role)


def run_settings(run: str) -> TrainConfig:
    """The settings of a run. Raises `UserError` where the folder holds none."""
    path = RunFolder(Path(run)).settings
    if not path.is_file():
        raise UserError(f"--runs {run}: no {path.name} there; name folders that `mrpo train` made")
    return build(TrainConfig, {}, str(path))


def run_names(runs: Sequence[str]) -> list[str]:
    """The end of each run's path, as many parts as it takes to tell the runs apart.

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


def references_of(policies: Sequence[Policy]) -> list[ReferenceSpec]:
    """What stage one scores; aliases are the policies' names, as far as an alias may hold them."""
    aliases: list[str] = []
    for policy in policies:
        short = re.sub(r"[^A-Za-z0-9._-]+", "-", policy.name).strip("-._")[-ALIAS_LENGTH:]
        short = short.strip("-._") or "policy"
        alias, number = short, 2
        while alias in aliases:
            alias, number = f"{short}-{number}", number + 1
        aliases.append(alias)
    return [replace(policy.reference, alias=alias) for policy, alias in zip(policies, aliases)]
