"""`score`, the Python front door: the same rows as `mrpo precompute`, with no files around it."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from shutil import rmtree
from typing import Any, get_args

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from mrpo.data.config import PrepareConfig
from mrpo.data.join import join
from mrpo.data.prepare import prepare
from mrpo.data.references import load_refs
from mrpo.data.shards import PairShards
from mrpo.data.store import Store
from mrpo.errors import UserError
from mrpo.precompute import process
from mrpo.precompute.config import EngineChoice, PrecomputeConfig
from mrpo.precompute.engines import ENGINES, RAY
from mrpo.precompute.run import precompute, score
from mrpo.tests.precompute.workspace import Workspace, rows

FORBIDDEN = (sys.executable, "-c", "raise SystemExit('no worker was to be started')")


def files(store: Store) -> dict[str, bytes]:
    """Every score file's bytes by its path in the store."""
    root = Path(store.root)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.glob("*/scores/*")}


def test_from_python_or_in_this_process_the_files_are_those_of_precompute(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte, under the same identities; and nothing is printed on stdout."""
    pairs = workspace.prepare(rows(20))
    assert precompute(workspace.config(refs="llama,qwen")).scored == {"llama": 40, "qwen": 40}
    expected = files(workspace.store)
    capfd.readouterr()

    specs = load_refs(workspace.refs_config)
    from_specs = Store(workspace.folder / "from-specs")
    result = score([specs["llama"], specs["qwen"]], pairs, from_specs, engine="hf")
    assert files(from_specs) == expected
    assert [record.alias for record in result.records] == ["llama", "qwen"]
    assert [record.runs[-1]["responses"] for record in result.records] == [40, 40]
    assert (result.scored, result.unscored, result.exit_code) == (
        {"llama": 40, "qwen": 40},
        {"llama": 0, "qwen": 0},
        0,
    )

    monkeypatch.setattr(process, "PYTHON", FORBIDDEN)
    entries = yaml.safe_load(workspace.refs_config.read_text())
    mapping = {"llama": entries["llama"]["model"], "qwen": entries["qwen"]}
    here = workspace.folder / "here"
    assert score(mapping, str(pairs.path), here, in_process=True).scored == result.scored
    assert files(Store(here)) == expected
    assert not (here / "logs").exists()
    again = score(mapping, pairs, here, in_process=True)
    assert again.scored == {"llama": 0, "qwen": 0}
    assert [r.identity for r in again.records] == [r.identity for r in result.records]
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "llama: scored 40 responses" in printed.err


@pytest.fixture
def split_pairs(workspace: Workspace) -> PairShards:
    source = workspace.folder / "split.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows(30)))
    config = PrepareConfig(
        source=str(source),
        out=str(workspace.folder / "split"),
        shard_pairs=12,
        validation_fraction=0.4,
    )
    return prepare(config)


def ids_of(pairs: PairShards, split: str) -> set[bytes]:
    return {
        response_id
        for shard in range(len(pairs.names))
        for pair in pairs.pairs(shard)
        if pair.split == split
        for response_id in pair.response_ids[1:]
    }


@pytest.mark.parametrize("in_process", [True, False])
def test_a_split_is_scored_alone_and_the_rest_later(
    workspace: Workspace, split_pairs: PairShards, in_process: bool
) -> None:
    """What is missing, left out and counted is that of the split; a second run adds the rest."""
    held_out = ids_of(split_pairs, "validation")
    assert 10 < len(held_out) < 50
    specs = [load_refs(workspace.refs_config)["llama"]]
    options: dict[str, Any] = {"engine": "hf", "in_process": in_process}
    first = score(specs, split_pairs, workspace.store, split="validation", **options)
    assert first.scored == {"llama": len(held_out)}
    assert first.unscored == {"llama": 0}
    assert set(workspace.by_id("llama")) == held_out
    if in_process:
        rest = score(specs, split_pairs, workspace.store, **options)
        assert rest.scored == {"llama": 60 - len(held_out)}
        assert workspace.scores("llama").num_rows() == 60


def test_a_split_without_pairs_is_a_users_mistake(workspace: Workspace) -> None:
    pairs = workspace.prepare(rows(2))
    with pytest.raises(UserError, match="has no pairs of split validation"):
        score(load_refs(workspace.refs_config).values(), pairs, workspace.store, split="validation")
    assert not Path(workspace.store.root).exists()


def test_a_workers_crash_is_counted_and_what_is_wrong_with_weights_is_raised(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = workspace.prepare(rows(4))
    entries = yaml.safe_load(workspace.refs_config.read_text())
    broken = workspace.folder / "broken"
    renamed = {"broken": entries["llama"]["model"]}
    monkeypatch.setattr(process, "PYTHON", FORBIDDEN)
    capsys.readouterr()
    result = score(renamed, pairs, workspace.store, engine="hf")
    assert (result.scored, result.unscored) == ({"broken": 0}, {"broken": 8})
    assert result.exit_code == 1
    printed = capsys.readouterr()
    assert "reference broken failed: exit code 1" in printed.err
    assert "no worker was to be started" in printed.err
    assert printed.out == ""

    Path(broken).mkdir()
    for path in Path(renamed["broken"]).iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(broken, dtype=torch.float32)
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    model.save_pretrained(broken)
    with pytest.raises(UserError, match=r"reference broken: .* of response .* is not finite"):
        score({"broken": str(broken)}, pairs, workspace.store, in_process=True)


@pytest.mark.parametrize(
    ("references", "options", "message"),
    [
        ({}, {}, "references: must map aliases"),
        ([], {}, "name one or more"),
        ({"a b": "org/model"}, {}, "alias 'a b' is not allowed"),
        ({"llama": {"modle": "org/model"}}, {}, "references: llama: needs a 'model'"),
        ({"llama": "org/model"}, {"max_tokens": 0}, "--max-tokens is 0"),
        ({"llama": "org/model"}, {"engine": "vllm", "in_process": True}, "in_process scores with"),
        ({"llama": "org/model"}, {"data_parallel_size": 2, "in_process": True}, "in_process"),
    ],
)
def test_a_mistake_is_found_before_any_work(
    workspace: Workspace, references: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        score(references, "nowhere", workspace.store, **options)


def test_an_alias_twice_is_refused(workspace: Workspace) -> None:
    spec = load_refs(workspace.refs_config)["llama"]
    with pytest.raises(UserError, match="each alias once"):
        score([spec, spec], "nowhere", workspace.store)


def test_settings_have_the_names_and_defaults_of_the_command() -> None:
    parameters = inspect.signature(score).parameters
    defaults = {field.name: field.default for field in fields(PrecomputeConfig)}
    assert set(defaults) - set(parameters) == {"refs", "refs_config", "data", "dry_run"}
    assert set(parameters) - set(defaults) == {"references", "split", "in_process"}
    for name in set(parameters) & set(defaults) - {"pairs"}:
        assert parameters[name].default == defaults[name] is not MISSING


def test_the_command_lists_every_engine() -> None:
    assert get_args(EngineChoice) == ("auto", *ENGINES, RAY)


def test_responses_beyond_a_limit_are_listed_though_nothing_else_is_left_to_score(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a list, training would ask for this very run again, and in vain."""
    data = rows(12)
    data[3]["chosen"][0]["content"] = "word " * 120
    pairs, store = workspace.prepare(data), tmp_path / "limited"
    spec = load_refs(workspace.refs_config)["llama"]
    for scored in (23, 0):
        result = score([spec], pairs, store, engine="hf", in_process=True, max_model_len=120)
        assert (result.scored, result.unscored) == ({"llama": scored}, {"llama": 0})
        scores = Store(store).scores(result.records[0].identity)
        left_out = [scores.left_out().contains(pairs.response_ids(n).both) for n in (0, 1)]
        assert [int(listed.sum()) for listed in left_out] == [1, 0]
        joined = join(pairs, Store(store), result.records, tmp_path / "joined")
        assert joined.references[0].missing == {"over_limit": 1}
        rmtree(Path(store) / result.records[0].identity / "left-out")
        with pytest.raises(UserError, match=r"pairs not yet scored in .*: 1 for llama"):
            join(pairs, Store(store), result.records, tmp_path / "joined")
