"""Settings of `mrpo precompute`: its flags, YAML keys and defaults. Standard library only.

Settings of `mrpo refs`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(kw_only=True, slots=True)
class PrecomputeConfig:
    """Score every pair under every reference, once and for good.

    Each reference runs in a process of its own, with its own tokenizer and chat template. What
    the store has is not scored again; a run that was stopped goes on where it was. The scores
    serve every later training run.

    Example: `mrpo precompute --pairs pairs --refs llama,mistral,qwen --store store`
    """

    refs: Annotated[str, "aliases of refs.yaml, comma-separated; the first is the base"]
    pairs: Annotated[
        str | None, "folder of pairs as `mrpo prepare` writes it; by default `pairs`"
    ] = None
    data: Annotated[
        str | None, "a source to prepare into the folder of pairs first, as `mrpo prepare` takes it"
    ] = None
    refs_config: Annotated[str, "the file that says what an alias is"] = "configs/refs.yaml"
    store: Annotated[
        str | None, "the score store, a folder or URL; by default $MRPO_STORE, else `store`"
    ] = None
    engine: Annotated[
        Literal["auto", "hf", "vllm", "server"],
        "hf: transformers; vllm: vLLM; server: a running vLLM server; "
        "auto: vllm where a GPU and vLLM are present, else hf",
    ] = "auto"
    server: Annotated[
        str | None,
        "URL of the vLLM server for --engine server; for several references alias=URL,alias=URL",
    ] = None
    dry_run: Annotated[
        bool, "check access, render every pair, say what would be scored at what cost, and stop"
    ] = False
    update_refs: Annotated[
        bool, "take each Hub model's newest commit instead of the one an alias first resolved to"
    ] = False
    keep_token_logps: Annotated[bool, "store the log-prob of every scored token too"] = False
    max_model_len: Annotated[
        int | None,
        "leave pairs with a longer sequence (in tokens) unscored; a later run may score them",
    ] = None
    max_tokens: Annotated[
        int | None,
        "tokens computed at once; by default chosen by device, halved when out of memory",
    ] = None
    bf16: Annotated[
        bool,
        "engine hf: compute in bfloat16 (autocast); such scores are kept apart from exact ones",
    ] = False
    gpu_memory_utilization: Annotated[
        float, "engine vllm: share of the GPU's memory that it may take"
    ] = 0.9
    tensor_parallel_size: Annotated[
        int | None, "engine vllm: GPUs that share each layer; by default as refs.yaml says"
    ] = None
    pipeline_parallel_size: Annotated[int, "engine vllm: GPUs that take turns over the layers"] = 1
    data_parallel_size: Annotated[
        int, "copies of a reference, each in a process with GPUs of its own; they share the shards"
    ] = 1
    concurrency: Annotated[int, "engine server: pairs under way at once"] = 32


@dataclass(kw_only=True, slots=True)
class RefsConfig:
    """List the references of refs.yaml: size, context, license, and what of the data is scored.

    No weights are loaded. What the Hub alone knows is shown as "?" where it can't be reached.

    Example: `mrpo refs --pairs pairs`
    """

    refs: Annotated[str | None, "aliases to list, comma-separated; by default all"] = None
    refs_config: Annotated[str, "the file that says what an alias is"] = "configs/refs.yaml"
    pairs: Annotated[str | None, "folder of pairs; by default `pairs` where there is one"] = None
    store: Annotated[
        str | None, "the score store, a folder or URL; by default $MRPO_STORE, else `store`"
    ] = None
