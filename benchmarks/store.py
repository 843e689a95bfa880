"""The score store at scale: generated pairs of short texts, generated scores, real code.

    python benchmarks/store.py --pairs 1000000 --folder /tmp/store-benchmark
    python benchmarks/store.py --pairs 10000000 --folder /tmp/store-benchmark    # the full run

Generates a folder of chat pairs (and a small one, to compare memory with), a store with scores of
several references, and the same pairs with 1 % new ones; then measures each step in a process of
its own, peak memory included, and prints a table beside what is promised. The 10 million pairs
with 5 references take about 7 GB of disk and 15 minutes, most of it to generate. What is generated
is found again by a second run; delete the folder when done.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mrpo.data.ids import ids_to_arrow
from mrpo.data.join import JoinedScores, join
from mrpo.data.pair_table import pair_schema
from mrpo.data.rendering import RenderedPair, RenderedSequence
from mrpo.data.shards import MANIFEST, SCHEMA_VERSION, PairShards, shard_name
from mrpo.data.store import SCORE_SCHEMA, ReferenceRecord, Store
from mrpo.data.store_commands import status
from mrpo.data.store_config import StatusConfig
from mrpo.train.methods import parse_method
from mrpo.train.rows import ScoredPairs
from mrpo.train.stream import PairStream, Position

SHARD = 8192
SMALL = 100_000
STREAMED = 1_000_000  # rows after which the rate is taken
MB = 2**20


def generate(folder: Path, pairs: int, references: int) -> None:
    """Everything that is measured on, each part once."""
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
            scores.add(score_table(ids_of(shard)[: pairs - shard * SHARD], number, shard))
        print(f"generated scores of {record.alias}", file=sys.stderr)
    (folder / "store.complete").touch()


def ids_of(shard: int) -> np.ndarray:
    """The ids of a shard's pairs: random bytes, as digests are."""
    return np.frombuffer(np.random.default_rng((1, shard)).bytes(16 * SHARD), dtype="V16")


def score_table(ids: np.ndarray, reference: int, shard: int) -> pa.Table:
    random = np.random.default_rng((2, reference, shard))
    n = len(ids)
    values = {
        "pair_id": ids_to_arrow(ids),
        "reason": pa.nulls(n, pa.string()),
        **{name: random.integers(2, 60, n) for name in SCORE_SCHEMA.names if "tokens" in name},
        **{name: -random.exponential(20, n) for name in SCORE_SCHEMA.names if "logp" in name},
        **{name: random.random(n) < 0.01 for name in SCORE_SCHEMA.names if "boundary" in name},
    }
    return pa.table([values[name] for name in SCORE_SCHEMA.names], schema=SCORE_SCHEMA)


def write_pairs(folder: Path, shards: range, pairs: int) -> None:
    """A folder of pairs as `mrpo prepare` writes it; its first shards are those of any other."""
    if (folder / MANIFEST).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for shard in shards:
        rows = min(SHARD, pairs - shard * SHARD)
        if rows > 0:
            name = shard_name(shard)
            pq.write_table(pair_table(shard, rows), folder / name, compression="zstd")
            entries.append({"name": name, "rows": rows, "sha256": ""})
    manifest = {"schema_version": SCHEMA_VERSION, "kind": "messages", "pairs": pairs}
    (folder / MANIFEST).write_text(json.dumps({**manifest, "shards": entries}))


def pair_table(shard: int, rows: int) -> pa.Table:
    numbers = [str(shard * SHARD + row) for row in range(rows)]
    chosen = [f"After {number} comes the next whole number, one more." for number in numbers]
    rejected = [f"I would rather not say what comes after {number}." for number in numbers]
    values = {
        "pair_id": ids_to_arrow(ids_of(shard)[:rows]),
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


class OneToken:
    """Stands in for the renderer: tokenizing is not the store's work."""

    def render_many(self, pairs: list[Any]) -> list[RenderedPair]:
        sequence = RenderedSequence([1, 2], 1, 2, False)
        return [RenderedPair(sequence, sequence, 1)] * len(pairs)


def measure_status(folder: Path) -> dict[str, float]:
    started = time.perf_counter()
    status(StatusConfig(store=str(folder / "store")))
    return {"seconds": time.perf_counter() - started}


def measure_missing(folder: Path) -> dict[str, float]:
    """What of the grown data set each reference lacks, one after another."""
    store, pairs = Store(folder / "store"), PairShards(folder / "grown")
    started = time.perf_counter()
    missing = 0
    for record in store.references():
        scores = store.scores(record.identity)
        for shard in range(len(pairs.names)):
            missing += int(scores.missing(pairs.pair_ids(shard), refresh=shard == 0).sum())
    return {"seconds": time.perf_counter() - started, "missing": missing}


def measure_join(folder: Path) -> dict[str, float]:
    store, pairs = Store(folder / "store"), PairShards(folder / "pairs")
    started = time.perf_counter()
    join(pairs, store, store.references()[:3], folder / "joined")
    seconds = time.perf_counter() - started
    join(PairShards(folder / "small"), store, store.references()[:3], folder / "joined-small")
    return {"seconds": seconds}


def open_stream(pairs: Path, joined: Path, resumed: bool = False) -> PairStream:
    """The stream as a training run opens it, method mrpo, but for the tokenizer."""
    scores = JoinedScores(joined)
    source = ScoredPairs(PairShards(pairs), scores, prompt_numbers=False)
    method = parse_method("mrpo", scores.aliases)
    training, _, _ = source.usable(method, resumed=resumed)
    return PairStream(
        source,
        training,
        OneToken(),  # type: ignore[arg-type]
        method,
        seed=0,
        batch_pairs=64,
        total_rows=sum(map(len, training)),
        limits={},
    )


def measure_stream(folder: Path) -> dict[str, float]:
    return streamed(folder / "pairs", folder / "joined")


def measure_small_stream(folder: Path) -> dict[str, float]:
    return streamed(folder / "small", folder / "joined-small")


def streamed(pairs: Path, joined: Path) -> dict[str, float]:
    """Rate of the whole way from files to batches, targets included, and memory on that way."""
    stream = open_stream(pairs, joined)
    started = time.perf_counter()
    rows = sum(len(batch) for batch in islice(stream.batches(), STREAMED // stream.batch_pairs))
    return {"seconds": time.perf_counter() - started, "rows": rows, "resident": resident()}


def measure_resume(folder: Path) -> dict[str, float]:
    """From nothing open to the first batch in the middle of the epoch."""
    started = time.perf_counter()
    stream = open_stream(folder / "pairs", folder / "joined", resumed=True)
    opened = time.perf_counter()
    windows = stream.epoch_rows // stream.window_rows
    next(stream.batches(Position(0, windows // 2, 1234)))
    finished = time.perf_counter()
    return {"seconds": finished - started, "open": opened - started, "batch": finished - opened}


def resident() -> float:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


STEPS: dict[str, Callable[[Path], dict[str, float]]] = {
    "status": measure_status,
    "missing": measure_missing,
    "join": measure_join,
    "small stream": measure_small_stream,
    "stream": measure_stream,
    "resume": measure_resume,
}


def measured(folder: Path, step: str) -> dict[str, float]:
    """One step in a process of its own: its figures, and its peak memory in bytes."""
    command = [sys.executable, __file__, "--folder", str(folder), "--step", step]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    print(step, figures, file=sys.stderr)
    return figures


def table(pairs: int, references: int, of: dict[str, dict[str, float]]) -> str:
    """Markdown: what was measured beside what is promised for 10 million pairs."""
    stream, growth = of["stream"], of["stream"]["resident"] - of["small stream"]["resident"]
    lines = [
        ("status", seconds(of["status"]), "5 s"),
        (f"missing after 1 % new rows, {references} references", seconds(of["missing"]), "30 s"),
        ("… peak memory", megabytes(of["missing"]["peak"]), "1,536 MB"),
        ("join of 3 references", seconds(of["join"]), "–"),
        ("… peak memory", megabytes(of["join"]["peak"]), "1,536 MB"),
        ("streaming, pairs/s", f"{stream['rows'] / stream['seconds']:,.0f}", "20,000"),
        (f"… memory beyond that for {SMALL:,} pairs", megabytes(growth), "200 MB"),
        ("first batch after a resume", seconds(of["resume"]), "2 s"),
    ]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    head = [f"{pairs:,} pairs, {references} references ({machine})", ""]
    head += ["| | measured | promised |", "|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines)])


def seconds(figures: dict[str, float]) -> str:
    return f"{figures['seconds']:.1f} s"


def megabytes(size: float) -> str:
    return f"{size / MB:,.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--references", type=int, default=5)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        figures = STEPS[arguments.step](arguments.folder)
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu = used.ru_utime + used.ru_stime
        print(json.dumps({**figures, "cpu": cpu, "peak": used.ru_maxrss * 1024}))
        return
    folder = arguments.folder / f"{arguments.pairs}-{arguments.references}"
    generate(folder, arguments.pairs, arguments.references)
    figures = {step: measured(folder, step) for step in STEPS}
    print(table(arguments.pairs, arguments.references, figures))


if __name__ == "__main__":
    main()
