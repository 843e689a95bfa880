"""Policies to evaluate, scored as stage one scores references.

A policy is a model folder, a PEFT adapter's folder, a Hub id or a finished run. `score_policies`
keeps their scores in `store.policies`, apart from the references', under identities of their own:
a policy whose weights did not change is never scored again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..data.references import ReferenceSpec
from ..data.shards import PairShards
from ..data.store import ReferenceRecord, Store
from ..errors import UserError
from ..precompute.run import score
from ..settings import build
from ..train.checkpoint import checkpoints
from ..train.config import TrainConfig
from ..train.run_folder import RunFolder
from ..train.start import POLICY

ADAPTER_CONFIG, TEMPLATE = "adapter_config.json", "chat_template.jinja"
ALIAS_LENGTH = 48  # leaves room for a number


def policy_at(path: str, name: str | None = None, kwargs: dict[str, Any] | None = None) -> Policy:
    """The policy that a path or a Hub id names; a folder with an adapter needs its base model."""
    folder = Path(path).expanduser()
    name = name or path
    if not folder.is_dir():
        return Policy(name=name, model=path, chat_template_kwargs=kwargs or {})
    if not (folder / ADAPTER_CONFIG).is_file():
        return Policy(name=name, model=str(folder.resolve()), chat_template_kwargs=kwargs or {})
