"""Mistakes in the text that a model was shown: each rendered on the probe's pairs, and scored.

Part of the probe (`probe_causes.py` has the mistakes that need no forward). Each is tried on the
shortest pairs first and given up where these speak against it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError

from ..data.pairs import Pair, Turns
from ..data.references import ReferenceSpec
from .findings import Finding
from .plain_scoring import PlainModel, PlainSequence, PlainTokenizer
from .probe_causes import EXPLAINS, Probed, Tolerance, found

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
