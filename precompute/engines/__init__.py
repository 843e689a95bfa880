"""Token ids in, token log-probs out: transformers, vLLM, a vLLM server."""

from __future__ import annotations

from .protocol import Engine, EngineName, EngineSettings


def load_engine(name: EngineName, settings: EngineSettings) -> Engine:
    """Load the reference into the named engine. Heavy imports happen here."""
    if name == "hf":
        from .hf import HfEngine

        return HfEngine(settings)
    if name == "vllm":
        from .vllm import VllmEngine

        return VllmEngine(settings)
    from .server import ServerEngine

    return ServerEngine(settings)
