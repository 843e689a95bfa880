"""Real comparisons: their numbers are those of train and evaluate run by hand, to the digit."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mrpo import cli
from mrpo.data.shards import PairShards
from mrpo.data.store import Store
from mrpo.errors import UserError
from mrpo.evaluation.compare import workers
from mrpo.evaluation.compare.cells import INPUTS, SETTINGS, Cell
from mrpo.evaluation.compare.results import Comparison, comparison_lines, read_comparison
from mrpo.evaluation.compare.worker import _train_and_evaluate
from mrpo.evaluation.config import ReportConfig
from mrpo.evaluation.report.tasks_section import task_sections
from mrpo.evaluation.tasks.results import policy_tasks
from mrpo.files import to_json
from mrpo.precompute.process import WorkerProcess
from mrpo.tests.evaluation.scored_pairs import Scored, add_scores, chat, prepared

Run = Callable[..., Any]
WORDS = ["Paris", "is", "the", "capital", "of", "France", "she", "sells", "two", "eggs", "thanks"]
WEIGHTS = Path("model", "model.safetensors")
METHODS, FRACTIONS = ("dpo:llama", "mrpo"), (0.5, 1.0)
REFS = ["--refs", "llama,qwen"]
TRAINING = ["--device", "cpu", "--batch-pairs", "8", "--learning-rate", "1e-3"]


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

    def cell(self, method: str, fraction: float, more: str = "") -> Path:
        name = method.replace(":", "=")
        return self.out / "cells" / name / f"fraction-{fraction:g}{more}" / "seed-42"


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
    flags = [*scored.flags, *TRAINING, *REFS, "--policy", str(tiny_references["llama"])]
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
    """Of the last cell: its worker has run another one before."""
    by_hand, cell = tmp_path / "by-hand", compared.cell("mrpo", 1.0)
    figures = run_by_hand(mrpo, [*compared.flags, "--method", "mrpo"], by_hand)
    assert (by_hand / WEIGHTS).read_bytes() == (cell / WEIGHTS).read_bytes()
    assert losses(by_hand) == losses(cell)
    assert figures_of(cell) == figures
    policy = figures["policies"][0]
    run = next(run for run in compared.comparison.runs if run.folder == str(cell))
    assert run.identity == policy["identity"]
    expected = {name: interval["value"] for name, interval in policy["overall"]["accuracy"].items()}
    assert run.accuracy == expected
    assert run.own_accuracy == figures["training"]["figures"]["eval_rewards/accuracies"]
    results = {
        result.metric: result.accuracy.value
        for result in compared.comparison.results
        if (result.method, result.fraction) == ("mrpo", 1.0)
    }
    assert results == expected


def test_a_worker_stays_up_for_all_cells_and_changes_no_number(
    mrpo: Run, compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single worker, adapters with dropout: the cells draw random numbers."""
    started = []

    class CountedProcess(WorkerProcess):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            started.append(arguments[0])
            super().__init__(*arguments, **options)

    monkeypatch.setattr(workers, "WorkerProcess", CountedProcess)
    out, lora = tmp_path / "compare", ["--lora-rank", "4", "--lora-dropout", "0.2"]
    flags = [*compared.flags, *lora]
    methods = ("dpo:llama", "dpo:qwen", "mrpo")
    ran = mrpo(
        *("compare", *flags, "--methods", ",".join(methods), "--seeds", 1, "--output-dir", out)
    )
    assert ran.code == 0, ran.err
    cells = [out / "cells" / name.replace(":", "=") / "fraction-1" / "seed-42" for name in methods]
    figures = run_by_hand(mrpo, [*flags, "--method", "mrpo"], tmp_path / "by-hand")
    for policy in (figures["policies"][0], (content := figures_of(cells[-1]))["policies"][0]):
        policy.pop("identity")  # peft writes the names of the layers in the order of a set
    assert content == figures
    weights = "model/adapter_model.safetensors"
    assert (cells[-1] / weights).read_bytes() == (tmp_path / "by-hand" / weights).read_bytes()
    assert started == [workers.WORKER]


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_an_interrupted_cell_goes_on_from_its_checkpoint_to_the_same_weights(
    mrpo: Run, compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Behind step 3 the worker is killed, or the command gets SIGTERM, which saves step 3."""
    monkeypatch.setattr(workers, "WORKER", "mrpo.tests.evaluation.compare.interrupted_worker")
    monkeypatch.setenv("MRPO_TEST_INTERRUPT", how)
    flags = ["--methods", "mrpo", "--seeds", 1, "--save-steps", 2, "--output-dir", tmp_path]
    ran = mrpo("compare", *compared.flags, *flags)
    cell = tmp_path / "cells" / "mrpo" / "fraction-1" / "seed-42"
    assert (cell / "interrupted").exists()
    if how == "stop":
        assert ran.code == 130
        saved = [path.parent.name for path in (cell / "checkpoints").glob("*/state.json")]
        assert max(saved) == "step-00000003"
        ran = mrpo("compare", *compared.flags, *flags)
    assert ran.code == 0, ran.err
    words = (cell / "cell.log").read_text()
    assert f"resumed     after step {2 if how == 'kill' else 3}" in words
    assert (cell / WEIGHTS).read_bytes() == (compared.cell("mrpo", 1.0) / WEIGHTS).read_bytes()
    assert figures_of(cell) == figures_of(compared.cell("mrpo", 1.0))


def test_a_run_that_keeps_crashing_is_named_and_the_others_are_compared(
    mrpo: Run, compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "WORKER", "mrpo.tests.evaluation.compare.interrupted_worker")
    monkeypatch.setenv("MRPO_TEST_INTERRUPT", "kill-dpo")
    flags = ["--methods", "dpo:llama,mrpo", "--seeds", 1, "--output-dir", tmp_path]
    ran = mrpo("compare", *compared.flags, *flags)
    assert ran.code == 1
    assert "FAILED: dpo:llama, fraction 1, seed 42: killed by SIGKILL" in ran.err
    log = (tmp_path / "cells" / "dpo=llama" / "fraction-1" / "seed-42" / "cell.log").read_text()
    assert log.count("$ mrpo train") == 2
    comparison = read_comparison(tmp_path / "compare.json")
    assert comparison.missing == ["dpo:llama, fraction 1, seed 42"]
    assert [run.method for run in comparison.runs] == ["mrpo"]


def test_nothing_to_compare_is_an_error(mrpo: Run, compared: Compared, tmp_path: Path) -> None:
    flags = ["--methods", "mrpo", "--seeds", 1, "--policy", "nowhere", "--output-dir", tmp_path]
    ran = mrpo("compare", *compared.flags, *flags)
    assert ran.code == 2
    assert "FAILED: mrpo, fraction 1, seed 42: policy nowhere: no model to load" in ran.err
    assert "all 1 runs failed, there is nothing to compare" in ran.err


def test_policies_scores_are_no_references_and_what_gc_took_is_scored_again(
    mrpo: Run, compared: Compared, tmp_path: Path
) -> None:
    aliases = {record.alias for record in compared.scored.store.references()}
    assert aliases == {"llama", "qwen"}
    out, store = tmp_path / "compare", tmp_path / "store"
    shutil.copytree(compared.out, out)
    shutil.copytree(compared.scored.store.root, store)
    shutil.rmtree(store / "policies")
    flags = ["--methods", ",".join(METHODS), "--seeds", 1, "--fractions", "0.5,1"]
    ran = mrpo("compare", *compared.flags, *flags, "--store", store, "--output-dir", out)
    assert ran.code == 0, ran.err
    assert "of which 0 are finished" in ran.out
    after = read_comparison(out / "compare.json")
    assert after.verdict == compared.comparison.verdict
    identities = {run.identity for run in compared.comparison.runs}
    assert identities == set(Store(store).policies.identities())


def test_policies_that_are_trained_already_answer_tasks_and_no_cell_trains_again(
    mrpo: Run, compared: Compared, shared_data: Path, tmp_path: Path
) -> None:
    """With one seed a method's figure is its cell's; the report has the same table."""
    out = tmp_path / "copy"
    shutil.copytree(compared.out, out)
    weights = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    flags = ["--methods", ",".join(METHODS), "--seeds", 1, "--fractions", "0.5,1"]
    flags += ["--tasks", "truthfulqa_mc1,truthfulqa_mc2", "--limit", 3, "--output-dir", out]
    ran = mrpo("compare", *compared.flags, *flags, "--tasks-data", shared_data)
    assert ran.code == 0, ran.err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == weights
    comparison = read_comparison(out / "compare.json")
    found = {(entry.method, entry.fraction, entry.task): entry for entry in comparison.tasks}
    assert len(found) == len(METHODS) * len(FRACTIONS) * 2
    for method, fraction in product(METHODS, FRACTIONS):
        cell = out / compared.cell(method, fraction).relative_to(compared.out)
        (policy,) = policy_tasks(cell / "evaluation.json")
        for task in policy.tasks:
            entry = found[method, fraction, task.pinned.task]
            assert entry.accuracy.value == pytest.approx(task.figures["acc,none"].value)
            assert entry.accuracy.low <= entry.accuracy.value <= entry.accuracy.high
    (section,) = task_sections(ReportConfig(folders=str(out)))
    assert [table.title for table in section.tables] == [
        "Trained on 100 % of the pairs",
        "Trained on 50 % of the pairs",
    ]
    for heading, *rows in (table.rows for table in section.tables):
        assert heading == ["policy", "truthfulqa_mc1", "truthfulqa_mc2"]
        assert [row[0] for row in rows] == list(METHODS)
        assert all(cell in ran.out for row in rows for cell in row)
    assert comparison.task_settings[0] in section.tables[0].note
    again = mrpo("compare", *compared.flags, *flags, "--tasks-data", shared_data)
    assert "4, of which 4 are finished" in again.out


def test_noise_betas_and_epsilons_are_axes_and_each_cell_is_train_by_hand(
    mrpo: Run, compared: Compared, tmp_path: Path
) -> None:
    """On a copy: the runs without noise and with the usual beta stay and are not repeated."""
    out = tmp_path / "compare"
    shutil.copytree(compared.out, out)
    axes = ["--label-noise", "0,0.4", "--betas", "0.1,0.5", "--epsilons", "none"]
    grid = ["--methods", ",".join(METHODS), "--seeds", 1, "--jobs", 2, "--output-dir", out]
    ran = mrpo("compare", *compared.flags, *grid, *axes)
    assert ran.code == 0, ran.err
    assert "label noise 0, 0.4 of the training prompts have their labels turned round" in ran.out
    assert "8, of which 1 are finished" in ran.out  # dpo:llama with beta 0.1
    copy = Compared(compared.scored, compared.flags, out, ran.out)
    comparison = copy.comparison
    names = ["dpo:llama beta=0.1", "dpo:llama beta=0.5"]  # one reference is never clipped
    names += ["mrpo beta=0.1 epsilon=none", "mrpo beta=0.5 epsilon=none"]
    assert comparison.methods == names
    assert comparison.label_noises == [0, 0.4]
    assert comparison.noise_cost.keys() == set(names)
    cells = {run.folder for run in comparison.runs}
    assert len(cells) == 8
    assert str(copy.cell("dpo:llama", 1.0)) in cells

    cell = copy.cell("mrpo", 1.0, "-noise-0.4-beta-0.5-epsilon-none")
    assert str(cell) in cells
    by_hand, settings = tmp_path / "by-hand", ["--beta", 0.5, "--epsilon", "none"]
    flags = [*compared.flags, "--method", "mrpo", *settings, "--label-noise", 0.4]
    assert figures_of(cell) == run_by_hand(mrpo, flags, by_hand)
    assert (by_hand / WEIGHTS).read_bytes() == (cell / WEIGHTS).read_bytes()
    clean = copy.cell("mrpo", 1.0, "-beta-0.5-epsilon-none")
    assert losses(clean) != losses(cell)
    for method in comparison.methods:  # at each noise level, against noise, calibration
        assert sum(line.startswith(method) for line in ran.out.splitlines()) == 4
    report = mrpo("report", out)
    assert report.code == 0, report.err


def test_a_cells_output_is_in_its_log_alone(compared: Compared) -> None:
    words = (compared.cell("mrpo", 1.0) / "cell.log").read_text()
    assert "eval_loss" in words
    assert "eval_loss" not in compared.printed


def run_by_hand(mrpo: Run, flags: list[str], folder: Path) -> dict[str, Any]:
    """Train and evaluate with the commands; the content of evaluation.json."""
    trained = mrpo("train", *flags, "--output-dir", folder)
    assert trained.code == 0, trained.err
    ran = mrpo("evaluate", "--runs", folder, "--out", folder / "evaluation.json")
    assert ran.code == 0, ran.err
    return figures_of(folder)


def figures_of(run: Path) -> dict[str, Any]:
    """What evaluation.json holds, but for the policy's name and the folder of the pairs."""
    content = json.loads((run / "evaluation.json").read_text())
    content["policies"][0].pop("name")
    content.pop("pairs")
    return content


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float | None]:
    return [line.get("loss") for line in log(run)]


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
    for run in comparison.runs:  # the base is the own reference of dpo:llama, not of mrpo
        same = run.own_accuracy == pytest.approx(run.accuracy["reward"])
        assert same == (run.method == "dpo:llama")
    assert len(comparison.calibration) == 4


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
    for path in out.rglob("cell.json"):  # as versions without label noise wrote it
        inputs = json.loads(path.read_text())
        del inputs["label_noise"]
        path.write_text(json.dumps(inputs))
    flags = ["--seeds", 1, "--fractions", "0.5,1", "--output-dir", out]
    again = mrpo("compare", *compared.flags, "--methods", ",".join(METHODS), *flags)
    assert again.code == 0, again.err
    assert "of which 4 are finished" in again.out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("cell.log")} == logs
    before, after = compared.comparison, read_comparison(out / "compare.json")
    assert after.verdict == before.verdict
    assert [run.accuracy for run in after.runs] == [run.accuracy for run in before.runs]


def test_all_cells_use_the_pairs_that_the_comparison_began_with(
    mrpo: Run, compared: Compared, tmp_path: Path
) -> None:
    kept = PairShards(compared.out / "pairs")
    assert kept.digest == PairShards(compared.scored.folder / "pairs").digest
    for path in compared.out.glob("cells/*/*/*/cell.yaml"):
        assert yaml.safe_load(path.read_text())["pairs"] == str(kept.path)
    others = prepared(tmp_path, rows(), validation_fraction=0.4)
    add_scores(others, {alias: np.full((75, 2), -5.0) for alias in ("llama", "qwen")})
    flags = [*others.flags, *TRAINING, *REFS, *compared.flags[-2:]]
    ran = mrpo("compare", *flags, "--methods", "mrpo", "--seeds", 1, "--output-dir", compared.out)
    assert ran.code == 2
    assert f"compare with --pairs {kept.path}, or name another --output-dir" in ran.err
    assert PairShards(compared.out / "pairs").digest == kept.digest


def test_a_comparison_of_a_version_without_label_noise_is_still_read(
    compared: Compared, tmp_path: Path
) -> None:
    content = json.loads((compared.out / "compare.json").read_text())
    for name in ("label_noises", "noise_cost", "calibration"):
        del content[name]
    for entry in content["results"] + content["runs"]:
        del entry["label_noise"]
        entry.pop("own_accuracy", None)
    (tmp_path / "compare.json").write_text(json.dumps(content))
    earlier = read_comparison(tmp_path / "compare.json")
    assert earlier.conditions == compared.comparison.conditions
    assert to_json(earlier.results) == to_json(compared.comparison.results)  # NaN equals NaN
    assert list(comparison_lines(earlier))


def test_other_settings_are_refused_by_name(mrpo: Run, compared: Compared) -> None:
    flags = [*compared.flags, "--methods", "mrpo", "--seeds", 1, "--output-dir", compared.out]
    ran = mrpo("compare", *flags, "--beta", 0.3)
    assert ran.code == 2
    assert "--beta" in ran.err
    assert "name another --output-dir" in ran.err


def test_a_cell_does_not_train_on_other_scores_than_the_comparison_began_with(
    compared: Compared, tmp_path: Path
) -> None:
    """Here llama is scored again while the comparison runs, as with `--bf16`."""
    store = Store(shutil.copytree(compared.scored.store.root, tmp_path / "store"))
    before = next(record for record in store.references() if record.alias == "llama")
    after = store.record(replace(before, inputs={**before.inputs, "autocast": "bfloat16"}))
    begun = compared.cell("mrpo", 1.0)
    settings = yaml.safe_load((begun / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(yaml.safe_dump(settings | {"store": store.root}))
    shutil.copy(begun / INPUTS, tmp_path)
    with pytest.raises(UserError, match=f"llama means {after.title} now, .*with {before.title};"):
        _train_and_evaluate(Cell("mrpo", 1.0, 42, tmp_path), "llama", keep_model=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--methods", "dpo,dpo:llama"], ["dpo and dpo:llama are the same"]),
        (["--methods", "mrpo:llama/zephyr"], ["'zephyr'"]),
        (["--methods", "mrpo", "--fractions", "2"], ["--fractions 2"]),
        (["--methods", "mrpo", "--seeds", "0"], ["--seeds is 0"]),
        (["--methods", "mrpo", "--label-noise", "0,15"], ["--label-noise 0,15", "from 0 to 1"]),
        (["--methods", "mrpo", "--betas", "0.1,0"], ["--betas 0.1,0", "above 0"]),
        (["--methods", "mrpo", "--epsilons", "-1"], ["--epsilons -1", "0 or more, or none"]),
        (["--methods", "dpo", "--epsilons", "1"], ["no method of dpo clips", "--epsilon"]),
        (["--methods", "mrpo", "--fractions", "0.1,0.1000001"], ["equal to six digits"]),
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
        "compare",
        *scored.flags,
        *TRAINING,
        *REFS,
        *policy,
        "--output-dir",
        tmp_path / "c",
        *changes,
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
