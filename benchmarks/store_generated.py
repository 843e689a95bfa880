"""Generated chat pairs of short texts and scores, for `benchmarks/store.py`.

The files are those that `mrpo prepare` and the store write, filled a column at a time. Ids are
random, as digests are; every pair has a prompt and responses of its own, which is the most that a
store has to hold for them. Shard n is the same in every folder of pairs.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mrpo.data.ids import ids_to_arrow
from mrpo.data.shards import MANIFEST, SCHEMA_VERSION, shard_name
from mrpo.data.store import SCORE_SCHEMA, ReferenceRecord, Store
from mrpo.data.tables import RESPONSE_IDS, pair_schema

SHARD = 8192
SMALL = 100_000  # pairs of the folder to compare memory with


def generate(folder: Path, pairs: int, references: int) -> None:
    """Generate all folders, unless they exist."""
    shards = -(-pairs // SHARD)
    write_pairs(folder / "small", range(-(-SMALL // SHARD)), SMALL)
    write_pairs(folder / "pairs", range(shards), pairs)
    write_pairs(folder / "grown", range(shards + 1 + shards // 100), pairs + pairs // 100)
    if (folder / "store.complete").exists():
        return
    store = Store(folder / "store")
    for number in range(references):
        record = store.record(
            ReferenceRecord(
                alias=f"ref{number}",
                entry={"model": f"org/ref{number}"},
                inputs={"model": {"commit": f"{number:040x}"}},
                runs=({"engine": "generated"},),
            )
        )
        scores = store.scores(record.identity)
        for shard in range(shards):
            scores.add(score_table(shard, min(SHARD, pairs - shard * SHARD), number))
        print(f"generated scores of {record.alias}", file=sys.stderr)
    (folder / "store.complete").touch()


def ids_of(shard: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The ids of a shard's pairs, prompts, chosen and rejected responses: random bytes."""
    ids = np.frombuffer(np.random.default_rng((1, shard)).bytes(4 * 16 * SHARD), dtype="V16")
    pairs, *responses = ids.reshape(4, SHARD)[:, :rows]
    return pairs, *responses  # type: ignore[return-value]


def score_table(shard: int, rows: int, reference: int) -> pa.Table:
    """Rows of both responses of a shard's pairs, pair by pair, as the worker stores them."""
    random = np.random.default_rng((2, reference, shard))
    _, prompts, *responses = ids_of(shard, rows)
    n = 2 * rows
    values = {
        "prompt_id": ids_to_arrow(prompts.repeat(2)),
        "response_id": ids_to_arrow(np.stack(responses, axis=1).reshape(-1)),
        "logp": -random.exponential(20, n),
        "end_logp": -random.exponential(1, n),
        "tokens": random.integers(2, 60, n),
        "prompt_tokens": random.integers(2, 60, n),
        "boundary": random.random(n) < 0.01,
        "checksum": random.integers(0, 2**32, n),
        "reason": pa.nulls(n, pa.string()),
    }
    return pa.table([values[name] for name in SCORE_SCHEMA.names], schema=SCORE_SCHEMA)


def write_pairs(folder: Path, shards: range, pairs: int) -> None:
    """A folder of pairs as `mrpo prepare` writes it; its first shards equal those of any other."""
    if (folder / MANIFEST).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for shard in shards:
        rows = min(SHARD, pairs - shard * SHARD)
        if rows > 0:
            name = shard_name(shard)
            pq.write_table(pair_table(shard, rows), folder / name, compression="zstd")
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            entries.append({"name": name, "rows": rows, "sha256": digest})
    manifest = {"schema_version": SCHEMA_VERSION, "kind": "messages", "pairs": pairs}
    (folder / MANIFEST).write_text(json.dumps({**manifest, "shards": entries}))


def pair_table(shard: int, rows: int) -> pa.Table:
    numbers = [str(shard * SHARD + row) for row in range(rows)]
    chosen = [f"After {number} comes the next whole number, one more." for number in numbers]
    rejected = [f"I would rather not say what comes after {number}." for number in numbers]
    values = {
        **dict(zip(("pair_id", *RESPONSE_IDS), map(ids_to_arrow, ids_of(shard, rows)))),
        "prompt": messages("user", [f"What comes after {number}, and why?" for number in numbers]),
        "chosen": messages("assistant", chosen),
        "rejected": messages("assistant", rejected),
        "tools": pa.nulls(rows, pa.string()),
        "chat_template_kwargs": pa.nulls(rows, pa.string()),
        "split": ["validation" if row % 100 == 0 else "train" for row in range(rows)],
        "source": ["generated"] * rows,
        "chosen_bytes": [len(text) for text in chosen],
        "rejected_bytes": [len(text) for text in rejected],
    }
    schema = pair_schema("messages")
    return pa.table([values[name] for name in schema.names], schema=schema)


def messages(role: str, texts: list[str]) -> pa.Array:
    """One message a row."""
    element = pair_schema("messages").field("prompt").type.value_field
    columns = [pa.array([role] * len(texts)), pa.array(texts), pa.nulls(len(texts), pa.string())]
    struct = pa.StructArray.from_arrays(columns, fields=list(element.type))
    return pa.ListArray.from_arrays(
        pa.array(np.arange(len(texts) + 1), pa.int32()), struct, type=pa.list_(element)
    )
