"""`make gpu-check` where there is no GPU: what can run here passes, and a fault is found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mrpo.benchmarks import gpu_check
from mrpo.benchmarks.gpu_checks.check import CHECKS
from mrpo.benchmarks.gpu_checks.world import World
from mrpo.model import logps

ON_A_CPU = (
    "scoring, float32",
    "scoring, sliding windows and softcap (Gemma 2)",
    "scoring, 6 heads in 2 groups (Qwen 2)",
    "scoring, bfloat16 weights",
    "scoring, bfloat16 autocast",
    "training, float32, against the CPU",
    "training, bfloat16 autocast",
    "training, gradient checkpointing",
    "training, LoRA over bfloat16 weights",
)
# A GPU box that has none of these runs it too: with None in its place no module is imported.
ON_A_BARE_BOX = """
import runpy, sys
sys.modules.update(dict.fromkeys(["datasets", "datasketch", "tenacity", "trl", "vllm", "ray"]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_without_a_gpu_its_checks_are_not_here_and_all_others_pass(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", ON_A_BARE_BOX, gpu_check.__file__]
    command += ["--out", str(tmp_path / "table.md")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()[4:]]
    outcomes = {row[0].removeprefix("| "): row[1] for row in rows}
    assert list(outcomes) == [check.name for check in CHECKS]
    assert [name for name, outcome in outcomes.items() if outcome == "pass"] == list(ON_A_CPU)
    assert {outcomes[name] for name in outcomes if name not in ON_A_CPU} == {"not here"}
    assert all("GPU" in row[2] for row in rows if row[1] == "not here")


def test_a_wrong_mask_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 without its sliding windows."""
    [check] = [check for check in CHECKS if check.name.startswith("scoring, sliding windows")]
    plain = logps.PackedMasks.dense
    monkeypatch.setattr(logps.PackedMasks, "dense", lambda masks, window: plain(masks, None))
    outcome, figures = check.outcome(World(tmp_path))
    assert outcome == "FAIL"
    assert "nats a token at most from the CPU" in figures
