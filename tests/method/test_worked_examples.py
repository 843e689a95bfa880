"""The worked examples in the docstrings of the mathematics run, and give what they say."""

from __future__ import annotations

import doctest
import inspect
from importlib import import_module

import pytest

MODULES = ("arrays", "virtual_reference", "weightings", "losses", "fitted", "grammar")


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_what_they_say(name: str) -> None:
    module = import_module(f"mrpo.method.{name}")
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for function in vars(module).values():
        if inspect.isfunction(function) and function.__module__ == module.__name__:
            # `accepts_numpy` hides a function from `doctest.testmod`.
            for test in finder.find(inspect.unwrap(function), globs=vars(module).copy()):
                runner.run(test)
    result = runner.summarize()
    assert result.attempted > 0
    assert result.failed == 0
