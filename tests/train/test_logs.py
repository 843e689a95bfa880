"""What a run says: the log's lines, the bar, the trackers."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mrpo.errors import UserError
from mrpo.train.logs import RunLog, check_trackers, open_trackers
from mrpo.train.run_folder import RunFolder

FAKE = """
calls = []
def init(**known): calls.append(("init", known))
def log(values, step): calls.append(("log", values, step))
def finish(): calls.append(("finish",))
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_undefined_value_is_null_and_goes_to_no_tracker(tmp_path: Path) -> None:
    seen = []

    class Tracker:
        def log(self, values: dict[str, float], step: int) -> None:
            seen.append((values, step))

        def finish(self) -> None:
            seen.append(({}, -1))

    log = RunLog(tmp_path / "log.jsonl", [Tracker()], first=True, step=0, total=2, length=0)
    log.write(1, {"loss": 0.5, "other": float("nan"), "none": None})
    log.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "loss": 0.5, "other": None, "none": None}
    assert seen == [({"step": 1, "loss": 0.5}, 1), ({}, -1)]


def test_log_is_cut_to_what_a_checkpoint_knows_of(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl", [], first=True, step=0, total=9, length=0)
    log.write(1, {"loss": 1.0})
    known = log.sync()
    log.write(2, {"loss": 2.0})
    log.close()
    log = RunLog(tmp_path / "log.jsonl", [], first=True, step=1, total=9, length=known)
    log.write(2, {"loss": 3.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [1.0, 3.0]


def test_bar_shows_loss_accuracy_speed_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    log = RunLog(tmp_path / "log.jsonl", [], first=True, step=2, total=10, length=0)
    log.show(5, 0.6931, 0.5, 12345.6)
    log.close()
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "5/10" in shown
    assert "loss 0.6931, accuracy 0.50, 12,346 tokens/s" in shown


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl", [], first=False, step=0, total=2, length=0)
    log.write(1, {"loss": 0.5})
    assert log.sync() == 0
    log.close()
    assert not (tmp_path / "log.jsonl").exists()


@pytest.fixture
def fake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], list[tuple[Any, ...]]]]:
    """A function that puts a fake tracker in place; returns what the fake was called with."""
    (tmp_path / "fakes").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "fakes")

    def place(name: str) -> list[tuple[Any, ...]]:
        (tmp_path / "fakes" / f"{name}.py").write_text(FAKE)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return import_module(name).calls

    yield place
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hosted_tracker_gets_name_settings_and_lines(
    tmp_path: Path, fake: Callable[[str], list[tuple[Any, ...]]], name: str
) -> None:
    calls = fake(name)
    trackers = open_trackers(f"none,{name}", "my run", RunFolder(tmp_path), {"beta": 0.1}, step=0)
    log = RunLog(tmp_path / "log.jsonl", trackers, first=True, step=0, total=9, length=0)
    log.write(3, {"loss": 0.5})
    log.close()
    log.close()  # at the end of a run and on the way out
    (_, known), logged, finished = calls
    assert known["name"].startswith("my run")
    assert known["config"] == {"beta": 0.1}
    assert known["resume"] == "allow"
    assert (logged, finished) == (("log", {"step": 3, "loss": 0.5}, 3), ("finish",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_runs_of_one_name_are_different_runs_and_a_resumed_one_is_itself(
    tmp_path: Path, fake: Callable[[str], list[tuple[Any, ...]]], name: str
) -> None:
    calls = fake(name)
    for folder, step in (("a/seed-42", 0), ("b/seed-42", 0), ("a/seed-42", 5), ("b/seed-42", 0)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        open_trackers(name, "seed-42", RunFolder(tmp_path / folder), {}, step)
    key = "id" if name == "wandb" else "name"
    first, second, resumed, from_scratch = (known[key] for _, known in calls)
    assert first == resumed
    assert len({first, second, from_scratch}) == 3


def test_tracker_that_is_not_installed_is_named_before_anything_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mrpo.train.logs.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        check_trackers("wandb")
    assert check_trackers("none") == check_trackers("") == []
