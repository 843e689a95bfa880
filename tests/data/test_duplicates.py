"""Telling new ids from known ones, against a Python set."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mrpo.data.ids import SeenIds, ids_from_bytes

# Few different bytes in few places: ids that come again, and ids that share either half.
ID = st.tuples(st.integers(0, 3), st.integers(0, 3)).map(
    lambda ends: bytes([ends[0], *[0] * 14, ends[1]])
)


@given(st.lists(st.lists(ID), max_size=12))
def test_an_id_is_new_the_first_time_only(batches: list[list[bytes]]) -> None:
    seen, known = SeenIds(), set()
    for batch in batches:
        expected = []
        for one in batch:
            expected.append(one not in known)
            known.add(one)
        assert seen.add(ids_from_bytes(batch)).tolist() == expected


def test_many_ids_are_told_apart_in_about_16_bytes_each() -> None:
    ids = np.frombuffer(np.random.default_rng(0).bytes(16 * 200_000), dtype="V16")
    seen = SeenIds()
    assert all(seen.add(batch).all() for batch in np.array_split(ids, 50))
    assert not any(seen.add(batch).any() for batch in np.array_split(ids[::-1], 7))
    assert sum(run.nbytes for run in seen._runs) == ids.nbytes
    assert len(seen._runs) < 10
