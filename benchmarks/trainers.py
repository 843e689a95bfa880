"""The training programs that `training.py` compares, each run in the child of a measurement."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mrpo.benchmarks.common import Child
from mrpo.benchmarks.workload import messages
from mrpo.data.shards import PairShards

if TYPE_CHECKING:
    from mrpo.train.config import TrainConfig
    from mrpo.train.loop import Run

RATE, BETA, SEED = 1e-4, 0.1, 1


def scores_file(pairs: Path) -> Path:
    """The base's summed log-probs [N, 2] of a folder of pairs."""
    return pairs.with_suffix(".scores.npy")


def order_file(pairs: Path) -> Path:
    """The rows of a folder of pairs in the order in which they are trained on."""
    return pairs.with_suffix(".order.npy")


@dataclass(slots=True)
class Steps:
    """What a run was after each of its steps; a tracker of its log writes them."""

    graphs: list[int]  # compiled so far; what grows behind a warm-up are recompilations
    peaks: list[int]  # bytes of the GPU at the step's peak

    @classmethod
    def none(cls) -> Steps:
        return cls(graphs=[0], peaks=[0])

    def log(self, *arguments: Any, **kwargs: Any) -> None:
        import torch
        from torch._dynamo.utils import counters

        self.graphs.append(counters["stats"]["unique_graphs"])
        self.peaks.append(torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0)

    def finish(self) -> None: ...


def run_to_end(config: TrainConfig, bf16: bool) -> tuple[Run, list[dict[str, Any]], Steps]:
    """`mrpo train` to the end of its loop: the run, the lines of its steps in the log, and more of
    these steps."""
    from mrpo.train.distributed import Ranks
    from mrpo.train.loop import train_steps
    from mrpo.train.run import set_up
    from mrpo.train.start import find_start

    ranks, steps = Ranks.start(config.device), Steps.none()
    run = set_up(config, find_start(config, ranks, bf16), ranks, bf16)
    run.log.trackers.append(steps)
    train_steps(run)
    run.log.close()
    log = Path(config.output_dir, "log.jsonl").read_text().splitlines()
    return run, [line for line in map(json.loads, log) if "loss" in line], steps


def train_here(child: Child, method: str, references: int) -> None:
    """`mrpo train` to the end of its loop; the times are those of its own log of every step."""
    import mrpo.train.run  # noqa: F401
    from mrpo.train.config import TrainConfig

    child.measurement.imported()
    options = child.options
    config = TrainConfig(
        output_dir=str(child.folder / f"run-{time.time_ns()}"),
        pairs=str(child.pairs),
        refs=",".join(f"ref{k}" for k in range(references)),
        refs_config=str(child.folder / "refs.yaml"),
        store=str(child.folder / "store"),
        method=method,
        beta=BETA,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        max_steps=options["warm_up"] + options["steps"],
        batch_pairs=options["batch_pairs"],
        max_tokens=options["max_tokens"],
        seed=SEED,
        eval_steps=2**31,
        save_steps=2**31,
    )
    run, lines, steps = run_to_end(config, options["gpu"])
    seconds = [line["perf/step_seconds"] for line in lines[options["warm_up"] :]]
    child.measurement.figures |= {
        "seconds": sum(seconds),
        "step_seconds": seconds,
        "losses": [line["loss"] for line in lines],
        "compiled_graphs": steps.graphs[options["warm_up"]],
        "recompiled_graphs": steps.graphs[-1] - steps.graphs[options["warm_up"]],
    }
    keep(child, run.forward.policy.lm)


def train_in_trl(child: Child, cached: bool, checkpointing: bool) -> None:
    """TRL's DPOTrainer over the pairs in our order; `cached` scores as docs/trl.md shows."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    child.measurement.imported()
    options, losses, ends = child.options, [], []
    rows = messages(PairShards(child.pairs).pairs(0))
    if cached:
        for row, (chosen, rejected) in zip(rows, np.load(scores_file(child.pairs)).tolist()):
            row |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    class Recording(DPOTrainer):
        def _precompute_ref_logps(self, dataset: Any, *arguments: Any) -> Any:
            return dataset

        def compute_loss(self, *arguments: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*arguments, **kwargs)
            losses.append(loss.detach())
            return loss

    class Clock(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

        def on_log(self, *arguments: Any, **kwargs: Any) -> None:
            if len(ends) <= options["warm_up"] + options["steps"]:  # the last line is a summary
                ends.append(time.perf_counter())

    steps = options["warm_up"] + options["steps"]
    trainer = Recording(
        model=child.model,
        args=DPOConfig(
            output_dir=str(child.folder / "trl"),
            beta=BETA,
            precompute_ref_log_probs=cached,
            max_length=None,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            per_device_train_batch_size=options["trl_batch"],
            gradient_accumulation_steps=options["batch_pairs"] // options["trl_batch"],
            train_sampling_strategy="sequential",
            max_steps=steps,
            logging_steps=1,
            gradient_checkpointing=checkpointing,
            bf16=options["gpu"],
            use_cpu=not options["gpu"],
            save_strategy="no",
            report_to="none",
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_list([rows[i] for i in np.load(order_file(child.pairs))]),
        callbacks=[Clock()],
    )
    trainer.train()
    seconds = np.diff(ends)[options["warm_up"] :].tolist()
    child.measurement.figures |= {
        "seconds": sum(seconds),
        "step_seconds": seconds,
        "losses": np.reshape([loss.item() for loss in losses], (steps, -1)).mean(1).tolist(),
    }
    keep(child, trainer.model)


def keep(child: Child, model: Any) -> None:
    """Save the final weights, to compare them with the other variants'."""
    import torch

    if not child.options["gpu"]:
        torch.save(model.state_dict(), child.folder / f"{child.variant}.pt")
