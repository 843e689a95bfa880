"""Multi-Reference Preference Optimization from stored scores.

Everything public is importable from here, the commands as functions:

    import mrpo

    mrpo.prepare(source="pairs.jsonl", out="pairs", validation_fraction=0.05)
    mrpo.precompute(pairs="pairs", refs="llama,qwen", refs_config="refs.yaml")
    mrpo.train(pairs="pairs", refs="llama,qwen", refs_config="refs.yaml", output_dir="runs/mrpo")
    mrpo.evaluate(runs="runs/mrpo")

A name is loaded when it is first asked for (PEP 562), so that `import mrpo` and `mrpo --help` do
not wait for torch. A mistake in what is given raises `UserError`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.config import PrepareConfig as PrepareConfig
    from .data.prepare import prepare as prepare
    from .data.references import ReferenceSpec as ReferenceSpec
    from .errors import UserError as UserError
    from .evaluation.audit.audit import audit as audit
    from .evaluation.compare.compare import compare as compare
    from .evaluation.config import AuditConfig as AuditConfig
    from .evaluation.config import CompareConfig as CompareConfig
    from .evaluation.config import DoctorConfig as DoctorConfig
    from .evaluation.config import EvaluateConfig as EvaluateConfig
    from .evaluation.config import ReportConfig as ReportConfig
    from .evaluation.doctor.doctor import doctor as doctor
    from .evaluation.evaluate import evaluate as evaluate
    from .evaluation.report.report import report as report
    from .method.losses import multi_dpo_loss as multi_dpo_loss
    from .method.losses import preference_loss as preference_loss
    from .method.virtual_reference import ctro_clip as ctro_clip
    from .method.virtual_reference import virtual_reference as virtual_reference
    from .method.weightings import arwc_weights as arwc_weights
    from .method.weightings import max_margin_weights as max_margin_weights
    from .precompute.config import PrecomputeConfig as PrecomputeConfig
    from .precompute.run import precompute as precompute
    from .precompute.run import score as score
    from .train.config import ExportConfig as ExportConfig
    from .train.config import TrainConfig as TrainConfig
    from .train.export import export as export
    from .train.run import train as train

# The same names once more, for the interpreter; a test keeps the two equal.
_MODULES = {
    "data.config": ("PrepareConfig",),
    "data.prepare": ("prepare",),
    "data.references": ("ReferenceSpec",),
    "errors": ("UserError",),
    "evaluation.audit.audit": ("audit",),
    "evaluation.compare.compare": ("compare",),
    "evaluation.config": (
        "AuditConfig", "CompareConfig", "DoctorConfig", "EvaluateConfig", "ReportConfig",
    ),
    "evaluation.doctor.doctor": ("doctor",),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.report.report": ("report",),
    "method.losses": ("multi_dpo_loss", "preference_loss"),
    "method.virtual_reference": ("ctro_clip", "virtual_reference"),
    "method.weightings": ("arwc_weights", "max_margin_weights"),
    "precompute.config": ("PrecomputeConfig",),
    "precompute.run": ("score",),
    "train.config": ("ExportConfig", "TrainConfig"),
    "train.export": ("export",),
}  # fmt: skip
_HOME = {name: module for module, names in _MODULES.items() for name in names}
_PACKAGES = ("precompute", "train")  # named as their commands, and callable as these

__all__ = [*_HOME, *_PACKAGES]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
