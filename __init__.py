"""Multi-Reference Preference Optimization from cached scores.

The mathematics is importable from the top (`from mrpo import virtual_reference`); nothing is
loaded before it is asked for (PEP 562), so that `mrpo --help` does not pay for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "arwc_weights": "method.weightings",
    "max_margin_weights": "method.weightings",
    "ctro_clip": "method.virtual_reference",
    "virtual_reference": "method.virtual_reference",
    "preference_loss": "method.losses",
    "multi_dpo_loss": "method.losses",
}

__all__ = list(_EXPORTS)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
