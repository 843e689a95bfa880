"""The settings of `mrpo train`: names as TRL's users know them, defaults as the authors' code.

`configs/train.yaml` holds the same keys with a comment each; a test keeps the two equal, and
another that every key is read somewhere. Standard library only: help loads nothing.


Settings of `mrpo export`: its flags, YAML keys and defaults. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ..errors import UserError
from ..settings import Also

POSITIVE = (
    "learning_rate", "train_fraction", "num_train_epochs", "max_steps", "batch_pairs",
    "max_length", "max_tokens", "lora_rank", "lora_alpha", "logging_steps", "eval_steps",
    "eval_pairs", "save_steps", "save_total_limit",
)  # fmt: skip


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Train a policy on preference pairs and the references' cached scores.

    No reference is loaded: the scores come from the store that `mrpo precompute` filled, and a
    step costs what DPO without a reference costs, for any number of references. The policy alone
    is written, as an ordinary model folder in `OUTPUT_DIR/model`.

    Example: `mrpo train --pairs pairs --refs llama,mistral,qwen --method mrpo --output-dir runs/a`
    """

    output_dir: Annotated[str, "Folder of the run: settings, log, scores, checkpoints, model/."]
    pairs: Annotated[
        str | None, "Folder of pairs as `mrpo prepare` writes it; by default `pairs`."
    ] = None
    data: Annotated[
        str | None,
        "A source to prepare into that folder first, as `mrpo prepare` takes it.",
        Also("dataset_name"),
    ] = None
    refs: Annotated[
        str | None, "Aliases in order, the base first. By default those that --method names."
    ] = None
    refs_config: Annotated[str, "The file that says what an alias is."] = "configs/refs.yaml"
    store: Annotated[str | None, "The score store. By default $MRPO_STORE, else `store`."] = None
    policy: Annotated[
        str | None,
        "Hub id or folder to start from. By default the base reference's model.",
        Also("model_name_or_path"),
    ] = None
    policy_revision: Annotated[
        str | None, "Commit, branch or tag of a policy on the Hub.", Also("model_revision")
    ] = None
    chat_template: Annotated[
        str | None, "A .jinja file in place of the policy's own chat template."
    ] = None

    method: Annotated[str, "METHOD[:ref/ref...][+weighting]: mrpo, multi-dpo, dpo:x, ..."] = "mrpo"
    reference_kind: Annotated[
        Literal["harmonic", "geometric", "arithmetic"] | None,
        "How several references become one. By default the method's.",
    ] = None
    weighting: Annotated[
        str | None, "Weights of the references: uniform, arwc, vdw, ... By default the method's."
    ] = None
    weights: Annotated[str | None, "Fixed weights, one per reference, as 0.5,0.3,0.2."] = None
    epsilon: Annotated[
        float | Literal["none"] | None,
        "Clipping (CTRO) around the base, or none. By default the method's, 0.1 for mrpo.",
    ] = None
    adaptive_epsilon: Annotated[
        bool, "Split epsilon between chosen and rejected as the authors' code does."
    ] = True
    normalize: Annotated[
        Literal["none", "token", "byte"], "Divide log-probs by the response's length."
    ] = "none"
    loss_type: Annotated[str, "sigmoid (DPO's), hinge, ipo, ..."] = "sigmoid"
    beta: Annotated[float, "Strength of the tie to the references."] = 0.1
    label_smoothing: Annotated[float, "Assumed share of flipped labels."] = 0.0
    sft_weight: Annotated[float, "Weight of a likelihood term of the chosen response."] = 0.0

    learning_rate: Annotated[float, "Peak learning rate."] = 1e-5
    lr_scheduler_type: Annotated[
        Literal["cosine", "linear", "constant"], "Course of the rate after the warm-up."
    ] = "cosine"
    warmup_ratio: Annotated[float, "Share of the steps over which the rate rises."] = 0.1
    weight_decay: Annotated[float, "AdamW's decay, of matrices only."] = 0.0
    adam_beta1: Annotated[float, "AdamW's first-moment decay."] = 0.9
    adam_beta2: Annotated[float, "AdamW's second-moment decay."] = 0.999
    adam_epsilon: Annotated[float, "AdamW's denominator floor."] = 1e-8
    max_grad_norm: Annotated[float, "Gradients are clipped to this norm; 0 clips nothing."] = 1.0
    train_fraction: Annotated[
        float, "Share of the training pairs to use, by prompt; part of every larger share."
    ] = 1.0
    num_train_epochs: Annotated[float, "Times through the training pairs."] = 1.0
    max_steps: Annotated[int | None, "Optimizer steps; overrides --num-train-epochs."] = None
    batch_pairs: Annotated[int, "Pairs per optimizer step, over all devices."] = 8
    seed: Annotated[int, "Of the order of pairs and the LoRA initialization."] = 42

    max_length: Annotated[
        int | None, "Tokens of prompt and response. Longer pairs are dropped, never truncated."
    ] = None
    max_tokens: Annotated[
        int | Literal["auto"],
        "Tokens of a micro-batch; auto grows it until the device's memory is nearly full.",
    ] = "auto"
    max_missing: Annotated[
        float, "Refuse when a larger share of pairs lacks a reference's score for good."
    ] = 0.05
    lora_rank: Annotated[
        int | None, "Train a LoRA adapter of this rank, not all weights.", Also("lora_r")
    ] = None
    lora_alpha: Annotated[int | None, "LoRA's scale. By default twice the rank."] = None
    lora_dropout: Annotated[float, "Dropout before the LoRA matrices."] = 0.0
    lora_target_modules: Annotated[str, "Layers that get LoRA, by comma."] = "all-linear"
    bf16: Annotated[
        bool | None, "bfloat16 autocast over float32 weights. By default on a GPU only."
    ] = None
    gradient_checkpointing: Annotated[bool, "Recompute activations: less memory, slower."] = False
    torch_compile: Annotated[bool, "Compile the model."] = False
    device: Annotated[str | None, "cpu or cuda. By default cuda where there is one."] = None

    logging_steps: Annotated[int, "Steps between two lines of the log."] = 1
    eval_steps: Annotated[int, "Steps between two evaluations on the validation pairs."] = 100
    eval_pairs: Annotated[int, "Validation pairs of an evaluation during training."] = 512
    save_steps: Annotated[int, "Steps between two checkpoints."] = 100
    save_total_limit: Annotated[int, "Last checkpoints kept, beside the best one."] = 2
    load_best_model_at_end: Annotated[
        bool, "Write the checkpoint of best held-out accuracy, not the last weights."
    ] = False
    resume: Annotated[bool, "Go on from the last complete checkpoint of --output-dir."] = False
    report_to: Annotated[str, "Trackers by comma: tensorboard, wandb, trackio; or none."] = "none"
    run_name: Annotated[str | None, "Name in the trackers. By default the output folder's."] = None

    def __post_init__(self) -> None:
        for name in POSITIVE:
            value = getattr(self, name)
            if isinstance(value, int | float) and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
        for name in (
            "warmup_ratio", "label_smoothing", "lora_dropout", "max_missing", "train_fraction"
        ):  # fmt: skip
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be in [0, 1]")
        for name in ("weight_decay", "max_grad_norm", "sft_weight", "seed"):
            value = getattr(self, name)
            if not value >= 0:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be 0 or more")


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """Write a data set with the virtual reference's log-probs, for other trainers.

    Each usable pair gets `ref_chosen_logps` and `ref_rejected_logps`, so that the sigmoid loss of
    TRL's DPOTrainer is the loss of the method. docs/trl.md has the few lines that make TRL take
    them. beta and the loss type are the trainer's own.

    Example: `mrpo export --pairs pairs --refs llama,qwen --method mrpo --out exports/mrpo`
    """

    pairs: Annotated[str, "Folder of pairs as `mrpo prepare` writes it."]
    out: Annotated[str, "Folder to write; an earlier export there is replaced."]
    format: Annotated[Literal["trl"], "The trainer that is to read it."] = "trl"
    refs: Annotated[
        str | None, "Aliases in order, the base first. By default those that --method names."
    ] = None
    refs_config: Annotated[str, "The file that says what an alias is."] = "configs/refs.yaml"
    store: Annotated[str | None, "The score store. By default $MRPO_STORE, else `store`."] = None
    method: Annotated[str, "METHOD[:ref/ref...][+weighting], as in `mrpo train`."] = "mrpo"
    reference_kind: Annotated[
        Literal["harmonic", "geometric", "arithmetic"] | None,
        "How several references become one. By default the method's.",
    ] = None
    weighting: Annotated[str | None, "Weights of the references. By default the method's."] = None
    weights: Annotated[str | None, "Fixed weights, one per reference, as 0.5,0.3,0.2."] = None
    epsilon: Annotated[
        float | Literal["none"] | None,
        "Clipping (CTRO) around the base, or none. By default the method's, 0.1 for mrpo.",
    ] = None
    adaptive_epsilon: Annotated[
        bool, "Split epsilon between the two responses, as MRPO does; otherwise all for both."
    ] = True
