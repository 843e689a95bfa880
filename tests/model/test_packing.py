"""Rows are read back token by token; plans hold every prompt once and fill their rows."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrpo.data.rendering import RenderedPrompt, RenderedSequence
from mrpo.model.packing import (
    PADDING,
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
def rendered_prompts(draw: st.DrawFn) -> RenderedPrompt:
    shared, branches = draw(TOKENS), []
    for _ in range(draw(st.integers(1, 4))):
        own = draw(st.lists(st.integers(0, 50), max_size=3))
        response = draw(TOKENS)
        ids = shared + own + response
        tail = draw(st.integers(0, len(response)))
        start = len(shared + own)
        begin = draw(st.integers(start + 1, len(ids)))  # a tool's turn, where there is room
        end = draw(st.integers(begin, max(begin, len(ids) - 1)))
        context = ((begin, end),) if begin < end else ()
        branches.append(RenderedSequence(ids, start, len(ids) - tail, False, context))
    return RenderedPrompt(tuple(branches), len(shared))


PROMPTS = st.lists(rendered_prompts(), min_size=1, max_size=6)


def sequences(prompts: list[RenderedPrompt]) -> list[RenderedSequence]:
    return [sequence for prompt in prompts for sequence in prompt.responses]


def places_of_sequences(prompts: list[RenderedPrompt]) -> list[tuple[int, int]]:
    """The prompt of each sequence, and its branch there."""
    return [(i, SHARED + 1 + k) for i, p in enumerate(prompts) for k in range(len(p.responses))]


def scored_places(sequence: RenderedSequence) -> list[int]:
    between = {i for begin, end in sequence.context for i in range(begin, end)}
    return sorted({*range(sequence.start, len(sequence.token_ids))} - between)


def check_scored_tokens(batch: Batch, prompts: list[RenderedPrompt]) -> None:
    """Every scored token once, in order, with the index of its sequence."""
    rows = sequences(prompts)
    assert batch.targets.tolist() == [s.token_ids[k] for s in rows for k in scored_places(s)]
    assert batch.token_counts == tuple(len(scored_places(s)) for s in rows)
    assert batch.sequence.tolist() == [
        i for i, n in enumerate(batch.token_counts) for _ in range(n)
    ]


def check_predictors(batch: Batch, prompts: list[RenderedPrompt]) -> None:
    """What predicts a token is its predecessor: same sequence or shared, one position before."""
    ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    branches, owners = batch.branch.flatten(), batch.prompt.flatten()
    places = [(i, k) for i, s in enumerate(sequences(prompts)) for k in scored_places(s)]
    for at, (number, place) in zip(batch.predict.tolist(), places):
        assert ids[at] == sequences(prompts)[number].token_ids[place - 1]
        assert positions[at] == place - 1
        prompt, branch = places_of_sequences(prompts)[number]
        assert owners[at] == prompt
        assert branches[at] in (SHARED, branch)


@given(PROMPTS)
def test_packed_row_reads_back(prompts: list[RenderedPrompt]) -> None:
    batch = pack(prompts)
    assert batch.input_ids.shape == (1, sum(packed_tokens(prompt) for prompt in prompts))
    check_scored_tokens(batch, prompts)
    check_predictors(batch, prompts)
    for (index, branch), sequence in zip(places_of_sequences(prompts), sequences(prompts)):
        own = (batch.prompt == index) & ((batch.branch == SHARED) | (batch.branch == branch))
        assert batch.input_ids[own].tolist() == sequence.token_ids
        assert batch.position_ids[own].tolist() == list(range(len(sequence.token_ids)))
    for index, prompt in enumerate(prompts):
        start, middle, *ends = (batch.bounds or ())[index]
        assert (batch.prompt[0, start : ends[-1]] == index).all()
        assert middle - start == prompt.shared
        assert ends[-1] - start == packed_tokens(prompt)
        for branch, (begin, end) in enumerate(pairwise([middle, *ends]), SHARED + 1):
            assert (batch.branch[0, begin:end] == branch).all()


@given(PROMPTS)
def test_padded_rows_read_back(prompts: list[RenderedPrompt]) -> None:
    batch = unpacked(prompts)
    assert batch.bounds is None
    width = max(map(padded_tokens, prompts))
    assert batch.input_ids.shape == (len(sequences(prompts)), width)
    check_scored_tokens(batch, prompts)
    for row, sequence in enumerate(sequences(prompts)):
        real = batch.prompt[row] != PADDING
        assert batch.input_ids[row][real].tolist() == sequence.token_ids
        assert real.tolist() == sorted(real.tolist(), reverse=True)  # padding is on the right
    assert (batch.predict // width == batch.sequence).all()


@given(PROMPTS, st.integers(1, 9))
def test_row_is_padded_to_the_length_asked(prompts: list[RenderedPrompt], multiple: int) -> None:
    plain = pack(prompts)
    batch = pack(prompts, length=lambda tokens: -(-tokens // multiple) * multiple)
    length = plain.num_tokens
    assert batch.num_tokens % multiple == 0
    assert batch.num_tokens - length < multiple
    assert torch.equal(batch.input_ids[:, :length], plain.input_ids)
    assert (batch.prompt[0, length:] == PADDING).all()
    assert torch.equal(batch.predict, plain.predict)


@given(PROMPTS, st.data())
def test_a_token_counts_once_for_each_sequence_that_holds_it(
    prompts: list[RenderedPrompt], data: st.DataObject
) -> None:
    """As often as in rows of one response each, which repeat the prompt."""
    count = len(sequences(prompts))
    copies = data.draw(st.none() | st.lists(st.integers(1, 3), min_size=count, max_size=count))
    wanted: Counter[tuple[int, int, int]] = Counter()  # by prompt, position and token
    owners = [prompt for prompt, _ in places_of_sequences(prompts)]
    for owner, sequence, times in zip(owners, sequences(prompts), copies or [1] * count):
        for position, token in enumerate(sequence.token_ids):
            wanted[owner, position, token] += times
    for batch in (pack(prompts, copies=copies), unpacked(prompts, copies=copies)):
        columns = (batch.prompt, batch.position_ids, batch.input_ids, batch.copies)
        counted: Counter[tuple[int, int, int]] = Counter()
        for owner, position, token, times in zip(*(c.flatten().tolist() for c in columns)):
            counted[owner, position, token] += times
        assert +counted == wanted  # padding counts 0 times


@settings(max_examples=50)
@given(st.lists(rendered_prompts(), max_size=40), st.integers(1, 120))
def test_plans_hold_every_prompt_once_within_the_budget(
    prompts: list[RenderedPrompt], max_tokens: int
) -> None:
    rows = plan_rows(prompts, max_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(prompts)))
    for row in rows:
        assert len(row) == 1 or sum(packed_tokens(prompts[i]) for i in row) <= max_tokens
    batches = plan_padded(prompts, max_tokens)
    assert sorted(index for row in batches for index in row) == list(range(len(prompts)))
    for row in batches:
        width = max(padded_tokens(prompts[i]) for i in row)
        assert len(row) == 1 or sum(len(prompts[i].responses) for i in row) * width <= max_tokens
    assert plan_rows(prompts, max_tokens) == rows


def prompt_of(tokens: int) -> RenderedPrompt:
    """A prompt whose packed row has this many tokens."""
    sequence = RenderedSequence([1, 2], 1, 2, boundary=False)
    longer = RenderedSequence([1] * (tokens - 1), 1, tokens - 1, False)
    return RenderedPrompt((sequence, longer), 1)


def test_rows_are_filled_longest_prompt_first() -> None:
    prompts = [prompt_of(tokens) for tokens in (3, 7, 4, 6, 25, 5, 5)]
    # 25 is beyond the budget and alone; 7 + 3, 6 + 4 and 5 + 5 fill rows of ten to the last token.
    assert plan_rows(prompts, 10) == [[4], [0, 1], [2, 3], [5, 6]]
    assert plan_rows([], 10) == []


def test_rows_of_real_lengths_are_nearly_full() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(512).exponential_(1 / 200, generator=generator).long() + 20
    prompts = [prompt_of(int(tokens)) for tokens in lengths.clamp(max=2048)]
    rows = plan_rows(prompts, 2048)
    assert sum(packed_tokens(prompt) for prompt in prompts) / (2048 * len(rows)) > 0.95


def test_scoring_a_first_token_is_our_own_fault() -> None:
    sequence = RenderedSequence([1, 2], 0, 2, boundary=False)
    with pytest.raises(AssertionError):
        pack([RenderedPrompt((sequence, sequence), 0)])
