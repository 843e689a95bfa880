"""Tiny references of three real architectures, each with its own tokenizer and chat template.

The demo trains them on its data, the tests use them untrained: a byte-level BPE with Llama 3's
headers, a SentencePiece-like BPE with Mistral's [INST], a byte-level BPE with Qwen's ChatML. The
templates follow each family's published format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..files import new_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Family = Literal["llama", "mistral", "qwen"]
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen")

LLAMA_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

MISTRAL_TEMPLATE = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] + '\\n\\n' %}
{%- set turns = messages[1:] %}
{%- else %}
{%- set system = '' %}
{%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
{%- if message['role'] == 'user' %}
{{- '[INST] ' + (system if loop.last or loop.index == turns | length - 1 else '') }}
{{- message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}
{{- ' ' + message['content'] + eos_token }}
{%- else %}
{{- raise_exception('only system, user and assistant roles are supported') }}
{%- endif %}
{%- endfor %}"""

QWEN_TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def write_reference(
    folder: str | Path,
    family: Family,
    texts: Iterable[str],
    *,
    vocab_size: int = 512,
    hidden_size: int = 48,
    seed: int = 0,
) -> Path:
    """Write an untrained model with its tokenizer as `save_pretrained` does; return the folder."""
    tokenizer = build_tokenizer(family, texts, vocab_size)
    model = build_model(family, len(tokenizer), hidden_size=hidden_size, seed=seed)
    return save_reference(model, tokenizer, folder)


def save_reference(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: str | Path
) -> Path:
    """Write both as `save_pretrained` does; the folder appears complete."""
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    folder = Path(folder)
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


def build_model(
    family: Family,
    vocab_size: int,
    *,
    hidden_size: int = 48,
    layers: int = 2,
    context: int = 1024,
    seed: int = 0,
) -> PreTrainedModel:
    """A randomly initialized float32 causal LM of the family's architecture."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = "qwen2" if family == "qwen" else family
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=context,
        tie_word_embeddings=family == "qwen",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    if family == "mistral":
        config.sliding_window = None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def build_tokenizer(
    family: Family, texts: Iterable[str], vocab_size: int
) -> PreTrainedTokenizerFast:
    """A fast tokenizer of the family's kind, trained on `texts`, with its chat template."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    if family == "mistral":
        raw, special = _metaspace_bpe(), {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
        extra, template = ["[INST]", "[/INST]"], MISTRAL_TEMPLATE
    elif family == "llama":
        raw, special = _byte_bpe(LLAMA_SPLIT), {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"}
        extra, template = ["<|start_header_id|>", "<|end_header_id|>"], LLAMA_TEMPLATE
    else:
        raw, special = _byte_bpe(QWEN_SPLIT, nfc=True), {"eos": "<|im_end|>"}
        extra, template = ["<|endoftext|>", "<|im_start|>"], QWEN_TEMPLATE
    raw = _train(raw, texts, vocab_size, [*special.values(), *extra])
    if bos := special.get("bos"):
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, raw.token_to_id(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        pad_token="<|endoftext|>" if family == "qwen" else special["eos"],
        extra_special_tokens=extra,
        **{f"{role}_token": token for role, token in special.items()},
    )


def _byte_bpe(split: str, nfc: bool = False) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    raw = Tokenizer(models.BPE())
    if nfc:
        raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    return raw


def _metaspace_bpe() -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return raw


def _train(raw: Tokenizer, texts: Iterable[str], vocab_size: int, special: list[str]) -> Tokenizer:
    """Learn the merges. With byte fallback, 256 byte tokens spell what no merge covers."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers

    fallback = raw.model.byte_fallback
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 256 * fallback,
        special_tokens=special,
        initial_alphabet=[] if fallback else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    if not fallback:
        return raw
    # The trainer has no byte tokens of its own; they are appended to the learned vocabulary,
    # as ordinary entries: as special tokens they would match the literal text "<0x0A>".
    state = json.loads(raw.to_str())
    vocab = state["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    return Tokenizer.from_str(json.dumps(state))
