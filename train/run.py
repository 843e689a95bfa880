"""`mrpo train`: everything around the loop, from the settings to the model's folder.

runs/name/train.yaml        the settings in force
runs/name/scores/           the references' scores, joined once; nothing else of them is read
runs/name/log.jsonl         a line a step, held-out evaluations between them
runs/name/checkpoints/      the last ones and the best
runs/name/evaluation.json   held-out figures of the final model
runs/name/model/            the final model; it is there when the run is complete
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import optim
from transformers.utils import logging as transformers_logging

from ..data.rendering import Renderer
from ..errors import UserError
from ..method.grammar import beta_warning, method_of
from ..method.objective import Method
from ..settings import write_resolved
from . import checkpoint
from .checkpoint import CHECKPOINTS, MODEL, TrainState
from .config import TrainConfig
from .dataset import Rows, TrainingPairs
from .distributed import Ranks
from .forward import BATCH_PAIRS, HeldOut, PairForward
from .logs import Meter, RunLog, cut, open_trackers
from .loop import Run, total_steps, train_steps
from .memory import TokenBudget
from .policy import PolicySource, load_config, load_policy, make_optimizer, model_card, write_model
from .start import Start, compare_with_base, find_start
from .stream import PairStream

STOPPED = 143  # 128 + SIGTERM, as a shell has it
EVALUATION = "evaluation.json"
ENDLESS = 2**62  # rows: --max-steps ends the run


def train(config: TrainConfig) -> int:
    """Train, or go on with, the run in `config.output_dir`; returns the exit code."""
    transformers_logging.disable_progress_bar()
    ranks = Ranks.start(config.device)
    try:
        half = config.bf16 if config.bf16 is not None else ranks.device.type == "cuda"
        start = ranks.on_first(lambda: find_start(config, ranks, half))
        if start.finished:
            ranks.say(f"this run is finished: {Path(config.output_dir) / MODEL}")
            return 0
        run = set_up(config, start, ranks, half)
        with closing(run.log):
            if not train_steps(run):
                ranks.say(f"SIGTERM: saved at step {run.state.step}; go on with --resume")
                return STOPPED
            finish(run, start)
    finally:
        ranks.close()
    return 0


def set_up(config: TrainConfig, start: Start, ranks: Ranks, half: bool) -> Run:
    """Read the scores, load the policy, and put in place what a checkpoint has."""
    source, method, training, held_out = _read_scores(config, start, ranks)
    num_pairs = sum(map(len, training))
    steps = total_steps(config, num_pairs)
    ranks.say(_summary(config, method, start, steps))
    forward, optimizer = _load(config, start, ranks, half)
    state = start.checkpoint.state if start.checkpoint else TrainState()
    budget = TokenBudget.of(config.max_tokens, ranks.device, start.tokens, state)
    streams = partial(
        PairStream,
        source,
        renderer=_renderer(start.source),
        method=method,
        seed=config.seed,
        limits=_limits(config, forward.policy.lm.config),
    )
    rows = ENDLESS if config.max_steps else round(config.num_train_epochs * num_pairs)
    stream = streams(training, batch_pairs=config.batch_pairs, total_rows=rows)
    if start.is_base:
        ranks.say(f"guard       {compare_with_base(forward, stream, budget, start.exact)}")
    return Run(
        config=config,
        settings=start.settings,
        forward=forward,
        method=method,
        parameters=[one for group in optimizer.param_groups for one in group["params"]],
        optimizer=optimizer,
        stream=stream,
        held_out=HeldOut(_held_out_stream(streams, held_out), forward, method, config.eval_pairs),
        budget=budget,
        state=state,
        total_steps=steps,
        log=_open_log(config, start, ranks, steps),
        meter=Meter(state, method, ranks.device),
        checkpoints=Path(config.output_dir) / CHECKPOINTS,
    )


def finish(run: Run, start: Start) -> None:
    """Evaluate the final policy, write it, and say where everything is."""
    config, ranks, step = run.config, run.forward.ranks, run.state.step
    if config.load_best_model_at_end:
        best = checkpoint.best(checkpoint.checkpoints(run.checkpoints))
        if best is not None and best.state.step != step:
            checkpoint.load_weights(best, run.forward.policy)
            step = best.state.step
    values = run.held_out.evaluate_all(step, run.budget.tokens)
    folder = Path(config.output_dir)
    partial_model = folder / f".{MODEL}.partial"
    if ranks.first:
        shutil.rmtree(partial_model, ignore_errors=True)
        _write_json(folder / EVALUATION, {"step": step, "method": str(run.method), **values})
    stored: Any = load_config(start.source).dtype
    write_model(partial_model, run.forward.policy, stored or torch.float32, ranks)
    if ranks.first:
        tokenizer = run.stream.renderer.tokenizer
        tokenizer.chat_template = start.source.chat_template or tokenizer.chat_template
        tokenizer.save_pretrained(partial_model)
        (partial_model / "README.md").write_text(_card(run, start, step, values))
        partial_model.rename(folder / MODEL)
        run.log.close()
        for name, value in values.items():
            print(f"{name:<24} {value:,.4f}")
        print(folder / MODEL)
    ranks.barrier()


def _read_scores(
    config: TrainConfig, start: Start, ranks: Ranks
) -> tuple[TrainingPairs, Method, list[Rows], list[Rows]]:
    """The pairs with their scores, the method with its weights, rows to train on and held out."""
    method = method_of(config)
    source = TrainingPairs(
        start.pairs,
        start.scores,
        prompt_numbers=method.reads_prompts,
        fraction=config.train_fraction,
    )
    method = source.prepared(method)
    training, held_out, unusable = source.usable(method, resumed=start.checkpoint is not None)
    num_pairs = sum(map(len, training))
    if num_pairs == 0:
        more = "; raise --train-fraction" if config.train_fraction < 1 else ""
        raise UserError(f"{start.pairs.path}: no pair to train on, {unusable:,} lack a score{more}")
    ranks.say(
        f"pairs       {num_pairs:,} to train on, {sum(map(len, held_out)):,} held out, "
        f"{unusable:,} without a score of the base"
    )
    return source, method, training, held_out


def _load(
    config: TrainConfig, start: Start, ranks: Ranks, half: bool
) -> tuple[PairForward, optim.AdamW]:
    """The policy and its optimizer, as the start has them or the checkpoint."""
    policy = load_policy(start.source, config, ranks, half)
    optimizer = make_optimizer(policy, config)
    if start.checkpoint is not None:
        checkpoint.load(start.checkpoint, policy, optimizer)
    if not policy.packs:
        model_type = policy.lm.config.model_type
        ranks.say(f"rows        one response each: packing is not tested for {model_type}")
    return PairForward(policy, ranks, autocast=half and ranks.world == 1), optimizer


def _renderer(source: PolicySource) -> Renderer:
    return Renderer.load(
        source.tokenizer or source.model,
        revision=source.revision if source.tokenizer is None else None,
        chat_template=source.chat_template,
        chat_template_kwargs=source.chat_template_kwargs,
    )


def _limits(config: TrainConfig, policy: Any) -> dict[str, int]:
    """Tokens that a sequence may have, by the reason that a longer pair is dropped for."""
    context = getattr(policy.get_text_config(), "max_position_embeddings", None)
    limits = {"beyond_context": context, "beyond_max_length": config.max_length}
    return {reason: limit for reason, limit in limits.items() if limit is not None}


def _held_out_stream(streams: Callable[..., PairStream], rows: list[Rows]) -> PairStream | None:
    total = sum(map(len, rows))
    if total == 0:
        return None
    return streams(rows, batch_pairs=BATCH_PAIRS, total_rows=total, held_out=True)


def _open_log(config: TrainConfig, start: Start, ranks: Ranks, steps: int) -> RunLog:
    """The log, cut back to what the checkpoint knows of, and the settings beside it."""
    folder = Path(config.output_dir)
    step, length = 0, 0
    if start.checkpoint is not None:
        step, length = start.checkpoint.state.step, start.checkpoint.log_bytes
    trackers = []
    if ranks.first:
        write_resolved(config, folder / "train.yaml")
        cut(folder, length)
        name = config.run_name or folder.resolve().name
        trackers = open_trackers(config.report_to, name, folder, asdict(config), step)
    return RunLog(folder, trackers, first=ranks.first, step=step, total=steps)


def _summary(config: TrainConfig, method: Method, start: Start, steps: int) -> str:
    """What was derived from the settings, a line each."""
    epsilon = "none" if method.epsilon is None else f"{method.epsilon:g}"
    lines = [
        f"method      {method}: {method.kind}, epsilon {epsilon}, loss {method.loss_type}, "
        f"beta {method.beta:g}",
        *(method.fitted.describe(method.references) if method.fitted else ()),
        f"policy      {start.source.name}",
        f"steps       {steps:,} of {config.batch_pairs} pairs, rate {config.learning_rate:g} "
        f"{config.lr_scheduler_type}",
    ]
    if start.checkpoint is not None:
        lines.append(f"resumed     behind step {start.checkpoint.state.step:,}")
    if warning := beta_warning(method.normalize, method.beta):
        lines.append(f"WARNING: {warning}")
    return "\n".join(lines)


def _card(run: Run, start: Start, step: int, values: dict[str, float]) -> str:
    trained = {
        "optimizer steps": step,
        "pairs trained on": run.state.pairs,
        "pairs that the policy could not take": sum(run.state.dropped.values()),
    }
    return model_card(
        name=run.config.run_name or Path(run.config.output_dir).resolve().name,
        source=start.source,
        method=run.method,
        references=start.scores.references,
        settings=start.settings,
        state=trained,
        held_out=values,
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Complete or not there."""
    partial_file = path.with_name(f".{path.name}.partial")
    partial_file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    partial_file.rename(path)
