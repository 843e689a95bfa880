"""The plan of requests, played through a prefix cache that behaves as vLLM's."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mrpo.data.rendering import RenderedPair, RenderedSequence
from mrpo.model.packing import padded_tokens
from mrpo.precompute.engines.requests import (
    CHOSEN,
    REJECTED,
    Request,
    common_tokens,
    plan_requests,
    scored_pair,
)


@st.composite
def pairs(draw: st.DrawFn) -> RenderedPair:
    """Few different tokens, so that responses share beginnings and prompts repeat."""
    token = st.integers(0, 2)
    prompt = draw(st.lists(token, min_size=2, max_size=40))
    responses = [draw(st.lists(token, min_size=1, max_size=24)) for _ in range(2)]
    # A merge over the boundary makes a branch's first scored token begin one token earlier.
    early = [draw(st.booleans()) if draw(st.booleans()) else False for _ in range(2)]
    sequences = []
    for response, merged in zip(responses, early):
        ids = [*prompt[:-1], 9, *response] if merged else prompt + response
        start = len(prompt) - merged
        begin = draw(st.integers(start + 1, len(ids)))  # a tool's turn, where there is room
        end = draw(st.integers(begin, max(begin, len(ids) - 1)))
        context = ((begin, end),) if begin < end else ()
        sequences.append(RenderedSequence(ids, start, len(ids), merged, context))
    return RenderedPair(*sequences, shared=0)


def true_logp(token_ids: list[int], position: int) -> float:
    """A number that depends on the token and on all before it."""
    return -float(hash(tuple(token_ids[: position + 1])) % 10_007) / 100


class Cache:
    """vLLM's prefix cache: whole blocks by content, the last token always computed."""

    def __init__(self, block: int) -> None:
        self.block, self.known = block, set()

    def cached(self, request: Request) -> int:
        """Tokens found, and the request's own blocks known from now on."""
        ids, found = request.token_ids, 0
        while request.read_cache and found + self.block < len(ids):
            if tuple(ids[: found + self.block]) not in self.known:
                break
            found += self.block
        for end in range(self.block, len(ids) + 1, self.block):
            self.known.add(tuple(ids[:end]))
        return found


@given(st.lists(pairs(), min_size=1, max_size=4), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=400, deadline=None)
def test_within_a_pair_the_cache_never_swallows_a_row_that_is_needed(
    batch: list[RenderedPair], block: int
) -> None:
    for pair in batch:
        cache = Cache(block)  # per pair: what other pairs left there is checked on output
        for request in plan_requests([pair], block):
            assert cache.cached(request) < request.first


@given(st.lists(pairs(), min_size=1, max_size=6), st.sampled_from([1, 4, 8]))
@settings(max_examples=300, deadline=None)
def test_requests_give_every_scored_token_once(batch: list[RenderedPair], block: int) -> None:
    parts: list[dict[int, np.ndarray]] = [{} for _ in batch]
    for request in plan_requests(batch, block):
        places = range(request.first, len(request.token_ids))
        parts[request.pair][request.branch] = np.array(
            [true_logp(request.token_ids, place) for place in places], dtype=np.float32
        )
    for index, pair in enumerate(batch):
        scored = scored_pair(pair, parts[index])
        for logps, sequence in ((scored.chosen, pair.chosen), (scored.rejected, pair.rejected)):
            between = {i for begin, end in sequence.context for i in range(begin, end)}
            places = sorted({*range(sequence.start, len(sequence.token_ids))} - between)
            assert sequence.num_scored == len(places)
            wanted = [true_logp(sequence.token_ids, place) for place in places]
            assert logps.tolist() == np.array(wanted, dtype=np.float32).tolist()


@given(st.lists(pairs(), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_the_longest_pair_comes_first_and_each_rejected_response_behind_its_chosen_one(
    batch: list[RenderedPair],
) -> None:
    plan = plan_requests(batch, 16)
    lengths = [padded_tokens(batch[request.pair]) for request in plan]
    assert lengths == sorted(lengths, reverse=True)
    for place, request in enumerate(plan):
        if request.branch == REJECTED:
            assert (plan[place - 1].pair, plan[place - 1].branch) == (request.pair, CHOSEN)
    assert {request.pair for request in plan} == set(range(len(batch)))


def pair(prompt: int, common: int, own: int = 5) -> RenderedPair:
    generator = random.Random(prompt)
    both = [generator.randrange(50) for _ in range(prompt + common)]
    sequences = [
        RenderedSequence(both + [last] * own, prompt, prompt + common + own, False)
        for last in (98, 99)
    ]
    return RenderedPair(*sequences, shared=prompt)


def test_only_common_tokens_that_fill_a_block_keep_a_response_from_the_cache() -> None:
    """Blocks of 16, prompts of 30 to 34 tokens: 32 cached tokens hold the row that predicts 32."""
    reads = {
        (prompt, common): plan_requests([pair(prompt, common)], 16)[1].read_cache
        for prompt in range(30, 35)
        for common in (0, 1, 2, 15)
    }
    without_cache = {(32, 0), (31, 1), (30, 2), (33, 15)}  # common tokens: 32, 32, 32, 48
    assert {case for case, read in reads.items() if not read} == without_cache


def test_what_both_responses_begin_with_is_asked_for_once() -> None:
    chosen, rejected = plan_requests([pair(20, 7, own=5)], 16)
    assert (chosen.first, chosen.num_logps) == (20, 12)
    assert (rejected.first, rejected.num_logps) == (27, 5)


def test_a_response_that_is_the_beginning_of_the_other_needs_no_request() -> None:
    ids = list(range(20))
    whole = RenderedSequence(ids, 10, 20, False)
    beginning = RenderedSequence(ids[:15], 10, 15, False)
    (only,) = plan_requests([RenderedPair(whole, beginning, 10)], 16)
    parts = {CHOSEN: np.arange(10, dtype=np.float32)}
    scored = scored_pair(RenderedPair(whole, beginning, 10), parts)
    assert only.branch == CHOSEN
    assert scored.rejected.tolist() == [0, 1, 2, 3, 4]


def test_common_tokens_of_lists_of_any_length() -> None:
    assert common_tokens([], [1]) == 0
    assert common_tokens([1, 2], [1, 2, 3]) == 2
    assert common_tokens([1, 2, 3], [1, 4, 3]) == 1
