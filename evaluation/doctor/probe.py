"""`mrpo doctor --probe N`: a few stored scores held against the same pairs scored the plain way.

    pairs of all lengths -> plain_scoring -> agree? -> else: which mistake gives the stored numbers?

The probe needs the weights that were scored: a reference whose weights are elsewhere, have changed
or were never here is skipped, and the reason is told.
"""

from __future__ import annotations

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
from ..score_table import ReferenceColumns, ScoreTable, pairs_at
from .findings import Finding
from .mistakes import (
    Probed,
    Tolerance,
    check_template,
    known_mistake,
    mistaken_rendering,
    unexplained,
)
from .plain_model import PlainModel, PlainTokenizer

LONGEST = 4096  # tokens of a sequence beyond which full logits are no small thing
# What can't be where stored and recomputed scores agree, however much the numbers look like it.
REFUTED = {"sign", "swapped", "means", "truncated", "shuffled", "tokens", "unlikely", "odd"}
AGREE = 0.95  # share of responses whose stored and recomputed scores must be the same
OTHER_TOKENS = 0.25  # share whose counts may differ: the plain way cuts some tokens elsewhere


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What the probe of one reference says."""

    alias: str
    skipped: str | None = None  # why there was no probe
    responses: int = 0  # scored again
    agree: int = 0  # of them with the stored score
    difference: float = float("nan")  # mean |stored − recomputed|, nats per token
    other_tokens: int = 0  # responses whose stored token counts are others
    findings: list[Finding] = field(default_factory=list)

    @property
    def confirms(self) -> bool:
        """Whether the stored scores are those of the text that they should be of."""
        return self.skipped is None and not self.findings


def probe(
    table: ScoreTable,
    k: int,
    spec: ReferenceSpec | None,
    others: Sequence[ReferenceSpec],
    pairs: PairShards,
    store: Store,
    count: int,
) -> ProbeReport:
    """Score `count` pairs of the table's k-th reference again, and say how they compare.

    Args:
        spec: the reference's entry in refs.yaml; None for imported scores.
        others: the other references, whose tokenizers and templates may have been taken for its.
    """
    reference = table.references[k]
    resolved = _weights_at_hand(reference.record, spec, store)
    if isinstance(resolved, str):
        return ProbeReport(reference.alias, skipped=resolved)
    rows = choose(reference, count)
    if len(rows) == 0:
        return ProbeReport(reference.alias, skipped="no pair has a score")
    transformers_logging.disable_progress_bar()
    model = PlainModel(
        resolved.model,
        revision=resolved.revision,
        dtype=resolved.dtype,
        adapter=resolved.adapter,
    )
    tokenizer = PlainTokenizer(
        resolved.model,
        revision=resolved.revision,
        template=resolved.spec.chat_template,
        kwargs=resolved.spec.chat_template_kwargs,
    )
    exact = resolved.dtype == "float32" and "autocast" not in reference.record.inputs
    tolerance = Tolerance.of(exact)
    probed = _probed(model, tokenizer, pairs_at(pairs, table.places[rows]), reference, rows)
    agree = sum(one.agrees(tolerance) for one in probed)
    other_tokens = sum(not one.same_tokens(one.score) for one in probed)
    off = [abs(one.stored - one.score.logp) / one.score.tokens for one in probed]
    if agree < AGREE * len(probed) or other_tokens > OTHER_TOKENS * len(probed):
        finding: Finding | None = (
            known_mistake(probed, tolerance)
            or mistaken_rendering(model, tokenizer, probed, others, tolerance)
            or unexplained(probed, tolerance)
        )
    else:
        finding = check_template(model, tokenizer, probed)
    return ProbeReport(
        alias=reference.alias,
        responses=len(probed),
        agree=agree,
        difference=float(np.mean(off)),
        other_tokens=other_tokens,
        findings=[] if finding is None else [finding],
    )


def choose(reference: ReferenceColumns, count: int) -> np.ndarray:
    """Rows of scored pairs from the shortest to the longest; none across a token boundary.

    Where a token stands across the boundary, the plain way and ours may part by a token.
    """
    lengths = np.nan_to_num(reference.prompt_tokens) + reference.tokens.max(axis=1)
    lengths = np.where(np.isnan(lengths), -reference.logps.min(axis=1), lengths)  # imported
    fit = reference.scored & ~(reference.boundary == 1).any(axis=1) & (lengths <= LONGEST)
    rows = np.flatnonzero(fit if fit.any() else reference.scored)
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))]


def _weights_at_hand(
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
    same = {key: value for key, value in record.inputs.items() if key != "autocast"}
    if same != resolved.inputs:
        changed = sorted(
            key for key in {*same, *resolved.inputs} if same.get(key) != resolved.inputs.get(key)
        )
        return f"its {', '.join(changed)} changed since it was scored"
    return resolved


def _probed(
    model: PlainModel,
    tokenizer: PlainTokenizer,
    texts: Sequence[Pair],
    reference: ReferenceColumns,
    rows: np.ndarray,
) -> list[Probed]:
    """Both responses of every pair, one after the other."""
    probed = []
    bar = tqdm(texts, desc=f"probe {reference.alias}", unit=" pairs", disable=None)
    for pair, row in zip(bar, rows):
        scores = [model.score(tokenizer.sequence(pair, branch)) for branch in (0, 1)]
        for branch in (0, 1):
            probed.append(
                Probed(
                    pair=pair,
                    branch=branch,
                    stored=float(reference.logps[row, branch]),
                    stored_tokens=float(reference.tokens[row, branch]),
                    stored_prompt_tokens=float(reference.prompt_tokens[row]),
                    score=scores[branch],
                    other=scores[1 - branch],
                )
            )
    return probed
