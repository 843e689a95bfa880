"""`mrpo demo --quick`, the whole way, as a user runs it."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mrpo.demo.data import DOMAINS
from mrpo.demo.run import METHODS, gain_sentence
from mrpo.evaluation.compare.results import Condition, read_comparison
from mrpo.evaluation.intervals import Interval


def demo(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mrpo.cli", "demo", "--quick", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def made(out: Path) -> dict[Path, int]:
    """Every file and when it was written, but for what each run says anew."""
    folders = ("references", "pairs", "store", "compare")
    paths = [path for folder in folders for path in (out / folder).rglob("*") if path.is_file()]
    said_anew = {
        "reference.json",
        "precompute.yaml",
        "compare.json",
        "compare.yaml",
        "manifest.json",
    }
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
    assert [line.split()[2] for line in commands] == ["prepare", "precompute", "compare", "report"]
    assert f"--methods {','.join(METHODS)}" in commands[2]
    runs = list((out / "compare" / "cells").glob("*/*/seed-*/model/model.safetensors"))
    assert len(runs) == len(METHODS) * 2 * 2 * 2  # fractions, noise levels, seeds
    page = (out / "report.html").read_text()
    assert all(method in page for method in METHODS)


def test_it_ends_with_tables_and_where_everything_is(first: tuple[Path, str]) -> None:
    out, printed = first
    tables = (out / "accuracy.txt").read_text()
    assert tables in printed
    for path in ("data", "references", "store", "compare", "report.html", "accuracy.txt"):
        assert str(out / path) in printed
        assert (out / path).exists()


def test_its_table_has_the_means_of_its_runs(first: tuple[Path, str]) -> None:
    """By domain from the runs' evaluations, overall from their pairs: the plain means."""
    out, _ = first
    rows = {line.split("  ")[0]: line.split("  ")[1:] for line in _lines(out, "overall")}
    assert list(rows) == [
        *(f"reference {alias}" for alias in ("llama", "mistral", "qwen")),
        *METHODS[:3],
        "mrpo (the paper's setting)",
        "geometric+reliable (recommended)",
    ]
    for method in METHODS:
        shown = next(cells for name, cells in rows.items() if name.split(" (")[0] == method)
        *domains, overall = [cell.split()[0] for cell in filter(None, shown)]
        folder = out / "compare" / "cells" / method.replace(":", "=")
        found = list(folder.glob("fraction-0.1*noise-0.3/seed-*/evaluation.json"))
        assert len(found) == 2
        (first, second) = (json.loads(path.read_text())["policies"][0] for path in found)
        for domain, cell in zip(DOMAINS, domains):
            values = [
                one["by_source"][domain]["accuracy"]["sum"]["value"] for one in (first, second)
            ]
            assert float(cell) == pytest.approx(50 * sum(values), abs=0.051)
        values = [one["overall"]["accuracy"]["sum"]["value"] for one in (first, second)]
        assert float(overall) == pytest.approx(50 * sum(values), abs=0.051)


def _lines(out: Path, heading: str) -> list[str]:
    """The rows of the table under a heading with this word."""
    lines = iter((out / "accuracy.txt").read_text().splitlines())
    next(line for line in lines if heading in line)
    return list(itertools.takewhile(bool, lines))


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.05, "several references help here"),
        (-0.01, 0.05, "no difference that can be told from chance"),
        (-0.05, -0.01, "one reference is better here"),
    ],
)
def test_its_sentence_says_what_the_interval_allows(
    first: tuple[Path, str], low: float, high: float, words: str
) -> None:
    comparison = read_comparison(first[0] / "compare" / "compare.json")
    gain = Interval((low + high) / 2, low, high)
    results = [replace(result, gain=gain) for result in comparison.results]
    said = gain_sentence(replace(comparison, results=results), Condition(0.1, 0.3))
    assert said.startswith("30 % of the labels wrong: geometric+reliable against dpo:")
    assert said.endswith(f": {words}.")


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
