"""Generated ids and scores for the tests of the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mrpo.data.ids import IdArray, ids_from_bytes, ids_to_arrow
from mrpo.data.store import SCORE_SCHEMA, ReferenceRecord

ScoreTable = Callable[..., pa.Table]


def make_ids(count: int, seed: int = 0) -> IdArray:
    return np.frombuffer(np.random.default_rng(seed).bytes(16 * count), dtype="V16")


def score_table(ids: IdArray | Sequence[bytes], first: float = -1.0, **columns: Any) -> pa.Table:
    """Rows whose chosen log-probs are first, first - 1, …; any column can be given."""
    ids = ids if isinstance(ids, np.ndarray) else ids_from_bytes(list(ids))
    n = len(ids)
    values: dict[str, Any] = {
        "chosen_logp": first - np.arange(n),
        "rejected_logp": first - np.arange(n) - 0.5,
        "chosen_end_logp": np.full(n, -0.1),
        "rejected_end_logp": np.full(n, -0.2),
        "chosen_tokens": np.full(n, 7),
        "rejected_tokens": np.full(n, 9),
        "prompt_tokens": np.full(n, 11),
        "chosen_boundary": [False] * n,
        "rejected_boundary": [False] * n,
        "reason": [None] * n,
    } | columns
    arrays = {name: pa.array(values[name], SCORE_SCHEMA.field(name).type) for name in values}
    return pa.table({"pair_id": ids_to_arrow(ids), **arrays})


def missing_table(ids: IdArray, reason: str) -> pa.Table:
    """Rows of pairs that can never be scored."""
    nothing: list[None] = [None] * len(ids)
    names = ("chosen_logp", "rejected_logp", "chosen_end_logp", "rejected_end_logp")
    return score_table(ids, reason=[reason] * len(ids), **dict.fromkeys(names, nothing))


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
        record = staticmethod(reference_record)

    return Make
