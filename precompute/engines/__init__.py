"""The engines: token ids in, token log-probs out.

A new engine is a module here with a class that fits `protocol.Engine`, and its line in `ENGINES`.
Standard library only until `load_engine` is called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .protocol import Engine, EngineSettings

EngineName = str  # a key of ENGINES
ENGINES: dict[EngineName, str] = {  # module and class
    "hf": "hf:HfEngine",  # transformers
    "vllm": "vllm:VllmEngine",  # a vLLM engine of its own
    "server": "server:ServerEngine",  # a running vLLM server
}

RAY = "ray"  # not an engine of its own: hf or vllm in the actors of a cluster (`on_ray.py`)


def load_engine(name: EngineName, settings: EngineSettings) -> Engine:
    """Load a reference into the named engine, importing what it needs."""
    module, class_name = ENGINES[name].split(":")
    engine: Engine = getattr(import_module(f".{module}", __name__), class_name)(settings)
    return engine
