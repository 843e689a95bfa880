"""Cells run side by side, are tried again, are told by name, and never twice at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mrpo.errors import UserError
from mrpo.evaluation.compare.cells import Cell, fractions_of, methods_of
from mrpo.evaluation.compare.workers import Grid

# In place of `mrpo`: notes what it was asked, then does what the cell's folder name says.
FAKE = """
import os, sys, time
from pathlib import Path
command, path = sys.argv[1], Path(sys.argv[-1])
folder = path.parent if command == "train" else path
seat = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS")
(folder / "pid").write_text(str(os.getpid()))
with (folder / "asked").open("a") as file:
    file.write(f"{command} {seat[0]} {seat[1]}\\n")
asked = (folder / "asked").read_text().splitlines()
if folder.name == "fails" or (folder.name == "fails-once" and len(asked) == 1):
    sys.exit("out of luck")
if folder.name == "mistake":
    print("error: --beta is 0", file=sys.stderr)
    sys.exit(2)
if folder.name == "slow":
    time.sleep(60)
if command == "train":
    (folder / "model").mkdir()
    step = folder / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    (step / "state.json").write_text("{}")
    (step / "weights").write_text("large")
else:
    (folder / "evaluate.json").write_text("{}")
"""


def cell(root: Path, name: str) -> Cell:
    (root / name).mkdir()
    return Cell(name, 1.0, 42, root / name)


def grid(seats: list[str | None] | None = None, keep_models: bool = True) -> Grid:
    return Grid(
        lambda one: ["evaluate", str(one.folder)],
        [sys.executable, "-S", "-c", FAKE],
        seats or [None],
        keep_models,
    )


def asked(one: Cell) -> list[str]:
    return [line.split()[0] for line in (one.folder / "asked").read_text().splitlines()]


def test_a_cell_is_trained_then_evaluated_and_then_left_alone(tmp_path: Path) -> None:
    cells = [cell(tmp_path, "a"), cell(tmp_path, "b")]
    assert grid().run(cells) == []
    assert grid().run(cells) == []
    for one in cells:
        assert asked(one) == ["train", "evaluate"]
        assert json.loads((one.folder / "result.json").read_text())["seconds"].keys() == {
            "train",
            "evaluate",
        }
        left = [path.name for path in (one.folder / "checkpoints").rglob("*") if path.is_file()]
        assert left == ["state.json"]
        assert (one.folder / "model").is_dir()
        assert (one.folder / "cell.log").read_text().startswith("$ mrpo train --config ")


def test_models_go_where_they_are_not_kept(tmp_path: Path) -> None:
    one = cell(tmp_path, "a")
    grid(keep_models=False).run([one])
    assert one.finished
    assert not (one.folder / "model").exists()
    assert not (one.folder / "checkpoints").exists()


def test_a_failure_is_tried_again_then_told_and_costs_no_other_cell(tmp_path: Path) -> None:
    names = ["fails-once", "fails", "fine"]
    cells = [cell(tmp_path, name) for name in names]
    failures = grid([None, None]).run(cells)
    assert [failure.cell.method for failure in failures] == ["fails"]
    assert "exit code 1" in failures[0].reason
    assert "out of luck" in failures[0].reason
    assert failures[0].command == f"mrpo train --config {tmp_path / 'fails' / 'cell.yaml'}"
    assert [one.finished for one in cells] == [True, False, True]
    assert asked(cells[0]) == ["train", "train", "evaluate"]
    assert asked(cells[1]) == ["train", "train"]
    grid().run(cells)  # the next run of the command tries it again, and nothing else
    assert len(asked(cells[1])) == 4
    assert len(asked(cells[2])) == 2


def test_a_users_mistake_is_not_tried_again(tmp_path: Path) -> None:
    one = cell(tmp_path, "mistake")
    failures = grid().run([one])
    assert asked(one) == ["train"]
    assert "error: --beta is 0" in failures[0].reason


def test_every_run_at_once_has_a_gpu_or_a_share_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    one, other = cell(tmp_path, "a"), cell(tmp_path, "b")
    grid(["3"]).run([one])
    grid([None, None]).run([other])
    assert (one.folder / "asked").read_text().split("\n")[0] == "train 3 None"
    assert (other.folder / "asked").read_text().split("\n")[0] == "train None 4"


def test_a_cell_that_another_process_works_on_is_left_to_it(tmp_path: Path) -> None:
    one = cell(tmp_path, "slow")
    code = (
        "import sys; from pathlib import Path\n"
        "from mrpo.tests.evaluation.compare.test_workers import Cell, grid\n"
        "grid().run([Cell('slow', 1.0, 42, Path(sys.argv[1]))])"
    )
    first = subprocess.Popen([sys.executable, "-c", code, str(one.folder)])
    wait_for(one.folder / "asked")
    failures = grid().run([one])
    assert failures[0].reason == "another process is at work on it"
    # Killed, it leaves the command running: the lock is the command's too.
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert grid().run([one])[0].reason == "another process is at work on it"
    os.kill(int((one.folder / "pid").read_text()), signal.SIGKILL)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_sigterm_ends_what_runs(tmp_path: Path) -> None:
    one = cell(tmp_path, "slow")
    watcher = subprocess.Popen(
        [
            sys.executable,
            "-S",
            "-c",
            "import os, sys, time\n"
            "while not os.path.exists(sys.argv[1]): time.sleep(0.02)\n"
            "os.kill(int(sys.argv[2]), 15)",
            str(one.folder / "asked"),
            str(os.getpid()),
        ]
    )
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        grid().run([one])
    watcher.wait()
    assert time.monotonic() - started < 30
    assert not one.finished


@pytest.mark.parametrize("text", ["", "0", "1.5", "half", "0.5,,x"])
def test_fractions_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--fractions"):
        fractions_of(text)


def test_methods_are_named_once() -> None:
    assert methods_of(" mrpo, dpo:llama") == ["mrpo", "dpo:llama"]
    for text in ("", "mrpo,mrpo"):
        with pytest.raises(UserError, match="--methods"):
            methods_of(text)
