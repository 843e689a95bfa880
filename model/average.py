"""The mean of several models' weights, written as a model folder that loads like any other.

    average(folders, weights, out)    of models of one architecture, or LoRA adapters of one model

Means are computed in float64 and written in the first model's dtype, with the first model's
configuration, tokenizer and shards. One file of the result is in memory at a time, with one tensor
of each model.

The mean of LoRA adapters is that of their deltas, exactly: with delta_k = s_k B_k A_k, the mean
Σ w_k delta_k is s [w_1 B_1, w_2 B_2, …] [A_1; A_2; …], an adapter whose rank is the sum of theirs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from math import fsum, sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data.references import ADAPTER_CONFIG, MODEL_CONFIG, TOKENIZER_FILES, files_of
from ..errors import UserError
from ..files import read_json, write_text

MODEL_FILE, ADAPTER_FILE = "model.safetensors", "adapter_model.safetensors"
INDEX = f"{MODEL_FILE}.index.json"
COPIED = (
    *(MODEL_CONFIG, "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *TOKENIZER_FILES,
)
WAY_OUT = "restore it, or save the model again with save_pretrained"
# What of an adapter's configuration changes its delta, and the values under which it is s·B·A.
PLAIN_LORA = {
    "peft_type": ("LORA",),
    "init_lora_weights": (True, False, "gaussian"),
    "bias": ("none",),
    **dict.fromkeys(
        (
            *("use_dora", "lora_bias", "rank_pattern", "alpha_pattern"),
            *("modules_to_save", "layer_replication", "target_parameters", "use_qalora"),
            *("trainable_token_indices", "alora_invocation_tokens", "corda_config", "eva_config"),
        ),
        (None, False),
    ),
}


def average(folders: Sequence[Path], weights: Sequence[float], out: Path) -> None:
    """Write the weighted mean of models, or of LoRA adapters, into the folder `out`.

    `weights`, of 0 or more, are divided by their sum. Raises `UserError` where a folder's weights
    are missing, damaged or of other names or shapes than the first one's.
    """
    refuse_other_shapes({str(folder): folder for folder in folders})
    shares = [weight / fsum(weights) for weight in weights]
    out.mkdir(parents=True, exist_ok=True)
    first = folders[0]
    for path in sorted({path for name in COPIED for path in first.glob(name)}):
        copy = out / path.relative_to(first)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    if is_adapter(first):
        _write_adapter(folders, shares, out)
        return
    for file in files_with_weights(first):
        with ExitStack() as opened:
            models = [_Tensors(folder, opened) for folder in folders]
            first_file = opened.enter_context(safe_open(file, "pt"))
            means = {
                name: _mean([model.read(name) for model in models], weights)
                for name in first_file.keys()  # noqa: SIM118 (it is no mapping)
            }
            save_file(means, out / file.name, first_file.metadata())
    if (first / INDEX).is_file():
        shutil.copyfile(first / INDEX, out / INDEX)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter, not a model."""
    return (folder / ADAPTER_CONFIG).is_file()


def files_with_weights(folder: Path) -> list[Path]:
    """The safetensors files of a model or an adapter. Raises `UserError` where one is missing."""
    names = [ADAPTER_FILE if is_adapter(folder) else MODEL_FILE]
    if (folder / INDEX).is_file() and not is_adapter(folder):
        index = read_json(folder / INDEX, {"weight_map": dict[str, str]}, WAY_OUT)
        names = sorted(set(index["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}, and means are of safetensors; {WAY_OUT}")
    return [folder / name for name in names]


def refuse_other_shapes(models: Mapping[str, Path]) -> None:
    """Raise `UserError` unless the folders, by name, have tensors of the same names and shapes.

    Of LoRA adapters the ranks may differ.
    """
    (first, folder), *others = models.items()
    expected = _shapes(folder)
    for other, path in others:
        shapes = _shapes(path)
        if name := min(expected.keys() ^ shapes.keys(), default=None):
            has, lacks = (first, other) if name in expected else (other, first)
            raise UserError(
                f"the weights of {first} and {other} differ: {has} has {name}, {lacks} has not; "
                "average models of one architecture"
            )
        for name, shape in expected.items():
            if shapes[name] != shape:
                raise UserError(
                    f"the weights of {first} and {other} differ: {name} is {_text(shape)} in "
                    f"{first}, {_text(shapes[name])} in {other}; average models of one architecture"
                )


def refuse_special_adapter(name: str, folder: Path) -> None:
    """Raise `UserError` for an adapter whose delta is not simply scale · B · A in each layer."""
    config = _adapter_config(folder)
    for key, plain in PLAIN_LORA.items():
        value = config.get(key, plain[0])
        if value not in plain and value not in ({}, []):
            raise UserError(
                f"{name}: its adapter has {key} {value!r}, and means are of plain LoRA adapters; "
                "merge it into a model folder first (peft's merge_and_unload)"
            )


class _Tensors:
    """A model's tensors by name, read when they are asked for."""

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        self._files: dict[str, Any] = {}
        for path in files_with_weights(folder):
            with files_of(path, "can't be read", WAY_OUT):
                file: Any = opened.enter_context(safe_open(path, "pt"))
            self._files |= dict.fromkeys(file.keys(), file)

    def names(self) -> list[str]:
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w t / Σ w in float64, in the first tensor's dtype; whole numbers must be equal."""
    first = tensors[0]
    if not first.is_floating_point():
        if any(not torch.equal(first, tensor) for tensor in tensors):
            raise UserError("the models differ in a tensor of whole numbers, which has no mean")
        return first
    # Weights that are all 1 give the plain mean, rounded once.
    total = sum(weight * tensor.double() for weight, tensor in zip(weights, tensors))
    assert isinstance(total, Tensor)
    return (total / fsum(weights)).to(first.dtype)


def _write_adapter(folders: Sequence[Path], shares: Sequence[float], out: Path) -> None:
    configs = [_adapter_config(folder) for folder in folders]
    scales = [_scale(config) for config in configs]
    rank = sum(config["r"] for config in configs)
    factors = [share * scale / scales[0] for share, scale in zip(shares, scales)]
    tensors = {}
    with ExitStack() as opened:
        adapters = [_Tensors(folder, opened) for folder in folders]
        for name in adapters[0].names():
            of_all = [adapter.read(name) for adapter in adapters]
            if _rank_axis(name) == 1:
                of_all = [(f * b.double()).to(b.dtype) for f, b in zip(factors, of_all)]
            dtype = of_all[0].dtype
            tensors[name] = torch.cat([t.to(dtype) for t in of_all], dim=_rank_axis(name))
        file = opened.enter_context(safe_open(folders[0] / ADAPTER_FILE, "pt"))
        save_file(tensors, out / ADAPTER_FILE, file.metadata())
    alpha = scales[0] * rank
    config = configs[0] | {"r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha}
    if config.get("use_rslora"):
        config["use_rslora"] = False  # its scale is alpha / rank
    write_text(out / ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True))


def _adapter_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = read_json(
        folder / ADAPTER_CONFIG, {"r": int, "lora_alpha": int | float}, WAY_OUT
    )
    return config


def _scale(config: dict[str, Any]) -> float:
    """What B · A is multiplied with; rsLoRA (arXiv 2312.03732) divides by the rank's root."""
    rank: int = config["r"]
    alpha: float = config["lora_alpha"]
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _rank_axis(name: str) -> int:
    """Of an adapter's tensor: A is [rank, in], B is [out, rank]."""
    for axis, part in enumerate("AB"):
        if f".lora_{part}." in name or f".lora_embedding_{part}" in name:
            return axis
    raise UserError(f"the adapters have {name}, and means are of plain LoRA adapters")


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor; of an adapter's without the rank."""
    adapter = is_adapter(folder)
    with ExitStack() as opened:
        tensors = _Tensors(folder, opened)
        shapes = {name: tensors.shape(name) for name in tensors.names()}
    if adapter:
        return {
            name: tuple(size for axis, size in enumerate(shape) if axis != _rank_axis(name))
            for name, shape in shapes.items()
        }
    return shapes


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
