"""Prepared pairs whose references are numbers of the test's own: no model anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from mrpo.data.config import PrepareConfig
from mrpo.data.ids import ids_to_arrow
from mrpo.data.prepare import prepare
from mrpo.data.references import load_refs, local_inputs
from mrpo.data.shards import PairShards
from mrpo.data.store import SCORE_SCHEMA, ReferenceRecord, Store


@dataclass(frozen=True, slots=True)
class Scored:
    """The folder of a user who has run prepare and precompute."""

    folder: Path
    pairs: PairShards
    store: Store

    @property
    def flags(self) -> list[str]:
        """Those of every command that reads scores."""
        return [
            *("--pairs", str(self.folder / "pairs")),
            *("--refs-config", str(self.folder / "refs.yaml")),
            *("--store", self.store.root),
        ]

    @property
    def lengths(self) -> np.ndarray:
        """[N, 2] bytes of the responses."""
        names = ["chosen_bytes", "rejected_bytes"]
        tables = [self.pairs.table(shard, names) for shard in range(len(self.pairs.names))]
        return np.concatenate([np.stack([t[name].to_numpy() for name in names], 1) for t in tables])


def chat(prompt: str, chosen: str, rejected: str, source: str = "test") -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "source": source,
    }


def prepared(folder: Path, rows: Sequence[Mapping[str, Any]], **options: Any) -> Scored:
    """Pairs of the rows, and an empty store beside them."""
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = prepare(PrepareConfig(source=str(source), out=str(folder / "pairs"), **options))
    return Scored(folder, pairs, Store(folder / "store"))


def add_scores(
    scored: Scored,
    logps: Mapping[str, np.ndarray],
    entries: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Store each reference's log-probs, [N, 2] nats in the pairs' order; NaN: beyond context.

    `entries` of refs.yaml may name real models on this disk.
    """
    invented = {alias: {"model": f"org/{alias}"} for alias in logps}
    refs_config = scored.folder / "refs.yaml"
    refs_config.write_text(yaml.safe_dump(entries or invented))
    specs = load_refs(refs_config)
    starts = np.cumsum([0, *scored.pairs.rows])
    for alias, values in logps.items():
        files = local_inputs(specs[alias]) if entries else {"model": {"files": alias}}
        inputs = {"dtype": "float32", **files}
        record = ReferenceRecord(alias=alias, entry=specs[alias].entry(), inputs=inputs)
        scored.store.record(record)
        for shard, start in enumerate(starts[:-1]):
            ids = scored.pairs.pair_ids(shard)
            table = _table(ids, values[start : start + len(ids)])
            scored.store.scores(record.identity).add(table)


def _table(ids: np.ndarray, logps: np.ndarray) -> pa.Table:
    missing = np.isnan(logps).any(axis=1)
    columns: dict[str, Any] = {
        "pair_id": ids_to_arrow(ids),
        "reason": ["beyond_context" if absent else None for absent in missing],
    }
    for branch, values in zip(("chosen", "rejected"), logps.T):
        columns[f"{branch}_logp"] = pa.array(values, pa.float64(), mask=missing)
        columns[f"{branch}_end_logp"] = pa.array(values / 100, pa.float64(), mask=missing)
        columns[f"{branch}_tokens"] = np.full(len(ids), 10)
        columns[f"{branch}_boundary"] = np.zeros(len(ids), bool)
    columns["prompt_tokens"] = np.full(len(ids), 5)
    return pa.table(
        {
            name: pa.array(columns[name], SCORE_SCHEMA.field(name).type)
            if not isinstance(columns[name], pa.Array)
            else columns[name]
            for name in SCORE_SCHEMA.names
        }
    )
