"""From finished runs to a comparison: accuracies, gains, growth and cost.

Every run gives an answer for the same held-out pairs, right (1) or wrong (0) by a metric, computed
by the functions of `evaluate.py` from the scores in `store.policies`. Intervals come from a paired
bootstrap over prompts and, where there are several, seeds (`verdict.py`): all methods share the
draws, so that what makes a pair hard for all of them cancels in a difference. The intervals of the
gains hold together (Bonferroni), since the best of several methods is looked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...data.shards import PairShards
from ...data.store import ReferenceRecord, Store
from ...train.run_folder import read_log
from ..config import Metric
from ..evaluate import METRICS, right
from ..intervals import Interval, mean_intervals
from ..score_table import ScoreTable, load_score_table
from .cells import Cell
from .results import Comparison, Result, RunResult, ScoringCost
from .verdict import ComparisonOutcome, Draws, Standing, growth, resample, standing, verdict

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
    references: Mapping[str, tuple[str, ...]]  # of each method, as the user wrote it
    fractions: Sequence[float]  # rising
    metric: Metric  # what decides

    @property
    def aliases(self) -> list[str]:
        return [record.alias for record in self.records]

    @property
    def base(self) -> str:
        return self.aliases[0]


def outcome_of(plan: ComparisonPlan, cells: Sequence[Cell], store: Store) -> Comparison:
    """Compare the finished cells; at least one must be."""
    identities = {cell: cell.identity for cell in cells if cell.identity is not None}
    policies = [store.policies.names_of(identity)[0] for identity in identities.values()]
    table = load_score_table(
        plan.pairs, store, plan.records[:1], policies=policies, split="validation"
    )
    answers = {cell: right(table, k) for k, cell in enumerate(identities, 1)}
    methods, seeds = list(plan.references), sorted({cell.seed for cell in cells})
    single = [len(plan.references[method]) == 1 for method in methods]
    draws: dict[Metric, Draws] = {}
    for metric in METRICS:
        values = np.full((len(table), len(methods), len(plan.fractions), len(seeds)), np.nan)
        for cell, answer in answers.items():
            place = methods.index(cell.method), plan.fractions.index(cell.fraction)
            values[:, *place, seeds.index(cell.seed)] = answer[metric]
        draws[metric] = resample(values, table.prompts)
    standings = {
        metric: [standing(drawn, at, methods, single) for at in range(len(plan.fractions))]
        for metric, drawn in draws.items()
    }
    grown = {}
    if len(plan.fractions) > 1:
        last = len(plan.fractions) - 1
        grown = {
            method: growth(draws[plan.metric], m, last - 1, last)
            for m, method in enumerate(methods)
        }
    return Comparison(
        base=plan.base,
        pairs=len(table),
        prompts=len(np.unique(table.prompts)),
        metric=plan.metric,
        metrics=dict(METRIC_WORDS),
        methods=methods,
        references={method: list(names) for method, names in plan.references.items()},
        fractions=list(plan.fractions),
        seeds=seeds,
        base_accuracy=_base_accuracy(table),
        results=_results(plan, methods, standings),
        growth=grown,
        runs=[_run(cell, identities[cell], answers[cell]) for cell in identities],
        missing=[str(cell) for cell in cells if cell not in identities],
        scoring=[_scoring(record) for record in plan.records],
        verdict=_words(
            plan, standings, grown, len(table), len(seeds), len(cells) - len(identities)
        ),
    )


def _words(
    plan: ComparisonPlan,
    standings: Mapping[Metric, Sequence[Standing]],
    grown: Mapping[str, Interval],
    pairs: int,
    seeds: int,
    missing: int,
) -> list[str]:
    order = [plan.metric, *(metric for metric in METRICS if metric != plan.metric)]
    words = {metric: METRIC_WORDS[metric].replace("the base", plan.base) for metric in order}
    return verdict(
        ComparisonOutcome(
            metrics=list(words.values()),
            fractions=plan.fractions,
            standings={words[metric]: standings[metric] for metric in order},
            references={m: refs[0] for m, refs in plan.references.items() if len(refs) == 1},
            growth=grown,
            pairs=pairs,
            seeds=seeds,
            missing=missing,
        )
    )


def _results(
    plan: ComparisonPlan, methods: Sequence[str], standings: Mapping[Metric, Sequence[Standing]]
) -> list[Result]:
    results = []
    for metric, by_fraction in standings.items():
        for fraction, standing_there in zip(plan.fractions, by_fraction):
            gains = {gain.method: gain for gain in standing_there.gains}
            for method in methods:
                gain = gains.get(method)
                results.append(
                    Result(
                        method=method,
                        fraction=fraction,
                        metric=metric,
                        accuracy=standing_there.accuracy[method],
                        seed_spread=standing_there.seed_spread[method],
                        gain=None if gain is None else gain.gain,
                        over=None if gain is None else gain.over,
                    )
                )
    return results


def _base_accuracy(table: ScoreTable) -> dict[Metric, Interval]:
    """By likelihood alone: the base's rewards against itself are all 0."""
    answers = right(table, 0)
    names = [name for name in METRICS if name != "reward"]
    values = np.stack([answers[name] for name in names], axis=1)
    return dict(zip(names, mean_intervals(values, table.prompts)))


def _run(cell: Cell, identity: str, answers: Mapping[Metric, np.ndarray]) -> RunResult:
    pairs, seconds = training_cost(read_log(cell.folder))
    return RunResult(
        method=cell.method,
        fraction=cell.fraction,
        seed=cell.seed,
        folder=str(cell.folder),
        identity=identity,
        accuracy={name: float(np.nanmean(values)) for name, values in answers.items()},
        pairs=pairs,
        seconds=seconds,
        pairs_per_second=pairs / seconds if seconds else float("nan"),
    )


def training_cost(log: Sequence[Mapping[str, float | None]]) -> tuple[float, float]:
    """(pairs trained on, seconds of optimizer steps) of a run, from the lines of its log."""
    pairs = seconds = 0.0
    last_step = 0.0
    for line in log:
        step_seconds, rate = line.get("perf/step_seconds"), line.get("perf/pairs_per_second")
        if step_seconds is None or rate is None:
            continue
        step = line["step"] or 0.0
        elapsed = step_seconds * (step - last_step)
        pairs, seconds, last_step = pairs + rate * elapsed, seconds + elapsed, step
    return pairs, seconds


def _scoring(record: ReferenceRecord) -> ScoringCost:
    runs = [run for run in record.runs if run.get("tokens_per_second")]
    return ScoringCost(
        alias=record.alias,
        pairs=sum(run["pairs"] for run in runs),
        tokens=sum(run["tokens"] for run in runs),
        seconds=sum(run["tokens"] / run["tokens_per_second"] for run in runs) or float("nan"),
    )
