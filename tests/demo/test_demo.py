"""`mrpo demo --quick`, the whole way, as a user runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

RUNS = ("dpo-llama", "dpo-mistral", "dpo-qwen", "mrpo")


def demo(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mrpo.cli", "demo", "--quick", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def made(out: Path) -> dict[Path, int]:
    """Every file and when it was written, but for what each run says anew."""
    folders = ("references", "pairs", "store", "runs")
    paths = [path for folder in folders for path in (out / folder).rglob("*") if path.is_file()]
    said_anew = {"reference.json", "precompute.yaml"}
    return {path: path.stat().st_mtime_ns for path in paths if path.name not in said_anew}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A demo's folder and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "demo-run"
    ran = demo(out)
    assert ran.returncode == 0, ran.stderr
    return out, ran.stdout


def test_it_shows_every_command_that_it_runs(first: tuple[Path, str]) -> None:
    out, printed = first
    commands = [line for line in printed.splitlines() if line.startswith("$ mrpo ")]
    assert [line.split()[2] for line in commands] == ["prepare", "precompute"] + ["train"] * 4
    for name, line in zip(RUNS, commands[2:]):
        assert f"--output-dir {out / 'runs' / name}" in line
        assert (out / "runs" / name / "model" / "model.safetensors").is_file()


def test_it_ends_with_a_table_of_all_models_and_where_they_are(first: tuple[Path, str]) -> None:
    out, printed = first
    table = (out / "accuracy.txt").read_text()
    assert table in printed
    rows = [line.split("  ")[0] for line in table.splitlines() if "–" in line]
    assert rows[:4] == [
        "reference llama",
        "reference mistral",
        "reference qwen",
        "policy untrained = llama",
    ]
    assert rows[4:] == [
        f"trained with {method}" for method in ("dpo:llama", "dpo:mistral", "dpo:qwen", "mrpo")
    ]
    for path in ("data", "references", "store", "accuracy.txt", *(f"runs/{r}/model" for r in RUNS)):
        assert str(out / path) in printed
        assert (out / path).exists()


def test_run_again_it_makes_nothing_again(first: tuple[Path, str]) -> None:
    out, _ = first
    before, table = made(out), (out / "accuracy.txt").read_text()
    again = demo(out)
    assert again.returncode == 0, again.stderr
    assert made(out) == before
    assert (out / "accuracy.txt").read_text() == table


def test_doctor_finds_its_references_healthy(first: tuple[Path, str], tmp_path: Path) -> None:
    """Texts by template, of few lengths, are no fault; nor is a reference that knows one domain."""
    out, _ = first
    command = [sys.executable, "-m", "mrpo.cli", "doctor", "--refs", "llama,mistral,qwen"]
    command += ["--pairs", str(out / "pairs"), "--refs-config", str(out / "refs.yaml")]
    command += ["--store", str(out / "store"), "--probe", "8", "--out", str(tmp_path / "d.json")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for alias in ("llama", "mistral", "qwen"):
        assert re.search(rf"^{alias} +healthy ", ran.stdout, re.MULTILINE), ran.stdout


def test_two_demos_do_not_mix_in_one_folder(first: tuple[Path, str]) -> None:
    out, _ = first
    other = demo(out, "--seed", "1")
    assert other.returncode == 2
    assert other.stderr.startswith(
        f"error: --out {out} holds a demo with --pairs 3000 --seed 0 --quick"
    )
    assert other.stderr.count("\n") == 1
