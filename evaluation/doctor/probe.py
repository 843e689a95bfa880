"""`mrpo doctor --probe N`: N pairs of each reference scored again in an independent way.

    pairs of all lengths -> plain_model.py -> agree? -> else: which mistake gives the stored scores?

The probe needs the weights that were scored: a reference whose weights are elsewhere, have changed
or were never here is skipped, and the output says why.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from ...data.pairs import Pair
from ...data.references import ReferenceSpec
from ...data.shards import PairShards
from ...data.store import ReferenceRecord, Store
from ...errors import UserError
from ...precompute.identity import ResolvedReference, resolve_reference
from ...precompute.preflight import SERVER
from ..score_table import ReferenceColumns, ScoreTable, pairs_at
from .mistakes import REFUSED, ProbedResponse, mistaken_numbers, mistaken_rendering, unexplained
from .plain_model import PlainModel, PlainTokenizer
from .verdicts import Finding

LONGEST = 4096  # tokens of a sequence beyond which full logits take much memory
# Findings that equal recomputed scores rule out, however much the numbers look like them.
HOW_COMPUTED = ("autocast", SERVER)  # inputs of an identity that refs.yaml does not have
REFUTED = {
    "sign",
    "swapped",
    "means",
    "truncated",
    "shuffled",
    "tokens",
    "unlikely",
    "odd",
    "unverified",
}
AGREE = 0.95  # share of responses whose stored and recomputed scores must be the same
OTHER_TOKENS = 0.25  # share whose counts may differ: the plain way splits some texts differently

MARKER = re.compile(r"<\|[^|<>\s]+\|>|<[a-z_]+_of_[a-z_]+>|\[/?[A-Z_]{3,}\]")
BETTER = 0.05  # share of the nats per byte that the right template saves at least
CONSISTENTLY = 0.75  # share of the responses on which it does


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """The result of probing one reference."""

    alias: str
    skipped: str | None = None  # why there was no probe
    responses: int = 0  # scored again
    agree: int = 0  # of them with the stored score
    difference: float = float("nan")  # mean |stored − recomputed|, nats per token
    other_tokens: int = 0  # responses whose stored token counts differ
    findings: list[Finding] = field(default_factory=list)


def probe(
    table: ScoreTable,
    k: int,
    spec: ReferenceSpec | None,
    others: Sequence[ReferenceSpec],
    pairs: PairShards,
    store: Store,
    count: int,
) -> ProbeReport:
    """Score `count` pairs of the table's k-th reference again, and compare.

    Args:
        spec: the reference's entry in refs.yaml; None for imported scores.
        others: the other references, whose tokenizer or template may have been used by mistake.
    """
    reference = table.references[k]
    resolved = _resolve(reference.record, spec, store)
    if isinstance(resolved, str):
        return ProbeReport(reference.alias, skipped=resolved)
    rows = choose(reference, count)
    transformers_logging.disable_progress_bar()
    model = PlainModel(
        resolved.model,
        resolved.revision,
        resolved.dtype,
        resolved.adapter,
        resolved.adapter_revision,
    )
    tokenizer = PlainTokenizer(resolved.model, resolved.revision, resolved.spec)
    exact = resolved.dtype == "float32" and "autocast" not in reference.record.inputs
    texts = pairs_at(pairs, table.places[rows])
    # The plain way scores all that follows the prompt: no responses with a tool's turns.
    kept = [n for n, pair in enumerate(texts) if not _has_tool_turns(pair)]
    if not kept:
        return ProbeReport(reference.alias, skipped="all its responses have turns of tools")
    rows, texts = rows[kept], [texts[n] for n in kept]
    responses: list[ProbedResponse] = []
    bar = tqdm(texts, desc=f"probe {reference.alias}", unit=" pairs", disable=None)
    for pair, row in zip(bar, rows):
        scores = [model.score(tokenizer.sequence(pair, branch)) for branch in (0, 1)]
        responses += [
            ProbedResponse(
                pair=pair,
                branch=branch,
                stored=float(reference.logps[row, branch]),
                stored_tokens=float(reference.tokens[row, branch]),
                stored_prompt_tokens=float(reference.prompt_tokens[row]),
                score=scores[branch],
                other_score=scores[1 - branch],
                exact=exact,
            )
            for branch in (0, 1)
        ]
    agree = sum(response.agrees for response in responses)
    other_tokens = sum(not response.same_tokens(response.score) for response in responses)
    finding: Finding | None
    if agree < AGREE * len(responses) or other_tokens > OTHER_TOKENS * len(responses):
        finding = (
            mistaken_numbers(responses)
            or mistaken_rendering(model, tokenizer, responses, others)
            or unexplained(responses)
        )
    else:
        finding = check_template(model, tokenizer, responses)
    return ProbeReport(
        alias=reference.alias,
        responses=len(responses),
        agree=agree,
        difference=float(np.mean([response.difference for response in responses])),
        other_tokens=other_tokens,
        findings=[] if finding is None else [finding],
    )


def choose(reference: ReferenceColumns, count: int) -> np.ndarray:
    """Rows of scored pairs from the shortest to the longest, without tokens across the boundary.

    Where a token spans prompt and response, the plain tokenizer may count one token more or less.
    """
    lengths = np.nan_to_num(reference.prompt_tokens) + reference.tokens.max(axis=1)
    lengths = np.where(np.isnan(lengths), -reference.logps.min(axis=1), lengths)  # imported
    fit = reference.scored & ~(reference.boundary == 1).any(axis=1) & (lengths <= LONGEST)
    rows = np.flatnonzero(fit if fit.any() else reference.scored)
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))]


def check_template(
    model: PlainModel, tokenizer: PlainTokenizer, responses: Sequence[ProbedResponse]
) -> Finding | None:
    """Scores are as refs.yaml asks, but refs.yaml shows the model a text that it does not know.

    That is a chat template from elsewhere, or plain text for a model that has a template.
    """
    own = tokenizer.tokenizer.chat_template
    if not isinstance(own, str) or tokenizer.template == own:
        return None
    chat = responses[0].pair.is_chat
    if chat and tokenizer.template is None:
        return None
    markers = _split_markers(tokenizer, tokenizer.template)
    if chat and markers and not _split_markers(tokenizer, own):
        evidence = (
            f"its chat template writes {markers[0]!r}, which its tokenizer splits into pieces, "
            "where the model's own has tokens"
        )
        cause = "chat_template in refs.yaml is another family's"
        return Finding("fault", "template", evidence, cause, "probe")
    saved = [_saved(model, tokenizer, response, own) for response in responses]
    if np.mean(saved) < BETTER or np.mean([share > 0 for share in saved]) < CONSISTENTLY:
        return None
    setting = "chat_template in refs.yaml" if chat else "pairs as plain text"
    evidence = f"with the model's own chat template responses cost {np.mean(saved):.0%} fewer nats"
    cause = f"{setting}: not what the model was trained on"
    return Finding("suspect", "template", evidence, cause, "probe")


def _has_tool_turns(pair: Pair) -> bool:
    return pair.is_chat and len(pair.chosen) + len(pair.rejected) > 2


def _resolve(
    record: ReferenceRecord, spec: ReferenceSpec | None, store: Store
) -> ResolvedReference | str:
    """The reference as it would be scored today, or why it can't be."""
    if record.imported or spec is None:
        return "its scores were imported"
    if spec.quantization is not None:
        return f"quantization {spec.quantization} is vLLM's own"
    try:
        resolved = resolve_reference(spec, store.kept_commits(spec))
    except UserError as error:
        return str(error)
    stored = {key: value for key, value in record.inputs.items() if key not in HOW_COMPUTED}
    if stored != resolved.inputs:
        keys = sorted({*stored, *resolved.inputs})
        changed = [key for key in keys if stored.get(key) != resolved.inputs.get(key)]
        return f"its {', '.join(changed)} changed since it was scored"
    return resolved


def _split_markers(tokenizer: PlainTokenizer, template: str | None) -> list[str]:
    """Control markers that a template writes and the tokenizer has no token for."""
    markers = dict.fromkeys(MARKER.findall(template or ""))
    ids = {marker: tokenizer.tokenizer(marker, add_special_tokens=False) for marker in markers}
    return [marker for marker, tokenized in ids.items() if len(tokenized.input_ids) > 2]


def _saved(
    model: PlainModel, tokenizer: PlainTokenizer, response: ProbedResponse, own: str
) -> float:
    """Share of the content's nats that the model's own template saves; 0 where it can't be used."""
    pair = response.pair if response.pair.is_chat else _as_chat(response.pair)
    try:
        score = model.score(tokenizer.sequence(pair, response.branch, own))
    except REFUSED:
        return 0.0
    return 1 - score.content_logp / response.score.content_logp


def _as_chat(pair: Pair) -> Pair:
    """A text pair as one user and one assistant message."""
    texts = zip(("user", "assistant", "assistant"), (pair.prompt, pair.chosen, pair.rejected))
    turns = [[{"role": role, "content": str(text).strip()}] for role, text in texts]
    return Pair(turns[0], turns[1], turns[2])
