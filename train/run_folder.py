"""The folder of a run: the one owner of its file names.

runs/name/train.yaml        the settings in force
runs/name/scores/           the references' scores, joined once
runs/name/log.jsonl         a line a step, evaluations between them
runs/name/checkpoints/      the last ones and the best
runs/name/evaluation.json   held-out figures: of training, and those that `mrpo evaluate` adds
runs/name/model/            the final model; it is there when the run is complete
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run's files are; makes none of them."""

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / "train.yaml"

    @property
    def scores(self) -> Path:
        return self.path / "scores"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def finished(self) -> bool:
        return self.model.is_dir()
