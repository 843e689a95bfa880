"""What a test needs and may not find here: it skips with the reason, and fails in CI."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """End the test that asks: nothing may skip where the lock is installed and the data is."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def needed(package: str) -> Any:
    """The package, which is in the extra `dev` and in the lock."""
    try:
        return import_module(package)
    except ImportError as error:
        missing(f"{package} can't be imported ({error}); pip install -e '.[dev]'")
