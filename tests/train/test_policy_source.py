"""Which weights a policy starts from: at the commits that its base reference was scored at."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mrpo.data.references import ReferenceSpec
from mrpo.errors import UserError
from mrpo.train import policy
from mrpo.train.config import TrainConfig
from mrpo.train.policy import load_policy, policy_source

BASE = ReferenceSpec("sft", "org/model", adapter="org/adapter")
COMMITS = {"model": "1" * 40, "adapter": "2" * 40}


def test_a_base_with_an_adapter_on_the_hub_is_loaded_at_the_commits_that_were_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: dict[str, Any] = {}

    def load_model(model: str, **options: Any) -> Any:
        loaded.update(options, model=model)
        raise KeyboardInterrupt  # seen enough

    config = TrainConfig(output_dir="run", refs="sft")
    source, is_base = policy_source(config, BASE, COMMITS)
    assert is_base
    monkeypatch.setattr(policy, "load_model", load_model)
    with pytest.raises(KeyboardInterrupt):
        load_policy(source, config, cast(Any, SimpleNamespace(world=1, device="cpu")), False)
    assert (loaded["model"], loaded["revision"]) == ("org/model", "1" * 40)
    assert (loaded["adapter"], loaded["adapter_revision"]) == ("org/adapter", "2" * 40)


def test_a_revision_of_a_policy_in_a_folder_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(output_dir="run", policy=str(tmp_path), policy_revision="main")
    with pytest.raises(UserError, match="--policy-revision is main, which has no effect on a"):
        policy_source(config, BASE, COMMITS)
