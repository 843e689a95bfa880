"""`mrpo train`: everything around the loop, from the settings to the model's folder.

    find_start (start.py)   checks, on the first process; joins the scores
    set_up                  reads the scores, loads the policy and what a checkpoint has of it
    train_steps (loop.py)   the optimizer steps
    finish                  the figures on all held-out pairs, and the model's folder with its card

`run_folder.py` lists the files of a run.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers.utils import logging as transformers_logging

from ..data.rendering import Renderer
from ..errors import UserError
from ..files import new_folder, write_text
from ..method.grammar import beta_warning, epsilon_warning
from ..method.objective import Method
from ..model.rates import slow_precision
from ..settings import command, write_resolved
from . import checkpoint
from .checkpoint import TrainState
from .config import TrainConfig
from .dataset import Rows, TrainingPairs, Usable, method_of
from .distributed import Ranks
from .forward import EVALUATION_PAIRS, HeldOut, PairForward
from .logs import Meter, RunLog, open_trackers
from .loop import Run, total_steps, train_steps
from .memory import TokenBudget
from .observations import observations
from .policy import (
    PolicySource,
    gather_weights,
    load_config,
    load_policy,
    make_optimizer,
    write_model,
)
from .run_folder import RunFolder, read_evaluation, read_log, update_evaluation
from .start import Start, compare_with_base, find_start
from .stream import PairStream, refusals, refuse_all

STOPPED = 143  # a shell's exit code after SIGTERM: 128 + 15
ENDLESS = 2**62  # rows: --max-steps ends the run
RECIPE = (
    "beta", "loss_type", "loss_weights", "f_divergence_type", "label_smoothing", "sft_weight",
    "normalize", "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay",
    "max_grad_norm", "batch_pairs", "shuffle", "train_fraction", "train_subset", "label_noise",
    "num_train_epochs", "max_steps", "max_length",
    "lora_rank", "bf16", "seed",
)  # fmt: skip  # the settings that the model card shows


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where a run is, and how far it got."""

    folder: RunFolder
    status: Literal["finished", "stopped"]  # stopped by SIGTERM: resume continues
    held_out: dict[str, float]  # figures on all held-out pairs; empty without any, or if stopped

    @property
    def exit_code(self) -> int:
        return STOPPED if self.status == "stopped" else 0


@command(TrainConfig)
def train(config: TrainConfig) -> TrainResult:
    """Train a policy, or resume the run in `output_dir`.

    Prints what was derived from the settings, and at the end the held-out figures. Raises
    `UserError` for settings, pairs or scores that can't be trained on.
    """
    transformers_logging.disable_progress_bar()
    folder = RunFolder(config.output_dir)
    ranks = Ranks.start(config.device)
    try:
        bf16 = config.bf16 if config.bf16 is not None else ranks.device.type == "cuda"
        on_cpu = bf16 and ranks.first and ranks.device.type == "cpu"
        if on_cpu and (slow := slow_precision("bfloat16")):
            ranks.say(f"WARNING: {slow}; leave out --bf16")
        start = ranks.on_first(lambda: find_start(config, ranks, bf16))
        if start.checkpoint is not None and folder.finished:
            ranks.say(f"this run is finished: {folder.model}")
            training = read_evaluation(folder.evaluation).get("training", {})
            return TrainResult(folder, "finished", training.get("figures", {}))
        run = set_up(config, start, ranks, bf16)
        with closing(run.log):
            if not train_steps(run):
                ranks.say(f"SIGTERM: saved at step {run.state.step}; continue with --resume")
                return TrainResult(folder, "stopped", {})
            return TrainResult(folder, "finished", finish(run))
    finally:
        ranks.close()


def set_up(config: TrainConfig, start: Start, ranks: Ranks, bf16: bool) -> Run:
    """Read the scores, load the policy, and restore what a checkpoint has."""
    renderer, limits = _renderer(start.source), _limits(config, start.source)
    source, method, usable = _read_scores(config, start, ranks, renderer, limits)
    num_pairs, num_held_out = _count(usable.training), _count(usable.held_out)
    steps = total_steps(config, num_pairs)
    ranks.say(_summary(config, method, start, steps))
    policy = load_policy(start.source, config, ranks, bf16)
    optimizer = make_optimizer(policy, config)
    state, log_bytes = TrainState(dropped=usable.refused), 0
    if start.checkpoint is not None:
        checkpoint.load(start.checkpoint, policy, optimizer)
        state, log_bytes = start.checkpoint.state, start.checkpoint.log_bytes
    if not policy.packs:
        model_type = policy.lm.config.model_type
        ranks.say(f"rows        one response each: packing is not tested for {model_type}")
    forward = PairForward(policy, ranks, autocast=bf16 and ranks.world == 1)
    budget = TokenBudget.of(config.max_tokens, ranks.device, start.tokens, state, start.per_token)
    make_stream = partial(
        PairStream,
        source,
        renderer=renderer,
        method=method,
        seed=config.seed,
        limits=limits,
    )
    rows = ENDLESS if config.max_steps else round(config.num_train_epochs * num_pairs)
    stream = make_stream(
        usable.training,
        batch_pairs=config.batch_pairs,
        total_rows=rows,
        by_prompt=config.shuffle == "prompts",
    )
    held_out_stream = None
    if num_held_out:
        held_out_stream = make_stream(
            usable.held_out, batch_pairs=EVALUATION_PAIRS, total_rows=num_held_out, held_out=True
        )
    if start.tolerance is not None:
        guard = compare_with_base(forward, stream, budget.tokens, start.tolerance)
        ranks.say(f"guard       {guard}")
    folder, trackers = start.folder, []
    if ranks.first:
        write_resolved(config, folder.settings)
        trackers = open_trackers(
            config.report_to, _name(config), folder, asdict(config), state.step
        )
    log = RunLog(
        folder.log, trackers, first=ranks.first, step=state.step, total=steps, length=log_bytes
    )
    return Run(
        config=config,
        start=start,
        forward=forward,
        method=method,
        optimizer=optimizer,
        stream=stream,
        held_out=HeldOut(held_out_stream, forward, method, config.eval_pairs),
        budget=budget,
        state=state,
        total_steps=steps,
        log=log,
        meter=Meter(state, method, ranks.device),
    )


def finish(run: Run) -> dict[str, float]:
    """Evaluate the final policy, write it, and print figures and folder; returns the figures."""
    ranks, step, folder = run.forward.ranks, run.state.step, run.start.folder
    if run.config.load_best_model_at_end:
        best = checkpoint.best(checkpoint.checkpoints(folder.checkpoints))
        if best is not None and best.state.step != step:
            checkpoint.load_weights(best, run.forward.policy)
            step = best.state.step
    figures = run.held_out.evaluate_all(step, run.budget.tokens)
    weights = gather_weights(run.forward.policy)
    if ranks.first:
        training = {"step": step, "method": str(run.method), "figures": figures}
        update_evaluation(folder.evaluation, {"training": training})
        with new_folder(folder.model) as model:
            tokenizer = run.stream.renderer.tokenizer
            write_model(model, run.forward.policy, weights, run.start.source, tokenizer)
            write_text(model / "README.md", model_card(run, step, figures))
        run.log.close()
        for name, value in figures.items():
            print(f"{name:<24} {value:,.4f}")
        for sentence in observations(read_log(folder.path), run.method.weighting):
            print(f"NOTE: {sentence}")
        print(folder.model)
        if Path(run.config.pairs or "pairs").resolve() != folder.pairs.resolve():
            shutil.rmtree(folder.pairs, ignore_errors=True)  # no step needs them any more
    ranks.barrier()
    return figures


def _read_scores(
    config: TrainConfig, start: Start, ranks: Ranks, renderer: Renderer, limits: Mapping[str, int]
) -> tuple[TrainingPairs, Method, Usable]:
    """The pairs with their scores, the method with its weights, and the rows to use.

    The schedule counts the pairs that are trained on, so all of them are rendered before the first
    step. With --max-steps it doesn't, and pairs are dropped as they are met.
    """
    method = method_of(config)
    source = TrainingPairs(
        start.pairs,
        start.scores,
        method.reads_prompts,
        config.train_fraction,
        config.label_noise,
        config.seed,
        config.train_subset,
    )
    method = source.prepared(method)
    exact = config.max_steps is None
    usable = source.usable(
        method,
        resumed=start.checkpoint is not None,
        reasons_of=partial(refusals, renderer=renderer, limits=limits) if exact else None,
        ranks=ranks,
    )
    if not _count(usable.training):
        if usable.refused:
            refuse_all(usable.refused)
        more = "; raise --train-fraction" if config.train_fraction < 1 else ""
        raise UserError(
            f"{start.pairs.path}: no pair to train on, {usable.unusable:,} lack a score{more}"
        )
    refused = start.checkpoint.state.dropped if start.checkpoint is not None else usable.refused
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in refused.items())
    ranks.say(
        f"pairs       {'' if exact else 'up to '}{_count(usable.training):,} to train on, "
        f"{_count(usable.held_out):,} held out, {usable.unusable:,} without a score of the base"
        + (f", {sum(refused.values()):,} that the policy can't take ({reasons})" if refused else "")
    )
    if config.label_noise:
        turned = sum(int(source.turned(n)[rows].sum()) for n, rows in enumerate(usable.training))
        ranks.say(f"label noise {turned:,} of the pairs to train on have their label turned round")
    return source, method, usable


def _limits(config: TrainConfig, source: PolicySource) -> dict[str, int]:
    """The most tokens of a sequence, by the reason under which a longer pair is dropped."""
    context = getattr(load_config(source).get_text_config(), "max_position_embeddings", None)
    limits = {"beyond_context": context, "beyond_max_length": config.max_length}
    return {reason: limit for reason, limit in limits.items() if limit is not None}


def _count(rows_of_shards: list[Rows]) -> int:
    return sum(map(len, rows_of_shards))


def _renderer(source: PolicySource) -> Renderer:
    return Renderer.load(
        source.tokenizer or source.model,
        revision=source.revision if source.tokenizer is None else None,
        chat_template=source.chat_template,
        chat_template_kwargs=source.chat_template_kwargs,
        system_role=source.system_role,
    )


def _name(config: TrainConfig) -> str:
    return config.run_name or Path(config.output_dir).resolve().name


def _summary(config: TrainConfig, method: Method, start: Start, steps: int) -> str:
    """What was derived from the settings, as aligned lines."""
    epsilon = "none" if method.epsilon is None else f"{method.epsilon:g}"
    whose = "MRPO authors' for LoRA" if config.lora_rank else "TRL's for full fine-tuning"
    default = f", the default ({whose})" if config.learning_rate == config.default_rate else ""
    lines = [
        f"method      {method}: {method.kind}, epsilon {epsilon}, loss {method.loss_type}, "
        f"beta {method.beta:g}",
        *method.describe(),
        f"policy      {start.source.name}",
        f"steps       {steps:,} of {config.batch_pairs} pairs, {config.lr_scheduler_type} rate "
        f"up to {config.peak_rate:g}{default}",
    ]
    if start.checkpoint is not None:
        lines.append(f"resumed     after step {start.checkpoint.state.step:,}")
    warnings = beta_warning(method.normalize, method.beta), epsilon_warning(method.epsilon)
    lines += [f"WARNING: {warning}" for warning in warnings if warning]
    return "\n".join(lines)


def model_card(run: Run, step: int, held_out: Mapping[str, float]) -> str:
    """README.md of the model's folder, with the front matter that the Hub reads."""
    method, settings, source = run.method, run.start.settings, run.start.source
    head: dict[str, Any] = {} if Path(source.model).is_dir() else {"base_model": source.model}
    head |= {
        "library_name": "peft" if settings["lora_rank"] else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mrpo", "dpo", "preference-optimization"],
    }
    references = {
        f"{alias} | {reference.entry['model']}": reference.identity
        for alias, reference in zip(method.references, run.start.scores.references)
    }
    clipping = "no clipping" if method.epsilon is None else f"clipping (CTRO) {method.epsilon:g}"
    combined = f"Combined as `{method.kind}`, weighting `{method.weighting}`, {clipping}."
    if method.weights is not None:  # all pairs share them
        weights = zip(method.references, method.weights)
        combined += f" Weights: {', '.join(f'{alias} {weight:.3f}' for alias, weight in weights)}."
    if method.reliability is not None:
        combined += (
            f" Labels: {method.reliability.full.noise:.1%} judged wrong by the references; each "
            "pair's loss is smoothed by its own chance of a wrong label."
        )
    trained = {
        "optimizer steps": step,
        "pairs trained on, over all epochs": run.state.pairs,
        "pairs that the policy could not take": sum(run.state.dropped.values()),
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {_name(run.config)}",
        f"{source.name}, fine-tuned on preference pairs with `{method}` by mrpo (Multi-Reference "
        "Preference Optimization, [arXiv 2405.16388](https://arxiv.org/abs/2405.16388)).",
        "## References",
        "Their log-probs were computed before training and cached; the first is the base.",
        _table("| alias | model | identity of its scores |\n|---|---|---|", references),
        combined,
        "## Recipe",
        _table("| setting | value |\n|---|---|", {name: settings.get(name) for name in RECIPE}),
        "## Data",
        f"Digest of the pairs: `{settings['pairs digest']}`.",
        _table("| | |\n|---|---|", trained),
        "## Held-out pairs",
        _table("| figure | value |\n|---|---|", held_out) if held_out else "None were held out.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: str, values: Mapping[str, Any]) -> str:
    """A Markdown table of names and values, without the values that are None."""
    shown = {
        name: f"{value:.4g}" if isinstance(value, float) else value
        for name, value in values.items()
        if value is not None
    }
    return "\n".join([head, *(f"| {name} | {value} |" for name, value in shown.items())])
