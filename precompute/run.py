"""Stage one: score what the store lacks, each reference in processes of its own.

    score(references, pairs, store)     from Python
    mrpo precompute --refs llama,qwen   the same from the command line, with a plan and a summary

    resolve references → preflight (render everything, add up) → one run per reference → result

A reference that fails does not stop the others: they are scored, the summary names it, and the
exit code is not 0.
"""

from __future__ import annotations

import platform
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ..data.ids import IdIndex, ids_to_numpy
from ..data.prepare import open_pairs
from ..data.references import ReferenceSpec, load_refs, select_refs
from ..data.shards import PairShards
from ..data.store import ReferenceRecord, Store, open_store
from ..errors import UserError
from ..settings import command, no_effect, write_resolved
from .config import EngineChoice, PrecomputeConfig
from .engines.protocol import EngineSettings
from .identity import ResolvedReference, resolve_reference
from .on_ray import cluster, score_on_ray
from .preflight import (
    SERVER,
    UNVERIFIED,
    ReferencePlan,
    duration,
    model_context,
    print_plans,
    survey,
    verify_server,
)
from .reference_run import Placement, ReferenceOutcome, ReferenceRun, place
from .scoring import Job, PairSelection


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreResult:
    """What a run scored."""

    records: list[ReferenceRecord] = field(default_factory=list)  # by reference, in order
    scored: dict[str, int] = field(default_factory=dict)  # responses scored by this run, by alias
    unscored: dict[str, int] = field(default_factory=dict)  # responses that failed, by alias

    @property
    def exit_code(self) -> int:
        return int(any(self.unscored.values()))


def score(
    references: Sequence[ReferenceSpec] | Mapping[str, Mapping[str, Any] | str],
    pairs: PairShards | str | Path,
    store: Store | str | Path | None = None,
    *,
    engine: EngineChoice = "auto",
    split: Literal["train", "validation"] | None = None,
    in_process: bool = False,
    server: str | None = None,
    update_refs: bool = False,
    keep_token_logps: bool = False,
    max_model_len: int | None = None,
    max_tokens: int | None = None,
    bf16: bool = False,
    gpu_memory_utilization: float = 0.9,
    tensor_parallel_size: int | None = None,
    pipeline_parallel_size: int = 1,
    data_parallel_size: int | None = None,
    concurrency: int = 32,
    ray_address: str | None = None,
    ray_engine: Literal["auto", "hf", "vllm"] = "auto",
) -> ScoreResult:
    """Score every response of the pairs under every reference, as far as the store lacks it.

    `references` maps aliases to models or to entries as in refs.yaml; `split` scores the pairs of
    one split only. With `in_process`, each reference is loaded and scored in this process by engine
    hf, not in a process of its own. The other settings are those of `PrecomputeConfig`.

    Progress goes to stderr, nothing to stdout. A reference that failed is reported on stderr and
    its responses are counted in `ScoreResult.unscored`; raises `UserError` where a mistake of the
    user's is the only reason.

        score({"llama": "meta-llama/Llama-3.2-1B-Instruct"}, "pairs", "store")
    """
    specs = list(load_refs(references).values() if isinstance(references, Mapping) else references)
    aliases = [spec.alias for spec in specs]
    if not specs or len(set(aliases)) < len(specs):
        raise UserError(f"references {', '.join(aliases)!r}: name one or more, each alias once")
    config = PrecomputeConfig(
        refs=",".join(aliases),
        engine=engine,
        server=server,
        update_refs=update_refs,
        keep_token_logps=keep_token_logps,
        max_model_len=max_model_len,
        max_tokens=max_tokens,
        bf16=bf16,
        gpu_memory_utilization=gpu_memory_utilization,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        data_parallel_size=data_parallel_size,
        concurrency=concurrency,
        ray_address=ray_address,
        ray_engine=ray_engine,
    )
    placement = place(config, specs, in_process=in_process)
    selection = PairSelection(pairs if isinstance(pairs, PairShards) else PairShards(pairs), split)
    if not isinstance(store, Store):
        store = open_store(None if store is None else str(store))
    run = _Run(config, specs, placement, selection, store, in_process)
    for plan in run.plans:
        for name in plan.damaged:
            print(f"{plan.reference.alias}: damaged file set aside: {name}", file=sys.stderr)
    result = run.carry_out()
    run.report_failures()
    return result


@command(PrecomputeConfig)
def precompute(config: PrecomputeConfig) -> ScoreResult:
    """Score the references of a refs.yaml; prints the plan and a summary.

    Raises `UserError` before any work for a mistake that preflight finds, and at the end for one
    that only scoring could find; what was scored until then is stored.
    """
    specs = select_refs(load_refs(config.refs_config), config.refs)
    placement = place(config, specs)
    selection = PairSelection(open_pairs(config.pairs, config.data))
    run = _Run(config, specs, placement, selection, open_store(config.store))
    if not any(p.reference.revision or p.reference.adapter_revision for p in run.plans):
        no_effect(config, "where no reference is on the Hub", "update_refs")
    print_plans(run.plans, selection, run.store)
    sys.stdout.flush()  # before hours of work, also where stdout is a file
    if config.dry_run:
        return ScoreResult(records=[plan.reference.record() for plan in run.plans])
    write_resolved(config, run.logs / "precompute.yaml")
    result = run.carry_out()
    run.print_summary()
    run.report_failures()
    return result


@dataclass(frozen=True)
class _Run:
    """Some references over some pairs: planned, then carried out."""

    config: PrecomputeConfig
    specs: Sequence[ReferenceSpec]
    placement: Placement
    selection: PairSelection
    store: Store
    in_process: bool = False
    outcomes: list[ReferenceOutcome] = field(default_factory=list)  # one per plan, in the end
    verified: dict[str, str] = field(default_factory=dict)  # by alias, what its server agrees with

    @cached_property
    def plans(self) -> list[ReferencePlan]:
        if self.selection.num_pairs == 0:
            raise UserError(
                f"{self.selection.pairs.path} has no pairs of split {self.selection.split}; "
                "prepare them with --validation-fraction, or take all pairs"
            )
        references = [self._resolve(spec) for spec in self.specs]
        if not any("autocast" in reference.inputs for reference in references):
            no_effect(self.config, "on weights that are bfloat16 already", "bf16")
        plans = [ReferencePlan(reference, self._job(reference)) for reference in references]
        survey(
            plans,
            self.selection,
            self.store,
            dry_run=self.config.dry_run,
            many_processes=not self.in_process,
        )
        return plans

    @cached_property
    def logs(self) -> Path:
        """A new folder for this run's logs, beside the scores where these are on this machine."""
        local = self.store.files.is_local
        base = Path(self.store.root) if local else Path(tempfile.gettempdir()) / "mrpo"
        folder = base / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        folder.mkdir(parents=True)
        return folder

    def carry_out(self) -> ScoreResult:
        """Score every reference."""
        result, root = ScoreResult(), self.store.root
        self.selection.pairs.note_use("store", Path(root) if self.store.files.is_local else root)
        for plan, outcome in zip(self.plans, self._outcomes()):
            alias, missing = plan.reference.alias, plan.missing
            if missing.todo or missing.refused:
                print(f"{alias}: scored {outcome.responses:,} responses", file=sys.stderr)
            elif missing.over_limit:
                left_out = np.concatenate(missing.left_out)
                self.store.scores(plan.job.identity).leave_out(left_out)
            facts = [self._facts(alias, outcome)] if outcome.responses else []
            record = self.store.record(plan.reference.record(*facts))
            lacking = self._lacking(plan.job.identity)
            outcome.left_out = min(lacking, max(missing.over_limit, outcome.over_limit))
            outcome.unscored = lacking - outcome.left_out
            self.outcomes.append(outcome)
            result.records.append(record)
            result.scored[alias] = outcome.responses
            result.unscored[alias] = outcome.unscored
        return result

    def print_summary(self) -> None:
        """A line per reference, on stdout."""
        for plan, outcome in zip(self.plans, self.outcomes):
            stored = self.selection.num_responses - plan.missing.num_responses
            parts = [f"{outcome.responses:,} responses scored", f"{stored:,} from the store"]
            if outcome.tokens_per_second is not None:
                parts[0] += (
                    f" ({outcome.tokens:,} tokens in {duration(outcome.seconds)}, "
                    f"{outcome.tokens_per_second:,.0f} tokens/s)"
                )
            for reason, count in self._reasons(plan.job.identity).most_common():
                parts.append(f"{count:,} {reason}")
            if outcome.left_out:
                parts.append(
                    f"{outcome.left_out:,} left out as too long for this run, which training "
                    "lists and counts under --max-missing"
                )
            if outcome.unscored:
                parts.append(f"{outcome.unscored:,} NOT SCORED")
            print(f"{plan.reference.alias}: " + "; ".join(parts))
        print(f"scores in {self.store.root}")

    def report_failures(self) -> None:
        """What went wrong, on stderr; raises `UserError` where it was the user's mistakes alone."""
        for plan, outcome in zip(self.plans, self.outcomes):
            shared = "" if outcome.unscored else "a worker, whose share others scored, of "
            for crash in outcome.crashes:
                print(f"{shared}reference {plan.reference.alias} failed: {crash}", file=sys.stderr)
        if not any(outcome.unscored for outcome in self.outcomes):
            return
        mistakes = dict.fromkeys(text for outcome in self.outcomes for text in outcome.mistakes)
        if mistakes and not any(outcome.crashes for outcome in self.outcomes):
            raise UserError("; ".join(mistakes))
        for text in mistakes:
            print(f"error: {text}", file=sys.stderr)

    def _outcomes(self) -> Iterator[ReferenceOutcome]:
        """Score one reference after another; on a Ray cluster all at once, as it has room."""
        if not self.placement.on_ray:
            yield from map(self._score, self.plans)
            return
        # The cluster is left first, by an interrupt too, which ends what the threads wait for.
        with ThreadPoolExecutor(len(self.plans)) as pool, cluster(self.config.ray_address):
            yield from pool.map(self._score, self.plans)

    def _score(self, plan: ReferencePlan) -> ReferenceOutcome:
        self.store.record(plan.reference.record())  # before its first score
        if not (plan.missing.todo or plan.missing.refused):
            return ReferenceOutcome()
        settings = replace(plan.job.settings, longest=plan.missing.longest)
        job = replace(plan.job, settings=settings)
        run = ReferenceRun(job, plan.missing.todo)
        if self.placement.on_ray:
            scores = self.store.scores(job.identity)
            shards = [shard for shard, _ in self.selection.all_missing(scores)]
            most, others = self.config.data_parallel_size, len(self.plans) - 1
            return run.run_elsewhere(score_on_ray(job, shards, most=most, others=others))
        if self.in_process:
            return run.run_here()
        return run.run(self.placement.device_groups[plan.reference.alias], self.logs)

    def _resolve(self, spec: ReferenceSpec) -> ResolvedReference:
        kept = self.store.kept_commits(spec)
        reference = resolve_reference(spec, kept, update=self.config.update_refs)
        if self.config.bf16 and self.placement.engine == "hf" and reference.dtype != "bfloat16":
            # Other numbers than the weights' own precision gives, so another identity.
            return replace(reference, inputs={**reference.inputs, "autocast": "bfloat16"})
        if self.placement.engine == "server" and not self.config.dry_run:
            return self._behind_server(reference)
        return reference

    def _behind_server(self, reference: ResolvedReference) -> ResolvedReference:
        """The reference whose scores its server gives: itself, as far as that can be shown."""
        alias = reference.alias
        if not self._lacking(reference.identity):
            return reference
        verified = verify_server(self._job(reference), self.selection, self.store)
        if verified is not None:
            self.verified[alias] = verified
            print(f"{alias}: the server's scores agree with {verified}", file=sys.stderr)
            return reference
        print(
            f"{alias}: neither stored scores nor weights are here to compare the server's scores "
            f"with; they are kept apart as those of an {UNVERIFIED}",
            file=sys.stderr,
        )
        reference = replace(reference, inputs={**reference.inputs, SERVER: UNVERIFIED})
        if self._lacking(reference.identity):
            verify_server(self._job(reference), self.selection, self.store, stored_only=True)
        return reference

    def _job(self, reference: ResolvedReference) -> Job:
        """All but the longest sequence, which the survey finds."""
        config, spec = self.config, reference.spec
        settings = EngineSettings(
            alias=reference.alias,
            model=reference.model,
            revision=reference.revision,
            dtype=reference.dtype,
            quantization=spec.quantization,
            adapter=reference.adapter,
            adapter_revision=reference.adapter_revision,
            autocast="autocast" in reference.inputs,
            max_tokens=config.max_tokens,
            tensor_parallel_size=config.tensor_parallel_size or spec.tensor_parallel_size,
            pipeline_parallel_size=config.pipeline_parallel_size,
            gpu_memory_utilization=config.gpu_memory_utilization,
            server=self.placement.servers.get(reference.alias),
            concurrency=config.concurrency,
        )
        return Job(
            engine=self.placement.engine,
            settings=settings,
            pairs=str(self.selection.pairs.path),
            split=self.selection.split,
            store=self.store.root,
            identity=reference.identity,
            chat_template=spec.chat_template,
            chat_template_kwargs=dict(spec.chat_template_kwargs),
            system_role=spec.system_role,
            context=model_context(reference),
            limit=config.max_model_len,
            keep_token_logps=config.keep_token_logps,
        )

    def _facts(self, alias: str, outcome: ReferenceOutcome) -> dict[str, Any]:
        """How the scores were made, and of which pairs, for `mrpo store verify --rescore`."""
        verified = self.verified.get(alias)
        return {
            **outcome.facts,
            **({"verified": verified} if verified else {}),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "responses": outcome.responses,
            "pairs_folder": str(self.selection.pairs.path.resolve()),
            "tokens": outcome.tokens,
            "tokens_per_second": outcome.tokens_per_second,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _lacking(self, identity: str) -> int:
        """How many responses of the pairs have no row."""
        missing = self.selection.all_missing(self.store.scores(identity))
        return sum(int(marked.sum()) for _, marked in missing)

    def _reasons(self, identity: str) -> Counter[str]:
        """The permanent reasons of the responses that have a row without a score."""
        table = self.store.scores(identity).read(["response_id", "reason"])
        refused = table.filter(table["reason"].is_valid())
        index = IdIndex(ids_to_numpy(refused["response_id"]))
        found = np.zeros(len(refused), bool)
        for shard in self.selection.shards if len(refused) else ():
            places = index.find(self.selection.response_ids(shard).both)
            found[places[places >= 0]] = True
        return Counter(refused["reason"].filter(pa.array(found)).to_pylist())
