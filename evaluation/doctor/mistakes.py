"""Which mistake gives the stored numbers: known ones, each tried on the probe's pairs.

Those here can be tried on the log-probs at hand; `probe_renderings.py` has those that show the
model another text, and need the pairs scored once more. A mistake that gives the stored scores of
nearly all responses is named; otherwise what differs is told.


Mistakes in the text that a model was shown: each rendered on the probe's pairs, and scored.

Part of the probe (`probe_causes.py` has the mistakes that need no forward). Each is tried on the
shortest pairs first and given up where these speak against it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError

from ...data.pairs import Pair, Turns
from ...data.references import ReferenceSpec
from .findings import Finding
from .plain_model import PlainModel, PlainSequence, PlainTokenizer, TokenLogps

EXPLAINS = 0.8  # share of the responses that a mistake must reproduce
FEWEST = 3  # responses that it must reproduce and the right way does not
BY_CHANCE = 0.1  # chance that one of many sums comes as near by accident, at most


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a recomputed log-prob may be from the stored one, in nats."""

    sequence: float
    token: float

    @classmethod
    def of(cls, exact: bool) -> Tolerance:
        """float32 throughout; or a lower precision, where a token's log-prob is off by 0.05."""
        return cls(2e-3, 2e-5) if exact else cls(0.1, 0.1)

    def fits(self, stored: float, recomputed: float, tokens: int) -> bool:
        return bool(abs(stored - recomputed) <= self.of_sum(tokens))

    def of_sum(self, tokens: int) -> float:
        return self.sequence + self.token * tokens


@dataclass(frozen=True, slots=True, eq=False)
class Probed:
    """One response: what the store says, and what the plain way gives."""

    pair: Pair
    branch: int  # 0 chosen, 1 rejected
    stored: float
    stored_tokens: float  # NaN where unknown
    stored_prompt_tokens: float  # in front of the chosen response
    score: TokenLogps
    other: TokenLogps  # of the pair's other response

    def agrees(self, tolerance: Tolerance) -> bool:
        return tolerance.fits(self.stored, self.score.logp, self.score.tokens)

    def same_tokens(self, score: TokenLogps) -> bool:
        """Whether the stored counts, where known, are those of a score of this response."""
        counts = [(self.stored_tokens, score.tokens)]
        if self.branch == 0:
            counts.append((self.stored_prompt_tokens, score.sequence.start))
        return all(np.isnan(stored) or stored == own for stored, own in counts)


Guess = Callable[[Probed, Tolerance], bool]  # whether a mistake gives the stored score


def known_mistake(probed: Sequence[Probed], tolerance: Tolerance) -> Finding | None:
    """The first mistake in `MISTAKES` that gives the stored scores."""
    right = np.array([one.agrees(tolerance) for one in probed])
    for code, cause, guess, least in MISTAKES:
        hits = np.array([guess(one, tolerance) for one in probed])
        if (hits | right).mean() >= least and (hits & ~right).sum() >= FEWEST:
            return found(code, cause, probed, int((hits | right).sum()))
    return None


def found(code: str, cause: str, probed: Sequence[Probed], explained: int) -> Finding:
    """A fault that reproduces the stored scores."""
    evidence = f"{differs(probed)}; this mistake gives {explained} of {len(probed)} exactly"
    return Finding("fault", code, evidence, cause, "probe")


def unexplained(probed: Sequence[Probed], tolerance: Tolerance) -> Finding:
    """What differs, where no known mistake gives the stored scores."""
    agree = float(np.mean([one.agrees(tolerance) for one in probed]))
    same = float(np.mean([one.same_tokens(one.score) for one in probed]))
    stored, own = (np.array([one.stored for one in probed]), [one.score.logp for one in probed])
    evidence = differs(probed)
    if agree > 0.2:
        code, cause = "mixed", f"{agree:.0%} of the rows are right, the others of another origin"
    elif len(probed) > 3 and np.corrcoef(stored, own)[0, 1] < 0.5:
        code, cause = "shuffled", "rows are not those of their pairs, or of other data"
    elif same < 0.5:
        code, cause = "rendering", "another text was scored: another template or tokenizer"
    else:
        code, cause = "weights", "other weights, or another text of as many tokens"
    return Finding("fault", code, evidence, cause, "probe")


def differs(probed: Sequence[Probed]) -> str:
    """How far apart stored and recomputed scores are."""
    off = np.mean([abs(one.stored - one.score.logp) / one.score.tokens for one in probed])
    other = sum(not one.same_tokens(one.score) for one in probed)
    counts = f", {other} of {len(probed)} with other token counts" if other else ""
    return f"scored again, it is {off:.2g} nats per token off{counts}"


def _base(factor: float) -> Guess:
    return lambda one, t: t.fits(one.stored * factor, one.score.logp, one.score.tokens)


def _mean(one: Probed, t: Tolerance) -> bool:
    return t.fits(one.stored * one.score.tokens, one.score.logp, one.score.tokens)


def _swapped(one: Probed, t: Tolerance) -> bool:
    return t.fits(one.stored, one.other.logp, one.other.tokens)


def _rounded(one: Probed, t: Tolerance) -> bool:
    """The nearest float16, or the next to it."""
    step = abs(float(np.spacing(np.float16(one.score.logp))))
    near = abs(one.stored - one.score.logp) <= 2 * step
    return bool(near and float(np.float16(one.stored)) == one.stored)


def _without_end(one: Probed, t: Tolerance) -> bool:
    sequence = one.score.sequence
    ended = sequence.end_start < len(sequence.token_ids)
    return ended and t.fits(one.stored, one.score.content_logp, one.score.tokens - 1)


def _cut_short(one: Probed, t: Tolerance) -> bool:
    """The sum of the response's first tokens."""
    sums = np.cumsum(one.score.response)[:-1]
    if not np.isnan(one.stored_tokens) and one.stored_tokens < one.score.tokens:
        last = int(one.stored_tokens)
        sums = sums[last - 1 : last]
    return any(t.fits(one.stored, value, count + 1) for count, value in enumerate(sums))


def _shifted(one: Probed, t: Tolerance) -> bool:
    """The sum of as many tokens, beginning inside the prompt; not where any number would fit."""
    width, start = one.score.tokens, one.score.sequence.start
    sums = np.concatenate([[0.0], np.cumsum(one.score.token_logps[1:])])  # [i]: tokens 1 to i
    first = np.arange(1, start)
    windows = sums[first + width - 1] - sums[first - 1]
    if len(windows) == 0 or 2 * len(windows) * t.of_sum(width) > BY_CHANCE * np.ptp(windows):
        return False
    return any(t.fits(one.stored, value, width) for value in windows)


# Code, cause, whether it gives the stored score, share of responses that it or the right way gives.
# Left padding can't give all: some padding is longer than the prompt.
MISTAKES: tuple[tuple[str, str, Guess, float], ...] = (
    ("base", "log-probs were stored in base 2, not as nats", _base(np.log(2)), EXPLAINS),
    ("base", "log-probs were stored in base 10, not as nats", _base(np.log(10)), EXPLAINS),
    ("sign", "losses were stored, not log-probs", _base(-1.0), EXPLAINS),
    ("means", "means per token were stored, not sums", _mean, EXPLAINS),
    ("swapped", "chosen and rejected were exchanged", _swapped, EXPLAINS),
    ("rounded", "sums were stored in float16", _rounded, EXPLAINS),
    ("end", "the end of turn was not scored", _without_end, EXPLAINS),
    ("truncated", "responses were cut short", _cut_short, EXPLAINS),
    ("padding", "the prompt's tail was scored as response, as left padding does", _shifted, 0.25),
)


SCREENED = 6  # responses on which a mistake is tried first
BETWEEN_TURNS = ("\n", "\n\n", " ", "")  # what joins messages where the template was left out
MARKER = re.compile(r"<\|[^|<>\s]+\|>|<[a-z_]+_of_[a-z_]+>|\[/?[A-Z_]{3,}\]")
BETTER = 0.05  # share of the nats per byte that the right template saves at least
CONSISTENTLY = 0.75  # share of the responses on which it does
# What a template raises for messages that it does not take.
REFUSED = (TemplateError, TypeError, ValueError, LookupError)


@dataclass(frozen=True, slots=True)
class Rendering:
    """One way to show a pair to the model."""

    code: str
    cause: str
    sequence: Callable[[Probed], PlainSequence | None]  # None: it does not apply


def mistaken_rendering(
    model: PlainModel,
    tokenizer: PlainTokenizer,
    probed: Sequence[Probed],
    others: Sequence[ReferenceSpec],
    tolerance: Tolerance,
) -> Finding | None:
    """The first wrong rendering that gives the stored scores of nearly all responses."""
    for rendering in renderings(tokenizer, others, probed[0].pair.is_chat):
        hits: list[bool] = []
        for one in probed:
            hits.append(_gives(model, rendering, one, tolerance))
            if len(hits) == SCREENED and np.mean(hits) < EXPLAINS:
                break
        if len(hits) == len(probed) and np.mean(hits) >= EXPLAINS:
            return found(rendering.code, rendering.cause, probed, sum(hits))
    return None


def renderings(
    tokenizer: PlainTokenizer, others: Sequence[ReferenceSpec], chat: bool
) -> Iterator[Rendering]:
    """Known ways to go wrong; those that need other references where these are at hand."""
    bos = tokenizer.tokenizer.bos_token_id
    if bos is not None:
        cause = "BOS stood there once too often, from the template and from the tokenizer"
        yield Rendering("bos", cause, lambda one: _in_front([bos], one.score.sequence))
        cause = "BOS was left out"
        yield Rendering("bos", cause, lambda one: _without(bos, one.score.sequence))
    for between in BETWEEN_TURNS if chat else ():
        for ended in (True, False):
            yield Rendering(
                "no_template", "the chat template was left out", _joined(tokenizer, between, ended)
            )
    for other in others:
        try:
            theirs = PlainTokenizer(
                str(other.model_folder or other.model),
                revision=other.revision,
                template=other.chat_template,
                kwargs=other.chat_template_kwargs,
            )
        except (OSError, ValueError):  # not at hand
            continue
        template = theirs.template or theirs.tokenizer.chat_template
        if chat and template:
            cause = f"the chat template was {other.alias}'s"
            yield Rendering("template", cause, _templated(tokenizer, template))
        cause = f"it was given the token ids of {other.alias}'s tokenizer"
        yield Rendering("tokens", cause, _tokenized(theirs))


def check_template(
    model: PlainModel, tokenizer: PlainTokenizer, probed: Sequence[Probed]
) -> Finding | None:
    """Scores are as the settings ask, but the settings show the model a text it does not know.

    That is a chat template from elsewhere, or plain text for a model that has a template.
    """
    own = tokenizer.tokenizer.chat_template
    if not isinstance(own, str) or tokenizer.template == own:
        return None
    chat = probed[0].pair.is_chat
    if chat and tokenizer.template is None:
        return None
    if chat and (spelled := _spelled_markers(tokenizer, probed[0].pair, own)):
        return Finding(
            "fault",
            "template",
            f"its chat template writes {spelled[0]!r}, which its tokenizer spells in pieces, where "
            "the model's own has tokens",
            "chat_template in refs.yaml is another family's",
            "probe",
        )
    saved = [_saved(model, tokenizer, one, own) for one in probed]
    if np.mean(saved) < BETTER or np.mean([value > 0 for value in saved]) < CONSISTENTLY:
        return None
    settings = "chat_template in refs.yaml" if chat else "pairs as plain text"
    return Finding(
        "suspect",
        "template",
        f"with the model's own chat template responses cost {np.mean(saved):.0%} fewer nats",
        f"{settings}: not what the model was trained on",
        "probe",
    )


def _gives(model: PlainModel, rendering: Rendering, one: Probed, tolerance: Tolerance) -> bool:
    try:
        sequence = rendering.sequence(one)
    except REFUSED:
        return False
    if sequence is None or not model.takes(sequence):
        return False
    score = model.score(sequence)
    return one.same_tokens(score) and tolerance.fits(one.stored, score.logp, score.tokens)


def _in_front(ids: list[int], sequence: PlainSequence) -> PlainSequence:
    return PlainSequence(
        [*ids, *sequence.token_ids], sequence.start + len(ids), sequence.end_start + len(ids)
    )


def _without(bos: int, sequence: PlainSequence) -> PlainSequence | None:
    if sequence.start < 2 or sequence.token_ids[0] != bos:
        return None
    return PlainSequence(sequence.token_ids[1:], sequence.start - 1, sequence.end_start - 1)


def _joined(
    tokenizer: PlainTokenizer, between: str, ended: bool
) -> Callable[[Probed], PlainSequence]:
    def sequence(one: Probed) -> PlainSequence:
        prompt, response = (_contents(turns) for turns in _turns(one))
        joined = between.join([*prompt, ""])
        return tokenizer.text(joined, between.join(response), ended)

    return sequence


def _templated(tokenizer: PlainTokenizer, template: str) -> Callable[[Probed], PlainSequence]:
    return lambda one: tokenizer.sequence(one.pair, one.branch, template)


def _tokenized(theirs: PlainTokenizer) -> Callable[[Probed], PlainSequence]:
    return lambda one: theirs.sequence(one.pair, one.branch)


def _turns(one: Probed) -> tuple[Turns, Turns]:
    return one.pair.prompt, one.pair.rejected if one.branch else one.pair.chosen


def _contents(turns: Turns) -> list[str]:
    assert isinstance(turns, list)
    return [message.get("content") or "" for message in turns]


def _spelled_markers(tokenizer: PlainTokenizer, pair: Pair, own: str) -> list[str]:
    """Control marks that the template in force writes and the tokenizer has no token for; none
    where the model's own template's marks are no tokens either."""

    def spelled(template: str | None) -> list[str]:
        marks = dict.fromkeys(MARKER.findall(template or ""))
        return [
            mark
            for mark in marks
            if len(tokenizer.tokenizer(mark, add_special_tokens=False).input_ids) > 2
        ]

    return [] if spelled(own) else spelled(tokenizer.template)


def _saved(model: PlainModel, tokenizer: PlainTokenizer, one: Probed, own: str) -> float:
    """Share of the content's nats that the model's own template saves; 0 where it can't be used."""
    pair = one.pair if one.pair.is_chat else _as_chat(one.pair)
    try:
        score = model.score(tokenizer.sequence(pair, one.branch, own))
    except REFUSED:
        return 0.0
    return 1 - score.content_logp / one.score.content_logp


def _as_chat(pair: Pair) -> Pair:
    """A text pair as one user and one assistant message."""

    def message(role: str, text: Turns) -> list[dict[str, str]]:
        return [{"role": role, "content": str(text).strip()}]

    return Pair(
        message("user", pair.prompt),
        message("assistant", pair.chosen),
        message("assistant", pair.rejected),
    )
