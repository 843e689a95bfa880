"""What is said before scoring on a processor that has no 16 bits, and how long it is to take."""

from __future__ import annotations

import pytest
import torch

from mrpo.model import rates
from mrpo.precompute.engines.protocol import EngineSettings
from mrpo.precompute.estimate import precision_warning

IN_FLOAT32 = "bfloat16 is slow; set dtype: float32 in refs.yaml, which is another identity"
NO_AUTOCAST = "bfloat16 is slow; leave out --bf16, which is another identity"


@pytest.mark.parametrize(
    ("settings", "gpus", "warning"),
    [
        ({"dtype": "bfloat16"}, 0, IN_FLOAT32),
        ({"dtype": "float32", "autocast": True}, 0, NO_AUTOCAST),
        ({"dtype": "float32"}, 0, None),
        ({"dtype": "auto"}, 0, None),
        ({"dtype": "bfloat16"}, 1, None),
    ],
)
def test_the_way_out_of_a_slow_precision(
    settings: dict[str, object], gpus: int, warning: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "slow_precision", {"bfloat16": "bfloat16 is slow"}.get)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert precision_warning(EngineSettings(alias="x", model="m", **settings)) == warning  # type: ignore[arg-type]
