"""Pairs that are prepared again under a run: it ends on those it started with, or says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mrpo.data.ids import digest_of
from mrpo.data.join import JoinedScores
from mrpo.data.prepare import prepare
from mrpo.data.shards import PairShards
from mrpo.errors import UserError
from mrpo.train import run as run_module
from mrpo.train.dataset import TrainingPairs
from mrpo.train.loop import train_steps
from mrpo.train.run import train

SETTINGS = {"shard_pairs": 30, "validation_fraction": 0.25}


@pytest.fixture
def pairs(inputs: Any, tmp_path: Path) -> Path:
    """The 48 pairs in a folder that a test may change."""
    prepare(source=inputs.root / "pairs.jsonl", out=tmp_path / "pairs", **SETTINGS)
    return tmp_path / "pairs"


def prepare_others(inputs: Any, pairs: Path) -> PairShards:
    """As many pairs in as many shards, but every chosen response with another's rejected one."""
    rows = [json.loads(line) for line in (inputs.root / "pairs.jsonl").open()]
    for row, twin in zip(rows, [*rows[1:], rows[0]]):
        row["rejected"] = [{"role": "assistant", "content": twin["chosen"][0]["content"] + " not"}]
    source = pairs.parent / "others.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(source=source, out=pairs, overwrite=True, **SETTINGS)


def test_a_run_ends_on_the_pairs_that_it_started_with(
    inputs: Any, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(inputs.config(tmp_path / "plain", pairs=str(pairs)))

    def prepared_again_first(run: Any) -> bool:
        before = PairShards(pairs).rows
        assert prepare_others(inputs, pairs).rows == before
        return train_steps(run)

    monkeypatch.setattr(run_module, "train_steps", prepared_again_first)
    train(inputs.config(tmp_path / "run", pairs=str(pairs)))
    weights = "model/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "plain" / weights).read_bytes()
    assert not (tmp_path / "run" / "pairs").exists()  # needed no more


def test_a_run_that_was_stopped_names_the_pairs_to_resume_with(
    inputs: Any, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(inputs.config(tmp_path / "plain", pairs=str(pairs)))
    config = inputs.config(tmp_path / "run", pairs=str(pairs))

    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    with pytest.raises(UserError, match=f"the unfinished run {tmp_path}/run uses them"):
        prepare(source=inputs.root / "pairs.jsonl", out=pairs)
    changed = prepare_others(inputs, pairs).digest
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    config.resume = True
    kept = tmp_path / "run" / "pairs"
    with pytest.raises(UserError, match=f"other pairs than those .* add --pairs {kept}"):
        train(config)
    config.pairs = str(kept)
    train(config)
    assert train(config).status == "finished"
    assert PairShards(pairs).digest == changed
    prepare(source=inputs.root / "pairs.jsonl", out=pairs)  # the run is no longer in the way
    weights = "model/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "plain" / weights).read_bytes()


def test_scores_of_other_pairs_never_meet_pairs(inputs: Any, pairs: Path, tmp_path: Path) -> None:
    """Two pairs exchanged in the joined scores, with a digest that is right."""
    config = inputs.config(tmp_path / "run", pairs=str(pairs))
    train(config)
    scores = JoinedScores(tmp_path / "run" / "scores")
    assert scores.pairs_digest == PairShards(pairs).digest
    TrainingPairs(PairShards(pairs), scores, prompt_numbers=False).scores(1)
    table, path = scores.table(1), scores.path / scores.names[1]
    pq.write_table(table.take([1, 0, *range(2, len(table))]), path)
    manifest = json.loads((scores.path / "joined.json").read_text())
    manifest["files"][1]["digest"] = digest_of(path.read_bytes())
    (scores.path / "joined.json").write_text(json.dumps(manifest))
    source = TrainingPairs(PairShards(pairs), JoinedScores(scores.path), prompt_numbers=False)
    source.scores(0)
    for read in (lambda: source.scores(1), lambda: source.chunk(1, [3])):
        with pytest.raises(UserError, match="was joined to other pairs than those in"):
            read()
