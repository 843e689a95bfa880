"""The plan of requests, played through a prefix cache that behaves as vLLM's."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mrpo.data.rendering import RenderedPrompt, RenderedSequence
from mrpo.model.packing import padded_tokens
from mrpo.precompute.engines.requests import Request, all_logps, common_tokens, plan_requests


@st.composite
def prompts(draw: st.DrawFn) -> RenderedPrompt:
    """Few different tokens, so that responses share beginnings and prompts repeat."""
    token = st.integers(0, 2)
    prompt = draw(st.lists(token, min_size=2, max_size=40))
    sequences = []
    for _ in range(draw(st.integers(1, 5))):
        response = draw(st.lists(token, min_size=1, max_size=24))
        # A merge over the boundary makes a first scored token begin one token earlier.
        merged = draw(st.booleans()) and draw(st.booleans())
        ids = [*prompt[:-1], 9, *response] if merged else prompt + response
        start = len(prompt) - merged
        begin = draw(st.integers(start + 1, len(ids)))  # a tool's turn, where there is room
        end = draw(st.integers(begin, max(begin, len(ids) - 1)))
        context = ((begin, end),) if begin < end else ()
        sequences.append(RenderedSequence(ids, start, len(ids), merged, context))
    return RenderedPrompt.of(sequences)


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


@given(st.lists(prompts(), min_size=1, max_size=4), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=400, deadline=None)
def test_within_a_prompt_the_cache_never_swallows_a_row_that_is_needed(
    batch: list[RenderedPrompt], block: int
) -> None:
    for prompt in batch:
        cache = Cache(block)  # per prompt: what others left there is checked on output
        for request in plan_requests([prompt], block):
            assert cache.cached(request) < request.first


@given(st.lists(prompts(), min_size=1, max_size=6), st.sampled_from([1, 4, 8]))
@settings(max_examples=300, deadline=None)
def test_requests_give_every_scored_token_once(batch: list[RenderedPrompt], block: int) -> None:
    parts: list[dict[int, np.ndarray]] = [{} for _ in batch]
    for request in plan_requests(batch, block):
        places = range(request.first, len(request.token_ids))
        parts[request.prompt][request.response] = np.array(
            [true_logp(request.token_ids, place) for place in places], dtype=np.float32
        )
    for prompt, own in zip(batch, parts):
        for logps, response in zip(all_logps(prompt, own), prompt.responses, strict=True):
            between = {i for begin, end in response.context for i in range(begin, end)}
            places = sorted({*range(response.start, len(response.token_ids))} - between)
            assert response.num_scored == len(places)
            wanted = [true_logp(response.token_ids, place) for place in places]
            assert logps.tolist() == np.array(wanted, dtype=np.float32).tolist()


@given(st.lists(prompts(), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_the_longest_prompt_comes_first_and_its_responses_directly_after_one_another(
    batch: list[RenderedPrompt],
) -> None:
    plan = plan_requests(batch, 16)
    lengths = [padded_tokens(batch[request.prompt]) for request in plan]
    assert lengths == sorted(lengths, reverse=True)
    order = list(dict.fromkeys(request.prompt for request in plan))
    places = [(order.index(request.prompt), request.response) for request in plan]
    assert places == sorted(places)
    assert set(order) == set(range(len(batch)))


def prompt_of(prompt: int, common: int, own: int = 5) -> RenderedPrompt:
    """Two responses with `common` first tokens."""
    generator = random.Random(prompt)
    both = [generator.randrange(50) for _ in range(prompt + common)]
    sequences = [
        RenderedSequence(both + [last] * own, prompt, prompt + common + own, False)
        for last in (98, 99)
    ]
    return RenderedPrompt(tuple(sequences), shared=prompt)


def test_only_common_tokens_that_fill_a_block_keep_a_response_from_the_cache() -> None:
    """Blocks of 16, prompts of 30 to 34 tokens: 32 cached tokens hold the row that predicts 32."""
    reads = {
        (prompt, common): plan_requests([prompt_of(prompt, common)], 16)[1].read_cache
        for prompt in range(30, 35)
        for common in (0, 1, 2, 15)
    }
    without_cache = {(32, 0), (31, 1), (30, 2), (33, 15)}  # common tokens: 32, 32, 32, 48
    assert {case for case, read in reads.items() if not read} == without_cache


def test_what_responses_begin_with_is_asked_for_once() -> None:
    first, second = plan_requests([prompt_of(20, 7, own=5)], 16)
    assert (first.first, first.num_logps) == (20, 12)
    assert (second.first, second.num_logps) == (27, 5)


def test_a_response_begins_as_the_one_before_it_that_it_has_most_in_common_with() -> None:
    """Of a prompt of ten tokens: a third response parts from the second later than from the first,
    and a fourth, whose first scored token comes earlier, takes no log-prob from them."""
    ids = list(range(20))
    sequences = [
        RenderedSequence([*ids[:12], *end], 10, 12 + len(end), False)
        for end in ([60, 61, 62], [70, 71, 72, 73], [70, 71, 80], [70, 71, 72, 73])
    ]
    sequences[3] = RenderedSequence(sequences[3].token_ids, 9, 16, True)
    prompt = RenderedPrompt.of(sequences)
    plan = plan_requests([prompt], 4)
    assert [request.first for request in plan] == [10, 12, 14, 9]
    # Blocks of 4: 8 tokens of the prompt are cached for all, and 12 for the second and third.
    assert [request.read_cache for request in plan] == [True, False, True, False]
    parts = {
        request.response: np.arange(request.num_logps, dtype=np.float32) + 100 * request.response
        for request in plan
    }
    assert [logps.tolist() for logps in all_logps(prompt, parts)] == [
        [0, 1, 2, 3, 4],
        [0, 1, 100, 101, 102, 103],
        [0, 1, 100, 101, 200],
        [300, 301, 302, 303, 304, 305, 306],
    ]


def test_a_response_that_is_the_beginning_of_another_needs_no_request() -> None:
    ids = list(range(20))
    whole = RenderedSequence(ids, 10, 20, False)
    beginning = RenderedSequence(ids[:15], 10, 15, False)
    prompt = RenderedPrompt((whole, beginning, whole), 10)
    (only,) = plan_requests([prompt], 16)
    assert only.response == 0
    scored = all_logps(prompt, {0: np.arange(10, dtype=np.float32)})
    assert [len(logps) for logps in scored] == [10, 5, 10]
    assert scored[1].tolist() == [0, 1, 2, 3, 4]


def test_common_tokens_of_lists_of_any_length() -> None:
    assert common_tokens([], [1]) == 0
    assert common_tokens([1, 2], [1, 2, 3]) == 2
    assert common_tokens([1, 2, 3], [1, 4, 3]) == 1
    assert common_tokens([1, 2, 3], [1, 2, 4], known=1) == 2
