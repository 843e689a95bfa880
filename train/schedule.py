"""How long a run is and how its learning rate goes: functions of the step, with no state.

The courses are those of transformers' schedules, step for step, so that a run compares with TRL's.
"""

from __future__ import annotations

import math

from .config import TrainConfig


def total_steps(config: TrainConfig, num_pairs: int) -> int:
    """Optimizer steps of a run over `num_pairs` training pairs."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, math.ceil(round(config.num_train_epochs * num_pairs) / config.batch_pairs))


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The rate of the update after `step` of `total` updates: 0 at the first of a warm-up."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if config.lr_scheduler_type == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate
