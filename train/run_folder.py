"""The folder of a run: the one owner of its file names.

runs/name/train.yaml        the settings in force
runs/name/pairs/            the pairs it was started with, as links, until it is finished
runs/name/scores/           the references' scores, joined once; training reads nothing else
runs/name/log.jsonl         a line a step, held-out evaluations between them
runs/name/checkpoints/      the latest ones and the best
runs/name/evaluation.json   held-out figures: of training, and those that `mrpo evaluate` adds
runs/name/tracker-id        the run's id in wandb and trackio, if --report-to names them
runs/name/average.json      in a comparison, in place of a log: what the model is the mean of
runs/name/model/            the final model; it is there once the run is finished
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import fits, read_json, write_json


class RunFolder:
    """Where a run's files are; creates none of them."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.settings = self.path / "train.yaml"
        self.pairs = self.path / "pairs"
        self.scores = self.path / "scores"
        self.log = self.path / "log.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.evaluation = self.path / "evaluation.json"
        self.average = self.path / "average.json"
        self.tracker_id = self.path / "tracker-id"
        self.model = self.path / "model"

    @property
    def finished(self) -> bool:
        return self.model.is_dir()


def read_log(folder: Path) -> Sequence[Mapping[str, float | None]]:
    """The lines of a run's log. Raises `UserError` where the folder has none."""
    path = RunFolder(folder).log
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise UserError(f"{folder}: no run of `mrpo train` ({path.name} is missing)") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: damaged; a line is not JSON") from None
    figures = dict[str, float | int | None]
    if not all(fits(line, {"step": int}) and fits(line, figures) for line in lines):
        raise UserError(f"{path}: damaged; a line is not a step with its figures")
    return lines


def read_evaluation(path: Path) -> dict[str, Any]:
    """What an evaluation.json holds; empty where there is none."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = read_json(path, {}, "remove it, or name another file")
    return content


def update_evaluation(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` into an evaluation.json; its other keys stay."""
    write_json(path, read_evaluation(path) | dict(content))
