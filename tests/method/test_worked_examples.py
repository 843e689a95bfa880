"""The worked examples in the docstrings of the mathematics run, and give what they say."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest

NAMES = ("virtual", "weightings", "losses", "normalize", "fitted")
MODULES = [*(f"mathematics.{name}" for name in NAMES), "methods"]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_what_they_say(name: str) -> None:
    result = doctest.testmod(import_module(f"mrpo.train.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
