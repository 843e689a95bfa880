"""A pair as requests to vLLM, and their log-probs as a pair's again.

vLLM gives the log-prob of token i from the row of token i - 1, and computes no row of a token that
it finds in its prefix cache. The rejected response is sent after the chosen one and finds the
blocks of their common tokens there, so that the prompt is computed once:

    chosen     p p p p p p p p | a b c d e
    rejected   p p p p p p p p | a b f g       common: up to b
               [ cached blocks    ]  ^ first: log-probs of a and b are those of the chosen response

The row that predicts the token at `first` must lie behind the cached blocks: otherwise the V2
runner leaves it out, and the V1 runner returns uninitialized memory. Since blocks are whole, this
concerns only common tokens that end with a block; such a request does not read the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...model.packing import padded_tokens
from .protocol import Logps, PairTokenLogps

if TYPE_CHECKING:
    from ...data.rendering import RenderedPair

CHOSEN, REJECTED = 0, 1


@dataclass(frozen=True, slots=True)
class Request:
    """One branch of a pair; asks for the log-probs of `token_ids[first:]`."""

    pair: int  # index into the pairs that are scored together
    branch: int
    token_ids: list[int]
    first: int
    read_cache: bool

    @property
    def num_logps(self) -> int:
        return len(self.token_ids) - self.first


def plan_requests(pairs: Sequence[RenderedPair], block: int) -> list[Request]:
    """Requests in the order to send them: longest pair first, each chosen response directly
    followed by its rejected one, while the common blocks are still cached.

    `block` is the cache's block size in tokens, or a divisor of it.
    """
    requests = []
    for index in sorted(range(len(pairs)), key=lambda i: (-padded_tokens(pairs[i]), i)):
        chosen, rejected = pairs[index].chosen, pairs[index].rejected
        requests.append(Request(index, CHOSEN, chosen.token_ids, chosen.start, True))
        common = common_tokens(chosen.token_ids, rejected.token_ids)
        first = rejected.start
        if chosen.start == rejected.start:
            first = max(first, common)
        if first < len(rejected.token_ids):
            cached = common // block * block
            requests.append(Request(index, REJECTED, rejected.token_ids, first, cached < first))
    return requests


def scored_pair(pair: RenderedPair, parts: Mapping[int, Logps]) -> PairTokenLogps:
    """A pair's log-probs from its requests, by branch; common tokens have the chosen response's."""
    chosen, own = parts[CHOSEN], parts.get(REJECTED, np.empty(0, np.float32))
    count = len(pair.rejected.token_ids) - pair.rejected.start
    rejected = np.concatenate([chosen[: count - len(own)], own])
    return PairTokenLogps(pair.chosen.scored(chosen), pair.rejected.scored(rejected))


def trial_pair(limit: int | None) -> RenderedPair:
    """A short pair of any ids, to try a route with: responses that part behind a whole block."""
    from ...data.rendering import RenderedPair, RenderedSequence

    length = min(64, (limit or 64) - 2)
    ids = [1 + place % 7 for place in range(length)]
    start = max(length // 2, 1)
    chosen, rejected = (
        RenderedSequence([*ids, *end], start, length + 2, boundary=False)
        for end in ([8, 9], [9, 8])
    )
    return RenderedPair(chosen, rejected, shared=start)


def disagreement(logps: Logps, plain: Logps, dtype: str) -> str | None:
    """How a trial's log-probs differ from those of plain prompt log-probs; None where they agree.

    Rows that are wrong are off by nats. In 16 bits, the same sum in another order differs by tenths
    of a nat for tokens as unlikely as the trial's.
    """
    allowed = 1e-2 if dtype == "float32" else 1.0
    difference = float(np.abs(logps - plain).max())
    if difference <= allowed:  # false for NaN
        return None
    return f"on a trial pair it is {difference:.2g} nats off plain prompt_logprobs"


def common_tokens(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """How many first tokens two sequences share."""
    differences = (i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b)
    return next(differences, min(len(chosen), len(rejected)))
