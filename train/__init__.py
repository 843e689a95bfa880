"""Stage two: the stream of scored pairs, the loop, the checkpoints, the export.

This package has the name of its command, so it can be called: `mrpo.train(…)` is
`mrpo.train.run.train(…)`, whether or not a module of the package was imported before.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

_DOC = __doc__


class _CallablePackage(ModuleType):
    """The package, with the signature and the documentation of the command that it calls."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        from .run import train

        return train(*args, **settings)

    @property
    def __signature__(self) -> inspect.Signature:
        from ..settings import signature_of
        from .config import TrainConfig

        return signature_of(TrainConfig, "TrainResult")

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        from ..settings import described
        from .config import TrainConfig

        return f"{inspect.getdoc(TrainConfig)}\n\n{described(TrainConfig)}\n\n{_DOC}"


sys.modules[__name__].__class__ = _CallablePackage
