"""Ids as numpy arrays, an index against a dictionary, a set of ids against a Python set."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from mrpo.data.ids import IdIndex, IdSet, ids_from_bytes, ids_to_arrow, ids_to_numpy

# Few different bytes in few places: equal ids, and ids that share either half, are common.
ID = st.tuples(st.integers(0, 2), st.integers(0, 2)).map(
    lambda ends: bytes([ends[0], *[0] * 14, ends[1]])
)


@given(st.lists(ID), st.lists(ID, min_size=1))
def test_finding_is_what_a_dictionary_of_first_places_says(
    stored: list[bytes], asked: list[bytes]
) -> None:
    places: dict[bytes, int] = {}
    for place, pair_id in enumerate(stored):
        places.setdefault(pair_id, place)
    index = IdIndex(ids_from_bytes(stored))
    assert index.find(ids_from_bytes(asked)).tolist() == [
        places.get(pair_id, -1) for pair_id in asked
    ]
    assert index.firsts().tolist() == sorted(places.values())


def test_random_ids_are_all_found() -> None:
    ids = np.frombuffer(np.random.default_rng(0).bytes(16 * 10_000), dtype="V16")
    assert IdIndex(ids).find(ids[::-1]).tolist() == list(range(9_999, -1, -1))
    assert (IdIndex(ids[:5000]).find(ids[5000:]) == -1).all()


@given(st.lists(ID), st.integers(0, 5))
def test_arrow_columns_keep_their_ids_when_sliced_or_chunked(ids: list[bytes], cut: int) -> None:
    array = ids_to_arrow(ids_from_bytes(ids))
    assert array.to_pylist() == ids
    chunked = pa.chunked_array([array.slice(0, cut), array.slice(cut)], type=array.type)
    assert [pair_id.tobytes() for pair_id in ids_to_numpy(chunked)] == ids


@given(st.lists(st.lists(ID), max_size=12), st.lists(ID, min_size=1))
def test_a_set_tells_new_ids_from_known_ones(
    batches: list[list[bytes]], asked: list[bytes]
) -> None:
    ids, known = IdSet(), set()
    for batch in batches:
        expected = []
        for pair_id in batch:
            expected.append(pair_id not in known)
            known.add(pair_id)
        assert ids.add(ids_from_bytes(batch)).tolist() == expected
        contained = ids.contains(ids_from_bytes(asked)).tolist()
        assert contained == [pair_id in known for pair_id in asked]


def test_a_set_of_many_ids_takes_at_most_20_bytes_each() -> None:
    ids = np.frombuffer(np.random.default_rng(0).bytes(16 * 200_000), dtype="V16")
    known = IdSet()
    assert all(known.add(batch).all() for batch in np.array_split(ids, 50))
    assert not any(known.add(batch).any() for batch in np.array_split(ids[::-1], 7))
    arrays = [(run.high, run.low, run._starts) for run in known._runs]
    assert sum(array.nbytes for run in arrays for array in run) <= 20 * len(ids)
    assert len(known._runs) < 10
