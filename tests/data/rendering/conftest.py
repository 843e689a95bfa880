"""Real tokenizers of published models, unpacked for the session."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from mrpo.data.rendering.renderer import load_tokenizer


@pytest.fixture(scope="session")
def real_tokenizers(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, PreTrainedTokenizerFast]:
    """By the name of the archive that holds it, such as "llama-bpe"."""
    root = tmp_path_factory.mktemp("tokenizers")
    for archive in sorted((shared_data / "tokenizers").glob("*.tar.gz")):
        with tarfile.open(archive) as files:
            files.extractall(root, filter="data")
    return {folder.name: load_tokenizer(str(folder)) for folder in sorted(root.iterdir())}
