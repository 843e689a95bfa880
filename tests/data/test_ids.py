"""Ids as numpy arrays: round trips, and finding them as a dictionary would."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from mrpo.data.ids import IdIndex, ids_from_bytes, ids_to_arrow, ids_to_numpy

# Few different bytes in few places: equal ids, and ids that share either half, are common.
ID = st.tuples(st.integers(0, 2), st.integers(0, 2)).map(
    lambda ends: bytes([ends[0], *[0] * 14, ends[1]])
)


@given(st.lists(ID), st.lists(ID, min_size=1))
def test_finding_is_what_a_dictionary_of_first_places_says(
    stored: list[bytes], asked: list[bytes]
) -> None:
    places: dict[bytes, int] = {}
    for place, one in enumerate(stored):
        places.setdefault(one, place)
    index = IdIndex(ids_from_bytes(stored))
    assert index.find(ids_from_bytes(asked)).tolist() == [places.get(one, -1) for one in asked]
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
    assert [one.tobytes() for one in ids_to_numpy(chunked)] == ids
