"""The one protocol behind which every engine scores: token ids in, token log-probs out.

An engine holds one loaded reference. `hf.py` runs transformers, `vllm.py` a vLLM engine of its
own, `server.py` asks a running vLLM server; `requests.py` is what the latter two share. All give
the same log-probs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from ...data.rendering import RenderedPrompt

# Log-probs in nats of a response's scored tokens, those of `RenderedSequence.scored`.
Logps = np.ndarray[Any, np.dtype[np.float32]]
Progress = Callable[[int], None]  # called with the responses finished since the last call


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What an engine loads and how it runs; plain values, to be sent as JSON."""

    alias: str
    model: str  # a folder or a Hub id
    revision: str | None = None
    dtype: str = "float32"
    quantization: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    autocast: bool = False  # engine hf: compute in bfloat16 over the weights' own precision
    max_tokens: int | None = None  # of one forward; None: by device
    longest: int = 0  # tokens of the longest sequence that will be asked for; 0: none will be
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    share_prompts: bool = True  # False only to measure what sharing gains
    server: str | None = None  # engine server: its URL
    concurrency: int = 32  # engine server: requests under way at once
    # engine server: token ids by text, which the server's tokenizer must give too
    probes: Mapping[str, list[int]] = field(default_factory=dict)


class Engine(Protocol):
    """A loaded reference."""

    @property
    def limit(self) -> int | None:
        """Tokens of the longest sequence it takes; None where it sets no limit of its own."""

    @property
    def facts(self) -> dict[str, Any]:
        """What is recorded beside the scores: engine, versions, device, settings in force."""

    def score(
        self, prompts: Sequence[RenderedPrompt], progress: Progress = lambda responses: None
    ) -> list[tuple[Logps, ...]]:
        """The log-probs of every response of every prompt, in the given order."""

    def close(self) -> None:
        """Free the devices, connections and processes that the engine holds."""


def adapter_folder(settings: EngineSettings) -> Path:
    """The adapter's files on this disk, from the Hub where it is there."""
    assert settings.adapter is not None
    folder = Path(settings.adapter)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(settings.adapter, revision=settings.adapter_revision))
