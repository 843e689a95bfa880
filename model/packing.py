"""Rows of token ids for a model: responses packed behind their prompt, or one response a row.

A packed row holds, for each of its prompts, the tokens that its responses share, then the rest of
each response, one after the other. Position ids restart at the shared length, so that each response
follows its prompt; the masks of `attention.py` keep responses and prompts apart. `plan_rows`
assigns prompts to rows: the speed depends on it, the numbers do not.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..data.rendering import RenderedPrompt, RenderedSequence

PADDING = -1
SHARED = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """The input of a forward: B rows of L tokens, and the R scored tokens among them.

    A sequence is a response with its prompt; sequences are numbered in the order in which prompts
    and their responses were given. Scored tokens are ordered by sequence, and within one as in the
    text.
    """

    input_ids: Tensor  # [B, L]
    position_ids: Tensor  # [B, L], from 0 in every sequence
    prompt: Tensor  # [B, L], which prompt a token belongs to; PADDING after the last
    branch: Tensor  # [B, L], SHARED, or from 1 which of the prompt's responses
    copies: Tensor  # [B, L], as how many tokens it counts: one for each response of the batch
    predict: Tensor  # [R], flat index into B * L of the token whose hidden state predicts
    targets: Tensor  # [R], the scored token ids
    sequence: Tensor  # [R], which sequence a scored token belongs to
    token_counts: tuple[int, ...]  # scored tokens of each sequence
    # Of a packed row, for each prompt: where it starts, where what its responses share ends, and
    # where each of them ends.
    bounds: tuple[tuple[int, ...], ...] | None

    @property
    def num_tokens(self) -> int:
        """Tokens that the decoder computes, padding included."""
        return self.input_ids.numel()


def packed_tokens(prompt: RenderedPrompt) -> int:
    """Tokens of a prompt and its responses in a packed row: what they share counts once."""
    repeats = len(prompt.responses) - 1
    return sum(len(one.token_ids) for one in prompt.responses) - repeats * prompt.shared


def padded_tokens(prompt: RenderedPrompt) -> int:
    """Tokens of the longest response with its prompt: the width of the prompt's padded rows."""
    return max(len(one.token_ids) for one in prompt.responses)


def plan_rows(prompts: Sequence[RenderedPrompt], max_tokens: int) -> list[list[int]]:
    """Indices of the prompts in each packed row, at most `max_tokens` tokens a row.

    Best fit decreasing: the longest first, each into the fullest row that still has room. A prompt
    whose tokens are beyond the budget gets a row of its own. The plan is a function of the lengths
    alone; rows come longest first, indices within a row ascending.
    """
    sizes = [packed_tokens(prompt) for prompt in prompts]
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for index in sorted(range(len(prompts)), key=lambda i: (-sizes[i], i)):
        fit = bisect_left(room, (sizes[index], 0))
        if fit < len(room):
            left, row = room.pop(fit)
        else:
            left, row = max_tokens, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(room, (left - sizes[index], row))
    return [sorted(row) for row in rows]


def plan_padded(prompts: Sequence[RenderedPrompt], max_tokens: int) -> list[list[int]]:
    """Indices of the prompts in each padded batch, at most `max_tokens` tokens with the padding.

    Prompts of similar length go together, longest first; one beyond the budget is alone.
    """
    widths = [padded_tokens(prompt) for prompt in prompts]
    batches: list[list[int]] = []
    rows = 0  # of the last batch
    for index in sorted(range(len(prompts)), key=lambda i: (-widths[i], i)):
        rows += len(prompts[index].responses)
        # The first prompt of a batch has its longest response, which sets the width of all rows.
        if batches and rows * widths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            rows = len(prompts[index].responses)
    return [sorted(batch) for batch in batches]


def pack(
    prompts: Sequence[RenderedPrompt],
    device: torch.device | str = "cpu",
    *,
    length: Callable[[int], int] | None = None,
    copies: Sequence[int] | None = None,
) -> Batch:
    """One packed row of all the prompts; `length` of its tokens is the length to pad it to.

    `copies`: as how many each sequence counts, 1 where it is None. Without prompts, a row of
    padding: a process without work must still join its group's forward.
    """
    row = _Columns(copies)
    bounds = []
    for index, prompt in enumerate(prompts):
        start, shared = len(row.ids), prompt.shared
        ids = prompt.responses[0].token_ids[:shared]
        row.add(ids, 0, index, SHARED, row.copies_of(len(prompt.responses)))
        ends = [len(row.ids)]
        for branch, sequence in enumerate(prompt.responses, SHARED + 1):
            assert 0 <= shared <= sequence.start, (shared, sequence.start)
            first = len(row.ids)  # index of the response's own first token
            row.add(sequence.token_ids[shared:], shared, index, branch, row.copies_of(1))
            before = first + sequence.start - shared  # index of the first scored token
            # The token before the first scored one is the response's own, or the last shared one.
            opener = before - 1 if sequence.start > shared else start + shared - 1
            row.score(sequence, opener, before)
            ends.append(len(row.ids))
        bounds.append((start, *ends))
    tokens = max(len(row.ids), 1)
    padded = length(tokens) if length is not None else tokens
    row.add([0] * (padded - len(row.ids)), 0, PADDING, SHARED, 0)
    return row.batch(len(row.ids), tuple(bounds), device)


def unpacked(
    prompts: Sequence[RenderedPrompt],
    device: torch.device | str = "cpu",
    *,
    copies: Sequence[int] | None = None,
) -> Batch:
    """One response a row after its prompt, padded on the right; without prompts, as `pack`."""
    rows = _Columns(copies)
    width = max((padded_tokens(prompt) for prompt in prompts), default=1)
    if not prompts:
        rows.add([0], 0, PADDING, SHARED, 0)
    for index, prompt in enumerate(prompts):
        for branch, sequence in enumerate(prompt.responses, SHARED + 1):
            first, length = len(rows.ids) + sequence.start, len(sequence.token_ids)
            rows.add(sequence.token_ids, 0, index, branch, rows.copies_of(1))
            rows.add([0] * (width - length), length, PADDING, branch, 0)
            rows.score(sequence, first - 1, first)
    return rows.batch(width, None, device)


class _Columns:
    """The columns of a batch under construction, as plain lists."""

    def __init__(self, copies: Sequence[int] | None) -> None:
        self._copies_of_sequence = copies
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.prompts: list[int] = []
        self.branches: list[int] = []
        self.copies: list[int] = []
        self.predict: list[int] = []
        self.targets: list[int] = []
        self.token_counts: list[int] = []

    def copies_of(self, count: int) -> int:
        """As how many the next `count` sequences count together."""
        if self._copies_of_sequence is None:
            return count
        number = len(self.token_counts)
        return sum(self._copies_of_sequence[number : number + count])

    def add(
        self, token_ids: list[int], position: int, prompt: int, branch: int, copies: int
    ) -> None:
        """Append tokens whose positions count up from `position`."""
        count = len(token_ids)
        self.ids += token_ids
        self.positions += range(position, position + count)
        self.prompts += [prompt] * count
        self.branches += [branch] * count
        self.copies += [copies] * count

    def score(self, sequence: RenderedSequence, opener: int, first: int) -> None:
        """Append the scored tokens: the first is at index `first` and is predicted at `opener`."""
        assert sequence.start > 0, "the first token of a sequence has nothing to predict it"
        count = len(sequence.token_ids) - sequence.start
        self.predict += sequence.scored([opener, *range(first, first + count - 1)])
        self.targets += sequence.scored(sequence.token_ids[sequence.start :])
        self.token_counts.append(sequence.num_scored)

    def batch(
        self, width: int, bounds: tuple[tuple[int, ...], ...] | None, device: torch.device | str
    ) -> Batch:
        """Rows of `width` tokens; the scored tokens are in the order of their sequences."""
        sequences = [number for number, n in enumerate(self.token_counts) for _ in range(n)]

        def column(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

        return Batch(
            input_ids=column(self.ids).view(-1, width),
            position_ids=column(self.positions).view(-1, width),
            prompt=column(self.prompts).view(-1, width),
            branch=column(self.branches).view(-1, width),
            copies=column(self.copies).view(-1, width),
            predict=column(self.predict),
            targets=column(self.targets),
            sequence=column(sequences),
            token_counts=tuple(self.token_counts),
            bounds=bounds,
        )
