"""How often a policy is right about held-out pairs, by metrics that hold for every method.

    sum, token, byte    the chosen response is the likelier one: whole, per token, per byte
    reward              the policy prefers the chosen response more than the base reference does

The reward is DPO's implicit one up to beta: log pi(y) − log pi_base(y). Measured from one common
base, policies of all methods are on one scale; a method's own references do not enter.


`mrpo evaluate`: policies on held-out pairs, all measured from one base reference.

policies -> precompute (their scores in the store) -> judgement -> table, evaluate.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..data.join import precompute_line
from ..data.references import load_refs
from ..data.shards import PairShards
from ..data.store import NotScored, ReferenceRecord, Store, open_store
from ..errors import UserError
from ..method.arrays import normalize_logps
from ..method.grammar import aliases_of
from ..settings import write_resolved
from ..train.config import TrainConfig
from .config import EvaluateConfig
from .figures import preferred
from .intervals import Interval, mean_intervals
from .policies import policy_at, policy_of_run, run_names, run_settings, score_policies
from .results import columns, free_path, write_json
from .score_table import NOT_SCORED, ReferenceColumns, ScoreTable, load_score_table

Metric = Literal["reward", "sum", "token", "byte"]
METRICS: tuple[Metric, ...] = ("reward", "sum", "token", "byte")
UNITS = {"sum": "none", "token": "token", "byte": "byte"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """A policy on some pairs."""

    pairs: int
    accuracy: dict[str, Interval]  # by metric
    margin: Interval  # mean of log pi(chosen) − log pi(rejected), nats
    reward_margin: Interval  # the same minus the base's, nats; times beta it is DPO's


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyFigures:
    """A policy on all pairs, and on those of each source."""

    name: str
    identity: str  # under which the store has its scores
    missing: dict[str, int]  # pairs left out, by reason: without a score of the policy or the base
    overall: Judgement
    by_source: dict[str, Judgement]


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
    """[N] 1 where the k-th entry is right about a pair, 0 where not, NaN without a score, by
    metric; entry 0 is the base, whose own rewards are all 0."""
    policy, base = table.references[k], table.references[0]
    usable = policy.scored & base.scored
    logps = {"reward": policy.logps - base.logps} | {
        name: normalize_logps(policy.logps, unit, policy.tokens, table.response_bytes)
        for name, unit in UNITS.items()
    }
    return {name: np.where(usable, preferred(logps[name]), np.nan) for name in METRICS}


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
    """Pairs without a score of either, the policy's reason before the base's."""
    reasons = np.where(policy.scored, base.reasons, policy.reasons)
    names: Sequence[str] = sorted(set(reasons[reasons != ""].tolist()))
    return {name: int((reasons == name).sum()) for name in names}


HEADS = {"reward": "by reward", "sum": "summed", "token": "per token", "byte": "per byte"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What evaluate.json holds."""

    pairs: str
    split: str
    base: PolicyFigures  # the base reference judged like a policy; its rewards are all 0
    policies: list[PolicyFigures]


@dataclass(frozen=True, slots=True)
class Ground:
    """What policies are measured on and from."""

    pairs: PairShards
    store: Store
    base: str
    refs_config: str


def evaluate(config: EvaluateConfig) -> None:
    """Score what is not scored yet, print the figures and write them."""
    out = free_path(config.out)
    runs = _listed(config.runs)
    ground = _ground(config, [run_settings(run) for run in runs])
    policies = [policy_at(path) for path in _listed(config.policies)]
    policies += [policy_of_run(run, name) for run, name in zip(runs, run_names(runs))]
    split = None if config.split == "all" else config.split
    base = _base(ground, split)
    records = score_policies(
        policies,
        ground.pairs,
        ground.store,
        split=split,
        engine=config.engine,
        max_tokens=config.max_tokens,
    )
    table = load_score_table(ground.pairs, ground.store, [base, *records], split=split)
    evaluation = Evaluation(
        pairs=str(ground.pairs.path),
        split=config.split,
        base=policy_figures(table, 0, ground.base),
        policies=[policy_figures(table, k + 1, one.name) for k, one in enumerate(policies)],
    )
    for line in evaluation_lines(evaluation):
        print(line)
    write_resolved(config, out.with_suffix(".yaml"))
    write_json(out, evaluation)
    print(out)


def evaluation_lines(evaluation: Evaluation) -> Iterator[str]:
    """The tables, line by line."""
    base, policies = evaluation.base, evaluation.policies
    yield f"{evaluation.split} pairs of {evaluation.pairs}, rewards measured from {base.name}"
    yield "accuracy in % and mean margins in nats, with 95 % intervals over prompts"
    yield ""
    rows = [_row(f"base {base.name}", base.overall, rewards=False)]
    rows += [_row(one.name, one.overall) for one in policies]
    heads = ["", "pairs", *HEADS.values(), "margin", "reward margin / beta"]
    yield from columns([heads, *rows])
    for one in policies:
        if one.missing:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in one.missing.items())
            yield f"{one.name}: left out {reasons}"
    sources = list(base.by_source)
    if len(sources) > 1:
        for source in sources:
            yield ""
            rows = [_row(f"base {base.name}", base.by_source[source], rewards=False)]
            rows += [
                _row(one.name, one.by_source[source]) for one in policies if source in one.by_source
            ]
            yield from columns([[source, *heads[1:]], *rows])
    yield ""


def _row(name: str, judgement: Judgement, rewards: bool = True) -> list[str]:
    accuracy = judgement.accuracy
    cells = [accuracy[metric].percent() for metric in METRICS]
    reward_margin = f"{judgement.reward_margin}"
    if not rewards:
        cells[0], reward_margin = "–", "–"
    return [name, f"{judgement.pairs:,}", *cells, f"{judgement.margin}", reward_margin]


def _ground(config: EvaluateConfig, runs: Sequence[TrainConfig]) -> Ground:
    """Pairs, store and base: as given, else as the runs have them, which must then agree."""

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
    return Ground(PairShards(pairs), open_store(store or None), base, refs_config)


def _base(ground: Ground, split: str | None) -> ReferenceRecord:
    """The base's record; `UserError` with the line to run where it lacks scores."""
    pairs, store = ground.pairs, ground.store
    line = precompute_line(pairs, store, [ground.base], ground.refs_config)
    try:
        record = store.resolve(ground.base, load_refs(ground.refs_config))
    except NotScored as error:
        raise UserError(f"{error}; run: {line}") from None
    table: ScoreTable = load_score_table(pairs, store, [record], split=split)
    unscored = int((table.references[0].reasons == NOT_SCORED).sum())
    if unscored:
        raise UserError(f"--base {ground.base}: {unscored:,} pairs not yet scored; run: {line}")
    return record


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]
