"""Soups and merges in a comparison: means of safetensors, made of cells like any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants as hub_constants
from huggingface_hub import file_download
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrpo.data.references import load_refs
from mrpo.data.store import ReferenceRecord, Store
from mrpo.demo.models import build_model, save_reference
from mrpo.errors import UserError
from mrpo.evaluation.compare import workers
from mrpo.evaluation.compare.averages import (
    MergeSource,
    make_soup,
    merge_folders,
    merge_sources,
    recorded_parts,
)
from mrpo.evaluation.compare.cells import Cell
from mrpo.evaluation.compare.results import Comparison, RunResult, read_comparison
from mrpo.evaluation.policies import policy_of_run
from mrpo.method.grammar import Average
from mrpo.tests.evaluation.compare.test_compare import TRAINING, rows, run_in_process
from mrpo.tests.evaluation.scored_pairs import add_scores, prepared
from mrpo.tests.model.test_average import adapter, changed
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
    tiny_references: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[str]]:
    """Of comparisons on pairs whose references' scores are numbers of our own."""
    scored = prepared(tmp_path_factory.mktemp("soup"), rows(), validation_fraction=0.3)
    rng = np.random.default_rng(0)
    scores = {
        alias: -scored.lengths * rng.uniform(1, 2, scored.lengths.shape)
        for alias in ("llama", "qwen")
    }
    add_scores(scored, scores)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        policy = ["--policy", str(tiny_references["llama"])]
        yield [*scored.flags, *TRAINING, "--refs", "llama,qwen", *policy]
    torch.set_num_threads(threads)


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


# Merges


@pytest.fixture(scope="module")
def experts(
    flags: list[str], tiny_references: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Flags of comparisons with model folders and adapters as references; scores of our own."""
    root, llama = tmp_path_factory.mktemp("experts"), tiny_references["llama"]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    vocabulary = AutoModelForCausalLM.from_pretrained(llama).config.vocab_size
    tokenizer.add_tokens(["<extra>"])
    entries = {
        "one": {"model": str(llama)},
        "two": {"model": str(changed(llama, root / "two", 1))},
        "three": {"model": str(changed(llama, root / "three", 2, max_shard_size="100KB"))},
        "mistral": {"model": str(tiny_references["mistral"])},
        "words": {
            "model": str(
                save_reference(build_model("llama", vocabulary), tokenizer, root / "words")
            )
        },
        "moved": {"model": str(changed(llama, root / "moved", 3))},
        "adapted": {"model": str(llama), "adapter": str(adapter(llama, root / "a", 1))},
        "again": {"model": str(llama), "adapter": str(adapter(llama, root / "b", 2, 2, 6))},
        "other": {"model": str(root / "two"), "adapter": str(adapter(llama, root / "c", 3))},
        "special": {
            "model": str(llama),
            "adapter": str(adapter(llama, root / "d", 4, use_rslora=True)),
        },
        "small": {"model": str(llama), "quantization": "fp8"},
    }
    scored = prepared(root, rows(), validation_fraction=0.3)
    rng = np.random.default_rng(1)
    logps = {a: -scored.lengths * rng.uniform(1, 2, scored.lengths.shape) for a in entries}
    add_scores(scored, logps, entries)
    changed(llama, root / "moved", 4)
    return [*scored.flags, *TRAINING, *ONE_SEED]


def test_a_merge_is_the_mean_of_the_references_made_once_for_all_runs(
    mrpo: Run, experts: list[str], tmp_path: Path
) -> None:
    grid = ["--methods", "dpo:one,merge:one/two/three", "--fractions", "0.5,1", "--seeds", 2]
    ran = mrpo("compare", *experts, *grid, "--jobs", 2, "--output-dir", tmp_path / "c")
    assert ran.code == 0, ran.err
    assert "runs        5, of which 0 are finished" in ran.out
    merged = Souped(experts, tmp_path / "c")
    cell = merged.cell("merge:one/two/three", "untrained/once")
    entries = yaml.safe_load(Path(experts[3]).read_text())
    models = [AutoModelForCausalLM.from_pretrained(entries[name]["model"]).state_dict()
              for name in ("one", "two", "three")]  # fmt: skip
    mean = AutoModelForCausalLM.from_pretrained(cell / "model").state_dict()
    for name, tensor in mean.items():
        exact = torch.stack([model[name].double() for model in models]).mean(0).float()
        assert torch.equal(tensor, exact), name
    of_merge = [run for run in merged.comparison.runs if run.method.startswith("merge")]
    assert len(of_merge) == 4  # two fractions, two seeds
    assert len({run.folder for run in of_merge}) == 1
    assert {run.seconds for run in of_merge} == {0}
    growth = merged.comparison.growth["merge:one/two/three"]
    assert (growth.value, growth.low, growth.high) == (0, 0, 0)
    assert [part.name for part in of_merge[0].parts] == ["one", "two", "three"]
    report = mrpo("report", merged.out)
    assert report.code == 0, report.err
    # Whatever the others are trained on: it stays.
    grid = ["--methods", "merge:one/two/three", "--refs", "one,two,three", "--label-noise", "0,0.2"]
    ran = mrpo("compare", *experts, *grid, "--betas", "0.1,0.2", "--output-dir", tmp_path / "c")
    assert ran.code == 0, ran.err
    assert "runs        1, of which 1 are finished" in ran.out


def test_a_merge_of_adapters_is_an_adapter_on_their_model(
    mrpo: Run, experts: list[str], tmp_path: Path
) -> None:
    flags = ["--refs", "one,adapted,again", "--methods", "merge:adapted/again"]
    ran = mrpo("compare", *experts, *flags, "--output-dir", tmp_path / "c")
    assert ran.code == 0, ran.err
    cell = Souped(experts, tmp_path / "c").cell("merge:adapted/again", "untrained/once")
    entries = yaml.safe_load(Path(experts[3]).read_text())
    base = entries["one"]["model"]
    deltas = []
    for folder in (entries["adapted"]["adapter"], entries["again"]["adapter"], cell / "model"):
        whole: Any = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), str(folder)
        )
        merged, plain = whole.merge_and_unload(), AutoModelForCausalLM.from_pretrained(base)
        deltas.append([a - b for a, b in zip(merged.parameters(), plain.parameters())])
    assert json.loads((cell / "model" / "adapter_config.json").read_text())["r"] == 6
    for first, second, mean in zip(*deltas):
        torch.testing.assert_close(mean, (first + second) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ("merge:one/mistral", "one and mistral differ in model_type (llama, mistral)"),
        ("merge:one/words", "one and words have different tokenizers (added_tokens)"),
        ("merge:one/adapted", "adapted has an adapter, one has not; merge the adapter"),
        ("merge:adapted/other", "adapted and other have adapters of different models"),
        ("merge:adapted/special", "special: its adapter has use_rslora True"),
        ("merge:one/small", "small is quantized or a GGUF file"),
        ("merge:one", "is the reference one itself; name two or more"),
        ("merge:one/two+vaw", "merge is uniform; leave out +vaw"),
        ("soup:one/two+arwc", "soup takes +vaw, or nothing; leave out +arwc"),
        ("soup+reliable", "leave out +reliable"),
        ("soup:one/zephyr", "reference 'zephyr' is not among"),
        ("soup,soup:one/two,merge:one/two", "soup and soup:one/two are the same (soup:one/two)"),
    ],
)
def test_what_has_no_mean_is_one_line_before_any_run(
    mrpo: Run, experts: list[str], tmp_path: Path, methods: str, words: str
) -> None:
    named = [name for name in ("mistral", "words", "adapted", "other", "special", "small")
             if name in methods]  # fmt: skip
    refs = ["--refs", ",".join(["one", "two", *named])]
    if methods.startswith("soup,"):
        refs = ["--refs", "one,two"]
    out = tmp_path / "c"
    ran = mrpo("compare", *experts, *refs, "--methods", methods, "--output-dir", out)
    assert ran.code == 2
    assert words in ran.err
    assert ran.err.count("\n") == 1
    assert not out.exists()


def test_a_merge_is_of_the_weights_that_were_scored(
    mrpo: Run, experts: list[str], tmp_path: Path
) -> None:
    """The alias with an identity names scores of weights that are no longer in the folder."""
    records = Store(experts[5]).references()
    (old,) = (record for record in records if record.alias == "moved")
    methods = ["--methods", f"merge:one/{old.title}"]
    ran = mrpo("compare", *experts, *methods, "--output-dir", tmp_path / "c")
    assert ran.code == 2
    assert "the model of moved is not what was scored; restore it, or run `mrpo precomp" in ran.err
    assert not (tmp_path / "c").exists()


def test_models_on_the_hub_are_merged_at_the_commits_that_were_scored(
    tiny_references: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the Hub's cache; the branch has moved on since."""
    for constants in (hub_constants, file_download.constants):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    sources, scored, newest = [], "a" * 40, "b" * 40
    for seed, name in enumerate(("one", "two")):
        cached = tmp_path / f"models--org--{name}"
        changed(tiny_references["llama"], cached / "snapshots" / scored, seed)
        changed(tiny_references["mistral"], cached / "snapshots" / newest, seed)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(newest)
        (spec,) = load_refs({name: f"org/{name}"}).values()
        inputs = {"dtype": "float32", "model": {"commit": scored}}
        record = ReferenceRecord(alias=name, entry=spec.entry(), inputs=inputs)
        sources.append(MergeSource(spec, record))
    folders = merge_folders("merge", sources)
    assert [folder.name for folder in folders] == [scored, scored]
    assert [folder.parents[1].name for folder in folders] == [
        "models--org--one",
        "models--org--two",
    ]
    absent = MergeSource(load_refs({"three": "org/three"})["three"], sources[0].record)
    with pytest.raises(UserError, match=r"method 'merge': .*org/three"):
        merge_folders("merge", [absent, sources[1]])


def test_a_reference_without_weights_has_no_mean() -> None:
    (spec,) = load_refs({"one": "org/one"}).values()
    record = ReferenceRecord(alias="one", entry={}, inputs={"imported": "two"})
    records = {"one": record, "two": replace(record, alias="two")}
    with pytest.raises(UserError, match="the scores of two were imported, and a mean needs its w"):
        merge_sources(Average("merge", ("one", "two"), "uniform"), records, {"one": spec})


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


@pytest.mark.parametrize("method", ["soup", "soup:one/two+vaw", "merge"])
def test_train_and_export_say_who_makes_means(
    mrpo: Run, experts: list[str], tmp_path: Path, method: str
) -> None:
    flags = [flag for flag in experts if flag not in ONE_SEED]
    for command in (["train", *flags, "--output-dir"], ["export", *flags[:6], "--out"]):
        ran = mrpo(*command, tmp_path / "out", "--method", method)
        assert ran.code == 2
        assert f"made by compare, not trained; run `mrpo compare --methods {method}`" in ran.err
        assert not (tmp_path / "out").exists()
