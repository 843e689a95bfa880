"""Pairs of a batch that share a prompt, to be computed together: each prompt and response once.

Of four ranked answers all pairings are six pairs with twelve responses, of which four are different
ones. `forward.py` computes the four behind one copy of the prompt and gives each pair the log-probs
of its two, so the loss and its gradient are those of one pair at a time. What a batch doesn't hold
together is computed again: `--shuffle prompts` keeps a prompt's pairs side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..data.rendering import RenderedPrompt, RenderedSequence


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """Some pairs of a batch, whose prompt is the same."""

    prompt: RenderedPrompt  # with each response of the pairs once
    rows: list[int]  # of the pairs in the batch
    numbers: list[tuple[int, int]]  # of each pair's chosen and rejected response

    @property
    def copies(self) -> list[int]:
        """How often each response stands in a pair."""
        standing = [number for both in self.numbers for number in both]
        return [standing.count(number) for number in range(len(self.prompt.responses))]

    def parts(self, max_tokens: int, tokens: Callable[[RenderedPrompt], int]) -> list[PromptGroup]:
        """The group in parts of at most `max_tokens` tokens each, as `tokens` counts them.

        A response whose pairs are in two parts is in both. A pair beyond the budget is alone.
        """
        if tokens(self.prompt) <= max_tokens:
            return [self]
        parts: list[tuple[list[int], set[int]]] = []  # places of pairs, and their responses
        # Pairs among the first few responses come first, so that parts hold few responses.
        order = sorted(range(len(self.rows)), key=lambda at: sorted(self.numbers[at])[::-1])
        for at in order:
            for places, used in parts:
                if tokens(self.prompt.only(sorted(used.union(self.numbers[at])))) <= max_tokens:
                    places.append(at)
                    used.update(self.numbers[at])
                    break
            else:
                parts.append(([at], {*self.numbers[at]}))
        return [self._part(places) for places, _ in parts]

    def _part(self, places: Sequence[int]) -> PromptGroup:
        used = sorted({number for at in places for number in self.numbers[at]})
        renumbered = {number: new for new, number in enumerate(used)}
        return PromptGroup(
            self.prompt.only(used),
            [self.rows[at] for at in places],
            [(renumbered[c], renumbered[r]) for c, r in (self.numbers[at] for at in places)],
        )


def grouped(pairs: Sequence[RenderedPrompt]) -> list[PromptGroup]:
    """The pairs of a batch by prompt, in the order of each prompt's first pair.

    Prompts are the same where the tokens that their pairs share are. So where a prompt's last token
    joins the first of some responses, the pairs of these form a group of their own.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for row, pair in enumerate(pairs):
        prompt = tuple(pair.responses[0].token_ids[: pair.shared])
        by_prompt.setdefault(prompt, []).append(row)
    return [_group(pairs, rows) for rows in by_prompt.values()]


def rows_of(groups: Iterable[PromptGroup]) -> list[int]:
    """The rows of all pairs, in the order in which `PairForward` gives their log-probs."""
    return [row for group in groups for row in group.rows]


def _group(pairs: Sequence[RenderedPrompt], rows: list[int]) -> PromptGroup:
    different: dict[tuple[object, ...], int] = {}
    responses: list[RenderedSequence] = []

    def number(response: RenderedSequence) -> int:
        key = (response.start, response.context, *response.token_ids)
        if key not in different:
            different[key] = len(responses)
            responses.append(response)
        return different[key]

    numbers = []
    for row in rows:
        chosen, rejected = map(number, pairs[row].responses)
        numbers.append((chosen, rejected))
    return PromptGroup(RenderedPrompt(tuple(responses), pairs[rows[0]].shared), rows, numbers)
