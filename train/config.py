"""Settings of `mrpo train` and `mrpo export`. Standard library only.

Names are those that TRL's users know, defaults those of the MRPO authors' code, except for the
learning rate of full fine-tuning.
`configs/train.yaml` holds the keys of `mrpo train` with a comment each; tests keep the two equal
and check that every key is read somewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ..errors import UserError
from ..settings import Also, ScoredPairSettings, above_zero, at_least_zero, no_effect, seed, share

# Peak learning rates: TRL's default for DPO, and that of the MRPO authors' code, which trains LoRA
# on q and v. All weights at LoRA's rate forget much of what the policy knew.
FULL_RATE, LORA_RATE = 1e-6, 1e-5


@dataclass(kw_only=True, slots=True)
class MethodConfig(ScoredPairSettings):
    """The scored pairs, and the method that makes one virtual reference of several."""

    refs: Annotated[
        str | None,
        "Aliases of references, comma-separated, the base first. By default those that --method "
        "names.",
    ] = None
    method: Annotated[
        str,
        "METHOD[:ref/ref…][+weighting][+reliable], such as mrpo, dpo:x, geometric+reliable.",
    ] = "mrpo"
    reference_kind: Annotated[
        Literal["harmonic", "geometric", "arithmetic"] | None,
        "How several references become one. By default the method's.",
    ] = None
    weighting: Annotated[
        str | None,
        "Weights of the references, such as uniform, arwc, vdw. By default the method's.",
    ] = None
    weights: Annotated[str | None, "Fixed weights, one for each reference, as 0.5,0.3,0.2."] = None
    epsilon: Annotated[
        float | Literal["none"] | None,
        "Clipping (CTRO) around the base, or none. By default the method's, 0.1 for mrpo.",
    ] = None
    adaptive_epsilon: Annotated[
        bool,
        "Split epsilon between chosen and rejected as the authors' code does, instead of using "
        "all of it for each.",
    ] = True


@dataclass(kw_only=True, slots=True)
class TrainConfig(MethodConfig):
    """Train a policy on preference pairs and the references' stored scores.

    No reference is loaded: the scores come from the store that `mrpo precompute` filled, and a
    step costs what DPO without a reference costs, for any number of references. Only the policy
    is written, as an ordinary model folder in `OUTPUT_DIR/model`.

    Example: `mrpo train --pairs pairs --refs llama,mistral,qwen --method mrpo --output-dir runs/a`
    """

    output_dir: Annotated[str, "Folder of the run: settings, log, scores, checkpoints, model/."]
    data: Annotated[
        str | None,
        "A source to prepare into --pairs first, as `mrpo prepare` takes it; 5 % are held out "
        "unless it has a split column.",
        Also("dataset_name"),
    ] = None
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

    normalize: Annotated[
        Literal["none", "token", "byte"], "Divide log-probs by the response's length."
    ] = "none"
    loss_type: Annotated[
        str,
        "The loss, under TRL's names: sigmoid (DPO's), sigmoid_norm, ipo, hinge, robust, exo_pair, "
        "nca_pair, bco_pair, sppo_hard, apo_zero, apo_down or discopop; or several with commas "
        "between them, such as sigmoid,bco_pair,sft.",
    ] = "sigmoid"
    loss_weights: Annotated[
        str | None, "One weight for each of several losses, as 0.8,0.2,1. By default 1 each."
    ] = None
    f_divergence_type: Annotated[
        Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"],
        "What holds the policy to the references.",
    ] = "reverse_kl"
    f_alpha_divergence_coef: Annotated[float, "alpha of alpha_divergence."] = 0.5
    beta: Annotated[float, "How strongly the policy is held to the references."] = 0.1
    label_smoothing: Annotated[float, "Assumed share of flipped labels."] = 0.0
    sft_weight: Annotated[float, "Weight of a likelihood term of the chosen response."] = 0.0

    learning_rate: Annotated[
        float | None,
        "Peak learning rate. By default 1e-6, TRL's for full fine-tuning, and with --lora-rank "
        "1e-5, that of the MRPO authors' code, which trains LoRA.",
    ] = None
    lr_scheduler_type: Annotated[
        Literal["cosine", "linear", "constant"], "Schedule of the rate after the warm-up."
    ] = "cosine"
    warmup_ratio: Annotated[float, "Share of the steps over which the rate rises."] = 0.1
    weight_decay: Annotated[float, "AdamW's weight decay, of matrices only."] = 0.0
    adam_beta1: Annotated[float, "AdamW's first-moment decay."] = 0.9
    adam_beta2: Annotated[float, "AdamW's second-moment decay."] = 0.999
    adam_epsilon: Annotated[float, "AdamW's denominator floor."] = 1e-8
    max_grad_norm: Annotated[float, "Gradients are clipped to this norm; 0: no clipping."] = 1.0
    train_fraction: Annotated[
        float, "Share of the training pairs to use, by prompt; part of every larger share."
    ] = 1.0
    train_subset: Annotated[
        int, "Which random draw of --train-fraction: 0, 1, …; each has other prompts."
    ] = 0
    label_noise: Annotated[
        float,
        "Share of the training prompts whose labels are turned round, drawn by --seed; part of "
        "every larger share. Held-out labels stay.",
    ] = 0.0
    num_train_epochs: Annotated[float, "Passes over the training pairs."] = 1.0
    max_steps: Annotated[int | None, "Optimizer steps; overrides --num-train-epochs."] = None
    batch_pairs: Annotated[int, "Pairs per optimizer step, over all devices."] = 8
    shuffle: Annotated[
        Literal["rows", "prompts"],
        "What is put in random order: pairs, or prompts with their pairs side by side, so that a "
        "batch computes each response of ranked data once.",
    ] = "rows"
    seed: Annotated[
        int, "Seed of the order of pairs, the LoRA initialization and the label noise."
    ] = 42

    max_length: Annotated[
        int | None,
        "Tokens of prompt and response; longer pairs are dropped, never truncated. By default the "
        "policy's context.",
    ] = None
    max_tokens: Annotated[
        int | Literal["auto"],
        "Tokens of a micro-batch; auto grows it until the device's memory is nearly full.",
    ] = "auto"
    max_missing: Annotated[
        float, "Refuse when a larger share of pairs permanently lacks a reference's score."
    ] = 0.05
    lora_rank: Annotated[
        int | None, "Train a LoRA adapter of this rank, not all weights.", Also("lora_r")
    ] = None
    lora_alpha: Annotated[int | None, "LoRA's scale. By default twice the rank."] = None
    lora_dropout: Annotated[float, "Dropout before the LoRA matrices."] = 0.0
    lora_target_modules: Annotated[str, "Layers that get LoRA, comma-separated."] = "all-linear"
    use_rslora: Annotated[bool, "rsLoRA: LoRA's scale divided by the root of the rank."] = False
    use_dora: Annotated[bool, "DoRA: the weights' magnitudes are trained beside LoRA."] = False
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
    save_total_limit: Annotated[int, "Latest checkpoints kept, beside the best one."] = 2
    load_best_model_at_end: Annotated[
        bool, "Write the checkpoint of best held-out accuracy, not the last weights."
    ] = False
    resume: Annotated[bool, "Continue from the last complete checkpoint of --output-dir."] = False
    report_to: Annotated[
        str, "Trackers, comma-separated: tensorboard, wandb, trackio; or none."
    ] = "none"
    run_name: Annotated[str | None, "Name in the trackers. By default the output folder's."] = None

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            self.learning_rate = self.default_rate
        above_zero(self, "learning_rate", "num_train_epochs", "train_fraction", "max_steps")
        above_zero(self, "batch_pairs", "max_length", "max_tokens", "lora_rank", "lora_alpha")
        above_zero(self, "logging_steps", "eval_steps", "eval_pairs", "save_steps")
        above_zero(self, "save_total_limit")
        at_least_zero(self, "weight_decay", "max_grad_norm", "sft_weight", "adam_epsilon")
        at_least_zero(self, "train_subset")
        seed(self, "seed")
        share(self, "warmup_ratio", "label_smoothing", "lora_dropout", "max_missing")
        share(self, "train_fraction", "label_noise", "adam_beta1", "adam_beta2")
        for name in ("adam_beta1", "adam_beta2"):
            if getattr(self, name) == 1:
                raise UserError(f"--{name.replace('_', '-')} is 1; it must be below 1")
        if self.lora_rank is None:
            lora = ("lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
            no_effect(self, "without --lora-rank", *lora)
        if self.f_divergence_type != "alpha_divergence":
            no_effect(
                self, "without --f-divergence-type alpha_divergence", "f_alpha_divergence_coef"
            )
        if self.report_to == "none":
            no_effect(self, "without --report-to", "run_name")

    @property
    def default_rate(self) -> float:
        return FULL_RATE if self.lora_rank is None else LORA_RATE

    @property
    def peak_rate(self) -> float:
        """`learning_rate`, which is set once the settings are checked."""
        assert self.learning_rate is not None
        return self.learning_rate


@dataclass(kw_only=True, slots=True)
class ExportConfig(MethodConfig):
    """Write a data set with the virtual reference's log-probs, for other trainers.

    Each usable pair gets `ref_chosen_logps` and `ref_rejected_logps`, so that the sigmoid loss of
    TRL's DPOTrainer is the loss of the method. docs/trl.md has the few lines that make TRL take
    them. beta and the loss type are the trainer's own.

    Example: `mrpo export --pairs pairs --refs llama,qwen --method mrpo --out exports/mrpo`
    """

    out: Annotated[str, "Folder to write; an earlier export there is replaced."]
