"""What `make real` prints: differences worked by hand, and no TRL where memory is short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mrpo.benchmarks import real_model
from mrpo.benchmarks.real_model import difference, speed_table


def test_differences_are_of_sums_and_of_tokens() -> None:
    left = {"a": np.array([-1.0, -2.0]), "b": np.array([-3.0])}
    right = {"a": np.array([-1.5, -1.75]), "b": np.array([-3.0])}
    figures = difference(left, right)
    assert (figures["sequences"], figures["tokens"]) == (2, 3)
    assert (figures["sequence_max"], figures["sequence_mean"]) == (0.25, 0.125)
    assert (figures["token_max"], figures["token_mean"]) == (0.5, 0.25)
    with pytest.raises(AssertionError, match="other responses"):
        difference(left, {"b": right["b"]})


def test_speeds_stand_beside_trls_and_losses_are_compared() -> None:
    def run(seconds: float, *losses: float) -> dict[str, object]:
        return {"seconds": seconds, "peak_mb": 1000.0, "load": 0.5, "losses": list(losses)}

    speeds = {name: run(8.0, 0.5, 0.4) for name in (*real_model.SCORING, *real_model.TRAINING)}
    speeds["mrpo, training"] = run(2.0, 0.5, 0.404)
    lines = speed_table(speeds, 32).splitlines()
    assert "| mrpo, training | 16.00 | 4.0 × | 1,000 | 0.5 |" in lines
    assert lines[-1] == "The losses of the steps differ by at most 1.0e-02, relative."


def test_trl_is_left_out_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []
    monkeypatch.setattr(real_model, "available_memory", lambda: 4 * 2**30)
    monkeypatch.setattr(
        real_model, "measured", lambda folder, variant: measured.append(variant) or {}
    )
    assert real_model.side_by_side(tmp_path, 32) == {}
    assert measured == ["scores of the pairs", *real_model.SCORING[1:], "mrpo, training"]
    assert "TRL left out: it needs about 18 GiB and 4 GiB are free" in capsys.readouterr().out


def test_a_file_that_is_there_is_not_downloaded(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert real_model.download(tmp_path) == tmp_path / "model.gguf"
    assert real_model.available_memory() > 2**20
