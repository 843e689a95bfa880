"""Known mistakes of scoring, each tried on the probe's responses: which gives the stored scores?

First mistakes in the numbers, which need no further forward pass (`MISTAKES`), then mistakes in the
text that the model was shown, which are rendered and scored (`renderings`). A mistake that gives
the stored scores of nearly all responses is named; otherwise the finding says what differs. A new
mistake is one entry of `MISTAKES` or of `renderings`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from jinja2 import TemplateError

from ...data.pairs import Pair, Turns
from ...data.references import ReferenceSpec
from .plain_model import PlainModel, PlainSequence, PlainTokenizer, TokenLogps
from .verdicts import Finding

EXPLAINS = 0.8  # share of the responses that a mistake must reproduce
FEWEST_EXPLAINED = 3  # responses that it must reproduce and the right way does not
BY_CHANCE = 0.1  # highest probability that some of many sums is as near by accident
SCREENED = 6  # responses on which a rendering is tried first
BETWEEN_TURNS = ("\n", "\n\n", " ", "")  # what joins messages where the template was left out
# What a template raises for messages that it does not accept.
REFUSED = (TemplateError, TypeError, ValueError, LookupError)


@dataclass(frozen=True, slots=True, eq=False)
class ProbedResponse:
    """One response: its stored score, and the recomputed one."""

    pair: Pair
    branch: int  # 0 chosen, 1 rejected
    stored: float  # log-prob, nats
    stored_tokens: float  # NaN where unknown
    stored_prompt_tokens: float  # in front of the chosen response
    score: TokenLogps
    other_score: TokenLogps  # of the pair's other response
    exact: bool  # float32 throughout; else a token's log-prob is off by 0.05

    @property
    def difference(self) -> float:
        """|stored − recomputed|, nats per token."""
        return abs(self.stored - self.score.logp) / self.score.tokens

    @property
    def agrees(self) -> bool:
        return self.is_of(self.score.logp, self.score.tokens)

    def is_of(self, logp: float, tokens: int, factor: float = 1.0) -> bool:
        """Whether the stored number, times a factor, is this sum over so many tokens."""
        return bool(abs(self.stored * factor - logp) <= self.off_by(tokens))

    def off_by(self, tokens: int) -> float:
        """How far a sum over so many tokens may be from the stored one, in nats."""
        return 2e-3 + 2e-5 * tokens if self.exact else 0.1 + 0.1 * tokens

    def same_tokens(self, score: TokenLogps) -> bool:
        """Whether the stored counts, where known, are those of a score of this response."""
        counts = [(self.stored_tokens, score.tokens)]
        if self.branch == 0:
            counts.append((self.stored_prompt_tokens, score.sequence.start))
        return all(np.isnan(stored) or stored == actual for stored, actual in counts)


Gives = Callable[[ProbedResponse], bool]  # whether a mistake gives the stored score
Renders = Callable[[ProbedResponse], PlainSequence | None]  # None where a mistake does not apply


def mistaken_numbers(responses: Sequence[ProbedResponse]) -> Finding | None:
    """The first of `MISTAKES` that gives the stored scores."""
    right = np.array([response.agrees for response in responses])
    for code, cause, gives, share in MISTAKES:
        hits = np.array([gives(response) for response in responses])
        if (hits | right).mean() >= share and (hits & ~right).sum() >= FEWEST_EXPLAINED:
            return _explained(code, cause, responses, int((hits | right).sum()))
    return None


def mistaken_rendering(
    model: PlainModel,
    tokenizer: PlainTokenizer,
    responses: Sequence[ProbedResponse],
    others: Sequence[ReferenceSpec],
) -> Finding | None:
    """The first wrong rendering that gives the stored scores of nearly all responses.

    Each is tried on the shortest pairs first and given up where it does not explain these.
    """
    for code, cause, render in renderings(tokenizer, others, responses[0].pair.is_chat):
        hits: list[bool] = []
        for response in responses:
            hits.append(_gives(model, render, response))
            if len(hits) == SCREENED and np.mean(hits) < EXPLAINS:
                break
        if len(hits) == len(responses) and np.mean(hits) >= EXPLAINS:
            return _explained(code, cause, responses, sum(hits))
    return None


def unexplained(responses: Sequence[ProbedResponse]) -> Finding:
    """What differs, where no known mistake gives the stored scores."""
    agree = float(np.mean([response.agrees for response in responses]))
    same = float(np.mean([response.same_tokens(response.score) for response in responses]))
    stored = [response.stored for response in responses]
    recomputed = [response.score.logp for response in responses]
    if agree > 0.2:
        code, cause = "mixed", f"{agree:.0%} of the rows are right, the others of another origin"
    elif len(responses) > 3 and np.corrcoef(stored, recomputed)[0, 1] < 0.5:
        code, cause = "shuffled", "rows do not belong to their pairs, or are of other data"
    elif same < 0.5:
        code, cause = "rendering", "another text was scored: another template or tokenizer"
    else:
        code, cause = "weights", "other weights, or another text of as many tokens"
    return Finding("fault", code, _difference(responses), cause, "probe")


# Mistakes in the numbers


def _scaled(factor: float) -> Gives:
    return lambda response: response.is_of(response.score.logp, response.score.tokens, factor)


def _mean(response: ProbedResponse) -> bool:
    return _scaled(response.score.tokens)(response)


def _swapped(response: ProbedResponse) -> bool:
    return response.is_of(response.other_score.logp, response.other_score.tokens)


def _rounded(response: ProbedResponse) -> bool:
    """The nearest float16, or the next to it."""
    step = abs(float(np.spacing(np.float16(response.score.logp))))
    near = abs(response.stored - response.score.logp) <= 2 * step
    return bool(near and float(np.float16(response.stored)) == response.stored)


def _without_end(response: ProbedResponse) -> bool:
    score = response.score
    ended = score.sequence.end_start < len(score.sequence.token_ids)
    return ended and response.is_of(score.content_logp, score.tokens - 1)


def _cut_short(response: ProbedResponse) -> bool:
    """The sum of the response's first tokens."""
    sums = np.cumsum(response.score.response)[:-1]
    if not np.isnan(response.stored_tokens) and response.stored_tokens < response.score.tokens:
        last = int(response.stored_tokens)
        sums = sums[last - 1 : last]
    return any(response.is_of(value, count + 1) for count, value in enumerate(sums))


def _shifted(response: ProbedResponse) -> bool:
    """The sum of as many tokens, beginning inside the prompt; not where any number would fit."""
    width, start = response.score.tokens, response.score.sequence.start
    sums = np.concatenate([[0.0], np.cumsum(response.score.token_logps[1:])])  # [i]: tokens 1 to i
    first = np.arange(1, start)
    windows = sums[first + width - 1] - sums[first - 1]
    covered = 2 * len(windows) * response.off_by(width)
    if len(windows) == 0 or covered > BY_CHANCE * np.ptp(windows):
        return False
    return any(response.is_of(value, width) for value in windows)


# Code, cause, whether it gives the stored score, share of responses that it or the right way gives.
# Left padding can't give all: some padding is longer than the prompt.
MISTAKES: tuple[tuple[str, str, Gives, float], ...] = (
    ("base", "log-probs were stored in base 2, not as nats", _scaled(np.log(2)), EXPLAINS),
    ("base", "log-probs were stored in base 10, not as nats", _scaled(np.log(10)), EXPLAINS),
    ("sign", "losses were stored, not log-probs", _scaled(-1.0), EXPLAINS),
    ("means", "means per token were stored, not sums", _mean, EXPLAINS),
    ("swapped", "chosen and rejected were exchanged", _swapped, EXPLAINS),
    ("rounded", "sums were stored in float16", _rounded, EXPLAINS),
    ("end", "the end of turn was not scored", _without_end, EXPLAINS),
    ("truncated", "responses were cut short", _cut_short, EXPLAINS),
    ("padding", "the prompt's end was scored as response, as left padding does", _shifted, 0.25),
)


# Mistakes in the text


def renderings(
    tokenizer: PlainTokenizer, others: Sequence[ReferenceSpec], chat: bool
) -> Iterator[tuple[str, str, Renders]]:
    """Code, cause, and how the pair was shown to the model.

    Another reference's tokenizer is tried only where it is on this machine.
    """
    bos = tokenizer.tokenizer.bos_token_id
    if bos is not None:
        cause = "BOS was added twice, by the template and by the tokenizer"
        yield "bos", cause, lambda response: _with_bos(bos, response.score.sequence)
        cause = "BOS was left out"
        yield "bos", cause, lambda response: _without_bos(bos, response.score.sequence)
    for between, ended in product(BETWEEN_TURNS if chat else (), (True, False)):
        cause = "the chat template was left out"
        yield "no_template", cause, _joined(tokenizer, between, ended)
    for other in others:
        try:
            theirs = PlainTokenizer(str(other.model_path or other.model), other.revision, other)
        except (OSError, ValueError):  # not on this machine
            continue
        template = theirs.template or theirs.tokenizer.chat_template
        if chat and template:
            cause = f"the chat template was {other.alias}'s"
            yield "template", cause, _rendered(tokenizer, template)
        cause = f"it was given the token ids of {other.alias}'s tokenizer"
        yield "tokens", cause, _rendered(theirs)


def _gives(model: PlainModel, render: Renders, response: ProbedResponse) -> bool:
    try:
        sequence = render(response)
    except REFUSED:
        return False
    if sequence is None or not model.accepts(sequence):
        return False
    score = model.score(sequence)
    return response.same_tokens(score) and response.is_of(score.logp, score.tokens)


def _with_bos(bos: int, sequence: PlainSequence) -> PlainSequence:
    return PlainSequence([bos, *sequence.token_ids], sequence.start + 1, sequence.end_start + 1)


def _without_bos(bos: int, sequence: PlainSequence) -> PlainSequence | None:
    if sequence.start < 2 or sequence.token_ids[0] != bos:
        return None
    return PlainSequence(sequence.token_ids[1:], sequence.start - 1, sequence.end_start - 1)


def _joined(tokenizer: PlainTokenizer, between: str, ended: bool) -> Renders:
    def sequence(response: ProbedResponse) -> PlainSequence:
        pair = response.pair
        prompt, turns = map(_contents, (pair.prompt, (pair.chosen, pair.rejected)[response.branch]))
        return tokenizer.text(between.join([*prompt, ""]), between.join(turns), ended)

    return sequence


def _rendered(tokenizer: PlainTokenizer, template: str | None = None) -> Renders:
    return lambda response: tokenizer.sequence(response.pair, response.branch, template)


def _contents(turns: Turns) -> list[str]:
    assert isinstance(turns, list)
    return [message.get("content") or "" for message in turns]


# The findings


def _explained(
    code: str, cause: str, responses: Sequence[ProbedResponse], explained: int
) -> Finding:
    """A fault that reproduces the stored scores."""
    evidence = (
        f"{_difference(responses)}; this mistake gives {explained} of {len(responses)} exactly"
    )
    return Finding("fault", code, evidence, cause, "probe")


def _difference(responses: Sequence[ProbedResponse]) -> str:
    """How far apart stored and recomputed scores are."""
    off = np.mean([response.difference for response in responses])
    other = sum(not response.same_tokens(response.score) for response in responses)
    counts = f", {other} of {len(responses)} with other token counts" if other else ""
    return f"scored again, it is {off:.2g} nats per token off{counts}"
