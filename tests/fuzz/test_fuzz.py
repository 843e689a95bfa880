"""A short fuzz run of bad input; `make fuzz` runs more of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mrpo.tests.fuzz.cases import run_cases
from mrpo.tests.fuzz.world import make_world

SEED, CASES = 0, 60


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "world"
    make_world(folder, shared_data)
    return folder


def test_bad_input_ends_in_success_or_in_one_line(world: Path, tmp_path: Path) -> None:
    cases = list(run_cases(world, SEED, range(CASES), tmp_path))
    assert [str(case) for case in cases if case.faults] == []
    codes = [case.ran.code for case in cases]
    assert codes.count(2) > CASES / 4, "hardly anything was refused: is the damage read?"
    assert codes.count(0) > CASES / 10, "hardly anything succeeded: does the world still work?"
