"""Shared by all tests: no network, real data where it is, tiny references, the command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # other tests run at the same time
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from mrpo import cli
from mrpo.demo.models import FAMILIES, write_reference
from mrpo.tests.needs import missing

TEXTS = [
    "What is the capital of France? The capital of France is Paris.",
    "How many eggs are left? She has 16 - 3 - 4 = 9 eggs, and sells them for 18 dollars.",
    "Write one polite sentence. Thank you very much for your help, and have a good day!",
    "A naïve café in Zürich; 東京 and emoji 🙂 are spelled byte by byte.\n\nNew paragraph.",
] * 8


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real pairs beside the checkout; in continuous integration it must be there."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        missing(f"real preference data not found at {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of untrained tiny models, one of each family, each with its own tokenizer."""
    root = tmp_path_factory.mktemp("references")
    return {
        family: write_reference(root / family, family, TEXTS, seed=seed)
        for seed, family in enumerate(FAMILIES)
    }


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def mrpo(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `mrpo ARGUMENTS…` in this process, through the command line's own entry."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr("sys.argv", ["mrpo", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return Ran(int(ended.value.code or 0), out, err)

    return run
