"""Workers stay up, a crash costs one cell, no state leaks, and no cell runs twice at once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.utils import logging as transformers_logging

from mrpo.demo.config import DemoConfig
from mrpo.errors import UserError
from mrpo.evaluation.compare import workers
from mrpo.evaluation.compare.cells import (
    Cell,
    cells_of,
    fractions_of,
    methods_of,
    settings_for,
)
from mrpo.evaluation.compare.worker import TORCH_SEED, process_state_kept, run_cell
from mrpo.evaluation.compare.workers import CellRunner
from mrpo.evaluation.config import CompareConfig
from mrpo.files import locked


@pytest.fixture(autouse=True)
def fake_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "WORKER", "mrpo.tests.evaluation.compare.fake_worker")


def make_cells(root: Path, *names: str) -> list[Cell]:
    for name in names:
        (root / name).mkdir()
    return [Cell(name, 1.0, 42, root / name) for name in names]


def test_each_seed_may_draw_fractions_of_its_own(tmp_path: Path) -> None:
    """In folders of their own; all pairs are all pairs, whatever the draw."""
    given = {"output_dir": str(tmp_path), "methods": "dpo:a", "fractions": "0.1,1", "seeds": 2}
    fixed, varied = (cells_of(CompareConfig(**given, vary_subset=vary)) for vary in (False, True))
    assert [(cell.fraction, cell.seed, cell.subset) for cell in varied] == [
        *((0.1, 42, 42), (0.1, 43, 43)),
        *((1.0, 42, 0), (1.0, 43, 0)),
    ]
    assert {cell.subset for cell in fixed} == {0}
    assert [cell.folder == before.folder for cell, before in zip(varied, fixed)] == [
        *(False, False),
        *(True, True),
    ]


def tries(cell: Cell) -> list[list[str]]:
    """Of each try: process id, device, threads."""
    path = cell.folder / "tries"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_one_worker_runs_cell_after_cell_and_finished_ones_are_left_alone(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, "a", "b", "c")
    runner = CellRunner("llama", [None])
    assert runner.run(cells) == []
    assert all(cell.finished for cell in cells)
    assert len({process for cell in cells for process, *_ in tries(cell)}) == 1
    assert runner.run(cells) == []
    assert [len(tries(cell)) for cell in cells] == [1, 1, 1]


def test_a_crash_is_tried_again_then_reported_and_costs_no_other_cell(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, "killed-once", "exits", "raises", "fine")
    failures = CellRunner("llama", [None]).run(cells)
    assert [failure.cell.method for failure in failures] == ["exits", "raises"]
    assert failures[0].reason.startswith("exit code 7")
    assert "on its way out" in failures[0].reason
    assert failures[1].reason.startswith("exit code 1")
    assert "RuntimeError: out of luck" in failures[1].reason
    assert failures[0].command == f"mrpo train --config {tmp_path / 'exits' / 'cell.yaml'}"
    assert [cell.finished for cell in cells] == [True, False, False, True]
    assert [len(tries(cell)) for cell in cells] == [2, 2, 2, 1]
    killed, exits, *_ = [[process for process, *_ in tries(cell)] for cell in cells]
    assert killed[0] != killed[1] == exits[0]  # a new worker, which stays up
    CellRunner("llama", [None]).run(cells)  # the next run tries what failed, and nothing else
    assert [len(tries(cell)) for cell in cells] == [2, 4, 4, 1]


def test_a_users_mistake_is_not_tried_again_and_the_worker_goes_on(tmp_path: Path) -> None:
    mistake, fine = make_cells(tmp_path, "mistake", "fine")
    failures = CellRunner("llama", [None]).run([mistake, fine])
    assert [failure.reason for failure in failures] == ["--beta is 0; it must be above 0"]
    assert len(tries(mistake)) == 1
    assert tries(mistake) == tries(fine)  # the same process


def test_every_worker_has_a_gpu_or_a_share_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    on_gpu, on_cpu, given = make_cells(tmp_path, "gpu", "cpu", "given")
    CellRunner("llama", ["3"]).run([on_gpu])
    CellRunner("llama", [None, None]).run([on_cpu])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    CellRunner("llama", [None, None]).run([given])
    devices = [tries(cell)[0][1:] for cell in (on_gpu, on_cpu, given)]
    assert devices == [["3", "None"], ["None", "4"], ["None", "3"]]


def test_sigterm_lets_every_worker_save_and_ends_it(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, "slow-a", "slow-b", "never")
    code = (
        "import os, sys, time\n"
        "*waiting, pid = sys.argv[1:]\n"
        "while not all(map(os.path.exists, waiting)): time.sleep(0.02)\n"
        "os.kill(int(pid), 15)"
    )
    waiting = [str(cell.folder / "waiting") for cell in cells[:2]]
    watcher = subprocess.Popen([sys.executable, "-S", "-c", code, *waiting, str(os.getpid())])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        CellRunner("llama", [None, None]).run(cells)
    watcher.wait()
    assert signal.getsignal(signal.SIGTERM) == before
    for cell in cells[:2]:
        assert (cell.folder / "saved").exists()
        with pytest.raises(ProcessLookupError):
            os.kill(int(tries(cell)[0][0]), 0)
    assert tries(cells[2]) == []
    assert not any(cell.finished for cell in cells)


def test_a_cell_that_another_process_runs_is_left_to_it(tmp_path: Path) -> None:
    (cell,) = make_cells(tmp_path, "taken")
    with locked(cell.folder / ".lock") as ours:
        assert ours
        with pytest.raises(UserError, match="another process is at work on it"):
            run_cell(cell, "llama", True)
    assert not cell.log.exists()  # nor is its log touched


def test_a_cells_traces_in_the_process_are_removed() -> None:
    state = [
        lambda: os.environ.get("MRPO_TRACE"),
        Path.cwd,
        torch.get_num_threads,
        transformers_logging.get_verbosity,
        lambda: signal.getsignal(signal.SIGTERM),
        lambda: list(warnings.filters),
        random.getstate,
        lambda: str(np.random.get_state()),
    ]
    before = [read() for read in state]
    seeded = torch.Generator().manual_seed(TORCH_SEED)
    seen = []
    for _ in range(2):
        with process_state_kept():
            seen.append(torch.rand(3).tolist())
            os.environ["MRPO_TRACE"] = "left"
            os.chdir("/")
            torch.set_num_threads(torch.get_num_threads() + 1)
            transformers_logging.set_verbosity_debug()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            warnings.simplefilter("error")
            random.random()
            np.random.random()
    assert [read() for read in state] == before
    assert seen[0] == seen[1] == torch.rand(3, generator=seeded).tolist()
    # That seed is the one that a new process begins with.
    code = (
        "import torch; new = torch.rand(3); torch.manual_seed(torch.initial_seed())\n"
        "assert torch.rand(3).equal(new)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("text", ["", "0", "1.5", "half", "0.5,,x"])
def test_fractions_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--fractions"):
        fractions_of(text)


def test_methods_are_named_once() -> None:
    assert methods_of(" mrpo, dpo:llama") == ["mrpo", "dpo:llama"]
    for text in ("", "mrpo,mrpo"):
        with pytest.raises(UserError, match="--methods"):
            methods_of(text)


def test_every_run_has_a_name_of_its_own_in_the_trackers(tmp_path: Path) -> None:
    config = CompareConfig(
        output_dir=str(tmp_path / "first"),
        methods="mrpo,dpo:llama",
        fractions="0.5,1",
        seeds=2,
        report_to="wandb",
    )
    pairs: Any = SimpleNamespace(path=tmp_path)
    cells = cells_of(config)
    names = [settings_for(config, cell, "llama,qwen", pairs).run_name for cell in cells]
    assert len(set(names)) == len(cells) == 8
    assert "first: dpo:llama, fraction 0.5, seed 43" in names


def test_the_last_seed_of_a_comparison_is_checked(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"output_dir": str(tmp_path), "methods": "mrpo", "seeds": 2}
    CompareConfig(seed=2**32 - 2, **settings)
    with pytest.raises(UserError, match="--seeds 2 from --seed 4294967295 end at 4294967296"):
        CompareConfig(seed=2**32 - 1, **settings)
    with pytest.raises(UserError, match="--seed is 4294967296; it must be a seed from 0 to 42949"):
        CompareConfig(seed=2**32, **settings)
    with pytest.raises(UserError, match="--seed is 4294967296"):
        DemoConfig(seed=2**32)
