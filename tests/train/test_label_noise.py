"""Label noise: labels of training prompts turned round, and nothing else of the run knows more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from mrpo.data.config import PrepareConfig
from mrpo.data.ids import ids_to_arrow
from mrpo.data.join import JoinedScores
from mrpo.data.pairs import label_turned
from mrpo.data.prepare import prepare
from mrpo.data.shards import PairShards
from mrpo.data.store import SCORE_SCHEMA, Store
from mrpo.errors import UserError
from mrpo.train.checkpoint import STATE_FILE
from mrpo.train.dataset import TrainingPairs
from mrpo.train.run import train

ALIASES = ["llama", "mistral", "qwen"]
WEIGHTS = Path("model", "model.safetensors")
NOISE = 0.4


def turned(source: TrainingPairs) -> set[tuple[int, int]]:
    """(shard, row) of the pairs whose label is turned round."""
    return {
        (shard, int(row))
        for shard in range(source.num_shards)
        for row in np.flatnonzero(source.turned(shard))
    }


def test_a_share_of_prompts_is_drawn_nested_and_anew_for_another_seed() -> None:
    prompts = [f"prompt {number}" for number in range(4000)]
    drawn = {
        (share, seed): {prompt for prompt in prompts if label_turned(prompt, share, seed)}
        for share in (0.0, 0.15, 0.3, 1.0)
        for seed in (42, 43)
    }
    for seed in (42, 43):
        assert drawn[0.0, seed] == set()
        assert drawn[0.15, seed] < drawn[0.3, seed] < drawn[1.0, seed] == set(prompts)
        assert abs(len(drawn[0.3, seed]) / 4000 - 0.3) < 0.025  # 3.5 standard deviations
    both = len(drawn[0.3, 42] & drawn[0.3, 43]) / 4000
    assert abs(both - 0.09) < 0.016  # independent: 0.3 of 0.3


def test_one_draw_serves_every_fraction_and_leaves_held_out_labels(
    joined: tuple[PairShards, JoinedScores],
) -> None:
    whole = turned(TrainingPairs(*joined, False, 1.0, NOISE, 42))
    assert whole == turned(TrainingPairs(*joined, True, 0.5, NOISE, 42))
    assert turned(TrainingPairs(*joined, False, 1.0, 0.2, 42)) < whole
    assert turned(TrainingPairs(*joined, False, 1.0, NOISE, 43)) != whole
    splits = {
        (shard, row): pair.split
        for shard in range(2)
        for row, pair in enumerate(joined[0].pairs(shard))
    }
    assert {splits[place] for place in whole} == {"train"}
    everything = turned(TrainingPairs(*joined, False, 1.0, 1.0, 42))
    assert everything == {place for place, split in splits.items() if split == "train"}


def test_rows_of_turned_pairs_have_texts_and_scores_exchanged(
    joined: tuple[PairShards, JoinedScores],
) -> None:
    plain, noisy = TrainingPairs(*joined, True), TrainingPairs(*joined, True, 1.0, NOISE, 42)
    for shard in range(2):
        where, rows = noisy.turned(shard), np.arange(joined[0].rows[shard])[::-1]
        assert 0 < where.sum() < len(where)
        before, after = plain.chunk(shard, rows), noisy.chunk(shard, rows)
        for row, was, now in zip(rows, before.pairs(0, len(rows)), after.pairs(0, len(rows))):
            assert now.prompt == was.prompt
            sides = (was.rejected, was.chosen) if where[row] else (was.chosen, was.rejected)
            assert (now.chosen, now.rejected) == sides
        assert before.ids(rows) == after.ids(rows)  # the pairs that the store knows
        for name in ("ref_{}_logps", "ref_{}_tokens", "{}_bytes"):
            for scores, old in (
                (after.scores, before.scores),
                (noisy.scores(shard)[0], plain.scores(shard)[0]),
            ):
                turn = where[rows] if scores is after.scores else where
                sides = [getattr(old, name.format(side)) for side in ("chosen", "rejected")]
                turn = turn.reshape(-1, *[1] * (sides[0].ndim - 1))
                np.testing.assert_array_equal(
                    getattr(scores, name.format("chosen")), np.where(turn, sides[1], sides[0])
                )
                np.testing.assert_array_equal(
                    getattr(scores, name.format("rejected")), np.where(turn, sides[0], sides[1])
                )


def test_a_run_is_that_on_pairs_turned_round_by_hand(
    inputs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights byte for byte and the log, with weights learned from the labels; and it says so."""
    settings = {"label_noise": NOISE, "method": "geometric+fitted", "seed": 7}
    train(inputs.config(tmp_path / "noisy", **settings))
    printed = capsys.readouterr().out
    config = inputs.config(tmp_path / "by-hand", **(settings | {"label_noise": 0.0}))
    count = turned_by_hand(inputs, tmp_path, seed=7)
    config.pairs, config.store = str(tmp_path / "pairs"), str(tmp_path / "store")
    train(config)
    assert f"label noise {count} of the pairs to train on have their label turned round" in printed
    assert "0 responses have other tokens" not in printed
    assert "WARNING" not in printed  # the policy's log-probs are those stored, exchanged or not
    weights = [(tmp_path / run / WEIGHTS).read_bytes() for run in ("noisy", "by-hand")]
    assert weights[0] == weights[1]
    logs = [losses(tmp_path / run) for run in ("noisy", "by-hand")]
    assert logs[0] == logs[1]
    assert any("eval_loss" in line for line in logs[0])
    train(inputs.config(tmp_path / "clean", **(settings | {"label_noise": 0.0})))
    assert (tmp_path / "clean" / WEIGHTS).read_bytes() != weights[0]
    card = (tmp_path / "noisy" / "model" / "README.md").read_text()
    assert "| label_noise | 0.4 |" in card
    assert yaml.safe_load((tmp_path / "noisy" / "train.yaml").read_text())["label_noise"] == NOISE


def turned_by_hand(inputs: Any, folder: Path, seed: int) -> int:
    """Prepare and score the pairs anew, some turned round; returns how many."""
    lines = (inputs.root / "pairs.jsonl").read_text().splitlines()
    before = PairShards(inputs.root / "pairs")
    held_out = {
        pair.prompt[0]["content"]
        for shard in range(2)
        for pair in before.pairs(shard)
        if pair.split == "validation"
    }
    rows, turns = [json.loads(line) for line in lines], []
    for row in rows:
        train_pair = row["prompt"][0]["content"] not in held_out
        turns.append(train_pair and label_turned(row["prompt"], NOISE, seed))
        if turns[-1]:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = prepare(
        PrepareConfig(
            source=str(folder / "pairs.jsonl"),
            out=str(folder / "pairs"),
            shard_pairs=30,
            validation_fraction=0.25,
        )
    )
    old, new = Store(inputs.root / "store"), Store(folder / "store")
    new_ids = np.concatenate([pairs.pair_ids(shard) for shard in range(2)])
    old_ids = np.concatenate([before.pair_ids(shard) for shard in range(2)])
    for alias in ALIASES:
        record = old.resolve(alias)
        new.record(record)
        table = pa.concat_tables(old.scores(record.identity).tables(SCORE_SCHEMA.names))
        place = {pair_id: row for row, pair_id in enumerate(table["pair_id"].to_pylist())}
        table = table.take([place[pair_id.tobytes()] for pair_id in old_ids])
        columns = {name: table[name].to_pylist() for name in SCORE_SCHEMA.names}
        for name in [name for name in columns if name.startswith("chosen_")]:
            first, second = columns[name], columns[name.replace("chosen", "rejected")]
            for row, turn in enumerate(turns):
                if turn:
                    first[row], second[row] = second[row], first[row]
        columns["pair_id"] = ids_to_arrow(new_ids)
        new.scores(record.identity).add(pa.table(columns, schema=SCORE_SCHEMA))
    return sum(turns)


def losses(run: Path) -> list[dict[str, Any]]:
    """The log without what is measured by the clock."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def test_a_run_of_a_version_without_the_setting_goes_on(inputs: Any, tmp_path: Path) -> None:
    """And it goes on without noise alone."""
    out = tmp_path / "run"
    train(inputs.config(out))
    for path in (out / "checkpoints").glob(f"*/{STATE_FILE}"):
        state = json.loads(path.read_text())
        del state["settings"]["label_noise"]
        path.write_text(json.dumps(state))
    assert train(inputs.config(out, resume=True)).status == "finished"
    with pytest.raises(UserError, match=r"--label-noise is 0\.3.*started with 0\.0"):
        train(inputs.config(out, resume=True, label_noise=0.3))


def test_a_share_above_1_is_refused(inputs: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--label-noise is 30; it must be in \[0, 1\]"):
        inputs.config(tmp_path / "run", label_noise=30)
