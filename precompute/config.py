"""Settings of `mrpo precompute` and `mrpo refs`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from ..errors import UserError
from ..settings import (
    PAIRS,
    REFS_CONFIG,
    References,
    ScoredPairSettings,
    StoreSettings,
    above_zero,
    share,
)
from .engines import ENGINES, RAY

if TYPE_CHECKING:
    EngineChoice = str
else:
    EngineChoice = Literal[("auto", *ENGINES, RAY)]


# Settings that not every engine heeds, and the engines that do.
HEEDED_BY = {
    "server": ("server",),
    "concurrency": ("server",),
    "bf16": ("hf",),
    "max_tokens": ("hf", "vllm"),
    "data_parallel_size": ("hf", "vllm"),
    "ray_address": (RAY,),
    "ray_engine": (RAY,),
    "gpu_memory_utilization": ("vllm",),
    "tensor_parallel_size": ("vllm",),
    "pipeline_parallel_size": ("vllm",),
}


@dataclass(kw_only=True, slots=True)
class PrecomputeConfig(ScoredPairSettings):
    """Score every response of the pairs under every reference, once for all training runs.

    Each reference runs in a process of its own, with its own tokenizer and chat template. What
    the store has is not scored again, and a run that was stopped continues where it was.

    Example: `mrpo precompute --pairs pairs --refs llama,mistral,qwen --store store`
    """

    refs: References
    data: Annotated[
        str | None,
        "A source to prepare into --pairs first, as `mrpo prepare` takes it; 5 % are held out "
        "unless it has a split column.",
    ] = None
    engine: Annotated[
        EngineChoice,
        "hf: transformers; vllm: vLLM; server: a running vLLM server; ray: hf or vllm on a Ray "
        "cluster; auto: vllm where a GPU and vLLM are present, else hf.",
    ] = "auto"
    server: Annotated[
        str | None,
        "URL of the vLLM server for --engine server; for several references alias=URL,alias=URL. "
        "A sample of its scores is compared with stored ones or engine hf's first.",
    ] = None
    dry_run: Annotated[
        bool, "Check access, render every pair, say what would be scored at what cost, and stop."
    ] = False
    update_refs: Annotated[
        bool, "Take each Hub model's newest commit, not the one an alias first resolved to."
    ] = False
    keep_token_logps: Annotated[bool, "Store the log-prob of every scored token too."] = False
    max_model_len: Annotated[
        int | None,
        "Leave longer sequences (in tokens) unscored; a later run may score them.",
    ] = None
    max_tokens: Annotated[
        int | None,
        "Engines hf and vllm: tokens computed at once. By default chosen by device, halved when "
        "out of memory.",
    ] = None
    bf16: Annotated[
        bool,
        "Engine hf: compute in bfloat16 (autocast); such scores are kept apart from exact ones.",
    ] = False
    gpu_memory_utilization: Annotated[
        float, "Engine vllm: share of the GPU's memory that it may take."
    ] = 0.9
    tensor_parallel_size: Annotated[
        int | None, "Engine vllm: GPUs that share each layer. By default as refs.yaml says."
    ] = None
    pipeline_parallel_size: Annotated[
        int, "Engine vllm: GPUs that each hold a part of the layers."
    ] = 1
    data_parallel_size: Annotated[
        int | None,
        "Engines hf and vllm: copies of a reference, each in a process with its own GPUs; they "
        "share the shards. By default 1, and on a Ray cluster as many as there is room for.",
    ] = None
    ray_address: Annotated[
        str | None,
        "Engine ray: address of the cluster, as `auto` or host:6379; by default one is started on "
        "this machine. Its nodes need the folders of pairs, store and local models.",
    ] = None
    ray_engine: Annotated[
        Literal["auto", "hf", "vllm"],
        "Engine ray: what its actors run; auto: vllm where the cluster has GPUs, else hf.",
    ] = "auto"
    concurrency: Annotated[int, "Engine server: pairs in flight at once."] = 32

    def __post_init__(self) -> None:
        above_zero(self, "max_model_len", "max_tokens", "gpu_memory_utilization", "concurrency")
        above_zero(self, "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
        share(self, "gpu_memory_utilization")
        if "@" in (self.server or ""):  # before any message repeats it
            raise UserError(
                "--server: credentials in a URL end up in logs; put the key into $VLLM_API_KEY"
            )


@dataclass(kw_only=True, slots=True)
class RefsConfig(StoreSettings):
    """List the references of refs.yaml: size, context, license, and how much of the data is scored.

    No weights are loaded. What only the Hub knows is shown as "?" where it can't be reached.

    Example: `mrpo refs --pairs pairs`
    """

    refs: Annotated[str | None, "Aliases to list, comma-separated. By default all."] = None
    refs_config: Annotated[str, REFS_CONFIG] = "configs/refs.yaml"
    pairs: Annotated[str | None, f"{PAIRS} By default `pairs` where there is one."] = None
