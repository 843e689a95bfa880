"""Raw rows for the tests of `prepare`: made, written in every format, prepared, read back."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mrpo.data.config import PrepareConfig
from mrpo.data.pairs import Pair
from mrpo.data.prepare import prepare
from mrpo.data.shards import PairShards

Row = dict[str, Any]


def text_rows(count: int, start: int = 0) -> list[Row]:
    return [
        {"prompt": f"{i} + 1 = ", "chosen": f"{i + 1}", "rejected": f"{i + 2}"}
        for i in range(start, start + count)
    ]


def chat_row(prompt: str, chosen: str, rejected: str) -> Row:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(source: Path | str, out: Path, **options: Any) -> PairShards:
    return prepare(PrepareConfig(source=str(source), out=str(out), **options))


def all_pairs(shards: PairShards) -> list[Pair]:
    return [pair for number in range(len(shards.names)) for pair in shards.pairs(number)]


def all_ids(shards: PairShards) -> list[bytes]:
    return [
        bytes(pair_id) for number in range(len(shards.names)) for pair_id in shards.pair_ids(number)
    ]


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def dropped(shards: PairShards) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in (shards.path / "dropped.jsonl").open()]
    return [(line["row"], line["reason"]) for line in lines]


def to_jsonl(path: Path, rows: list[Row]) -> Path:
    return write(path.with_suffix(".jsonl"), rows)


def to_jsonl_gz(path: Path, rows: list[Row]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    out = path.with_suffix(".jsonl.gz")
    out.write_bytes(gzip.compress(text.encode()))
    return out


def to_csv(path: Path, rows: list[Row]) -> Path:
    """Messages as JSON, the only way they fit into a cell."""
    out = path.with_suffix(".csv")
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(rows[0])
        for row in rows:
            cells = row.values()
            writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    return out


def to_parquet(path: Path, rows: list[Row]) -> Path:
    out = path.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out


def turns(shards: PairShards) -> list[tuple[Any, Any, Any]]:
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in all_pairs(shards)]


def formats(shards: PairShards) -> list[str]:
    return [name for source in shards.manifest["sources"] for name in source["format"]]


def said(*texts: str, system: str | None = None) -> list[Row]:
    """A conversation that the user opens."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def answer(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


def prepared(tmp_path: Path, *rows: Row, **options: Any) -> PairShards:
    return run(write(tmp_path / "rows.jsonl", list(rows)), tmp_path / "pairs", **options)


def scored(*scores: Any, key: str = "score") -> Row:
    """A row of responses, each with its score."""
    return {"prompt": "q", "completions": [{"text": f"r{s}", key: s} for s in scores]}
