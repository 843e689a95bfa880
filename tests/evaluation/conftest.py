"""Real pairs, and references that learned from them: what doctor and evaluate are tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging as transformers_logging

from mrpo.tests.evaluation.trained import Clinic, open_clinic, real_rows

transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session")
def rows(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Rows for `prepare`, by data set."""
    return real_rows(shared_data, tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="session")
def clinic(rows: dict[str, list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Clinic:
    """Three healthy references."""
    return open_clinic(rows, tmp_path_factory.mktemp("clinic"), seed=0)
