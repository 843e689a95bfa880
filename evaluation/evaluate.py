"""`mrpo evaluate`: how often a policy is right about held-out pairs, whatever method trained it.

    sum, token, byte    the chosen response is the likelier one: in total, per token, per byte
    reward              the policy prefers the chosen response more than the base reference does

The reward is DPO's implicit reward up to beta: log pi(y) − log pi_base(y). Measured from one common
base, policies of all methods are on one scale; a method's own references do not enter.

    policies.py -> scores -> score_table.py -> figures with intervals -> evaluation.json

With --tasks the same policies also answer GSM8K and TruthfulQA (`tasks/`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np

from ..data.join import JoinedScores
from ..data.shards import PairShards
from ..data.store import open_store
from ..errors import UserError
from ..files import output_file, to_json
from ..method.arrays import normalize_logps
from ..method.grammar import aliases_of
from ..precompute.run import score
from ..settings import comma_separated, command, write_resolved
from ..terminal import table_lines
from ..train.config import TrainConfig
from ..train.run_folder import RunFolder, update_evaluation
from .config import EvaluateConfig, Metric, TaskSettings
from .figures import preferred
from .intervals import Interval, mean_intervals
from .policies import Policy, policy_at, policy_of_run, references_of, run_names, run_settings
from .score_table import ScoreTable, load_score_table, scored_records
from .tasks.harness import plan_tasks
from .tasks.measure import measure_tasks
from .tasks.results import PolicyTasks, task_lines

METRICS: tuple[Metric, ...] = get_args(Metric)
HEADS = {"reward": "by reward", "sum": "summed", "token": "per token", "byte": "per byte"}
UNITS = {"sum": "none", "token": "token", "byte": "byte"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """Figures of a policy on some pairs."""

    pairs: int
    accuracy: dict[str, Interval]  # by metric
    margin: Interval  # mean of log pi(chosen) − log pi(rejected), nats
    reward_margin: Interval  # the same minus the base's, nats; times beta it is DPO's


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyFigures:
    """Figures of a policy on all pairs, and on the pairs of each source."""

    name: str
    identity: str  # under which its scores are stored
    missing: dict[str, int]  # pairs left out, by reason: without a score of the policy or the base
    overall: Judgement
    by_source: dict[str, Judgement]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What `mrpo evaluate` measures on pairs, and on tasks, and adds to evaluation.json."""

    pairs: str
    split: str
    base: PolicyFigures  # the base reference itself; its rewards are all 0
    policies: list[PolicyFigures]
    tasks: list[PolicyTasks] = field(default_factory=list)  # of the same policies; [] without tasks


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskEvaluation:
    """What it measures and adds where policies only answer tasks."""

    tasks: list[PolicyTasks]


@command(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> Evaluation | TaskEvaluation:
    """Score the policies where they are not yet, print their figures and write them to --out.

    Raises `UserError` where the base lacks scores, a policy can't be loaded or scored, or a task's
    questions are missing.
    """
    out = output_file(config.out)
    runs = comma_separated(config.runs)
    settings = [run_settings(run) for run in runs]
    policies = [policy_at(path) for path in comma_separated(config.policies)]
    policies += [policy_of_run(run, name) for run, name in zip(runs, run_names(runs))]
    planned = plan_tasks(TaskSettings.of(config))
    store, lines = config.store, list[str]()
    evaluation: Evaluation | TaskEvaluation = TaskEvaluation(tasks=[])
    if config.on_pairs:
        completed = _completed(config, settings)
        if config.pairs is None:
            _refuse_changed_pairs(str(completed.pairs), runs)
        store, evaluation = completed.store, measure(policies, completed)
        lines += evaluation_lines(evaluation)
    if planned:
        measured = measure_tasks(policies, planned, open_store(store), config.engine)
        evaluation = replace(evaluation, tasks=measured)
        lines += task_lines(measured)
    print("\n".join(lines))
    write_resolved(config, out.with_suffix(".yaml"))
    update_evaluation(out, to_json(evaluation))
    print(out)
    return evaluation


def measure(
    policies: Sequence[Policy], config: EvaluateConfig, *, in_process: bool = False
) -> Evaluation:
    """Score the policies where they are not yet, and compute their figures.

    The scores are kept in `store.policies`, apart from the references': a policy whose weights did
    not change is never scored again.

    Args:
        config: with a base; `runs` and `policies` are not read.
        in_process: engine hf scores in this process instead of a worker of its own.
    """
    assert config.base is not None
    split = None if config.split == "all" else config.split
    pairs, store = PairShards(config.pairs or "pairs"), open_store(config.store)
    refs_config = config.refs_config or "configs/refs.yaml"
    base = scored_records(pairs, store, [config.base], refs_config, split=split)
    result = score(
        references_of(policies),
        pairs,
        store.policies,
        engine=config.engine,
        split=split,
        in_process=in_process,
        max_tokens=config.max_tokens,
        update_refs=True,  # a policy on the Hub is evaluated at its newest commit
    )
    if result.exit_code:
        raise UserError("not all policies could be scored; see the lines above")
    table = load_score_table(pairs, store, base, policies=result.records, split=split)
    return Evaluation(
        pairs=str(pairs.path),
        split=config.split,
        base=policy_figures(table, 0, config.base),
        policies=[policy_figures(table, k, policy.name) for k, policy in enumerate(policies, 1)],
    )


def policy_figures(table: ScoreTable, k: int, name: str) -> PolicyFigures:
    """The figures of the table's k-th entry; entry 0 is the base."""
    policy, base = table.references[k], table.references[0]
    usable = policy.scored & base.scored
    values = np.stack(
        [*right(table, k).values(), policy.margins, policy.margins - base.margins], axis=1
    )
    sources = sorted(set(table.sources[usable].tolist()))
    reasons = np.where(policy.scored, base.reasons, policy.reasons)

    def judgement(rows: np.ndarray) -> Judgement:
        *accuracies, margin, reward_margin = mean_intervals(values[rows], table.prompts[rows])
        return Judgement(
            pairs=int(rows.sum()),
            accuracy=dict(zip(METRICS, accuracies)),
            margin=margin,
            reward_margin=reward_margin,
        )

    return PolicyFigures(
        name=name,
        identity=policy.record.identity,
        missing=dict(sorted(Counter(reasons[reasons != ""].tolist()).items())),
        overall=judgement(usable),
        by_source={source: judgement(usable & (table.sources == source)) for source in sources},
    )


def right(table: ScoreTable, k: int) -> dict[Metric, np.ndarray]:
    """[N] 1 where the k-th entry is right about a pair, 0 where it is wrong, NaN without a score.

    By metric; entry 0 is the base, whose own rewards are all 0.
    """
    policy, base = table.references[k], table.references[0]
    usable = policy.scored & base.scored
    logps = {"reward": policy.logps - base.logps} | {
        name: normalize_logps(policy.logps, unit, policy.tokens, table.response_bytes)
        for name, unit in UNITS.items()
    }
    return {name: np.where(usable, preferred(logps[name]), np.nan) for name in METRICS}


def reward_margins(table: ScoreTable, k: int, normalize: str = "none") -> np.ndarray:
    """[N] how much more than the base the k-th entry prefers the chosen response; NaN unknown.

    In nats, of log-probs normalized as in training; times beta it is the margin of DPO's reward.
    """
    policy, base = (
        normalize_logps(entry.logps, normalize, entry.tokens, table.response_bytes)
        for entry in (table.references[k], table.references[0])
    )
    return (policy - base) @ np.array([1.0, -1.0])


def evaluation_lines(evaluation: Evaluation) -> Iterator[str]:
    """The printed tables, line by line."""
    base, sources = evaluation.base, list(evaluation.base.by_source)
    yield f"{evaluation.split} pairs of {evaluation.pairs}, rewards measured from {base.name}"
    yield "accuracy in % and mean margins in nats, with 95 % intervals over prompts"
    yield ""
    yield from table_lines(_rows(evaluation))
    for policy in evaluation.policies:
        if policy.missing:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in policy.missing.items())
            yield f"{policy.name}: left out {reasons}"
    for source in sources if len(sources) > 1 else ():
        yield ""
        yield from table_lines(_rows(evaluation, source))
    yield ""


def _rows(evaluation: Evaluation, source: str | None = None) -> list[list[str]]:
    """The table over all pairs, or over those of a source."""
    rows = [[source or "", "pairs", *HEADS.values(), "margin", "reward margin / beta"]]
    for policy in [evaluation.base, *evaluation.policies]:
        judgement = policy.overall if source is None else policy.by_source.get(source)
        if judgement is None:
            continue
        name, rewards = policy.name, str(judgement.reward_margin)
        cells = [judgement.accuracy[metric].percent() for metric in METRICS]
        if policy is evaluation.base:
            name, cells[0], rewards = f"base {name}", "–", "–"
        rows.append([name, f"{judgement.pairs:,}", *cells, str(judgement.margin), rewards])
    return rows


def _refuse_changed_pairs(pairs: str, runs: Sequence[str]) -> None:
    """Raise `UserError` where a run was trained on other pairs than its folder of pairs has now."""
    for run in runs:
        scores = RunFolder(run).scores
        digest = JoinedScores(scores).pairs_digest if scores.is_dir() else None
        if digest is not None and digest != PairShards(pairs).digest:
            raise UserError(
                f"{pairs} was prepared again since {run} was trained, so pairs that are held out "
                "now may be among its training pairs; give --pairs to evaluate on these all the "
                "same, or on others"
            )


def _completed(config: EvaluateConfig, runs: Sequence[TrainConfig]) -> EvaluateConfig:
    """With what is not given taken from the runs, which must then agree."""

    of_runs: dict[str, list[str | None]] = {
        "--pairs": [run.pairs or "pairs" for run in runs],
        "--refs-config": [run.refs_config for run in runs],
        "--store": [run.store for run in runs],
        "--base": [aliases_of(run.refs, run.method)[0] for run in runs],
    }
    found: dict[str, Any] = {}
    for flag, values in of_runs.items():
        name, distinct = flag[2:].replace("-", "_"), list(dict.fromkeys(values))
        if values and not getattr(config, name):
            if len(distinct) > 1:
                raise UserError(
                    f"the runs differ in {flag} ({distinct[0]}, {distinct[1]}); give {flag}"
                )
            found[name] = distinct[0]
    completed = replace(config, **found)
    if completed.base is None:
        raise UserError("--base is missing; name the reference to measure rewards from")
    return completed
