"""A real comparison: its numbers are those of train and evaluate run by hand, to the digit."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mrpo import cli
from mrpo.evaluation.compare.results import Comparison, read_comparison
from mrpo.tests.evaluation.scored_pairs import Scored, add_scores, chat, prepared

Run = Callable[..., Any]
WORDS = [
    "Paris",
    "is",
    "the",
    "capital",
    "of",
    "France",
    "she",
    "sells",
    "two",
    "eggs",
    "thanks",
]
METHODS, FRACTIONS = ("dpo:llama", "mrpo"), (0.5, 1.0)
TRAINING = (
    "--device",
    "cpu",
    "--batch-pairs",
    "8",
    "--learning-rate",
    "1e-3",
    "--refs",
    "llama,qwen",
)


def rows() -> list[dict[str, Any]]:
    """60 prompts; a quarter of them with two pairs."""
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(2, 8)))

    return [
        chat(f"{number % 60} {WORDS[number % 60 % 11]}", f"{text()} yes", f"{text()} no")
        for number in range(75)
    ]


@dataclass(frozen=True)
class Compared:
    """What `mrpo compare` made, and the flags that it was given."""

    scored: Scored
    flags: list[str]
    out: Path
    printed: str

    @property
    def comparison(self) -> Comparison:
        return read_comparison(self.out / "compare.json")

    def cell(self, method: str, fraction: float) -> Path:
        name = method.replace(":", "=")
        return self.out / "cells" / name / f"fraction-{fraction:g}" / "seed-42"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Runs at once share the cores; a sum by hand is to be added up as theirs were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """Pairs whose references are numbers of our own: the policy alone is a model."""
    scored = prepared(tmp_path_factory.mktemp("compare"), rows(), validation_fraction=0.3)
    rng = np.random.default_rng(0)
    add_scores(
        scored,
        {
            alias: -scored.lengths * rng.uniform(1, 2, scored.lengths.shape)
            for alias in ("llama", "qwen")
        },
    )
    return scored


@pytest.fixture(scope="module")
def compared(
    scored: Scored,
    tiny_references: dict[str, Path],
    one_thread: None,
) -> Compared:
    out = scored.folder / "runs" / "compare"
    flags = [*scored.flags, *TRAINING, "--policy", str(tiny_references["llama"])]
    code, printed = run_in_process(
        *("compare", *flags, "--methods", ",".join(METHODS), "--seeds", "1", "--jobs", "2"),
        *("--fractions", "0.5,1", "--output-dir", str(out)),
    )
    assert code == 0, printed
    return Compared(scored, flags, out, printed)


def run_in_process(*arguments: str) -> tuple[int, str]:
    """As the fixture `mrpo`, for fixtures that live longer than a test."""
    import contextlib
    import io

    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr("sys.argv", ["mrpo", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0), out.getvalue()


def test_numbers_are_those_of_train_and_evaluate_by_hand(
    mrpo: Run, compared: Compared, tmp_path: Path
) -> None:
    by_hand = tmp_path / "by-hand"
    trained = mrpo(
        *("train", *compared.flags, "--method", "mrpo", "--train-fraction", "0.5"),
        *("--output-dir", by_hand),
    )
    assert trained.code == 0, trained.err
    evaluated = mrpo("evaluate", "--runs", by_hand, "--out", tmp_path / "evaluate.json")
    assert evaluated.code == 0, evaluated.err
    policy = json.loads((tmp_path / "evaluate.json").read_text())["policies"][0]
    run = next(
        run for run in compared.comparison.runs if (run.method, run.fraction) == ("mrpo", 0.5)
    )
    assert run.identity == policy["identity"]  # the very same weights
    expected = {name: one["value"] for name, one in policy["overall"]["accuracy"].items()}
    assert run.accuracy == expected
    results = {
        result.metric: result.accuracy.value
        for result in compared.comparison.results
        if (result.method, result.fraction) == ("mrpo", 0.5)
    }
    assert results == expected
    logs = [
        [json.loads(line).get("loss") for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (by_hand, compared.cell("mrpo", 0.5))
    ]
    assert logs[0] == logs[1]


def test_every_cell_trains_on_its_fraction_and_all_are_judged_on_the_same_pairs(
    compared: Compared,
) -> None:
    comparison, manifest = compared.comparison, compared.scored.pairs.manifest
    assert comparison.pairs == manifest["splits"]["validation"]
    assert comparison.prompts < comparison.pairs
    trained = {(run.method, run.fraction): run.pairs for run in comparison.runs}
    for method in METHODS:
        assert trained[method, 1.0] == pytest.approx(manifest["splits"]["train"])
        assert 0 < trained[method, 0.5] < trained[method, 1.0]
    assert all(run.seconds > 0 for run in comparison.runs)


def test_the_answer_is_in_words_and_last_comes_where_it_is(compared: Compared) -> None:
    lines = compared.printed.rstrip().splitlines()
    assert lines[-1] == str(compared.out / "compare.json")
    assert lines[0].startswith("methods     dpo:llama, mrpo")
    for sentence in compared.comparison.verdict:
        assert sentence in lines
    assert "llama" in compared.comparison.verdict[0]


def test_finished_cells_are_not_repeated_and_new_ones_are_added(
    mrpo: Run, compared: Compared, tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(compared.out, out)
    logs = {path: path.stat().st_mtime_ns for path in out.rglob("cell.log")}
    flags = ["--seeds", 1, "--fractions", "0.5,1", "--output-dir", out]
    again = mrpo("compare", *compared.flags, "--methods", ",".join(METHODS), *flags)
    assert again.code == 0, again.err
    assert "of which 4 are finished" in again.out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("cell.log")} == logs
    before, after = compared.comparison, read_comparison(out / "compare.json")
    assert after.verdict == before.verdict
    assert [run.accuracy for run in after.runs] == [run.accuracy for run in before.runs]


def test_other_settings_are_refused_by_name(mrpo: Run, compared: Compared) -> None:
    flags = [*compared.flags, "--methods", "mrpo", "--seeds", 1, "--output-dir", compared.out]
    ran = mrpo("compare", *flags, "--beta", 0.3)
    assert ran.code == 2
    assert "--beta" in ran.err
    assert "name another --output-dir" in ran.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--methods", "dpo,dpo:llama"], ["dpo and dpo:llama are the same"]),
        (["--methods", "mrpo:llama/zephyr"], ["'zephyr'"]),
        (["--methods", "mrpo", "--fractions", "2"], ["--fractions 2"]),
        (["--methods", "mrpo", "--seeds", "0"], ["--seeds is 0"]),
    ],
)
def test_mistakes_are_one_line_before_any_run(
    mrpo: Run,
    scored: Scored,
    tiny_references: dict[str, Path],
    tmp_path: Path,
    changes: list[str],
    words: list[str],
) -> None:
    policy = ["--policy", tiny_references["llama"]]
    ran = mrpo(
        "compare", *scored.flags, *TRAINING, *policy, "--output-dir", tmp_path / "c", *changes
    )
    assert ran.code == 2
    for word in words:
        assert word in ran.err
    assert not (tmp_path / "c").exists()


def test_pairs_without_a_held_out_part_are_refused(mrpo: Run, tmp_path: Path) -> None:
    scored = prepared(tmp_path, rows()[:8])
    add_scores(scored, {"llama": np.full((8, 2), -5.0)})
    ran = mrpo("compare", *scored.flags, "--methods", "dpo:llama", "--output-dir", tmp_path / "c")
    assert ran.code == 2
    assert "--validation-fraction" in ran.err


def test_pairs_not_yet_scored_come_with_the_line_to_run(mrpo: Run, tmp_path: Path) -> None:
    scored = prepared(tmp_path, rows()[:8])
    add_scores(scored, {"llama": np.full((8, 2), -5.0)})
    grown = prepared(tmp_path, rows()[:30], validation_fraction=0.4)
    ran = mrpo("compare", *grown.flags, "--methods", "dpo:llama", "--output-dir", tmp_path / "c")
    assert ran.code == 2
    assert f"run: mrpo precompute --pairs {tmp_path / 'pairs'} --refs llama" in ran.err
    assert not (tmp_path / "c").exists()
