"""The model card of a trained policy: recipe, data, references and what held-out pairs say.

Written as README.md into the model's folder, with the front matter that the Hub reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..data.join import JoinedReference
from .objective import Method
from .policy import PolicySource

RECIPE = (
    "beta", "loss_type", "label_smoothing", "sft_weight", "normalize", "learning_rate",
    "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm", "batch_pairs",
    "train_fraction", "num_train_epochs", "max_steps", "max_length", "lora_rank", "bf16", "seed",
)  # fmt: skip


def model_card(
    *,
    name: str,
    source: PolicySource,
    method: Method,
    references: Sequence[JoinedReference],
    settings: Mapping[str, Any],
    state: Mapping[str, Any],
    held_out: Mapping[str, float],
) -> str:
    """The card's text. `state` has what was trained: steps, pairs and those dropped."""
    on_hub = {} if Path(source.model).is_dir() else {"base_model": source.model}
    head = on_hub | {
        "library_name": "peft" if settings["lora_rank"] else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mrpo", "dpo", "preference-optimization"],
    }
    rows = {key: settings[key] for key in RECIPE if settings[key] is not None}
    columns = zip(method.references, method.columns)
    table = [
        f"| {alias} | {references[column].entry['model']} | {references[column].identity} |"
        for alias, column in columns
    ]
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        f"{source.name}, fine-tuned on preference pairs with `{method}` by mrpo (Multi-Reference "
        "Preference Optimization, [arXiv 2405.16388](https://arxiv.org/abs/2405.16388)).",
        "## References",
        "Their log-probs were computed before training and cached; the first is the base.",
        "| alias | model | identity of its scores |\n|---|---|---|\n" + "\n".join(table),
        _weighting(method),
        "## Recipe",
        "| setting | value |\n|---|---|\n" + _rows(rows),
        "## Data",
        f"Digest of the pairs: `{settings['pairs digest']}`.",
        "| | |\n|---|---|\n" + _rows(state),
        "## Held-out pairs",
        "| figure | value |\n|---|---|\n" + _rows(held_out) if held_out else "None were held out.",
    ]
    return "\n\n".join(lines) + "\n"


def _weighting(method: Method) -> str:
    """How the references are combined, with the weights where all pairs share them."""
    clipping = "no clipping" if method.epsilon is None else f"clipping (CTRO) {method.epsilon:g}"
    line = f"Combined as `{method.kind}`, weighting `{method.weighting}`, {clipping}."
    if method.weights is None:
        return line
    weights = ", ".join(
        f"{alias} {weight:.3f}" for alias, weight in zip(method.references, method.weights)
    )
    return f"{line} Weights: {weights}."


def _rows(values: Mapping[str, Any]) -> str:
    shown = {
        key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()
    }
    return "\n".join(f"| {key} | {value} |" for key, value in shown.items())
