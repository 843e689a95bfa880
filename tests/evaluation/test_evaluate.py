"""Evaluate says what train says where both mean the same, and scores a policy once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mrpo.data.config import PrepareConfig
from mrpo.data.prepare import prepare
from mrpo.data.store import ReferenceRecord, Store
from mrpo.errors import UserError
from mrpo.evaluation.config import EvaluateConfig, ReportConfig
from mrpo.evaluation.evaluate import evaluate, policy_figures, right
from mrpo.evaluation.policies import run_names
from mrpo.evaluation.report.tasks_section import task_sections
from mrpo.evaluation.score_table import (
    ReferenceColumns,
    ScoreTable,
    load_complete_score_table,
    pairs_at,
)
from mrpo.files import to_json
from mrpo.precompute.config import PrecomputeConfig
from mrpo.precompute.run import precompute
from mrpo.tests.evaluation.scored_pairs import add_scores, chat, prepared
from mrpo.train.config import TrainConfig
from mrpo.train.run import train
from mrpo.train.run_folder import read_evaluation


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_references: dict[str, Path]
) -> dict[str, Any]:
    """Two runs against llama, of all weights and of an adapter: the settings that they share."""
    folder = tmp_path_factory.mktemp("evaluate")
    made = [
        chat(f"Question {n}?", f"Answer {n} is {n * n}.", f"No answer to {n}.", "ab"[n % 2])
        for n in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    source, pairs = str(folder / "rows.jsonl"), str(folder / "pairs")
    prepare(PrepareConfig(source=source, out=pairs, validation_fraction=0.4))
    entries = {"llama": {"model": str(tiny_references["llama"])}}
    (folder / "refs.yaml").write_text(yaml.safe_dump(entries))
    shared = {
        "pairs": pairs,
        "refs": "llama",
        "refs_config": str(folder / "refs.yaml"),
        "store": str(folder / "store"),
    }
    assert precompute(PrecomputeConfig(**shared, engine="hf")).exit_code == 0
    for name, more in {"full": {}, "lora": {"lora_rank": 4}}.items():
        config = TrainConfig(
            output_dir=str(folder / "runs" / name),
            method="dpo",
            max_steps=4,
            learning_rate=1e-2,
            device="cpu",
            **shared,
            **more,
        )
        assert train(config).exit_code == 0
    return shared | {"folder": folder}


def evaluated(out: Path, **settings: Any) -> dict[str, Any]:
    """What `evaluate` writes, which is also what it returns."""
    returned = evaluate(out=str(out), **settings)
    content = read_evaluation(out)
    content.pop("training", None)
    assert content == to_json(returned)
    return content


def test_reward_accuracy_is_the_one_that_train_ended_with(
    trained: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = [trained["folder"] / "runs" / name for name in ("full", "lora")]
    content = evaluated(tmp_path / "evaluation.json", runs=runs)
    assert content["base"]["name"] == "llama"
    for run, policy in zip(runs, content["policies"]):
        final = read_evaluation(run / "evaluation.json")["training"]["figures"]
        assert policy["name"] == run.name
        overall = policy["overall"]
        assert overall["pairs"] == final["eval_pairs"]
        assert overall["accuracy"]["reward"]["value"] == pytest.approx(
            final["eval_rewards/accuracies"], abs=1e-12
        )
        margin = final["eval_rewards/margins"] / 0.1  # beta
        assert overall["reward_margin"]["value"] == pytest.approx(margin, abs=1e-4)
        sources = policy["by_source"]
        assert sum(figures["pairs"] for figures in sources.values()) == overall["pairs"]
    assert capfd.readouterr().out.splitlines()[-1] == str(tmp_path / "evaluation.json")
    assert (tmp_path / "evaluation.yaml").is_file()


def test_policies_are_scored_once_and_apart_from_the_references(
    trained: dict[str, Any], tmp_path: Path
) -> None:
    run, store = trained["folder"] / "runs" / "full", Store(trained["store"])
    content = evaluated(tmp_path / "first.json", runs=run)
    identity = content["policies"][0]["identity"]
    assert {record.alias for record in store.references()} == {"llama"}
    assert identity in store.policies.identities()
    assert not list(Path(store.root).rglob("refs.yaml"))
    files = score_files(store)
    assert evaluated(tmp_path / "again.json", runs=run) == content
    assert score_files(store) == files


def test_pairs_prepared_again_are_not_taken_for_held_out_ones(
    trained: dict[str, Any], tmp_path: Path
) -> None:
    """With another share held out, training pairs of the run would count as held out."""
    run, pairs = tmp_path / "run", tmp_path / "pairs"
    shutil.copytree(trained["folder"] / "runs" / "full", run)
    prepare(source=trained["folder"] / "rows.jsonl", out=pairs, validation_fraction=0.6)
    settings = yaml.safe_load((run / "train.yaml").read_text())
    (run / "train.yaml").write_text(yaml.safe_dump(settings | {"pairs": str(pairs)}))
    with pytest.raises(UserError, match=f"{pairs} was prepared again since {run} was trained"):
        evaluate(runs=str(run), out=str(tmp_path / "e.json"))
    evaluate(runs=str(run), pairs=str(pairs), out=str(tmp_path / "e.json"))


def test_evaluation_leaves_what_training_wrote(trained: dict[str, Any]) -> None:
    run = trained["folder"] / "runs" / "full"
    before = read_evaluation(run / "evaluation.json")
    assert before.keys() == {"training"}
    returned = evaluate(runs=str(run), out=str(run / "evaluation.json"))
    assert read_evaluation(run / "evaluation.json") == before | to_json(returned)


def test_tasks_stand_beside_the_figures_on_pairs(
    trained: dict[str, Any], shared_data: Path, tmp_path: Path
) -> None:
    """Of an adapter, which the harness runs as PEFT loads it; the report shows the run's."""
    run = tmp_path / "lora"
    shutil.copytree(trained["folder"] / "runs" / "lora", run)
    content = evaluated(
        run / "evaluation.json",
        runs=run,
        tasks="truthfulqa_mc2",
        tasks_data=shared_data,
        limit=2,
    )
    (policy,) = content["policies"]
    (answered,) = content["tasks"]
    assert answered["identity"] == policy["identity"]
    (task,) = answered["tasks"]
    (section,) = task_sections(ReportConfig(folders=str(run)))
    (table,) = section.tables
    figure = task["figures"]["acc,none"]["value"]
    assert table.rows[1][0] == "lora: lora"
    assert table.rows[1][1].startswith(f"{100 * figure:.1f} (")


def score_files(store: Store) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path(store.root).rglob("*.parquet")}


def test_the_base_itself_has_no_rewards_and_its_stored_likelihoods(
    trained: dict[str, Any], tmp_path: Path, tiny_references: dict[str, Path]
) -> None:
    given = {name: trained[name] for name in ("pairs", "refs_config", "store")}
    content = evaluated(
        tmp_path / "evaluation.json",
        policies=str(tiny_references["llama"]),
        base="llama",
        **given,
    )
    policy = content["policies"][0]
    assert policy["identity"] == content["base"]["identity"]
    assert policy["overall"]["reward_margin"]["value"] == 0
    assert policy["overall"]["accuracy"]["sum"] == content["base"]["overall"]["accuracy"]["sum"]


def test_runs_are_named_by_what_tells_their_paths_apart() -> None:
    assert run_names(["/a/dpo", "/b/mrpo"]) == ["dpo", "mrpo"]
    assert run_names(["/dpo/all/seed-1", "/mrpo/all/seed-1"]) == [
        "dpo/all/seed-1",
        "mrpo/all/seed-1",
    ]
    assert run_names(["/a/x", "/a/x"]) == ["x", "x"]
    assert run_names([]) == []


def test_metrics_by_hand() -> None:
    """Three pairs; the policy's chosen log-probs −4, −6, −6, rejected −8, −5, −9.

    Summed it is right about 1 and 3. Per token, with 2 and 8 tokens in pair 1: −2 against −1,
    wrong. The base's margins are 5, −3, 3, the policy's 4, −1, 3: more only in pair 2; in pair 3
    they are equal, which is not more.
    """
    policy = stored([[-4, -8], [-6, -5], [-6, -9]], [[2, 8], [1, 1], [1, 1]])
    base = stored([[-5, -10], [-7, -4], [-4, -7]], np.ones((3, 2)))
    table = ScoreTable(
        places=np.zeros((3, 2), int),
        ids=np.zeros(3, "V16"),
        sources=np.array(["a", "a", "b"]),
        prompts=np.arange(3),
        prompt_bytes=np.ones(3),
        response_bytes=np.array([[1.0, 4.0], [2.0, 1.0], [2.0, 1.0]]),
        references=[base, policy],
    )
    assert {name: values.tolist() for name, values in right(table, 1).items()} == {
        "reward": [0.0, 1.0, 0.0],
        "sum": [1.0, 0.0, 1.0],
        "token": [0.0, 0.0, 1.0],
        "byte": [0.0, 1.0, 1.0],  # −4 : −2, −3 : −5, −3 : −9
    }
    figures = policy_figures(table, 1, "policy")
    assert figures.overall.margin.value == pytest.approx(2.0)
    assert figures.overall.reward_margin.value == pytest.approx(1 / 3)
    assert [figures.by_source[name].pairs for name in "ab"] == [2, 1]


def test_pairs_come_in_the_order_of_their_places(tmp_path: Path) -> None:
    rows = [chat(f"Question {n}?", f"Yes {n}.", f"No {n}.") for n in range(7)]
    pairs = prepared(tmp_path, rows, shard_pairs=3).pairs
    places = np.array([[2, 0], [0, 1], [2, 0], [1, 2]])
    questions = [pair.prompt[0]["content"] for pair in pairs_at(pairs, places)]
    assert questions == [f"Question {n}?" for n in (6, 1, 6, 5)]
    assert pairs_at(pairs, places[:0]) == []


def test_pairs_that_a_limit_left_out_are_missing_and_others_are_asked_for(tmp_path: Path) -> None:
    rows = [chat(f"Question {n}?", f"Yes {n}.", f"No {n}.") for n in range(9)]
    (tmp_path / "more").mkdir()
    larger = prepared(tmp_path / "more", rows).pairs
    scored = prepared(tmp_path, rows[:7])
    add_scores(scored, {"llama": np.full((7, 2), -5.0)})
    refs, store = str(tmp_path / "refs.yaml"), scored.store
    with pytest.raises(UserError, match=r"pairs not yet scored in .* by llama; run: mrpo"):
        load_complete_score_table(larger, store, "llama", refs)
    scores = store.scores(store.references()[0].identity)
    scores.leave_out(larger.pair_ids(0)[6:8])  # the first of them scored since
    with pytest.raises(UserError, match=r"pairs not yet scored in .* by llama; run: mrpo"):
        load_complete_score_table(larger, store, "llama", refs)
    scores.leave_out(larger.pair_ids(0)[8:])
    table = load_complete_score_table(larger, store, "llama", refs)
    assert table.references[0].missing == {"over_limit": 2}
    assert table.references[0].scored.tolist() == [True] * 7 + [False] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to evaluate"),
        ({"runs": "nowhere"}, "no train.yaml there"),
        ({"policies": "org/name"}, "--base is missing"),
        ({"policies": "https://user:secret@host/name", "base": "llama"}, "one of them is a URL"),
        ({"policies": "org/name", "out": "table.csv"}, "results are JSON"),
    ],
)
def test_mistakes_are_one_line(
    settings: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        evaluate(EvaluateConfig(**settings))
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def stored(logps: Any, tokens: Any) -> ReferenceColumns:
    values = np.array(logps, float)
    return ReferenceColumns(
        record=ReferenceRecord(alias="x", entry={}, inputs={}),
        logps=values,
        end_logps=values * 0,
        tokens=np.array(tokens, float),
        prompt_tokens=np.ones(len(values)),
        boundary=values * 0,
        reasons=np.full(len(values), "", object),
    )
