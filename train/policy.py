"""The policy: where it starts from, how it is loaded, sharded and written.

Weights are float32 masters, or under LoRA a frozen model with float32 adapters; with several
processes FSDP2 shards everything under the one module that maps packed pairs to log-probs.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from ..data.references import ReferenceSpec, from_pretrained
from ..errors import UserError
from ..files import read_json
from ..model.load import BALANCED, balancing_coefficient, default_attention, load_model
from ..model.logps import SequenceLogps
from ..settings import comma_separated, no_effect
from .config import TrainConfig
from .distributed import Ranks


@dataclass(frozen=True, slots=True)
class PolicySource:
    """The model that training starts from."""

    model: str  # Hub id or folder
    revision: str | None = None
    adapter: str | None = None  # merged into the model before training
    adapter_revision: str | None = None
    chat_template: str | None = None  # the text of one in place of the model's own
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system_role: str | None = None
    tokenizer: str | None = None  # a folder with one of its own, where it is not the model's

    @property
    def name(self) -> str:
        return f"{self.model}@{self.revision}" if self.revision else self.model


def policy_source(
    config: TrainConfig, base: ReferenceSpec | None, commits: Mapping[str, str]
) -> tuple[PolicySource, bool]:
    """The model that --policy names, by default the base's, and whether it is the base reference.

    Args:
        base: the base's entry in refs.yaml, None where its scores were imported.
        commits: at which the base's "model" and "adapter" were scored, if they are on the Hub.
    """
    template = _template(config.chat_template)
    if config.policy is None and base is None:
        raise UserError("the base reference's scores were imported; name a model with --policy")
    if config.policy is None and config.policy_revision is not None:
        raise UserError("--policy-revision goes with --policy; name the model it is of")
    if base is not None and (config.policy is None or _names(config, base)):
        if base.quantization is not None:
            raise UserError(
                f"the base reference {base.alias} is quantized and can't be trained; name the "
                "model to train with --policy"
            )
        source = PolicySource(
            model=str(base.model_path or base.model),
            revision=commits.get("model", base.revision),
            adapter=base.adapter and str(base.adapter_folder or base.adapter),
            adapter_revision=commits.get("adapter"),
            chat_template=template or base.chat_template,
            chat_template_kwargs=dict(base.chat_template_kwargs),
            system_role=base.system_role,
        )
        return source, template in (None, base.chat_template)
    assert config.policy is not None
    folder = Path(config.policy).expanduser()
    model = str(folder.resolve()) if folder.is_dir() else config.policy
    if folder.is_dir():
        no_effect(config, "on a policy in a folder", "policy_revision")
    adapter_config = folder / "adapter_config.json"
    if adapter_config.is_file():
        shape = {"base_model_name_or_path": str}
        below = read_json(adapter_config, shape, "restore the adapter")["base_model_name_or_path"]
        own = model if (folder / "tokenizer_config.json").is_file() else None
        source = PolicySource(below, adapter=model, chat_template=template, tokenizer=own)
        return source, False
    return PolicySource(model, config.policy_revision, chat_template=template), False


def load_config(source: PolicySource) -> PretrainedConfig:
    """The architecture, without weights."""
    try:
        return from_pretrained(AutoConfig, source.model, source.revision)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"policy {source.name}: no model to load ({first_line}); "
            "name a Hub id or a model folder with --policy"
        ) from None


# Multimodal architectures of which the tests train the text model: gemma3's checkpoint stays whole,
# of qwen3_5's transformers loads and writes the text model alone.
MULTIMODAL = ("gemma3", "qwen3_5")
_MODALITIES = ("text_config", "vision_config", "audio_config", "audio_encoder_config")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def refuse_untrainable(config: PretrainedConfig, name: str) -> None:
    """Raise `UserError` for an architecture whose training here would not be right."""
    kind, text = config.model_type, config.get_text_config()
    parts = [part for part in _MODALITIES if part in config.sub_configs]
    if (parts or text is not config) and kind not in MULTIMODAL:
        raise UserError(
            f"policy {name}: {kind} is multimodal and its training on text is not tested; choose a "
            f"text model, or one of {', '.join(MULTIMODAL)}"
        )
    if balancing_coefficient(config) and text.model_type not in BALANCED:
        raise UserError(
            f"policy {name}: {text.model_type} is a mixture of experts whose balancing loss is not "
            f"tested here; choose {', '.join(sorted(BALANCED))}, or set "
            "router_aux_loss_coef in its config.json to 0"
        )


def load_policy(
    source: PolicySource, config: TrainConfig, ranks: Ranks, bf16: bool
) -> SequenceLogps:
    """The policy on its device, in training mode; LoRA's is the only dropout."""
    rank, alone = config.lora_rank, ranks.world == 1
    model: Any = load_model(
        source.model,
        revision=source.revision,
        dtype="bfloat16" if rank and bf16 and alone else "float32",
        device=ranks.device if alone else "cpu",
        attn=default_attention(ranks.device),
        adapter=source.adapter,
        adapter_revision=source.adapter_revision,
    )
    if source.adapter is not None:
        model = model.merge_and_unload().requires_grad_(True)  # peft froze it
    unused = _parts_without_text(model)
    for part in unused:
        model.get_submodule(part).requires_grad_(False)
    policy = SequenceLogps(_with_lora(model, config, rank, unused) if rank else model)
    lm: Any = policy.lm
    layers = policy.decoder_layers
    if config.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    if config.torch_compile:
        for layer in layers:
            layer.compile(dynamic=True)
    if not alone:
        _shard(policy, layers, ranks, bf16)
    return policy.train()


def make_optimizer(policy: SequenceLogps, config: TrainConfig) -> optim.AdamW:
    """AdamW over the trained parameters; as in TRL, biases and norms do not decay."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.peak_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def gather_weights(policy: SequenceLogps) -> dict[str, torch.Tensor]:
    """The whole weights of a policy on the first rank; every rank must call this."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(policy, options=whole)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def write_model(
    folder: Path,
    policy: SequenceLogps,
    weights: Mapping[str, torch.Tensor],
    source: PolicySource,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write trained weights as transformers does, in the source's dtype, or as a PEFT adapter.

    The tokenizer is written beside them, with the chat template that the policy was trained on.
    """
    tokenizer.chat_template = source.chat_template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    model: Any = policy.model
    lm: Any = policy.lm
    if lm is not model:
        model.save_pretrained(folder, state_dict=dict(weights))
        return
    dtype = load_config(source).dtype or torch.float32
    # A model without memory of the same architecture takes the weights in the dtype to write.
    with torch.device("meta"):
        written: Any = AutoModelForCausalLM.from_config(
            lm.config, dtype=dtype, trust_remote_code=False
        )
    written.load_state_dict({name: w.to(dtype) for name, w in weights.items()}, assign=True)
    written.tie_weights()
    written.generation_config = lm.generation_config
    written.save_pretrained(folder)
    if lm.config.get_text_config() is not lm.config:
        for name in _PROCESSOR_FILES:
            file = cached_file(
                source.model,
                name,
                revision=source.revision,
                _raise_exceptions_for_missing_entries=False,
            )
            if file is not None:
                shutil.copyfile(file, folder / name)


def _parts_without_text(model: PreTrainedModel) -> list[str]:
    """The modules of a multimodal model that texts do not pass through."""
    if model.config.get_text_config() is model.config:
        return []
    names = {module: name for name, module in model.named_modules()}
    used = [names[part] for part in (model.get_decoder(), model.get_output_embeddings())]
    base = names[model.get_decoder()].rpartition(".")[0]
    siblings = [f"{base}.{name}" for name, _ in model.get_submodule(base).named_children()]
    return [name for name in siblings if name not in used]


def _with_lora(
    model: nn.Module, config: TrainConfig, rank: int, unused: Sequence[str]
) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = config.lora_target_modules
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=config.lora_alpha or 2 * rank,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules=targets if targets == "all-linear" else comma_separated(targets),
        exclude_modules=rf"({'|'.join(map(re.escape, unused))})\..*" if unused else None,
    )
    torch.manual_seed(config.seed)
    try:
        policy = get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"--lora-target-modules {targets}: {error}") from None
    # PEFT keeps and writes a set, whose order, and with it the adapter's identity, is random.
    adapter: Any = policy.peft_config["default"]
    adapter.target_modules = sorted(adapter.target_modules)
    return policy


def _shard(policy: SequenceLogps, layers: nn.ModuleList, ranks: Ranks, bf16: bool) -> None:
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    dtype = torch.bfloat16 if bf16 else None
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*layers, policy):
        fully_shard(module, mesh=mesh, mp_policy=precision)


def _names(config: TrainConfig, base: ReferenceSpec) -> bool:
    """Whether --policy names the base's model, without an adapter or quantization of the base."""
    assert config.policy is not None
    if base.adapter is not None or base.quantization is not None:
        return False
    if config.policy_revision not in (None, base.revision):
        return False
    folder = Path(config.policy).expanduser().resolve()
    places = ((start / Path(base.model).expanduser()).resolve() for start in (base.folder, Path()))
    return config.policy == base.model or (folder.is_dir() and folder in places)


def _template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template {path}: can't be read ({error})") from None
