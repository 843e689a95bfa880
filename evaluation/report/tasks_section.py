"""The report's section on tasks: what comparisons and single runs answered, a table each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...settings import comma_separated
from ...train.run_folder import RunFolder
from ..compare.compare import RESULT, SETTINGS
from ..compare.results import read_comparison, task_accuracy_rows
from ..config import ReportConfig
from ..tasks.results import PolicyTasks, policy_tasks, task_rows
from .charts import Section, Table


def task_sections(config: ReportConfig) -> list[Section]:
    """Tables of the folders' figures on tasks; none where no policy was asked.

    Runs that were asked under the same settings share a table.
    """
    tables: list[Table] = []
    runs: dict[tuple[str, ...], list[PolicyTasks]] = {}
    for folder in map(Path, comma_separated(config.folders)):
        if (folder / SETTINGS).is_file():
            comparison = read_comparison(folder / RESULT)
            tables += [
                _table(
                    f"Trained on {condition}",
                    task_accuracy_rows(comparison, condition),
                    comparison.task_settings,
                    "questions and seeds",
                )
                for condition in reversed(comparison.conditions if comparison.tasks else [])
            ]
            continue
        for policy in policy_tasks(RunFolder(folder).evaluation):
            settings = tuple(str(task.pinned) for task in policy.tasks)
            named = replace(policy, name=f"{folder.resolve().name}: {policy.name}")
            runs.setdefault(settings, []).append(named)
    tables += [
        _table("Runs", task_rows(policies), settings, "questions")
        for settings, policies in runs.items()
    ]
    words = [
        "Answered through lm-evaluation-harness. Accuracy in %; of truthfulqa_mc2 the probability "
        "of the correct answers among all."
    ]
    return [Section(title="Tasks", words=words, tables=tables)] if tables else []


def _table(title: str, rows: Sequence[Sequence[str]], settings: Sequence[str], over: str) -> Table:
    head, *body = rows
    note = f"With 95 % intervals over {over}. " + ". ".join(settings) + "."
    return Table(title=title, rows=[["policy", *head[1:]], *body], note=note)
