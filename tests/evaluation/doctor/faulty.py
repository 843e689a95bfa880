"""Faults, injected into real scores: each function gives what a faulty stage one would store.

Where a fault is in what the model was shown, it is really shown that and scored anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrpo.data.pairs import Pair, Turns
from mrpo.data.rendering import RenderedPrompt, RenderedSequence, Renderer
from mrpo.demo.models import Family, build_model
from mrpo.tests.evaluation.trained import Clinic, score

LOGPS = [f"{branch}_{part}" for branch in ("chosen", "rejected") for part in ("logp", "end_logp")]


def other_token_ids(clinic: Clinic, alias: str, other: str) -> pa.Table:
    """The reference is given the ids of another's tokenizer."""
    size = AutoModelForCausalLM.from_pretrained(clinic.models[alias]).config.vocab_size
    rendered = _changed(
        Renderer.load(clinic.models[other]).render_many(clinic.pairs),
        lambda sequence: dataclasses.replace(
            sequence, token_ids=[token % size for token in sequence.token_ids]
        ),
    )
    return score(clinic.models[alias], clinic.pairs, rendered)


def no_template(clinic: Clinic, alias: str) -> pa.Table:
    """Messages joined by line breaks, in place of the chat template."""
    tokenizer = AutoTokenizer.from_pretrained(clinic.models[alias])

    def shown(pair: Pair, turns: Turns) -> RenderedSequence:
        prompt = "".join(f"{message['content']}\n" for message in _messages(pair.prompt))
        before = tokenizer(prompt).input_ids
        ids = tokenizer(prompt + _messages(turns)[0]["content"]).input_ids
        same = [a == b for a, b in zip(before, ids)]
        start = max(1, same.index(False) if False in same else len(before))
        return RenderedSequence([*ids, tokenizer.eos_token_id], start, len(ids), False)

    rendered = [
        RenderedPrompt.of([shown(pair, turns) for turns in (pair.chosen, pair.rejected)])
        for pair in clinic.pairs
    ]
    return score(clinic.models[alias], clinic.pairs, rendered)


def template_of(clinic: Clinic, alias: str, other: str) -> pa.Table:
    """The chat template of another family."""
    template = AutoTokenizer.from_pretrained(clinic.models[other]).chat_template
    renderer = Renderer.load(clinic.models[alias], chat_template=template)
    return score(clinic.models[alias], clinic.pairs, renderer.render_many(clinic.pairs))


def truncated(clinic: Clinic, alias: str) -> pa.Table:
    """Sequences cut at the length that a quarter of them exceeds."""
    rendered = Renderer.load(clinic.models[alias]).render_many(clinic.pairs)
    lengths = [len(sequence.token_ids) for sequence in _sequences(rendered)]
    most = int(np.quantile(lengths, 0.75))

    def cut(sequence: RenderedSequence) -> RenderedSequence:
        ids = sequence.token_ids[: max(most, sequence.start + 1)]
        return RenderedSequence(
            ids, sequence.start, min(sequence.end_start, len(ids)), sequence.boundary
        )

    return score(clinic.models[alias], clinic.pairs, _changed(rendered, cut))


def doubled_bos(clinic: Clinic, alias: str) -> pa.Table:
    """BOS from the template and from the tokenizer."""

    def doubled(sequence: RenderedSequence) -> RenderedSequence:
        ids = [sequence.token_ids[0], *sequence.token_ids]
        return RenderedSequence(ids, sequence.start + 1, sequence.end_start + 1, sequence.boundary)

    rendered = Renderer.load(clinic.models[alias]).render_many(clinic.pairs)
    return score(clinic.models[alias], clinic.pairs, _changed(rendered, doubled))


@torch.inference_mode()
def left_padded(clinic: Clinic, alias: str, batch: int = 8) -> pa.Table:
    """Padded on the left, sliced as if the padding were on the right."""
    model: Any = AutoModelForCausalLM.from_pretrained(clinic.models[alias]).eval()
    rendered = Renderer.load(clinic.models[alias]).render_many(clinic.pairs)
    sequences = _sequences(rendered)
    sums = []
    for first in range(0, len(sequences), batch):
        some = sequences[first : first + batch]
        longest = max(len(sequence.token_ids) for sequence in some)
        padding = [longest - len(sequence.token_ids) for sequence in some]
        ids = torch.tensor([[0] * n + sequence.token_ids for n, sequence in zip(padding, some)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
        logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        taken = logps.gather(2, ids[:, 1:, None])[..., 0].double()
        for row, sequence in enumerate(some):
            sums.append(float(taken[row, sequence.start - 1 : len(sequence.token_ids) - 1].sum()))
    return with_columns(
        clinic.scores[alias], {"chosen_logp": sums[0::2], "rejected_logp": sums[1::2]}
    )


def random_weights(clinic: Clinic, alias: str, folder: Path) -> pa.Table:
    """The architecture as it is before any training."""
    tokenizer = AutoTokenizer.from_pretrained(clinic.models[alias])
    family: Family = alias  # type: ignore[assignment]
    build_model(family, len(tokenizer), hidden_size=48, layers=2, seed=99).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return score(folder, clinic.pairs)


def shuffled(table: pa.Table) -> pa.Table:
    """Every row belongs to another pair."""
    order = np.random.default_rng(0).permutation(len(table))
    return with_columns(
        table,
        {name: table[name].take(order) for name in table.column_names},
    )


def swapped(table: pa.Table) -> pa.Table:
    """Chosen is rejected and rejected chosen."""
    parts = ("logp", "end_logp", "tokens", "boundary")
    return with_columns(
        table,
        {f"chosen_{part}": table[f"rejected_{part}"] for part in parts}
        | {f"rejected_{part}": table[f"chosen_{part}"] for part in parts},
    )


def base_two(table: pa.Table) -> pa.Table:
    return with_columns(table, {name: table[name].to_numpy() / np.log(2) for name in LOGPS})


def means(table: pa.Table) -> pa.Table:
    """Log-probs per token."""
    return with_columns(
        table,
        {
            name: table[name].to_numpy() / table[f"{name.split('_')[0]}_tokens"].to_numpy()
            for name in LOGPS
        },
    )


def half_copied(table: pa.Table, other: pa.Table) -> pa.Table:
    """Every other row is another reference's."""
    rows = np.arange(len(table))
    source = pa.concat_tables([table, other])
    return source.take(np.where(rows % 2, rows, rows + len(table)))


def in_float16(table: pa.Table) -> pa.Table:
    return with_columns(
        table,
        {name: table[name].to_numpy().astype(np.float16).astype(np.float64) for name in LOGPS},
    )


def with_columns(table: pa.Table, columns: dict[str, Any]) -> pa.Table:
    """The table with some columns replaced."""
    for name, values in columns.items():
        place = table.column_names.index(name)
        if not isinstance(values, pa.ChunkedArray):
            values = pa.array(values, table.schema.field(name).type)
        table = table.set_column(place, table.schema.field(name), values)
    return table


def _sequences(rendered: Sequence[RenderedPrompt]) -> list[RenderedSequence]:
    return [sequence for pair in rendered for sequence in pair.responses]


def _changed(
    rendered: Sequence[RenderedPrompt], change: Callable[[RenderedSequence], RenderedSequence]
) -> list[RenderedPrompt]:
    return [RenderedPrompt.of([*map(change, pair.responses)]) for pair in rendered]


def _messages(turns: Turns) -> list[dict[str, Any]]:
    assert isinstance(turns, list)
    return turns
