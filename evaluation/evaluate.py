"""`mrpo evaluate`: how often a policy is right about held-out pairs, whatever method trained it.

    sum, token, byte    the chosen response is the likelier one: in total, per token, per byte
    reward              the policy prefers the chosen response more than the base reference does

The reward is DPO's implicit reward up to beta: log pi(y) − log pi_base(y). Measured from one common
base, policies of all methods are on one scale; a method's own references do not enter.

    policies.py scores the policies -> score_table.py -> figures with intervals -> evaluation.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..data.shards import PairShards
from ..data.store import Store, open_store
from ..errors import UserError
from ..files import output_file, to_json
from ..method.arrays import normalize_logps
from ..method.grammar import aliases_of
from ..settings import comma_separated, command, write_resolved
from ..terminal import table_lines
from ..train.config import TrainConfig
from ..train.run_folder import update_evaluation
from .config import EvaluateConfig, Metric
from .figures import preferred
from .intervals import Interval, mean_intervals
from .policies import Policy, policy_at, policy_of_run, run_names, run_settings, score_policies
from .score_table import ReferenceColumns, ScoreTable, load_score_table, scored_records

METRICS: tuple[Metric, ...] = ("reward", "sum", "token", "byte")
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
    """What `mrpo evaluate` measures and adds to evaluation.json."""

    pairs: str
    split: str
    base: PolicyFigures  # the base reference itself; its rewards are all 0
    policies: list[PolicyFigures]


@dataclass(frozen=True, slots=True)
class EvaluationInputs:
    """The pairs and the base reference that policies are measured with."""

    pairs: PairShards
    store: Store
    base: str
    refs_config: str


@command(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> Evaluation:
    """Score the policies where they are not yet, print their figures and write them to --out.

    Raises `UserError` where the base lacks scores, or a policy can't be loaded or scored.
    """
    out = output_file(config.out)
    runs = comma_separated(config.runs)
    settings = [run_settings(run) for run in runs]
    policies = [policy_at(path) for path in comma_separated(config.policies)]
    policies += [policy_of_run(run, name) for run, name in zip(runs, run_names(runs))]
    inputs = _inputs(config, settings)
    evaluation = measure(
        policies,
        inputs,
        split=config.split,
        engine=config.engine,
        max_tokens=config.max_tokens,
    )
    for line in evaluation_lines(evaluation):
        print(line)
    write_resolved(config, out.with_suffix(".yaml"))
    update_evaluation(out, to_json(evaluation))
    print(out)
    return evaluation


def measure(
    policies: Sequence[Policy],
    inputs: EvaluationInputs,
    *,
    split: Literal["validation", "train", "all"] = "validation",
    engine: Literal["hf", "vllm", "auto"] = "hf",
    max_tokens: int | None = None,
    in_process: bool = False,
) -> Evaluation:
    """Score the policies into `store.policies` and compute their figures.

    With `in_process` engine hf scores in this process instead of a worker of its own.
    """
    only = None if split == "all" else split
    pairs, store = inputs.pairs, inputs.store
    base = scored_records(pairs, store, [inputs.base], inputs.refs_config, split=only)
    records = score_policies(
        policies,
        pairs,
        store.policies,
        split=only,
        engine=engine,
        max_tokens=max_tokens,
        in_process=in_process,
    )
    table = load_score_table(pairs, store, base, policies=records, split=only)
    return Evaluation(
        pairs=str(pairs.path),
        split=split,
        base=policy_figures(table, 0, inputs.base),
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
    return PolicyFigures(
        name=name,
        identity=policy.record.identity,
        missing=_missing(policy, base),
        overall=_judgement(values[usable], table.prompts[usable]),
        by_source={
            source: _judgement(values[rows], table.prompts[rows])
            for source in sources
            for rows in [usable & (table.sources == source)]
        },
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


def evaluation_lines(evaluation: Evaluation) -> Iterator[str]:
    """The printed tables, line by line."""
    base, policies = evaluation.base, evaluation.policies
    yield f"{evaluation.split} pairs of {evaluation.pairs}, rewards measured from {base.name}"
    yield "accuracy in % and mean margins in nats, with 95 % intervals over prompts"
    yield ""
    rows = [_row(f"base {base.name}", base.overall, rewards=False)]
    rows += [_row(policy.name, policy.overall) for policy in policies]
    heads = ["", "pairs", *HEADS.values(), "margin", "reward margin / beta"]
    yield from table_lines([heads, *rows])
    for policy in policies:
        if policy.missing:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in policy.missing.items())
            yield f"{policy.name}: left out {reasons}"
    sources = list(base.by_source)
    if len(sources) > 1:
        for source in sources:
            yield ""
            rows = [_row(f"base {base.name}", base.by_source[source], rewards=False)]
            rows += [
                _row(policy.name, policy.by_source[source])
                for policy in policies
                if source in policy.by_source
            ]
            yield from table_lines([[source, *heads[1:]], *rows])
    yield ""


def _row(name: str, judgement: Judgement, rewards: bool = True) -> list[str]:
    accuracy = judgement.accuracy
    cells = [accuracy[metric].percent() for metric in METRICS]
    reward_margin = f"{judgement.reward_margin}"
    if not rewards:
        cells[0], reward_margin = "–", "–"
    return [name, f"{judgement.pairs:,}", *cells, f"{judgement.margin}", reward_margin]


def _judgement(values: np.ndarray, prompts: np.ndarray) -> Judgement:
    """From columns [n, 6]: the metrics, the margin, the reward margin."""
    *accuracies, margin, reward_margin = mean_intervals(values, prompts)
    return Judgement(
        pairs=len(values),
        accuracy=dict(zip(METRICS, accuracies)),
        margin=margin,
        reward_margin=reward_margin,
    )


def _missing(policy: ReferenceColumns, base: ReferenceColumns) -> dict[str, int]:
    """Pairs without a score of the policy or the base; the policy's reason goes first."""
    reasons = np.where(policy.scored, base.reasons, policy.reasons)
    names: Sequence[str] = sorted(set(reasons[reasons != ""].tolist()))
    return {name: int((reasons == name).sum()) for name in names}


def _inputs(config: EvaluateConfig, runs: Sequence[TrainConfig]) -> EvaluationInputs:
    """Pairs, store and base: as given, else those of the runs, which must then agree."""

    def of_runs(flag: str, value: Callable[[TrainConfig], str | None], default: str | None) -> str:
        values = list(dict.fromkeys(value(run) or default for run in runs)) or [default]
        if len(values) > 1:
            raise UserError(f"the runs differ in {flag} ({values[0]}, {values[1]}); give {flag}")
        if values[0] is None:
            raise UserError(f"{flag} is missing; name the reference to measure rewards from")
        return values[0]

    pairs = config.pairs or of_runs("--pairs", lambda run: run.pairs, "pairs")
    refs_config = config.refs_config or of_runs(
        "--refs-config", lambda run: run.refs_config, "configs/refs.yaml"
    )
    store = config.store or of_runs("--store", lambda run: run.store, "")
    base = config.base or of_runs("--base", lambda run: aliases_of(run.refs, run.method)[0], None)
    return EvaluationInputs(PairShards(pairs), open_store(store or None), base, refs_config)
