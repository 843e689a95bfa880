"""What a policy's answers to a task came to: pinned settings, values of each question, figures.

Kept in the store beside the policy's scores, under everything that makes the numbers, so that
nothing is asked twice:

    <store>/policies/<identity>/tasks/<key>-<digest>.json

`key` is a digest of the pinned settings, `digest` of the file's bytes. As with scores, the engine,
its versions and the machine are recorded and not part of the key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...data.ids import digest_of, identity_of
from ...data.store import Store
from ...data.store.store import TASK_RESULTS
from ...errors import UserError
from ...files import fits, to_json
from ...terminal import table_lines
from ...train.run_folder import read_evaluation
from ..intervals import Interval, mean_intervals, wilson

HEADS = {
    "exact_match,strict-match": "gsm8k strict",
    "exact_match,flexible-extract": "gsm8k flexible",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PinnedTask:
    """Everything that makes a task's numbers but the policy, and where its questions are from."""

    task: str
    version: str  # of the task, in the harness
    harness: str  # version of lm-eval
    source: str  # names of the files, or of the data set on the Hub
    data: str  # digest of the questions asked, and of what examples are drawn from
    config: str  # digest of prompt, generation settings, filters and metrics
    questions: int
    limit: int | None  # --limit
    num_fewshot: int
    fewshot_seed: int | None  # None without examples
    chat_template: bool
    generation: str  # how answers are generated; empty where they are only scored
    metrics: list[str]  # with their filters, as the harness names them

    @property
    def key(self) -> str:
        """A name for what makes the numbers: neither where the questions are from nor --limit."""
        shown_only = ("source", "limit")
        return identity_of({k: v for k, v in asdict(self).items() if k not in shown_only})

    def __str__(self) -> str:
        shots = ""
        if self.num_fewshot:
            shots = f"{self.num_fewshot} examples drawn with seed {self.fewshot_seed}; "
        first = "the first " if self.limit else ""
        filters = [metric.partition(",")[2] for metric in self.metrics]
        return (
            f"{self.task}: version {self.version} of lm-eval {self.harness}; "
            f"{first}{self.questions:,} questions of {self.source}; {shots}"
            f"{'the chat template' if self.chat_template else 'no chat template'}"
            + (f"; {self.generation}" if self.generation else "")
            + (f"; {', '.join(filters)}" if filters != ["none"] else "")
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """A policy's values on each question of a task."""

    pinned: PinnedTask
    facts: dict[str, Any]  # engine, its versions, device, date
    values: dict[str, list[float]]  # by metric; NaN where a question has none

    def figures(self) -> dict[str, Interval]:
        """The mean of each metric with its 95 % interval over questions.

        Wilson's where each question is right or wrong, which also holds where all are; else the
        bootstrap's.
        """
        figures = {}
        for metric, listed in self.values.items():
            values = np.array(listed)
            known = values[~np.isnan(values)]
            if len(known) and np.isin(known, (0.0, 1.0)).all():
                figures[metric] = wilson(known)
            else:
                (figures[metric],) = mean_intervals(values[:, None], np.arange(len(values)))
        return figures


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFigures:
    """What evaluation.json holds of a task."""

    pinned: PinnedTask
    facts: dict[str, Any]
    figures: dict[str, Interval]  # by metric
    undefined: dict[str, int]  # questions without a value, by metric; empty where there are none


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyTasks:
    """A policy's figures on all tasks."""

    name: str
    identity: str
    tasks: list[TaskFigures]


def figures_of(result: TaskResult) -> TaskFigures:
    """A result without the single questions."""
    undefined = {name: int(np.isnan(values).sum()) for name, values in result.values.items()}
    return TaskFigures(
        pinned=result.pinned,
        facts=result.facts,
        figures=result.figures(),
        undefined={name: count for name, count in undefined.items() if count},
    )


def keep_result(store: Store, identity: str, result: TaskResult) -> None:
    """Write a result to a store of policies, durably."""
    data = (json.dumps(to_json(result), ensure_ascii=False, allow_nan=False) + "\n").encode()
    name = f"{result.pinned.key}-{digest_of(data)}.json"
    store.files.write(f"{identity}/{TASK_RESULTS}/{name}", data)


def kept_result(store: Store, identity: str, pinned: PinnedTask) -> TaskResult | None:
    """What a store of policies has under these settings; None where it has nothing intact."""
    folder = f"{identity}/{TASK_RESULTS}"
    for name in sorted(store.files.names(folder)):
        key, _, digest = name.removesuffix(".json").partition("-")
        if key != pinned.key:
            continue
        data = store.files.read(f"{folder}/{name}")
        if digest_of(data) == digest:
            return _decoded(json.loads(data), pinned)
    return None


def _decoded(content: Mapping[str, Any], pinned: PinnedTask) -> TaskResult | None:
    """`pinned` says where the questions are from now."""
    shape = {"facts": {}, "values": dict[str, list[float | None]]}
    if not fits(content, shape):  # of another version
        return None
    values = {
        metric: [float("nan") if value is None else float(value) for value in listed]
        for metric, listed in content["values"].items()
    }
    return TaskResult(pinned=pinned, facts=content["facts"], values=values)


def policy_tasks(path: Path) -> list[PolicyTasks]:
    """What an evaluation.json holds of tasks; nothing where there is none.

    Raises `UserError` where it is damaged.
    """
    figures = {"figures": dict[str, dict[str, float | None]], "facts": {}, "undefined": {}}
    shape = [{"name": str, "identity": str, "tasks": [{"pinned": {"task": str}} | figures]}]
    content = read_evaluation(path).get("tasks", [])
    try:
        if not fits(content, shape):
            raise TypeError
        return [
            PolicyTasks(
                name=policy["name"],
                identity=policy["identity"],
                tasks=[
                    TaskFigures(
                        pinned=PinnedTask(**task["pinned"]),
                        facts=task["facts"],
                        figures={name: _interval(f) for name, f in task["figures"].items()},
                        undefined=task["undefined"],
                    )
                    for task in policy["tasks"]
                ],
            )
            for policy in content
        ]
    except TypeError:
        raise UserError(
            f"{path}: its tasks are damaged, or of another version; run `mrpo evaluate` again"
        ) from None


def _interval(content: Mapping[str, float | None]) -> Interval:
    """NaN was written as null."""
    known = {name: float("nan") if value is None else value for name, value in content.items()}
    return Interval(**known)


def task_lines(policies: Sequence[PolicyTasks]) -> Iterator[str]:
    """The printed settings and table, line by line."""
    yield from (str(entry.pinned) for entry in policies[0].tasks)
    yield "accuracy in %, of truthfulqa_mc2 the probability of the correct answers, with 95 %"
    yield "intervals over questions"
    yield ""
    yield from table_lines(task_rows(policies))
    for policy in policies:
        for entry in policy.tasks:
            for metric, count in entry.undefined.items():
                yield f"{policy.name}: {head(entry.pinned.task, metric)} undefined for {count:,}"
    yield ""


def task_rows(policies: Sequence[PolicyTasks]) -> list[list[str]]:
    """A row for each policy, a column for each metric of a task; the heading first."""
    columns = [
        (entry.pinned.task, metric) for entry in policies[0].tasks for metric in entry.figures
    ]
    rows = [["", *(head(*column) for column in columns)]]
    for policy in policies:
        figures = {(e.pinned.task, name): f for e in policy.tasks for name, f in e.figures.items()}
        rows.append([policy.name, *(figures[column].percent() for column in columns)])
    return rows


def head(task: str, metric: str) -> str:
    """The heading of a metric's column.

    >>> head("gsm8k", "exact_match,strict-match"), head("truthfulqa_mc1", "acc,none")
    ('gsm8k strict', 'truthfulqa_mc1')
    """
    return HEADS.get(metric, task)
