"""Generated ids and scores for the tests of the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mrpo.data.ids import IdArray, ResponseIds, ids_from_bytes
from mrpo.data.store import ReferenceRecord
from mrpo.tests.response_rows import response_rows, rows_of_pairs

ScoreTable = Callable[..., pa.Table]


def make_ids(count: int, seed: int = 0) -> IdArray:
    return np.frombuffer(np.random.default_rng(seed).bytes(16 * count), dtype="V16")


def score_table(ids: IdArray | Sequence[bytes], first: float = -1.0, **columns: Any) -> pa.Table:
    """Rows of responses whose log-probs are first, first - 1, …; any column can be given."""
    ids = ids if isinstance(ids, np.ndarray) else ids_from_bytes(list(ids))
    return response_rows(ids, **{"logp": first - np.arange(len(ids)), **columns})


def missing_table(ids: IdArray, reason: str) -> pa.Table:
    """Rows of responses that can never be scored."""
    return score_table(ids, reason=[reason] * len(ids))


def pair_ids(count: int, seed: int = 0) -> ResponseIds:
    """The ids of pairs of different prompts, with different responses."""
    return ResponseIds(*(make_ids(count, seed=1000 * seed + part) for part in range(3)))


def pair_table(ids: ResponseIds, first: float = -1.0, **columns: Any) -> pa.Table:
    """Rows of both responses of pairs: chosen ones first, first - 1, …, rejected ones 0.5 less."""
    chosen = first - np.arange(len(ids.chosen))
    return rows_of_pairs(ids, **{"chosen_logp": chosen, "rejected_logp": chosen - 0.5, **columns})


def reference_record(alias: str = "llama", commit: str = "a" * 40, **more: Any) -> ReferenceRecord:
    return ReferenceRecord(
        alias=alias,
        entry={"model": "org/name"},
        inputs={"model": {"commit": commit}},
        resolved_commit=commit,
        **more,
    )


@pytest.fixture(scope="session")
def make() -> Any:
    """The generators above; test modules can't import each other."""

    class Make:
        ids = staticmethod(make_ids)
        scores = staticmethod(score_table)
        missing = staticmethod(missing_table)
        pair_ids = staticmethod(pair_ids)
        pair_scores = staticmethod(pair_table)
        record = staticmethod(reference_record)

    return Make
