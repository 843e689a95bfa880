"""The tasks' questions from local files, in the form of the data sets that the harness reads.

GSM8K's files are those of openai/grade-school-math. TruthfulQA's is the table of
sylinrl/TruthfulQA, whose answers are read as its own evaluation reads them: separated by
semicolons, each with a period. From them:

    MC1    the best answer against all incorrect ones
    MC2    all correct answers against all incorrect ones
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from ...errors import UserError
from ..config import Task

Row = dict[str, Any]


def read_splits(task: Task, folder: str, shots: int) -> dict[str, list[Row]]:
    """The rows of each split of a task; those that examples are drawn from only where needed.

    Raises `UserError` for a file that is missing or damaged, and for too few examples.
    """
    splits = {split: read(_find(folder, name)) for split, (name, read) in FILES[task].items()}
    for split, rows in splits.items():
        if not rows:
            raise UserError(f"--tasks-data {folder}: {FILES[task][split][0]} is empty; restore it")
    if task != "gsm8k":
        return splits
    if shots == 0:
        return splits | {"train": []}
    splits["train"] = _gsm8k(_find(folder, EXAMPLES))
    if len(splits["train"]) < shots:
        raise UserError(
            f"--num-fewshot {shots}: {EXAMPLES} has {len(splits['train'])} examples; ask for fewer"
        )
    return splits


def files_of_task(task: Task, shots: int) -> str:
    """The names of the files that `read_splits` reads, without .gz."""
    names = [name for name, _ in FILES[task].values()]
    return ", ".join([*names, EXAMPLES] if task == "gsm8k" and shots else names)


def answers_of(text: str) -> list[str]:
    """Answers separated by semicolons, each once and with a period.

    >>> answers_of("Nothing happens; You get sick.; Nothing happens;")
    ['Nothing happens.', 'You get sick.']
    """
    parts = filter(None, map(str.strip, text.split(";")))
    return list(dict.fromkeys(part if part.endswith(".") else f"{part}." for part in parts))


def _gsm8k(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append({name: row[name] for name in ("question", "answer")})
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}, line {number}: no object with question and answer; restore the file"
            ) from None
        if not all(isinstance(text, str) for text in rows[-1].values()):
            raise UserError(f"{path}, line {number}: a field is not text; restore the file")
    return rows


def _truthfulqa(path: Path) -> list[Row]:
    csv.field_size_limit(sys.maxsize)
    rows = []
    try:
        for number, row in enumerate(csv.DictReader(_lines(path), strict=True), 1):
            question, best, correct, incorrect = (
                row[name]
                for name in ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
            )
            right, wrong = answers_of(correct), answers_of(incorrect)
            if not (answers_of(best) and right and wrong):
                raise UserError(f"{path}, row {number}: an answer is missing; restore the file")
            rows.append(
                {
                    "question": question.strip(),
                    "mc1_targets": _targets(answers_of(best), wrong),
                    "mc2_targets": _targets(right, wrong),
                }
            )
    except (csv.Error, KeyError, AttributeError, TypeError):
        raise UserError(
            f"{path}: not TruthfulQA's table, with Question, Best Answer, Correct Answers and "
            "Incorrect Answers in each row; restore the file"
        ) from None
    return rows


def _targets(right: list[str], wrong: list[str]) -> Row:
    return {"choices": right + wrong, "labels": [1] * len(right) + [0] * len(wrong)}


def _find(folder: str, name: str) -> Path:
    found = [path for path in (Path(folder) / name, Path(folder) / f"{name}.gz") if path.is_file()]
    if not found:
        raise UserError(
            f"--tasks-data {folder}: no {name} there, nor {name}.gz; name the folder that has it"
        )
    return found[0]


def _lines(path: Path) -> Iterator[str]:
    """A file's lines as they are. Raises `UserError` for a damaged file."""
    try:
        with _open(path) as file:
            yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}: damaged, it can't be unpacked; restore the file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; restore the file") from None


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


EXAMPLES = "gsm8k_train.jsonl"
# By task and split of the harness's own data set: the local file, and what reads it.
FILES: dict[Task, dict[str, tuple[str, Callable[[Path], list[Row]]]]] = {
    "gsm8k": {"test": ("gsm8k_test.jsonl", _gsm8k)},
    "truthfulqa_mc1": {"validation": ("truthfulqa.csv", _truthfulqa)},
    "truthfulqa_mc2": {"validation": ("truthfulqa.csv", _truthfulqa)},
}
