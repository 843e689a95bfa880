"""Soups in a comparison: means of the policies of other cells, made like any other cell."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrpo.errors import UserError
from mrpo.evaluation.compare import workers
from mrpo.evaluation.compare.averages import (
    make_soup,
    recorded_parts,
)
from mrpo.evaluation.compare.cells import Cell
from mrpo.evaluation.compare.results import Comparison, RunResult, read_comparison
from mrpo.evaluation.policies import policy_of_run
from mrpo.method.grammar import Average
from mrpo.tests.evaluation.compare.test_compare import TRAINING, rows, run_in_process
from mrpo.tests.evaluation.scored_pairs import add_scores, prepared
from mrpo.train.config import TrainConfig

Run = Callable[..., Any]
WEIGHTS = "model/model.safetensors"
METHODS = "dpo:llama,soup,soup+vaw,soup:qwen"
ONE_SEED = ["--seeds", "1"]


@dataclass(frozen=True)
class Souped:
    """What `mrpo compare` made, and the flags that it was given."""

    flags: list[str]
    out: Path
    printed: str = ""

    @property
    def comparison(self) -> Comparison:
        return read_comparison(self.out / "compare.json")

    def cell(self, method: str, folder: str = "fraction-1/seed-42") -> Path:
        name = method.replace(":", "=").replace("/", "~")
        return self.out / "cells" / name / folder

    def run(self, method: str) -> RunResult:
        (found,) = (run for run in self.comparison.runs if run.method == method)
        return found

    def at(self, out: Path) -> Souped:
        return Souped(self.flags, out)


@pytest.fixture(scope="module")
def flags(
    one_thread: None, tiny_references: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Of comparisons on pairs whose references' scores are numbers of our own."""
    scored = prepared(tmp_path_factory.mktemp("soup"), rows(), validation_fraction=0.3)
    rng = np.random.default_rng(0)
    scores = {
        alias: -scored.lengths * rng.uniform(1, 2, scored.lengths.shape)
        for alias in ("llama", "qwen")
    }
    add_scores(scored, scores)
    policy = ["--policy", str(tiny_references["llama"])]
    return [*scored.flags, *TRAINING, "--refs", "llama,qwen", *policy]


@pytest.fixture(scope="module")
def souped(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Souped:
    """Two workers; dpo:qwen is a part of the soups and no method."""
    out = tmp_path_factory.mktemp("compare") / "souped"
    arguments = [*flags, "--methods", METHODS, *ONE_SEED, "--jobs", "2", "--output-dir", str(out)]
    code, printed = run_in_process("compare", *arguments)
    assert code == 0, printed
    return Souped(flags, out, printed)


def weighted_mean(folders: list[Path], weights: list[float]) -> dict[str, np.ndarray]:
    models = [load_file(folder / WEIGHTS) for folder in folders]
    return {
        name: sum(w * model[name].astype(np.float64) for w, model in zip(weights, models))
        for name in models[0]
    }


def assert_mean(cell: Path, parts: list[Path], weights: list[float]) -> None:
    found, expected = load_file(cell / WEIGHTS), weighted_mean(parts, weights)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=1e-7)
    first = load_file(parts[0] / WEIGHTS)
    assert any((found[name] != first[name]).any() for name in found)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_a_soup_is_the_mean_of_the_policies_of_its_parts(souped: Souped) -> None:
    parts = [souped.cell("dpo:llama"), souped.cell("dpo:qwen")]
    assert_mean(souped.cell("soup"), parts, [0.5, 0.5])
    recorded = json.loads((souped.cell("soup") / "average.json").read_text())["parts"]
    identities = [json.loads((part / "result.json").read_text())["identity"] for part in parts]
    assert recorded == [
        {"name": name, "identity": identity, "weight": 0.5, "accuracy": {}}
        for name, identity in zip(("dpo:llama", "dpo:qwen"), identities)
    ]
    settings = yaml.safe_load((souped.cell("soup") / "cell.yaml").read_text())
    for part in parts:
        others = yaml.safe_load((part / "cell.yaml").read_text())
        differ = {name for name in settings if settings[name] != others[name]}
        assert differ == {"method", "output_dir"}


@pytest.mark.parametrize(
    ("normalize", "weights"), [("none", [0.75, 0.25]), ("token", [0.2, 0.8]), ("byte", [0.5, 0.5])]
)
def test_vaw_weighs_each_part_by_its_held_out_accuracy_by_likelihood(
    souped: Souped, tmp_path: Path, normalize: str, weights: list[float]
) -> None:
    """Normalized as in training; the accuracies are made to be 0.9 and 0.3, 0.1 and 0.4, 0, 0."""
    copy = souped.at(shutil.copytree(souped.out, tmp_path / "copy"))
    parts = [copy.cell("dpo:llama"), copy.cell("dpo:qwen")]
    known = {"sum": (0.9, 0.3), "token": (0.1, 0.4), "byte": (0.0, 0.0)}
    for number, part in enumerate(parts):
        content = json.loads((part / "evaluation.json").read_text())
        for metric, accuracies in known.items():
            accuracy = content["policies"][0]["overall"]["accuracy"][metric]
            accuracy["value"] = accuracies[number]
        (part / "evaluation.json").write_text(json.dumps(content))
    soup = copy.cell("soup+vaw")
    values = yaml.safe_load((soup / "cell.yaml").read_text()) | {"normalize": normalize}
    llama, qwen = (Cell(f"dpo:{part.parents[1].name[4:]}", 1.0, 42, part) for part in parts)
    cell = Cell("soup+vaw", 1.0, 42, soup, parts=(llama, qwen))
    make_soup(cell, Average("soup", ("llama", "qwen"), "vaw"), TrainConfig(**values))
    assert [part.weight for part in recorded_parts(cell)] == pytest.approx(weights)
    assert_mean(soup, parts, weights)
    (parts[1] / "evaluation.json").write_text('{"policies": []}')
    with pytest.raises(
        UserError, match=r"the accuracy of dpo:qwen, .* is missing; remove .*result"
    ):
        make_soup(cell, Average("soup", ("llama", "qwen"), "vaw"), TrainConfig(**values))


def test_vaw_takes_the_parts_own_evaluation(souped: Souped) -> None:
    parts = [souped.cell("dpo:llama"), souped.cell("dpo:qwen")]
    evaluations = [json.loads((part / "evaluation.json").read_text()) for part in parts]
    known = [e["policies"][0]["overall"]["accuracy"]["sum"]["value"] for e in evaluations]
    weights = [accuracy / sum(known) for accuracy in known]
    assert [part.weight for part in souped.run("soup+vaw").parts] == pytest.approx(weights)


def test_a_soup_of_one_part_is_that_part(souped: Souped) -> None:
    soup, part = souped.cell("soup:qwen") / "model", souped.cell("dpo:qwen") / "model"
    files, of_part = contents(soup), contents(part)
    assert files.pop("README.md") != of_part.pop("README.md")
    assert files == of_part
    (recorded,) = souped.run("soup:qwen").parts
    assert souped.run("soup:qwen").identity == recorded.identity
    assert souped.run("soup:qwen").accuracy == recorded.accuracy


def test_it_is_an_ordinary_folder_and_evaluated_as_any_run(
    mrpo: Run, souped: Souped, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(souped.cell("soup") / "model", dtype="auto")
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(souped.cell("soup") / "model").chat_template
    out = tmp_path / "evaluation.json"
    ran = mrpo("evaluate", "--runs", souped.cell("soup"), "--out", out)
    assert ran.code == 0, ran.err
    (policy,) = json.loads(out.read_text())["policies"]
    assert policy["identity"] == souped.run("soup").identity
    accuracy = {name: value["value"] for name, value in policy["overall"]["accuracy"].items()}
    assert accuracy == souped.run("soup").accuracy


def test_parts_are_shown_as_parts_and_not_compared(mrpo: Run, souped: Souped) -> None:
    comparison = souped.comparison
    assert comparison.methods == METHODS.split(",")
    assert comparison.references["soup"] == ["llama", "qwen"]
    assert {run.method for run in comparison.runs} == set(comparison.methods)
    assert "parts       dpo:qwen: trained for soups alone, no methods here" in souped.printed
    lines = souped.printed.splitlines()
    assert any(line.split()[:3] == ["soup", "dpo:qwen", "0.500"] for line in lines)
    costs = {run.method: run.pairs for run in comparison.runs}  # a soup costs what its parts do
    assert costs["soup"] == pytest.approx(2 * costs["dpo:llama"])
    gains = {r.method: r.gain for r in comparison.results if r.metric == "sum"}
    assert gains["soup"]
    assert gains["soup:qwen"] is None  # it has one reference
    report = mrpo("report", souped.out)
    assert report.code == 0, report.err
    assert "Means of weights" in (souped.out / "report.html").read_text()


def test_finished_soups_stay_and_go_with_a_part_that_is_another(
    mrpo: Run, souped: Souped, tmp_path: Path
) -> None:
    copy = souped.at(shutil.copytree(souped.out, tmp_path / "copy"))
    arguments = ["compare", *copy.flags, "--methods", METHODS, *ONE_SEED, "--output-dir", copy.out]
    ran = mrpo(*arguments)
    assert ran.code == 0, ran.err
    assert "5, of which 5 are finished" in ran.out
    assert contents(copy.cell("soup") / "model") == contents(souped.cell("soup") / "model")
    # As if the part had been trained on another machine, to other weights.
    recorded = copy.cell("soup") / "average.json"
    recorded.write_text(recorded.read_text().replace('"weight": 0.5', '"weight": 0.25'))
    identity = json.loads((copy.cell("dpo:qwen") / "result.json").read_text())["identity"]
    recorded.write_text(recorded.read_text().replace(identity, "0" * 32))
    (copy.cell("soup") / WEIGHTS).write_bytes(b"of other parts")
    ran = mrpo(*arguments)
    assert ran.code == 0, ran.err
    assert "5, of which 4 are finished" in ran.out
    assert contents(copy.cell("soup") / "model") == contents(souped.cell("soup") / "model")
    shutil.rmtree(copy.cell("dpo:qwen"))
    ran = mrpo(*arguments)
    assert ran.code == 0, ran.err
    assert "5, of which 1 are finished" in ran.out
    for method in ("dpo:qwen", "soup", "soup+vaw", "soup:qwen"):
        assert contents(copy.cell(method) / "model") == contents(souped.cell(method) / "model")


@pytest.mark.parametrize("how", ["stop", "kill-average"])
def test_an_interrupted_soup_has_the_same_bytes(
    mrpo: Run, souped: Souped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Behind step 3 of each part, or when the mean's weights are written."""
    monkeypatch.setattr(workers, "WORKER", "mrpo.tests.evaluation.compare.interrupted_worker")
    monkeypatch.setenv("MRPO_TEST_INTERRUPT", how)
    copy = souped.at(tmp_path / "compare")
    flags = ["--methods", "soup+vaw", *ONE_SEED, "--save-steps", 2, "--output-dir", copy.out]
    codes = []
    while not codes or (codes[-1] == 130 and len(codes) < 4):
        codes.append(mrpo("compare", *copy.flags, *flags).code)
    assert codes == {"stop": [130, 130, 0]}.get(how, [0])
    cells = [copy.cell(method) for method in ("dpo:llama", "dpo:qwen", "soup+vaw")]
    marked = [cell for cell in cells if (cell / "interrupted").exists()]
    assert marked == (cells[2:] if how == "kill-average" else cells[:2])
    for method in ("dpo:llama", "dpo:qwen", "soup+vaw"):
        assert contents(copy.cell(method) / "model") == contents(souped.cell(method) / "model")
    assert copy.run("soup+vaw").accuracy == souped.run("soup+vaw").accuracy
    assert copy.run("soup+vaw").parts == souped.run("soup+vaw").parts


def test_models_of_parts_are_kept_until_the_soups_are_made(
    mrpo: Run, souped: Souped, tmp_path: Path
) -> None:
    copy = souped.at(tmp_path / "compare")
    arguments = [*copy.flags, *ONE_SEED, "--no-keep-models", "--output-dir", copy.out]
    for methods, finished in (("soup:qwen/llama", "3, of which 0"), ("soup+vaw", "3, of which 0")):
        ran = mrpo("compare", *arguments, "--methods", methods)
        assert ran.code == 0, ran.err
        assert finished in ran.out
        assert list(copy.out.glob("cells/*/*/*/model")) == []
        assert list(copy.out.glob("cells/*/*/*/checkpoints")) == []
        ran = mrpo("compare", *arguments, "--methods", methods)
        assert "3, of which 3" in ran.out
    assert copy.run("soup+vaw").accuracy == souped.run("soup+vaw").accuracy
    assert copy.run("soup+vaw").identity == souped.run("soup+vaw").identity


def test_a_soup_of_adapters_is_an_adapter(mrpo: Run, souped: Souped, tmp_path: Path) -> None:
    copy = souped.at(tmp_path / "compare")
    lora = ["--lora-rank", 4, "--betas", "0.1,0.5"]
    ran = mrpo(
        "compare", *copy.flags, *lora, *ONE_SEED, "--methods", "soup", "--output-dir", copy.out
    )
    assert ran.code == 0, ran.err
    assert copy.comparison.methods == ["soup beta=0.1", "soup beta=0.5"]
    for folder in ("fraction-1/seed-42", "fraction-1-beta-0.5/seed-42"):
        deltas = []
        for method in ("dpo:llama", "dpo:qwen", "soup"):
            model = copy.cell(method, folder) / "model"
            config = json.loads((model / "adapter_config.json").read_text())
            weights = load_file(model / "adapter_model.safetensors")
            scale = config["lora_alpha"] / config["r"]
            layers = [name for name in weights if ".lora_A." in name]
            deltas.append([scale * weights[n.replace("_A.", "_B.")] @ weights[n] for n in layers])
        for llama, qwen, soup in zip(*deltas):
            np.testing.assert_allclose(soup, (llama + qwen) / 2, rtol=0, atol=1e-7)
            assert np.abs(soup).max() > 1e-4


def test_a_soup_whose_part_failed_is_named_and_the_others_are_compared(
    mrpo: Run, souped: Souped, tmp_path: Path
) -> None:
    copy = souped.at(shutil.copytree(souped.out, tmp_path / "copy"))
    torn = copy.cell("dpo:qwen") / "model"
    (copy.cell("dpo:qwen") / "result.json").unlink()
    (torn / "model.safetensors").write_bytes(b"torn")
    ran = mrpo("compare", *copy.flags, "--methods", METHODS, *ONE_SEED, "--output-dir", copy.out)
    assert ran.code == 1
    assert "FAILED: dpo:qwen, fraction 1, seed 42: " in ran.err
    reason = "its part failed: dpo:qwen, fraction 1, seed 42"
    assert f"FAILED: soup+vaw, fraction 1, seed 42: {reason}" in ran.err
    assert f"by hand: mrpo compare --config {copy.out / 'compare.yaml'}" in ran.err
    assert {run.method for run in copy.comparison.runs} == {"dpo:llama"}


def test_a_soup_is_rendered_as_its_parts_are(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    rendering = {"chat_template_kwargs": {"enable_thinking": False}, "system_role": "fold"}
    (tmp_path / "average.json").write_text(json.dumps({"rendering": rendering}))
    reference = policy_of_run(tmp_path, "soup").reference
    assert reference.chat_template_kwargs == {"enable_thinking": False}
    assert reference.system_role == "fold"
    (tmp_path / "average.json").write_text("{}")
    with pytest.raises(UserError, match=r"damaged, .*; remove .* and run `mrpo compare` again"):
        policy_of_run(tmp_path, "soup")
