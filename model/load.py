"""Load a causal LM, and tell for each architecture whether a row may hold several pairs.

The tests compare every architecture of the allow-list with one response at a time through
transformers' own forward. Any other architecture runs one response a row.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GgufConfig, PretrainedConfig, PreTrainedModel

from ..data.references import GGUF, files_of, from_pretrained
from ..errors import UserError
from .attention import FLEX, SDPA

Attention = Literal["sdpa", "flex_attention"]
REGISTERED: dict[Attention, str] = {"sdpa": SDPA, "flex_attention": FLEX}

PACKABLE = frozenset(
    {
        *("arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text"),
        *("glm", "glm4", "gpt2", "gpt_neox", "granite", "granitemoe", "helium"),
        *("hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "mixtral"),
        *("nanochat", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe"),
        *("qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2", "vaultgemma"),
    }
)


# MoE architectures whose load-balancing loss the tests compare with transformers' own.
BALANCED = frozenset({"granitemoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"})


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    attn: Attention | None = None,
    adapter: str | Path | None = None,
    adapter_revision: str | None = None,
) -> nn.Module:
    """The causal LM in eval mode without dropout, with an attention that supports packed rows.

    `path` may be a GGUF file, whose weights are dequantized.
    `attn` is by default FlexAttention on a GPU and sdpa elsewhere; `adapter` is a PEFT adapter to
    put on top (a folder, or a Hub id with its revision), and then a `PeftModel` is returned. Raises
    `UserError` for a dtype that torch does not have, for a model that does not exist or is no
    causal LM, and for an adapter that does not fit.
    """
    kind = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if kind != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise UserError(f"dtype {dtype!r} is unknown; use float32, bfloat16, float16 or auto")
    try:
        options: dict[str, Any] = {"dtype": kind}
        if is_gguf := Path(path).suffix == GGUF:
            options["quantization_config"] = GgufConfig(dequantize=True)
        model = from_pretrained(AutoModelForCausalLM, path, revision, **options)
        if is_gguf:
            _forget_file(model, Path(path))
        remove_dropout(model)
        set_attention(model, attn or default_attention(device))
        if adapter is not None:
            model = with_adapter(model, adapter, adapter_revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model {path} could not be loaded: {reason}") from error
    return model.to(device).eval()


def with_adapter(
    model: PreTrainedModel, adapter: str | Path, revision: str | None = None
) -> nn.Module:
    """A `PeftModel`: the model with a PEFT adapter in its layers.

    Raises `UserError` where the adapter can't be read, or is not all in the layers.
    """
    from peft import PeftModel

    with warnings.catch_warnings(), files_of(adapter):
        # PEFT warns of weights that the adapter lacks, and leaves these layers as they are.
        warnings.filterwarnings("error", message=".*missing adapter keys")
        try:
            adapted: Any = PeftModel.from_pretrained(model, str(adapter), revision=revision)
        except UserWarning as warning:
            reason = " ".join(str(warning).split())[:300]
            raise UserError(
                f"adapter {adapter} does not fit its model ({reason}); check the adapter and the "
                "model it is for"
            ) from None
    config = adapted.peft_config["default"]
    if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
        raise UserError(
            f"adapter {adapter}: of kind {config.peft_type.value}, part of which is not in the "
            "model's layers; only adapters of layers, such as LoRA, are supported"
        )
    return adapted


def _forget_file(model: Any, path: Path) -> None:
    """Make a dequantized model of a GGUF file an ordinary one, which trains and can be saved."""
    vars(model.config).pop("quantization_config", None)
    model.is_quantized, model.hf_quantizer = False, None
    # transformers keeps the folder's name; an adapter's configuration has to name the file.
    model.name_or_path = model.config.name_or_path = str(path.resolve())


def default_attention(device: torch.device | str) -> Attention:
    return "flex_attention" if torch.device(device).type == "cuda" else "sdpa"


def packs(config: PretrainedConfig) -> bool:
    """Whether a row of this architecture may hold several pairs with shared prompts."""
    config = config.get_text_config()
    causal = not getattr(config, "use_bidirectional_attention", False)
    return config.model_type in PACKABLE and causal


def balancing_coefficient(config: PretrainedConfig) -> float:
    """The weight of an MoE model's load-balancing loss, from its config; 0.0: it has none."""
    config = config.get_text_config()
    has_loss = hasattr(config, "output_router_logits")
    return float(getattr(config, "router_aux_loss_coef", None) or 0.0) if has_loss else 0.0


def rope_limit(config: PretrainedConfig) -> int | None:
    """The longest row, in tokens, whose rotary frequencies equal those of every shorter one.

    Two kinds of rotary embedding choose their frequencies by the longest position in the batch:
    beyond this length a sequence has to be computed alone. None for all other kinds.
    """
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if rope and all(isinstance(r, dict) for r in rope.values()) else [rope]
    limits = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)


def layer_windows(config: PretrainedConfig) -> list[int | None]:
    """The sliding window of each layer in tokens, None for full attention."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def set_attention(lm: PreTrainedModel, attn: Attention) -> None:
    """Set a packable architecture's attention; never eager, which would add a boolean mask.

    Others keep transformers' choice, except where that is the sdpa which leaves out a softcap.
    """
    softcap = getattr(lm.config.get_text_config(), "attn_logit_softcapping", None)
    if packs(lm.config):
        lm.set_attn_implementation(REGISTERED[attn])
    elif softcap is not None and lm.config._attn_implementation == "sdpa":
        lm.set_attn_implementation(SDPA)


def remove_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0: the policy is compared with scores computed without dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            # Architectures keep the rates of functional dropout in attributes of this kind.
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)
