"""The training loop: one optimizer step, and what happens between two steps.

    for each batch of --batch-pairs pairs, the same whatever the number of devices:
        the policy's log-probs, each prompt and response once, a few packed rows at a time
        the loss of each pair against the references' cached targets, divided by the batch's pairs
        the gradient clipped, a stop if it is not finite, one AdamW update

A step changes `Run.state`, the policy and the optimizer, and nothing else; a run resumed from a
checkpoint of these three continues bit for bit. Learning rates are those of transformers'
schedules, step for step, so that a run compares with TRL's.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn, optim
from torch.distributed.tensor import DTensor

from ..errors import UserError
from ..method.objective import Method
from ..method.weightings import OnlineWeights
from ..model.logps import balancing_loss
from . import checkpoint
from .checkpoint import Checkpoint, TrainState
from .config import TrainConfig
from .forward import MEASURES, HeldOut, PairForward
from .groups import PromptGroup, rows_of
from .logs import Meter, RunLog
from .memory import TokenBudget, is_out_of_memory
from .start import Start
from .stream import PairStream, Prefetch, StepBatch

Shares = list[tuple[list[PromptGroup], float]]  # as `PairForward.shares` returns them


@dataclass(slots=True)
class Run:
    """Everything that the loop works with; `run.py` creates it."""

    config: TrainConfig
    start: Start
    forward: PairForward
    method: Method
    optimizer: optim.Optimizer
    stream: PairStream
    held_out: HeldOut
    budget: TokenBudget
    state: TrainState
    total_steps: int
    log: RunLog
    meter: Meter


def train_steps(run: Run) -> bool:
    """Run all steps from `run.state` to the end.

    Returns False where SIGTERM ended them early; a checkpoint is saved then.
    """
    config, state = run.config, run.state
    ready = Prefetch(run.stream.batches(state.position, state.dropped))
    with closing(ready), sigterm_noted() as sigterm:
        batch = run.meter.wait_for(ready)
        while batch is not None and state.step < run.total_steps:
            values = optimizer_step(run, batch)
            batch = run.meter.wait_for(ready)
            last = batch is None or state.step == run.total_steps
            if last or state.step % config.logging_steps == 0:
                run.log.write(state.step, values | run.meter.line())
            stopping = run.forward.ranks.any(sigterm.is_set())
            due = last or state.step % config.save_steps == 0
            accuracy = None
            if due or state.step % config.eval_steps == 0:
                accuracy = evaluate_held_out(run)
            if due or stopping:
                save_checkpoint(run, accuracy)
            if stopping and not last:
                return False
    return True


def optimizer_step(run: Run, batch: StepBatch) -> dict[str, float]:
    """One update of the policy from one batch; the log's values that are of this step alone.

    Raises `UserError` before an update that is not finite.
    """
    state, optimizer = run.state, run.optimizer
    rate = learning_rate(run.config, state.step, run.total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate

    if run.method.online:
        batch = choose_weights(run, batch)
    backward(run, batch)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    grad_norm = float(norm)
    if not math.isfinite(grad_norm):
        raise UserError(
            f"step {state.step + 1}: the gradient's norm is {grad_norm}, so nothing was updated; "
            f"lower --learning-rate, or look at the batch of pair {batch.ids[0].hex()}"
        )
    if 0 < run.config.max_grad_norm < grad_norm:
        nn.utils.clip_grads_with_norm_(parameters, run.config.max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    state.step += 1
    state.pairs += len(batch)
    state.position, state.dropped = batch.position, batch.dropped
    state.max_tokens = run.budget.tokens
    if run.method.online:
        learn_weights(run, batch)
    meter = run.meter
    run.log.show(state.step, meter.loss, meter.accuracy, meter.tokens_per_second)
    epoch = run.stream.epochs_before(state.position)
    return {"epoch": epoch, "grad_norm": grad_norm, "learning_rate": rate}


def choose_weights(run: Run, batch: StepBatch) -> StepBatch:
    """The batch under the weights learned so far (swcw), or under one drawn reference (thompson).

    Every rank does the same: what it goes by, scores and the ranks' common accuracy, is the same.
    """
    state, method = run.state, run.method
    online = state.online or OnlineWeights.start(len(method.references))
    if method.weighting == "thompson":
        if online.accuracy is None:
            online = replace(online, accuracy=sample_accuracy(run))
        online = online.drawn(run.config.seed, state.step)
    state.online = online
    return replace(batch, targets=method.targets(batch.scores, online=online.weights))


def learn_weights(run: Run, batch: StepBatch) -> None:
    """Learn from the batch that was just trained on."""
    assert run.state.online is not None
    if run.method.weighting == "thompson":
        run.state.online = run.state.online.rewarded(sample_accuracy(run))
    else:
        weights = run.method.batch_weights(batch.scores)
        run.state.online = replace(run.state.online, weights=weights)


def sample_accuracy(run: Run) -> float:
    """On a fixed sample of held-out pairs, not timed."""
    with run.meter.paused():
        return run.held_out.sample_accuracy(run.budget.tokens)


def backward(run: Run, batch: StepBatch) -> None:
    """Gradients of the batch's mean loss; repeated with half the budget if memory runs out."""
    ranks, budget = run.forward.ranks, run.budget
    while True:
        seed_step(run)
        run.optimizer.zero_grad(set_to_none=True)
        budget.watch(ranks)
        shares = run.forward.shares(batch.pairs, budget.tokens)
        count = run.forward.policy.tokens
        longest = max(sum(count(group.prompt) for group in groups) for groups, _ in shares)
        if not ranks.any(ranks.world > 1 and not budget.fits(longest, ranks)):
            try:
                totals = micro_batches(run, batch, shares)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if ranks.world > 1:  # the others wait in a collective until torchrun ends them
                    raise UserError(
                        f"step {run.state.step + 1}: rank {ranks.rank} is out of memory at "
                        f"{budget.tokens} tokens; continue with --resume and a smaller --max-tokens"
                    ) from None
        largest = max(len(rows_of(groups)) for groups, _ in shares)
        budget.halve(int(ranks.max(torch.tensor(largest))))
    if run.optimizer.state:  # from the second step on: in the first there are no moments yet
        budget.learn(longest, ranks, bound=len(shares) > 1)
    run.meter.add(batch, ranks.sum(totals).tolist())


def seed_step(run: Run) -> None:
    """Dropout depends on the step alone, so a resumed or repeated step drops the same."""
    ranks = run.forward.ranks
    torch.manual_seed((run.config.seed << 32) + run.state.step * ranks.world + ranks.rank)


def micro_batches(run: Run, batch: StepBatch, shares: Shares) -> Tensor:
    """Backward through this rank's micro-batches; sums over them of `MEASURES`, of an MoE policy's
    balancing loss (times the pairs, as the measures are) and of tokens.

    FSDP2 averages gradients over the ranks, hence the factor of their number.
    """
    ranks, policy = run.forward.ranks, run.forward.policy
    totals = torch.zeros(len(MEASURES) + 2, device=ranks.device)
    several = ranks.world > 1 or len(shares) > 1
    sizes = routing_sizes(run, shares) if policy.balancing and several else None
    for groups, weight in shares:
        loss, measures, tokens, routing = run.forward.run(batch, groups, run.method)
        balancing = measures.new_zeros(())
        if routing is not None:
            whole = routing.sizes() if sizes is None else sizes
            balancing = balancing_loss(routing, whole) * len(batch)
            loss = loss + policy.balancing * balancing
            balancing = balancing.detach().to(measures.dtype)
            measures[0] += policy.balancing * balancing
        (loss * (weight * ranks.world / len(batch))).backward()
        totals += weight * torch.cat([measures, balancing[None], measures.new_tensor([tokens])])
    return totals


@torch.no_grad()
def routing_sizes(run: Run, shares: Shares) -> Tensor:
    """How often an MoE policy sends the whole batch's tokens to each expert: `Routing.sizes`.

    The balancing loss is no sum over pairs. Micro-batches can share one only if they know this
    beforehand, so it takes a forward of its own.
    """
    parts = []
    for groups, weight in shares:
        run.forward(groups)
        routing = run.forward.policy.routing
        assert routing is not None
        parts.append(weight * routing.sizes())
    seed_step(run)
    total = torch.stack(parts).sum(0)
    return run.forward.ranks.sum(total).to(total)


def evaluate_held_out(run: Run) -> float | None:
    """Log the policy's figures on held-out pairs; the accuracy, None where there are none."""
    with run.meter.paused():
        values = run.held_out.evaluate(run.state.step, run.budget.tokens)
    if values:
        run.log.write(run.state.step, values)
    return values.get("eval_rewards/accuracies")


def save_checkpoint(run: Run, accuracy: float | None) -> None:
    """Save the run as it is after `run.state.step`."""
    with run.meter.paused():
        folder = run.start.folder.checkpoints / f"step-{run.state.step:08d}"
        saved = Checkpoint(folder, run.state, run.start.settings, accuracy, run.log.sync())
        keep = run.config.save_total_limit
        checkpoint.save(saved, run.forward.policy, run.optimizer, run.forward.ranks, keep)


def total_steps(config: TrainConfig, num_pairs: int) -> int:
    """Optimizer steps of a run over `num_pairs` training pairs."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, math.ceil(round(config.num_train_epochs * num_pairs) / config.batch_pairs))


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The rate of the update after `step` of `total` updates; 0 at the first of a warm-up."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.peak_rate * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if config.lr_scheduler_type == "cosine":
        return config.peak_rate * 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_scheduler_type == "linear":
        return config.peak_rate * (1 - progress)
    return config.peak_rate


@contextmanager
def sigterm_noted() -> Iterator[threading.Event]:
    """Inside the block SIGTERM, which schedulers send before they kill, only sets the event.

    Python handles signals in the main thread; in any other thread the event is never set.
    """
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.set())
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)
