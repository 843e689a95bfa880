"""From finished runs to a comparison: accuracies, gains, growth and cost.

Every run gives an answer for the same held-out pairs, right (1) or wrong (0) by a metric, computed
by the functions of `evaluate.py` from the scores in `store.policies`. Intervals come from a paired
bootstrap over prompts and, where there are several, seeds (`verdict.py`): all methods share the
draws, so that what makes a pair hard for all of them cancels in a difference. The intervals of the
gains hold together (Bonferroni), since the best of several methods is looked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ...data.shards import PairShards
from ...data.store import ReferenceRecord, Store
from ...train.run_folder import read_evaluation, read_log
from ..config import Metric
from ..evaluate import METRICS, reward_margins, right
from ..intervals import Interval, interval, mean_intervals
from ..score_table import ScoreTable, load_score_table
from ..tasks.results import PinnedTask, head, kept_result
from .averages import recorded_parts
from .cells import Cell, runs_of
from .results import (
    Calibration,
    Comparison,
    Condition,
    RunResult,
    ScoringCost,
    TaskAccuracy,
    conditions_of,
)
from .verdict import Draws, change, judge, resample, tied_singles, verdict

TENTHS = 10  # parts of a reliability curve
PAIRS_OF_A_TENTH = 20  # fewer pairs make fewer parts
METRIC_WORDS: dict[Metric, str] = {
    "reward": "implicit reward against the base",
    "sum": "likelihood",
    "token": "likelihood per token",
    "byte": "likelihood per byte",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonPlan:
    """What is compared."""

    pairs: PairShards
    records: list[ReferenceRecord]  # the base first
    references: dict[str, list[str]]  # of each method, as the user wrote it
    fractions: list[float]  # rising
    label_noises: list[float]  # rising
    metric: Metric  # what decides
    beta: float  # where a cell has none of its own
    normalize: str
    tasks: list[PinnedTask] = field(default_factory=list)

    @property
    def aliases(self) -> list[str]:
        return [record.alias for record in self.records]

    @property
    def base(self) -> str:
        return self.aliases[0]


def outcome_of(plan: ComparisonPlan, cells: Sequence[Cell], store: Store) -> Comparison:
    """Compare the finished cells; at least one must be."""
    runs = runs_of(cells)
    identities = {run.folder: run.identity for run in runs if run.identity is not None}
    policies = [store.policies.names_of(identity)[0] for identity in identities.values()]
    table = load_score_table(
        plan.pairs, store, plan.records[:1], policies=policies, split="validation"
    )
    columns = {folder: k for k, folder in enumerate(identities, 1)}
    answers = {folder: right(table, k) for folder, k in columns.items()}
    methods, seeds = list(plan.references), sorted({cell.seed for cell in cells})
    conditions = conditions_of(plan.fractions, plan.label_noises)
    places = {
        cell: (
            methods.index(cell.name),
            conditions.index(Condition(cell.fraction, cell.label_noise)),
            seeds.index(cell.seed),
        )
        for cell in cells
        if cell.folder in identities
    }
    margins = np.full((len(table), len(methods), len(conditions), len(seeds)), np.nan)
    for cell, place in places.items():
        beta = plan.beta if cell.beta is None else cell.beta
        margins[:, *place] = beta * reward_margins(table, columns[cell.folder], plan.normalize)
    draws: dict[Metric, Draws] = {}
    for metric in METRICS:
        values = np.full_like(margins, np.nan)
        for cell, place in places.items():
            values[:, *place] = answers[cell.folder][metric]
        draws[metric] = resample(values, table.prompts)
    deciding = draws[plan.metric]
    counted = ~np.isnan([answers[cell.folder]["reward"] for cell in places]).any(axis=0)
    accuracies: dict[Path, dict[Metric, float]] = {
        folder: {name: float(np.nanmean(values)) for name, values in answer.items()}
        for folder, answer in answers.items()
    }
    comparison = Comparison(
        base=plan.base,
        pairs=int(counted.sum()),
        prompts=len(np.unique(table.prompts[counted])),
        metric=plan.metric,
        metrics=METRIC_WORDS,
        methods=methods,
        references=plan.references,
        fractions=plan.fractions,
        label_noises=plan.label_noises,
        seeds=seeds,
        base_accuracy=_base_accuracy(table),
        results=[
            result
            for metric in METRICS
            for result in judge(draws[metric], plan.references, conditions, metric)
        ],
        growth=change(deciding, methods, -2, -1) if len(plan.fractions) > 1 else {},
        noise_cost=change(deciding, methods, -1, len(plan.fractions) - 1)
        if len(plan.label_noises) > 1
        else {},
        calibration=calibrations(margins, table.prompts, methods, conditions),
        task_settings=list(map(str, plan.tasks)),
        tasks=_task_accuracies(plan.tasks, places, identities, store, methods, conditions, seeds),
        runs=[_run(cell, identities[cell.folder], accuracies) for cell in places],
        missing=list(dict.fromkeys(str(cell) for cell in cells if cell not in places)),
        scoring=[_scoring(record) for record in plan.records],
        verdict=[],
    )
    words = verdict(comparison, tied_singles(deciding, plan.references))
    return replace(comparison, verdict=words)


def calibrations(
    margins: np.ndarray,
    prompts: np.ndarray,
    methods: Sequence[str],
    conditions: Sequence[Condition],
) -> list[Calibration]:
    """Of reward margins [N, M, C, S], beta included: pairs, methods, conditions, seeds.

    NaN where there is none; a method without a margin at a condition has no calibration there.
    Intervals are over prompts and seeds.
    """
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        surprise = np.logaddexp(0, -margins)  # −log sigmoid(margin)
    losses, briers = resample(surprise, prompts), resample(np.expm1(-surprise) ** 2, prompts)
    result = []
    for m, c in np.ndindex(len(methods), len(conditions)):
        known = margins[:, m, c][~np.isnan(margins[:, m, c])]
        if not len(known):
            continue
        confidence = np.exp(-np.logaddexp(0, -np.abs(known)))
        order = np.argsort(confidence, kind="stable")
        tenths = np.array_split(order, min(TENTHS, max(len(order) // PAIRS_OF_A_TENTH, 1)))
        log_loss, brier = (
            interval(float(scores.means[m, c]), scores.draws[:, m, c])
            for scores in (losses, briers)
        )
        result.append(
            Calibration(
                method=methods[m],
                fraction=conditions[c].fraction,
                label_noise=conditions[c].label_noise,
                log_loss=log_loss,
                brier=brier,
                confidence=[float(confidence[part].mean()) for part in tenths],
                accuracy=[float((known[part] > 0).mean()) for part in tenths],
            )
        )
    return result


def _task_accuracies(
    tasks: Sequence[PinnedTask],
    places: Mapping[Cell, tuple[int, int, int]],
    identities: Mapping[Path, str],  # by the folder of the run
    store: Store,
    methods: Sequence[str],
    conditions: Sequence[Condition],
    seeds: Sequence[int],
) -> list[TaskAccuracy]:
    """Each method's figures on the tasks, with intervals over questions and seeds."""
    shape = len(methods), len(conditions), len(seeds)
    accuracies = []
    for pinned in tasks:
        values = {metric: np.full((pinned.questions, *shape), np.nan) for metric in pinned.metrics}
        for cell, place in places.items():
            result = kept_result(store.policies, identities[cell.folder], pinned)
            for metric, answers in result.values.items() if result else ():
                values[metric][:, *place] = answers
        for metric, answered in values.items():
            draws = resample(answered, np.arange(pinned.questions))
            accuracies += [
                TaskAccuracy(
                    method=methods[m],
                    fraction=conditions[c].fraction,
                    label_noise=conditions[c].label_noise,
                    task=head(pinned.task, metric),
                    accuracy=interval(float(draws.means[m, c]), draws.draws[:, m, c]),
                )
                for m, c in np.ndindex(len(methods), len(conditions))
                if np.isfinite(draws.means[m, c])
            ]
    return accuracies


def _base_accuracy(table: ScoreTable) -> dict[Metric, Interval]:
    """By likelihood alone: the base's rewards against itself are all 0."""
    answers = right(table, 0)
    names = [name for name in METRICS if name != "reward"]
    values = np.stack([answers[name] for name in names], axis=1)
    return dict(zip(names, mean_intervals(values, table.prompts)))


def _run(cell: Cell, identity: str, accuracies: Mapping[Path, Mapping[Metric, float]]) -> RunResult:
    """The run with the cost of its training: a soup costs what its parts do, a merge nothing."""
    costs = [_cost(run) for run in (cell.parts if cell.average else [cell])]
    pairs, seconds = (sum(of_all) for of_all in zip(*costs)) if costs else (0.0, 0.0)
    of_parts = {part.method: dict(accuracies[part.folder]) for part in cell.parts}
    parts = recorded_parts(cell) if cell.average else []
    trained = read_evaluation(cell.run.evaluation).get("training", {})
    return RunResult(
        method=cell.name,
        fraction=cell.fraction,
        label_noise=cell.label_noise,
        seed=cell.seed,
        folder=str(cell.folder),
        identity=identity,
        accuracy=dict(accuracies[cell.folder]),
        own_accuracy=trained.get("figures", {}).get("eval_rewards/accuracies", float("nan")),
        pairs=pairs,
        seconds=seconds,
        pairs_per_second=pairs / seconds if seconds else float("nan"),
        parts=[replace(part, accuracy=of_parts.get(part.name, {})) for part in parts],
    )


def _cost(cell: Cell) -> tuple[float, float]:
    """Pairs that a run has trained on, and the seconds of its optimizer steps."""
    pairs = seconds = last_step = 0.0
    for line in read_log(cell.folder):
        step_seconds, rate = line.get("perf/step_seconds"), line.get("perf/pairs_per_second")
        if step_seconds is None or rate is None:
            continue
        step = line["step"] or 0.0
        elapsed = step_seconds * (step - last_step)  # a line has the means since the one before
        pairs, seconds, last_step = pairs + rate * elapsed, seconds + elapsed, step
    return pairs, seconds


def _scoring(record: ReferenceRecord) -> ScoringCost:
    runs = [run for run in record.runs if run.get("tokens_per_second")]
    return ScoringCost(
        alias=record.alias,
        responses=sum(run["responses"] for run in runs),
        tokens=sum(run["tokens"] for run in runs),
        seconds=sum(run["tokens"] / run["tokens_per_second"] for run in runs) or float("nan"),
    )
