"""A prompt's responses as requests to vLLM, and their log-probs from the answers.

vLLM gives the log-prob of token i from the row of token i - 1, and computes no row of a token that
it finds in its prefix cache. The responses of a prompt are sent one after the other, and each finds
there the blocks of what it has in common with one before, so that the prompt is computed once:

    first response     p p p p p p p p | a b c d e
    second response    p p p p p p p p | a b f g       common: up to b
                       [ cached blocks    ]  ^ first: log-probs of a and b are those of the first

The row that predicts the token at `first` must lie behind the cached blocks: otherwise the V2
runner leaves it out, and the V1 runner returns uninitialized memory. Since blocks are whole, this
concerns only common tokens that end with a block; such a request does not read the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...model.packing import padded_tokens
from .protocol import Logps

if TYPE_CHECKING:
    from ...data.rendering import RenderedPrompt


@dataclass(frozen=True, slots=True)
class Request:
    """One response of a prompt; asks for the log-probs of `token_ids[first:]`."""

    prompt: int  # index into the prompts that are scored together
    response: int  # its number among the prompt's
    token_ids: list[int]
    first: int
    read_cache: bool

    @property
    def num_logps(self) -> int:
        return len(self.token_ids) - self.first


class _Known(NamedTuple):
    """What of a response the ones before it tell."""

    first: int  # index of the first scored token whose log-prob must be asked for
    source: int  # number of the response that has the log-probs of those before it, if any
    cached: int  # first tokens that an earlier response has too, and so may be in the cache


def plan_requests(prompts: Sequence[RenderedPrompt], block: int) -> list[Request]:
    """Requests in the order to send them: longest prompt first, the responses of each directly
    after one another, while the common blocks are still cached.

    `block` is the cache's block size in tokens, or a divisor of it.
    """
    requests = []
    for index in sorted(range(len(prompts)), key=lambda i: (-padded_tokens(prompts[i]), i)):
        responses = prompts[index].responses
        for number, (response, known) in enumerate(zip(responses, _known(prompts[index]))):
            if known.first < len(response.token_ids):
                reads = known.cached // block * block < known.first
                requests.append(Request(index, number, response.token_ids, known.first, reads))
    return requests


def all_logps(prompt: RenderedPrompt, parts: Mapping[int, Logps]) -> tuple[Logps, ...]:
    """The log-probs of all responses, from those of the prompt's requests by number."""
    none = np.empty(0, np.float32)
    whole: list[Logps] = []  # with a tool's turns
    for number, (response, known) in enumerate(zip(prompt.responses, _known(prompt))):
        copied = known.first - response.start
        before = whole[known.source][:copied] if copied else none
        whole.append(np.concatenate([before, parts.get(number, none)]))
    return tuple(response.scored(logps) for response, logps in zip(prompt.responses, whole))


def _known(prompt: RenderedPrompt) -> Iterator[_Known]:
    """For each response of a prompt, from the ones before it."""
    for number, response in enumerate(prompt.responses):
        first, source, cached = response.start, 0, 0
        for earlier, other in enumerate(prompt.responses[:number]):
            common = common_tokens(response.token_ids, other.token_ids, prompt.shared)
            cached = max(cached, common)
            if other.start == response.start and common > first:
                first, source = common, earlier
        yield _Known(first, source, cached)


def trial_prompt(limit: int | None) -> RenderedPrompt:
    """A short prompt of any ids, to try a route with: responses that part behind a whole block."""
    from ...data.rendering import RenderedPrompt, RenderedSequence

    length = min(64, (limit or 64) - 2)
    ids = [1 + place % 7 for place in range(length)]
    start = max(length // 2, 1)
    responses = (
        RenderedSequence([*ids, *end], start, length + 2, boundary=False)
        for end in ([8, 9], [9, 8])
    )
    return RenderedPrompt(tuple(responses), shared=start)


def disagreement(logps: Logps, plain: Logps, dtype: str) -> str | None:
    """How a trial's log-probs differ from those of plain prompt log-probs; None where they agree.

    Rows that are wrong are off by nats. In 16 bits, the same sum in another order differs by tenths
    of a nat for tokens as unlikely as the trial's.
    """
    allowed = 1e-2 if dtype == "float32" else 1.0
    difference = float(np.abs(logps - plain).max())
    if difference <= allowed:  # false for NaN
        return None
    return f"on a trial prompt it is {difference:.2g} nats off plain prompt_logprobs"


def common_tokens(one: Sequence[int], other: Sequence[int], known: int = 0) -> int:
    """How many first tokens two sequences share, of which `known` are known to be shared."""
    end = min(len(one), len(other))
    return next((i for i in range(known, end) if one[i] != other[i]), end)
