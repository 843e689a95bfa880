"""The order of the pairs, and batches of them prepared in a thread ahead of the training step.

    epoch e: the shards in a permuted order, cut into windows of 65,536 rows,
             each window permuted as a whole; by prompt, the pairs of each stand side by side

The order is a function of seed and epoch alone, the same on every rank, and a place in it is
three numbers (`Position`), so a resumed run opens one window and continues with the very next
pair. One window of pairs is in memory. Batches run on across epochs; only the run's last one may
be short. From here a batch (`StepBatch`) goes through `forward.py` to `loop.py`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Generic, NamedTuple, NoReturn, TypeVar

import numpy as np

from ..data.pairs import Pair
from ..data.rendering import Refusal, RenderedPrompt, Renderer
from ..errors import UserError
from ..method.objective import Method, ReferenceLogps, ReferenceTargets
from ..model.packing import padded_tokens
from .dataset import Chunk, Rows, TrainingPairs, Window, stacked

WINDOW_ROWS = 65_536
TAKEN_ROWS = 2048  # rows put in order together: Arrow's cost is per call more than per row
BLOCK_ROWS = 256  # pairs rendered in one call of the tokenizer
BATCHES_AHEAD = 8

Item = TypeVar("Item")


class Position(NamedTuple):
    """The next row to read: row `row` of window `window` of epoch `epoch`."""

    epoch: int = 0
    window: int = 0
    row: int = 0


START = Position()


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """The pairs of one optimizer step, and the position of the stream after them."""

    pairs: list[RenderedPrompt]
    ids: list[bytes]
    scores: ReferenceLogps
    targets: ReferenceTargets  # of the same pairs, on the CPU
    position: Position
    dropped: dict[str, int]  # pairs up to here that the policy can't take, by reason

    def __len__(self) -> int:
        return len(self.pairs)


def window(
    usable: list[Rows], seed: int, epoch: int, number: int, size: int = WINDOW_ROWS
) -> tuple[list[tuple[int, Rows]], Rows]:
    """The rows of a window by shard, and the order in which to read them.

    Args:
        usable: for each shard, the rows to be read.
        number: which window of the epoch, from 0.

    Returns:
        [(shard, rows)] in the epoch's order of shards, and a permutation of all these rows taken
        one after the other; both empty after the last window.
    """
    shards = np.random.default_rng((seed, epoch)).permutation(len(usable))
    start, stop, offset = number * size, (number + 1) * size, 0
    parts = []
    for shard in shards:
        rows = usable[shard]
        first, last = max(start - offset, 0), min(stop - offset, len(rows))
        if first < last:
            parts.append((int(shard), rows[first:last]))
        offset += len(rows)
    total = sum(len(rows) for _, rows in parts)
    # Windows count from 1 here: a trailing 0 in the seed would not change the generator.
    return parts, np.random.default_rng((seed, epoch, number + 1)).permutation(total)


def side_by_side(order: Rows, prompts: np.ndarray, seed: int, epoch: int, number: int) -> Rows:
    """A window's order with the rows of each prompt side by side.

    Prompts are permuted alike, however many rows they have; within a prompt the rows keep their
    order.

    Args:
        order: [n] a permutation of the window's rows.
        prompts: [n] int64, the same number for the rows of a prompt.
    """
    different, prompt = np.unique(prompts, return_inverse=True)
    generator = np.random.default_rng((seed, epoch, number + 1, len(different)))
    place = generator.permutation(len(different))[prompt]
    return order[np.argsort(place[order], kind="stable")]


def rendered_within(
    pairs: Sequence[Pair], renderer: Renderer, limits: Mapping[str, int]
) -> Iterator[RenderedPrompt | Refusal]:
    """Each pair as the policy sees it, or why it is dropped; `limits` as `PairStream` has them."""
    for rendered in renderer.render_many(pairs):
        if isinstance(rendered, RenderedPrompt):
            longest = padded_tokens(rendered)
            over = (reason for reason, limit in limits.items() if longest > limit)
            if reason := next(over, None):
                rendered = Refusal(reason, f"{longest} tokens, above {limits[reason]}")
        yield rendered


def refusals(
    pairs: Sequence[Pair], renderer: Renderer, limits: Mapping[str, int]
) -> list[str | None]:
    """For each pair why a stream with these limits would drop it, None where it would not."""
    reasons: list[str | None] = []
    for start in range(0, len(pairs), BLOCK_ROWS):
        block = rendered_within(pairs[start : start + BLOCK_ROWS], renderer, limits)
        reasons += (shown.reason if isinstance(shown, Refusal) else None for shown in block)
    return reasons


def refuse_all(dropped: Mapping[str, int]) -> NoReturn:
    """Raise `UserError`: the policy can't take any pair, for these reasons."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
    raise UserError(
        f"no pair is left that the policy can take ({reasons}); prepare shorter ones, "
        "raise --max-length, or choose another --policy"
    )


class PairStream:
    """Batches of rendered pairs with their targets, from any position to the end."""

    def __init__(
        self,
        source: TrainingPairs,
        usable: list[Rows],
        renderer: Renderer,
        method: Method,
        *,
        seed: int,
        batch_pairs: int,
        total_rows: int,
        limits: Mapping[str, int],
        held_out: bool = False,
        by_prompt: bool = False,
        window_rows: int = WINDOW_ROWS,
    ) -> None:
        """
        Args:
            usable: for each shard, the rows to be read.
            total_rows: rows to read, in all epochs together.
            limits: most tokens of a sequence, by the reason under which a longer pair is dropped.
            held_out: the pairs are not trained on, see `Method.targets`.
            by_prompt: the pairs of a prompt follow each other, as far as a window has them.
        """
        self.source, self.usable, self.renderer, self.method = source, usable, renderer, method
        self.seed, self.batch_pairs, self.held_out = seed, batch_pairs, held_out
        self.total_rows, self.limits, self.window_rows = total_rows, limits, window_rows
        self.by_prompt = by_prompt

    @property
    def epoch_rows(self) -> int:
        return sum(len(rows) for rows in self.usable)

    def epochs_before(self, position: Position) -> float:
        """The epochs that the stream has read at a position, with the fraction of the current."""
        rows = position.window * self.window_rows + position.row
        return position.epoch + rows / self.epoch_rows

    def batches(
        self, position: Position = START, dropped: Mapping[str, int] | None = None
    ) -> Iterator[StepBatch]:
        """The batches from `position` on; counts of `dropped` pairs continue those given.

        Raises `UserError` if the policy can't take a single pair of the stream.
        """
        kept: list[_Example] = []
        refused, any_pair = Counter(dropped or {}), position != START
        for example in self._examples(position):
            if example.after.epoch > 0 and not (kept or any_pair):
                refuse_all(refused)  # a stream without end would search forever
            if isinstance(example.rendered, Refusal):
                # Pairs are counted once, not once an epoch.
                refused[example.rendered.reason] += example.after.epoch == 0
                position = example.after
                continue
            if len(kept) == self.batch_pairs:
                yield self._batch(kept, position, refused)
                kept, any_pair = [], True
            kept.append(example)
            position = example.after
        if kept:
            yield self._batch(kept, position, refused)
        elif not any_pair:
            refuse_all(refused)

    def _examples(self, position: Position) -> Iterator[_Example]:
        epoch, number, row = position
        remaining = self.total_rows - epoch * self.epoch_rows - number * self.window_rows - row
        while remaining > 0:
            parts, order = window(self.usable, self.seed, epoch, number, self.window_rows)
            if not parts:
                assert number > 0, "a stream of no rows"
                epoch, number, row = epoch + 1, 0, 0
                continue
            in_memory = Window([self.source.chunk(shard, rows) for shard, rows in parts])
            if self.by_prompt:
                order = side_by_side(order, in_memory.prompts(), self.seed, epoch, number)
            for start in range(row, len(order), TAKEN_ROWS):
                chunk = in_memory.take(order[start : start + TAKEN_ROWS][:remaining])
                remaining -= len(chunk)
                for place, rendered in enumerate(self._rendered(chunk)):
                    after = Position(epoch, number, start + place + 1)
                    yield _Example(after, rendered, chunk, place)
            number, row = number + 1, 0

    def _rendered(self, chunk: Chunk) -> Iterator[RenderedPrompt | Refusal]:
        """The rows of a chunk, rendered a block at a time."""
        for start in range(0, len(chunk), BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, len(chunk))
            yield from rendered_within(chunk.pairs(start, stop), self.renderer, self.limits)

    def _batch(self, kept: list[_Example], position: Position, dropped: Counter[str]) -> StepBatch:
        parts = [
            (chunk, np.array([example.place for example in examples]))
            for chunk, examples in groupby(kept, attrgetter("chunk"))
        ]
        scores = stacked([(chunk.scores, places) for chunk, places in parts])
        return StepBatch(
            pairs=[example.rendered for example in kept],  # type: ignore[misc]
            ids=[pair_id for chunk, places in parts for pair_id in chunk.ids(places)],
            scores=scores,
            targets=self.method.targets(scores, self.held_out),
            position=position,
            dropped=dict(dropped),
        )


class _Example(NamedTuple):
    """One row on its way into a batch."""

    after: Position  # the next row's
    rendered: RenderedPrompt | Refusal
    chunk: Chunk
    place: int  # of the row in its chunk


class Prefetch(Generic[Item]):
    """Runs an iterator in a thread, a few items ahead; its errors rise in `next`."""

    def __init__(self, items: Iterator[Item], ahead: int = BATCHES_AHEAD) -> None:
        self._items, self._thread = items, ThreadPoolExecutor(max_workers=1)
        self._ready = deque(self._thread.submit(next, items, None) for _ in range(ahead))

    def next(self) -> Item | None:
        """The next item, waiting for it; None after the last."""
        item = self._ready.popleft().result()
        self._ready.append(self._thread.submit(next, self._items, None))
        return item

    def close(self) -> None:
        """Stop the thread, which ends with the item that it is working on."""
        self._thread.shutdown(cancel_futures=True)
