"""Preference pairs from real question sets, as JSONL that `mrpo prepare` reads.

    python benchmarks/real_pairs.py gsm8k gsm8k_model_solutions.jsonl.gz gsm8k_pairs.jsonl
    python benchmarks/real_pairs.py truthfulqa truthfulqa.csv.gz truthfulqa_pairs.jsonl

Both sets have several right and several wrong answers to each question. The first right answer is
chosen over the first wrong one, the second over the second, and so on while there are both. So a
question gives more than one pair where it can, no answer is in two pairs, and nothing is random.
What is right: for gsm8k (openai/grade-school-math) the `is_correct` of each of four models'
solutions, in the file's order of models; for truthfulqa (sylinrl/TruthfulQA) the columns "Correct
Answers" and "Incorrect Answers", separated by semicolons. Answers that a question has twice count
once, those that it has as both right and wrong not at all.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Question = tuple[str, list[str], list[str]]  # the question, right answers, wrong answers


def gsm8k_questions(lines: Iterable[str]) -> Iterator[Question]:
    """Questions of gsm8k_model_solutions.jsonl; every object in a row is a model's solution."""
    for line in lines:
        row = json.loads(line)
        solutions = [value for value in row.values() if isinstance(value, dict)]
        right = [answer["solution"] for answer in solutions if answer["is_correct"]]
        wrong = [answer["solution"] for answer in solutions if not answer["is_correct"]]
        yield row["question"], right, wrong


def truthfulqa_questions(lines: Iterable[str]) -> Iterator[Question]:
    """Questions of TruthfulQA.csv."""
    for row in csv.DictReader(lines):
        right, wrong = row["Correct Answers"].split(";"), row["Incorrect Answers"].split(";")
        yield row["Question"], right, wrong


def preference_rows(questions: Iterable[Question], source: str) -> Iterator[dict[str, Any]]:
    """The pairs of each question in message format, by the rule above."""
    for question, right, wrong in questions:
        for chosen, rejected in zip(_only(right, wrong), _only(wrong, right)):
            yield {
                "prompt": [{"role": "user", "content": question.strip()}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "source": source,
            }


def _only(answers: list[str], others: list[str]) -> list[str]:
    """The different answers in order, without blank ones and without the others."""
    excluded = {"", *map(str.strip, others)}
    return [answer for answer in dict.fromkeys(map(str.strip, answers)) if answer not in excluded]


QUESTIONS = {"gsm8k": gsm8k_questions, "truthfulqa": truthfulqa_questions}


def write_pairs(kind: str, source: Path, out: Path) -> int:
    """Write the pairs of a question set (plain or gzipped) as JSONL; returns their number."""
    count = 0
    with (
        gzip.open(source, "rt", encoding="utf-8", newline="")
        if source.suffix == ".gz"
        else source.open(encoding="utf-8", newline="") as lines,
        out.open("w", encoding="utf-8") as file,
    ):
        for row in preference_rows(QUESTIONS[kind](lines), kind):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kind", choices=sorted(QUESTIONS))
    parser.add_argument("source", type=Path, help="the question set, .gz or not")
    parser.add_argument("out", type=Path, help="the JSONL file to write")
    arguments = parser.parse_args()
    if not arguments.source.is_file():
        sys.exit(f"error: {arguments.source}: no such file")
    count = write_pairs(arguments.kind, arguments.source, arguments.out)
    print(f"{count:,} pairs in {arguments.out}")


if __name__ == "__main__":
    main()
