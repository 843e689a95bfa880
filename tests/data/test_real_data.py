"""`prepare` on real preference data, and `benchmarks/real_pairs.py`, which makes some of it.

Some of the texts are offensive: what is asserted are counts, roles and flags, never a value that
holds a text, so that no failure prints one.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mrpo.data.config import PrepareConfig
from mrpo.data.formats import parse_dialogue
from mrpo.data.pairs import Pair
from mrpo.data.prepare import prepare
from mrpo.data.shards import PairShards
from mrpo.errors import UserError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "real_pairs.py"
HH = "hh_harmless_test.jsonl.gz"


@pytest.fixture(scope="module")
def real_pairs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real_pairs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(source: Path, out: Path, **options: Any) -> PairShards:
    return prepare(PrepareConfig(source=str(source), out=str(out), **options))


def all_pairs(shards: PairShards) -> list[Pair]:
    return [pair for number in range(len(shards.names)) for pair in shards.pairs(number)]


def prompts(pairs: list[Pair]) -> list[str]:
    return [json.dumps(pair.prompt) for pair in pairs]


def most_sides(pairs: list[Pair]) -> int:
    """The largest number of splits that any one prompt stands in."""
    splits: dict[str, set[str]] = {}
    for prompt, pair in zip(prompts(pairs), pairs):
        splits.setdefault(prompt, set()).add(pair.split)
    return max(map(len, splits.values()))


def test_hh_rlhf_becomes_messages(shared_data: Path, tmp_path: Path) -> None:
    shards = run(shared_data / HH, tmp_path / "hh", validation_fraction=0.1, shard_pairs=1000)
    manifest = shards.manifest
    assert manifest["rows"] == 2312
    assert manifest["dropped"] == {"empty_response": 4, "prompt_not_shared": 5}
    assert manifest["duplicates"] == 0
    assert shards.kind == "messages"
    assert shards.rows == [1000, 1000, 303]
    lines = [json.loads(line) for line in (tmp_path / "hh" / "dropped.jsonl").open()]
    assert [line["row"] for line in lines if line["reason"] == "empty_response"] == [
        87,
        517,
        926,
        1104,
    ]
    assert len(lines) == 9
    pairs = all_pairs(shards)
    openings = {message["role"] for pair in pairs for message in (pair.prompt[0], pair.prompt[-1])}
    responses = {
        tuple(message["role"] for message in response)
        for pair in pairs
        for response in (pair.chosen, pair.rejected)
    }
    sources = {pair.source for pair in pairs}
    assert openings == {"user"}
    assert responses == {("assistant",)}
    assert sources == {"hh_harmless_test"}
    assert most_sides(pairs) == 1
    assert 0.07 < manifest["splits"]["validation"] / shards.num_pairs < 0.13


def test_hh_rlhf_loses_no_text(shared_data: Path, tmp_path: Path) -> None:
    shards = run(shared_data / HH, tmp_path / "hh")
    listed = [json.loads(line) for line in (tmp_path / "hh" / "dropped.jsonl").open()]
    gone = {line["row"] for line in listed}
    sizes = shards.table(0, ["chosen_bytes", "rejected_bytes"]).to_pylist()
    pairs = iter(zip(all_pairs(shards), sizes))
    with gzip.open(shared_data / HH, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for number, line in enumerate(file, 1) if number not in gone]
    for row in rows:
        pair, size = next(pairs)
        for branch in ("chosen", "rejected"):
            response = getattr(pair, branch)
            same_turns = pair.prompt + response == parse_dialogue(row[branch])
            same_end = row[branch].rstrip().endswith(response[0]["content"])
            same_size = size[f"{branch}_bytes"] == len(response[0]["content"].encode())
            assert (same_turns, same_end, same_size) == (True, True, True)
    assert sum(1 for _ in pairs) == 0


def test_hh_rlhf_strictly_stops_at_the_first_unusable_row(
    shared_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"line 87 cannot be used: empty_response"):
        run(shared_data / HH, tmp_path / "hh", strict=True)
    assert not (tmp_path / "hh").exists()


def test_hh_dialogues_that_open_alike_stay_on_one_side(shared_data: Path, tmp_path: Path) -> None:
    def straddling(shards: PairShards) -> int:
        sides: dict[str, set[str]] = {}
        for pair in all_pairs(shards):
            assert isinstance(pair.prompt, list)
            sides.setdefault(pair.prompt[0]["content"], set()).add(pair.split)
        return sum(len(side) > 1 for side in sides.values())

    options = {"validation_fraction": 0.3}
    by_turn = run(shared_data / HH, tmp_path / "turn", **options)
    by_prompt = run(shared_data / HH, tmp_path / "prompt", group_by="prompt", **options)
    assert straddling(by_turn) == 0
    assert straddling(by_prompt) > 0


def test_the_solutions_of_gsm8k_as_scored_and_as_labelled_responses(
    shared_data: Path, tmp_path: Path, real_pairs: ModuleType
) -> None:
    """Four models' solutions with `is_correct`: both ways give pairs of a right and a wrong one."""
    scored, labelled, expected = [], [], set()
    with gzip.open(shared_data / "gsm8k_model_solutions.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            solutions = [value for value in row.values() if isinstance(value, dict)]
            scored.append({"question": row["question"], "answers": solutions})
            for solution in solutions:
                response, label = solution["solution"], solution["is_correct"]
                labelled.append(
                    {"question": row["question"], "completion": response, "label": label}
                )
            for right in solutions:
                for wrong in solutions:
                    if right["is_correct"] and not wrong["is_correct"]:
                        expected.add((row["question"], right["solution"], wrong["solution"]))
    assert sum(len(row["answers"]) for row in scored) == 4 * 1319
    for name, rows, options in (
        ("scored", scored, {"pairs_from": "all"}),
        ("labelled", labelled, {"chat": True}),
    ):
        source = tmp_path / f"{name}.json"
        source.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        shards = run(source, tmp_path / name, **options)
        pairs = {
            (pair.prompt[0]["content"], pair.chosen[0]["content"], pair.rejected[0]["content"])  # type: ignore[index]
            for pair in all_pairs(shards)
        }
        only_right_and_wrong = pairs <= expected
        questions = {question for question, _, _ in pairs}
        assert only_right_and_wrong
        assert len(questions) == len({question for question, _, _ in expected})
        counted = sum(shards.manifest["left_out"].values())
        if name == "scored":
            all_of_them = pairs == expected
            assert all_of_them
            assert shards.num_pairs + shards.manifest["duplicates"] + counted == 6 * 1319
        else:
            assert len(labelled) == 2 * (shards.num_pairs + shards.manifest["duplicates"]) + counted


def test_a_column_inside_gsm8k_by_map(shared_data: Path, tmp_path: Path) -> None:
    fields = ("chosen={ground_truth}", "rejected={6b_finetuning.solution}")
    source = shared_data / "gsm8k_model_solutions.jsonl.gz"
    shards = run(source, tmp_path / "pairs", map=fields, allow_dropped=True)
    assert shards.num_pairs + sum(shards.manifest["dropped"].values()) == 1319
    assert shards.manifest["unused_columns"] == [
        "6b_verification",
        "175b_finetuning",
        "175b_verification",
    ]


def test_the_table_of_truthfulqa_as_it_is(shared_data: Path, tmp_path: Path) -> None:
    columns = {"chosen_column": "Best Answer", "rejected_column": "Best Incorrect Answer"}
    source = shared_data / "truthfulqa.csv.gz"
    with pytest.raises(UserError, match="column 'Question' looks like a part of the prompt"):
        run(source, tmp_path / "pairs", **columns)
    shards = run(
        source,
        tmp_path / "pairs",
        prompt_column="Question",
        group_column="Category",
        validation_fraction=0.3,
        **columns,
    )
    assert shards.num_pairs == shards.manifest["rows"] == 790
    assert shards.manifest["unused_columns"] == [
        "Type",
        "Correct Answers",
        "Incorrect Answers",
        "Source",
    ]
    assert min(shards.manifest["splits"].values()) > 0


@pytest.mark.parametrize(
    ("kind", "file", "questions", "count"),
    [
        ("gsm8k", "gsm8k_model_solutions.jsonl.gz", 731, 966),
        ("truthfulqa", "truthfulqa.csv.gz", 790, 2454),
    ],
)
def test_real_questions_become_pairs(
    shared_data: Path, tmp_path: Path, kind: str, file: str, questions: int, count: int
) -> None:
    out = tmp_path / "pairs.jsonl"
    command = [sys.executable, str(SCRIPT), kind, str(shared_data / file), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{count:,} pairs in {out}\n"
    shards = run(out, tmp_path / "pairs", validation_fraction=0.1)
    assert shards.manifest["dropped"] == {}
    assert shards.manifest["duplicates"] == 0
    assert shards.num_pairs == count
    pairs = all_pairs(shards)
    sources = {pair.source for pair in pairs}
    num_prompts = len(set(prompts(pairs)))
    num_answers = len(
        {
            (prompt, response[0]["content"])
            for prompt, pair in zip(prompts(pairs), pairs)
            for response in (pair.chosen, pair.rejected)
        }
    )
    assert sources == {kind}
    assert num_prompts == questions
    assert num_answers == 2 * count  # no answer stands in two pairs
    assert most_sides(pairs) == 1


def test_the_first_right_answer_meets_the_first_wrong_one(real_pairs: ModuleType) -> None:
    question = ("q ", ["r1", "both", " r1", "r2", ""], ["w1", "both", "w2", "w3"])
    rows = list(real_pairs.preference_rows([question], "set"))
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows] == [
        ("r1", "w1"),
        ("r2", "w2"),
    ]
    assert rows[0]["prompt"] == [{"role": "user", "content": "q"}]
    assert rows[0]["source"] == "set"


def test_questions_of_gsm8k_and_truthfulqa(real_pairs: ModuleType) -> None:
    row = {
        "question": "q",
        "ground_truth": "t",
        "small": {"is_correct": False, "solution": "w"},
        "large": {"is_correct": True, "solution": "r"},
    }
    assert list(real_pairs.gsm8k_questions([json.dumps(row)])) == [("q", ["r"], ["w"])]
    table = ["Question,Correct Answers,Incorrect Answers\n", 'q,r1; r2;r3,"w1, really; w2"\n']
    assert list(real_pairs.truthfulqa_questions(table)) == [
        ("q", ["r1", " r2", "r3"], ["w1, really", " w2"])
    ]


def test_a_missing_question_set_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "gsm8k", "missing.jsonl", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr == "error: missing.jsonl: no such file\n"
    assert not (tmp_path / "out").exists()
