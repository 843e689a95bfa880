"""What is said where the processor has no 16 bits."""

from __future__ import annotations

import pytest

from mrpo.model import rates


def test_the_rate_of_this_processor_is_measured() -> None:
    assert rates.matrix_rate("cpu", "float32") > 1e8
    assert rates.matrix_rate("cpu", "bfloat16") > 1e6


@pytest.mark.parametrize(("rate", "times"), [(1e9, "90"), (4.5e10, "2"), (4.6e10, None)])
def test_a_slow_precision_is_named(
    rate: float, times: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "matrix_rate", lambda device, dtype: rate if "b" in dtype else 9e10)
    said = times and f"bfloat16 is {times} times slower than float32 on this processor"
    assert rates.slow_precision("bfloat16") == said
    assert rates.slow_precision("float32") is None
    assert rates.slow_precision("auto") is None
