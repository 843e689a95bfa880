"""What a run starts from: checked on the first process, before any weights are loaded.

A new run resolves its references in the store and joins their scores into `scores/`; a resumed
one reads those scores and takes the policy's source from its checkpoint. No reference's weights
are ever read. Where the policy is the base reference, `compare_with_base` checks before the first
step that it computes the log-probs that the store has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.join import MISSING, JoinedScores, join, resolve_references
from ..data.prepare import open_pairs, prepare_line
from ..data.references import load_refs
from ..data.shards import PairShards
from ..data.store import OVER_LIMIT, open_store
from ..errors import UserError
from ..files import fits
from ..method.grammar import aliases_of
from ..method.objective import ReferenceLogps
from .checkpoint import Checkpoint, checkpoint_to_resume, numeric_settings
from .config import TrainConfig
from .dataset import method_of
from .distributed import Ranks
from .forward import PairForward, PairLogps
from .groups import rows_of
from .logs import check_trackers
from .memory import Sizes, memory_plan, refuse_what_cannot_fit
from .policy import PolicySource, load_config, policy_source, refuse_untrainable
from .run_folder import RunFolder
from .stream import PairStream

POLICY = "policy source"  # its key among a checkpoint's settings
FIRST_PAIRS = 64
EXACT, ROUNDED = 1e-3, 0.1  # nats per token that the policy may be off, in float32 and otherwise


@dataclass(frozen=True, slots=True)
class Start:
    """All that the processes of a run agree on before they load the policy."""

    folder: RunFolder
    pairs: PairShards
    scores: JoinedScores
    settings: Mapping[str, Any]  # that determine the numbers; checkpoints store them
    source: PolicySource
    checkpoint: Checkpoint | None
    tokens: int  # of the first micro-batches; 0 where the run is finished
    per_token: float  # bytes that a step is planned to take for each token of its largest row
    tolerance: float | None = None  # for `compare_with_base`, if the policy is the base reference


def recorded_source(checkpoint: Checkpoint) -> PolicySource:
    """What the policy of a checkpoint was loaded from. Raises `UserError` where it is damaged."""
    values = checkpoint.settings.get(POLICY)
    try:
        source = PolicySource(**values)  # type: ignore[arg-type]
    except TypeError:
        source = None
    if source is None or not fits(source, PolicySource):
        raise UserError(
            f"{checkpoint.folder}: damaged, its {POLICY} can't be read; delete it to go on from an "
            "earlier checkpoint"
        )
    return source


def find_start(config: TrainConfig, ranks: Ranks, bf16: bool) -> Start:
    """Check everything that can be checked; create the run's folder and its joined scores."""
    check_trackers(config.report_to)
    method, folder = method_of(config), RunFolder(config.output_dir)
    pairs = open_pairs(config.pairs, config.data)
    settings = numeric_settings(config, pairs)
    checkpoint = checkpoint_to_resume(config, settings)
    if checkpoint is not None:
        source = recorded_source(checkpoint)
        planned = (0, 0.0) if folder.finished else _plan(config, source, ranks, bf16)
        scores = JoinedScores(folder.scores)
        if folder.pairs.is_dir() and (kept := PairShards(folder.pairs)).digest == pairs.digest:
            pairs = kept
        return Start(folder, pairs, scores, checkpoint.settings, source, checkpoint, *planned)

    store, specs = open_store(config.store), load_refs(config.refs_config)
    records = resolve_references(pairs, store, method.references, config.refs_config)
    for record in records:
        print(f"scores      {store.described(record, specs.get(record.alias))}", flush=True)
    # The policy starts from the first reference, whichever of them the method uses.
    first = aliases_of(config.refs, config.method)[0]
    base = store.resolve(first, specs)
    parts = ((name, base.inputs.get(name)) for name in ("model", "adapter"))
    commits = {name: part["commit"] for name, part in parts if part and "commit" in part}
    source, is_base = policy_source(config, specs.get(first.partition("@")[0]), commits)
    planned = _plan(config, source, ranks, bf16)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output-dir {folder.path}: {error.strerror}; name another folder"
        ) from None
    try:
        scores = join(pairs, store, records, folder.scores, refs_config=config.refs_config)
    except UserError:
        if not any(folder.path.iterdir()):
            folder.path.rmdir()
        raise
    refuse_missing(scores, config.max_missing, pairs)
    pairs.note_use("run", folder.path)
    pairs = pairs.linked(folder.pairs)
    tolerance = None
    if is_base and records[0].identity == base.identity:
        tolerance = EXACT if not bf16 and base.inputs["dtype"] == "float32" else ROUNDED
    settings |= {POLICY: asdict(source)}
    return Start(folder, pairs, scores, settings, source, None, *planned, tolerance)


def compare_with_base(
    forward: PairForward, stream: PairStream, max_tokens: int, tolerance: float
) -> str:
    """One line on how far the policy, which is the base reference, is from its stored scores.

    Args:
        stream: training pairs; up to 64, each once, are scored by the policy and compared with
            column 0.
        max_tokens: of a micro-batch.
        tolerance: nats per token that are expected.
    """
    # Sums over responses: absolute and signed difference, whether tokens differ, 1.
    sums, remaining = torch.zeros(4, dtype=torch.float64), FIRST_PAIRS
    first_epoch = copy(stream)
    first_epoch.total_rows = min(stream.total_rows, stream.epoch_rows)
    forward.policy.eval()
    for batch in islice(first_epoch.batches(), -(-FIRST_PAIRS // stream.batch_pairs)):
        pairs = batch.pairs[:remaining]
        remaining -= len(pairs)
        for groups, weight in forward.shares(pairs, max_tokens):
            with torch.no_grad():
                logps = forward(groups)
            sums += weight * _differences(logps, batch.scores, rows_of(groups))
    forward.policy.train()
    absolute, signed, other_tokens, responses = forward.ranks.sum(sums).tolist()
    absolute, signed = absolute / responses, signed / responses
    line = (
        f"{signed:+.1e} nats per token from the base's stored scores on {int(responses) // 2} "
        f"pairs, {absolute:.1e} in absolute value; up to {tolerance:g} is expected"
    )
    if absolute <= tolerance and not other_tokens:
        return line
    cause = f"{int(other_tokens)} responses have other tokens" if other_tokens else "other weights"
    return (
        f"{line}\nWARNING: the policy is NOT the base reference as it was scored ({cause}); "
        "check --policy, its revision and chat template, or score the base again"
    )


def refuse_missing(scores: JoinedScores, max_missing: float, pairs: PairShards) -> None:
    """Raise `UserError` where a reference lacks more than this share of the scores."""
    for reference in scores.references:
        count = sum(reference.missing.values())
        if count > max_missing * scores.num_pairs:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in reference.missing.items())
            line = prepare_line(pairs, "scored", exclude=str(scores.path / MISSING))
            ways = f"leave those pairs out ({line}), leave it out of --refs, or raise --max-missing"
            if OVER_LIMIT in reference.missing:
                ways = f"score them with a larger --max-model-len or more memory, {ways}"
            raise UserError(
                f"reference {reference.alias} has no score for {count:,} of "
                f"{scores.num_pairs:,} pairs ({reasons}), above --max-missing {max_missing}; "
                f"{ways}"
            )


def _plan(config: TrainConfig, source: PolicySource, ranks: Ranks, bf16: bool) -> tuple[int, float]:
    """Print the memory plan and refuse what can't fit; `tokens` and `per_token` of a `Start`."""
    if source.adapter is not None and config.lora_rank is not None:
        raise UserError(
            f"--lora-rank {config.lora_rank}: the policy {source.name} has an adapter already; "
            "merge it into a model folder first (peft's merge_and_unload)"
        )
    if config.use_dora and ranks.world > 1:
        raise UserError(
            "--use-dora is not tested with several processes; leave it out, or train with one"
        )
    architecture = load_config(source)
    refuse_untrainable(architecture, source.name)
    sizes = Sizes.of(architecture)
    plan = memory_plan(sizes, config, ranks, bf16)
    print(f"memory      {plan}", flush=True)
    refuse_what_cannot_fit(plan, sizes, config, ranks, bf16)
    return plan.tokens, plan.per_token


def _differences(logps: PairLogps, scores: ReferenceLogps, rows: Sequence[int]) -> Tensor:
    """Sums over responses: |difference| and difference per token, whether tokens differ, 1."""

    def stored(chosen: np.ndarray, rejected: np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate([chosen[rows, 0], rejected[rows, 0]]))

    policy = torch.cat([logps.chosen, logps.rejected]).double().cpu()
    tokens = torch.cat([logps.chosen_tokens, logps.rejected_tokens]).cpu()
    difference = (policy - stored(scores.ref_chosen_logps, scores.ref_rejected_logps)) / tokens
    other_tokens = tokens != stored(scores.ref_chosen_tokens, scores.ref_rejected_tokens)
    return torch.stack(
        [difference.abs(), difference, other_tokens.double(), torch.ones_like(difference)]
    ).sum(1)
