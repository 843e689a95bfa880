"""Rows of token ids for a model: pairs packed with their prompt once, or one response a row.

A packed row holds, for each of its pairs, the tokens that the branches share, then the rest of the
chosen branch, then the rest of the rejected branch. Position ids restart at the shared length, so
that each branch follows its prompt; the masks of `attention.py` keep branches and pairs apart.
`plan_rows` assigns pairs to rows: the speed depends on it, the numbers do not.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..data.rendering import RenderedPair, RenderedSequence

PADDING = -1
SHARED, CHOSEN, REJECTED = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Batch:
    """The input of a forward: B rows of L tokens, and the R scored tokens among them.

    Scored tokens are ordered by sequence, and within a sequence as in the text. Sequence
    `2 * i` is the chosen and `2 * i + 1` the rejected branch of the i-th pair given.
    """

    input_ids: Tensor  # [B, L]
    position_ids: Tensor  # [B, L], from 0 in every sequence
    pair: Tensor  # [B, L], which pair a token belongs to; PADDING after the last
    branch: Tensor  # [B, L], SHARED, CHOSEN or REJECTED
    predict: Tensor  # [R], flat index into B * L of the token whose hidden state predicts
    targets: Tensor  # [R], the scored token ids
    sequence: Tensor  # [R], which sequence a scored token belongs to
    token_counts: tuple[int, ...]  # scored tokens of each sequence
    spans: tuple[tuple[int, int], ...] | None  # a packed row's [start, stop) per pair

    @property
    def num_tokens(self) -> int:
        """Tokens that the decoder computes, padding included."""
        return self.input_ids.numel()


def packed_tokens(pair: RenderedPair) -> int:
    """Tokens of a pair in a packed row: the shared prompt counts once."""
    return len(pair.chosen.token_ids) + len(pair.rejected.token_ids) - pair.shared


def padded_tokens(pair: RenderedPair) -> int:
    """Tokens of the longer response with its prompt: the width of the pair's padded rows."""
    return max(len(pair.chosen.token_ids), len(pair.rejected.token_ids))


def plan_rows(pairs: Sequence[RenderedPair], max_tokens: int) -> list[list[int]]:
    """Indices of the pairs in each packed row, at most `max_tokens` tokens a row.

    Best fit decreasing: the longest pair first, each into the fullest row that still has room. A
    pair longer than the budget gets a row of its own. The plan is a function of the lengths alone;
    rows come longest pair first, indices within a row ascending.
    """
    sizes = [packed_tokens(pair) for pair in pairs]
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for index in sorted(range(len(pairs)), key=lambda i: (-sizes[i], i)):
        fit = bisect_left(room, (sizes[index], 0))
        if fit < len(room):
            left, row = room.pop(fit)
        else:
            left, row = max_tokens, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(room, (left - sizes[index], row))
    return [sorted(row) for row in rows]


def plan_padded(pairs: Sequence[RenderedPair], max_tokens: int) -> list[list[int]]:
    """Indices of the pairs in each padded batch, at most `max_tokens` tokens with the padding.

    Pairs of similar length go together, longest first; one longer than the budget is alone.
    """
    widths = [padded_tokens(pair) for pair in pairs]
    batches: list[list[int]] = []
    for index in sorted(range(len(pairs)), key=lambda i: (-widths[i], i)):
        # The first pair of a batch is its longest, and sets the width of all its rows.
        if batches and 2 * (len(batches[-1]) + 1) * widths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return [sorted(batch) for batch in batches]


def pack(
    pairs: Sequence[RenderedPair],
    device: torch.device | str = "cpu",
    *,
    length: Callable[[int], int] | None = None,
) -> Batch:
    """One packed row of all the pairs; `length` of its tokens is the length to pad it to.

    Without pairs, a row of padding: a process without work must still join its group's forward.
    """
    row = _Columns()
    spans = []
    for index, pair in enumerate(pairs):
        start, shared = len(row.ids), pair.shared
        row.add(pair.chosen.token_ids[:shared], 0, index, SHARED)
        for branch, sequence in ((CHOSEN, pair.chosen), (REJECTED, pair.rejected)):
            assert 0 <= shared <= sequence.start, (shared, sequence.start)
            first = len(row.ids)  # index of the branch's own first token
            row.add(sequence.token_ids[shared:], shared, index, branch)
            before = first + sequence.start - shared  # index of the first scored token
            # The token before the first scored one is the branch's own, or the last shared one.
            opener = before - 1 if sequence.start > shared else start + shared - 1
            row.score(sequence, opener, before)
        spans.append((start, len(row.ids)))
    tokens = max(len(row.ids), 1)
    padded = length(tokens) if length is not None else tokens
    row.add([0] * (padded - len(row.ids)), 0, PADDING, SHARED)
    return row.batch(len(row.ids), tuple(spans), device)


def unpacked(pairs: Sequence[RenderedPair], device: torch.device | str = "cpu") -> Batch:
    """One response a row after its prompt, padded on the right; without pairs, as `pack`."""
    rows = _Columns()
    width = max((padded_tokens(pair) for pair in pairs), default=1)
    if not pairs:
        rows.add([0], 0, PADDING, SHARED)
    for index, pair in enumerate(pairs):
        for branch, sequence in ((CHOSEN, pair.chosen), (REJECTED, pair.rejected)):
            first, length = len(rows.ids) + sequence.start, len(sequence.token_ids)
            rows.add(sequence.token_ids, 0, index, branch)
            rows.add([0] * (width - length), length, PADDING, branch)
            rows.score(sequence, first - 1, first)
    return rows.batch(width, None, device)


class _Columns:
    """The columns of a batch under construction, as plain lists."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.pairs: list[int] = []
        self.branches: list[int] = []
        self.predict: list[int] = []
        self.targets: list[int] = []
        self.token_counts: list[int] = []

    def add(self, token_ids: list[int], position: int, pair: int, branch: int) -> None:
        """Append tokens whose positions count up from `position`."""
        count = len(token_ids)
        self.ids += token_ids
        self.positions += range(position, position + count)
        self.pairs += [pair] * count
        self.branches += [branch] * count

    def score(self, sequence: RenderedSequence, opener: int, first: int) -> None:
        """Append the scored tokens: the first is at index `first` and is predicted at `opener`."""
        assert sequence.start > 0, "the first token of a sequence has nothing to predict it"
        count = len(sequence.token_ids) - sequence.start
        self.predict += sequence.scored([opener, *range(first, first + count - 1)])
        self.targets += sequence.scored(sequence.token_ids[sequence.start :])
        self.token_counts.append(sequence.num_scored)

    def batch(
        self, width: int, spans: tuple[tuple[int, int], ...] | None, device: torch.device | str
    ) -> Batch:
        """Rows of `width` tokens; the scored tokens are in the order of their sequences."""
        sequences = [number for number, n in enumerate(self.token_counts) for _ in range(n)]

        def column(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

        return Batch(
            input_ids=column(self.ids).view(-1, width),
            position_ids=column(self.positions).view(-1, width),
            pair=column(self.pairs).view(-1, width),
            branch=column(self.branches).view(-1, width),
            predict=column(self.predict),
            targets=column(self.targets),
            sequence=column(sequences),
            token_counts=tuple(self.token_counts),
            spans=spans,
        )
