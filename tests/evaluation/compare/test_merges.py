"""Merges in a comparison: means of the references themselves, made once for all runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants as hub_constants
from huggingface_hub import file_download
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrpo.data.references import load_refs
from mrpo.data.store import ReferenceRecord, Store
from mrpo.demo.models import build_model, save_reference
from mrpo.errors import UserError
from mrpo.evaluation.compare.averages import (
    MergeSource,
    merge_folders,
    merge_sources,
)
from mrpo.method.grammar import Average
from mrpo.tests.evaluation.compare.test_compare import TRAINING, rows
from mrpo.tests.evaluation.compare.test_soups import ONE_SEED, Souped
from mrpo.tests.evaluation.scored_pairs import add_scores, prepared
from mrpo.tests.model.test_average import adapter, changed

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def experts(
    one_thread: None, tiny_references: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
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
            "adapter": str(adapter(llama, root / "d", 4, use_dora=True)),
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
        ("merge:adapted/special", "special: its adapter has use_dora True"),
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
