"""Rows are read back token by token; plans hold every pair once and fill their rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrpo.data.rendering import RenderedPair, RenderedSequence
from mrpo.model.packing import (
    CHOSEN,
    PADDING,
    REJECTED,
    SHARED,
    Batch,
    pack,
    packed_tokens,
    padded_tokens,
    plan_padded,
    plan_rows,
    unpacked,
)

TOKENS = st.lists(st.integers(0, 50), min_size=1, max_size=12)


@st.composite
def rendered_pairs(draw: st.DrawFn) -> RenderedPair:
    shared, branches = draw(TOKENS), []
    for _ in range(2):
        own = draw(st.lists(st.integers(0, 50), max_size=3))
        response = draw(TOKENS)
        ids = shared + own + response
        tail = draw(st.integers(0, len(response)))
        start = len(shared + own)
        begin = draw(st.integers(start + 1, len(ids)))  # a tool's turn, where there is room
        end = draw(st.integers(begin, max(begin, len(ids) - 1)))
        context = ((begin, end),) if begin < end else ()
        branches.append(RenderedSequence(ids, start, len(ids) - tail, False, context))
    return RenderedPair(branches[0], branches[1], len(shared))


PAIRS = st.lists(rendered_pairs(), min_size=1, max_size=6)


def sequences(pairs: list[RenderedPair]) -> list[RenderedSequence]:
    return [sequence for pair in pairs for sequence in (pair.chosen, pair.rejected)]


def scored_places(sequence: RenderedSequence) -> list[int]:
    between = {i for begin, end in sequence.context for i in range(begin, end)}
    return sorted({*range(sequence.start, len(sequence.token_ids))} - between)


def check_scored_tokens(batch: Batch, pairs: list[RenderedPair]) -> None:
    """Every scored token once, in order, with the index of its sequence."""
    rows = sequences(pairs)
    assert batch.targets.tolist() == [s.token_ids[k] for s in rows for k in scored_places(s)]
    assert batch.token_counts == tuple(len(scored_places(s)) for s in rows)
    assert batch.sequence.tolist() == [
        i for i, n in enumerate(batch.token_counts) for _ in range(n)
    ]


def check_predictors(batch: Batch, pairs: list[RenderedPair]) -> None:
    """What predicts a token is its predecessor: same sequence or shared, one position before."""
    ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    branches, owners = batch.branch.flatten(), batch.pair.flatten()
    places = [(i, k) for i, s in enumerate(sequences(pairs)) for k in scored_places(s)]
    for at, (number, place) in zip(batch.predict.tolist(), places):
        assert ids[at] == sequences(pairs)[number].token_ids[place - 1]
        assert positions[at] == place - 1
        assert owners[at] == number // 2
        assert branches[at] in (SHARED, CHOSEN + number % 2)


@given(PAIRS)
def test_packed_row_reads_back(pairs: list[RenderedPair]) -> None:
    batch = pack(pairs)
    assert batch.input_ids.shape == (1, sum(packed_tokens(pair) for pair in pairs))
    check_scored_tokens(batch, pairs)
    check_predictors(batch, pairs)
    for index, pair in enumerate(pairs):
        for branch, sequence in ((CHOSEN, pair.chosen), (REJECTED, pair.rejected)):
            own = (batch.pair == index) & ((batch.branch == SHARED) | (batch.branch == branch))
            assert batch.input_ids[own].tolist() == sequence.token_ids
            assert batch.position_ids[own].tolist() == list(range(len(sequence.token_ids)))
        start, stop = (batch.spans or ())[index]
        assert (batch.pair[0, start:stop] == index).all()
        assert stop - start == packed_tokens(pair)


@given(PAIRS)
def test_padded_rows_read_back(pairs: list[RenderedPair]) -> None:
    batch = unpacked(pairs)
    assert batch.spans is None
    assert batch.input_ids.shape == (2 * len(pairs), max(map(padded_tokens, pairs)))
    check_scored_tokens(batch, pairs)
    for row, sequence in enumerate(sequences(pairs)):
        real = batch.pair[row] != PADDING
        assert batch.input_ids[row][real].tolist() == sequence.token_ids
        assert real.tolist() == sorted(real.tolist(), reverse=True)  # padding is on the right
    width = batch.input_ids.shape[1]
    assert (batch.predict // width == batch.sequence).all()


@given(PAIRS, st.integers(1, 9))
def test_row_is_padded_to_the_length_asked(pairs: list[RenderedPair], multiple: int) -> None:
    plain = pack(pairs)
    batch = pack(pairs, length=lambda tokens: -(-tokens // multiple) * multiple)
    length = plain.num_tokens
    assert batch.num_tokens % multiple == 0
    assert batch.num_tokens - length < multiple
    assert torch.equal(batch.input_ids[:, :length], plain.input_ids)
    assert (batch.pair[0, length:] == PADDING).all()
    assert torch.equal(batch.predict, plain.predict)


@settings(max_examples=50)
@given(st.lists(rendered_pairs(), max_size=40), st.integers(1, 120))
def test_plans_hold_every_pair_once_within_the_budget(
    pairs: list[RenderedPair], max_tokens: int
) -> None:
    rows = plan_rows(pairs, max_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(pairs)))
    for row in rows:
        assert len(row) == 1 or sum(packed_tokens(pairs[i]) for i in row) <= max_tokens
    batches = plan_padded(pairs, max_tokens)
    assert sorted(index for row in batches for index in row) == list(range(len(pairs)))
    for row in batches:
        width = max(padded_tokens(pairs[i]) for i in row)
        assert len(row) == 1 or 2 * len(row) * width <= max_tokens
    assert plan_rows(pairs, max_tokens) == rows


def pair_of(tokens: int) -> RenderedPair:
    """A pair whose packed row has this many tokens."""
    sequence = RenderedSequence([1, 2], 1, 2, boundary=False)
    return RenderedPair(sequence, RenderedSequence([1] * (tokens - 1), 1, tokens - 1, False), 1)


def test_rows_are_filled_longest_pair_first() -> None:
    pairs = [pair_of(tokens) for tokens in (3, 7, 4, 6, 25, 5, 5)]
    # 25 is beyond the budget and alone; 7 + 3, 6 + 4 and 5 + 5 fill rows of ten to the last token.
    assert plan_rows(pairs, 10) == [[4], [0, 1], [2, 3], [5, 6]]
    assert plan_rows([], 10) == []


def test_rows_of_real_lengths_are_nearly_full() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(512).exponential_(1 / 200, generator=generator).long() + 20
    pairs = [pair_of(int(tokens)) for tokens in lengths.clamp(max=2048)]
    rows = plan_rows(pairs, 2048)
    assert sum(packed_tokens(pair) for pair in pairs) / (2048 * len(rows)) > 0.95


def test_scoring_a_first_token_is_our_own_fault() -> None:
    sequence = RenderedSequence([1, 2], 0, 2, boundary=False)
    with pytest.raises(AssertionError):
        pack([RenderedPair(sequence, sequence, 0)])
