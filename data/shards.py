"""Pairs on disk: `part-00000.parquet` … and `manifest.json`, written once, read by every stage.

`ShardWriter` fills shards of a fixed number of pairs in the order they come, so that more rows at
the end never change a full shard. `PairShards` opens a finished folder; the manifest is written
last, so a folder that has one is complete. The columns are those of `pair_table.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from .ids import IdArray, ids_to_numpy
from .pair_table import PAIR_COLUMNS, Kind, from_table, to_table
from .pairs import Pair

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1

# Texts get neither dictionaries nor minima and maxima: these would repeat whole texts.
_SHORT = ["split", "source", "tools", "chat_template_kwargs"]
_ROLES = [f"{name}.list.element.role" for name in ("prompt", "chosen", "rejected")]
_ORDERED = ["pair_id", "chosen_bytes", "rejected_bytes"]


class PairShards:
    """A folder of prepared pairs.

    Raises `UserError` where the folder is none, is incomplete, or was written by a later version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest: dict[str, Any] = _read_manifest(self.path)
        shards = self.manifest["shards"]
        self.kind: Kind = self.manifest["kind"]
        self.names: list[str] = [shard["name"] for shard in shards]
        self.rows: list[int] = [shard["rows"] for shard in shards]

    def __repr__(self) -> str:
        return f"PairShards({str(self.path)!r}: {self.num_pairs} pairs, {self.kind})"

    @cached_property
    def num_pairs(self) -> int:
        return sum(self.rows)

    def table(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One shard as an Arrow table, all columns or the named ones."""
        path = self.path / self.names[shard]
        try:
            table = pq.ParquetFile(path).read(columns=None if columns is None else list(columns))
        except (OSError, pa.ArrowInvalid) as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
            raise UserError(
                f"{path} {reason}, but {MANIFEST} lists it; run `mrpo prepare` again"
            ) from None
        if table.num_rows != self.rows[shard]:
            raise UserError(
                f"{path} has {table.num_rows} rows, {MANIFEST} says {self.rows[shard]}; "
                "run `mrpo prepare` again"
            )
        return table

    def pairs(self, shard: int, rows: Sequence[int] | None = None) -> list[Pair]:
        """The pairs of a shard, all in order or the given rows (numbers within the shard)."""
        table = self.table(shard, PAIR_COLUMNS)
        return from_table(table if rows is None else table.take(pa.array(rows, pa.int64())))

    def pair_ids(self, shard: int) -> IdArray:
        """The ids of a shard's pairs, [rows] of 16 raw bytes."""
        return ids_to_numpy(self.table(shard, ["pair_id"]).column("pair_id"))


class ShardWriter:
    """Writes pairs in the order they are added; holds one shard in memory at a time."""

    def __init__(self, folder: Path, shard_pairs: int) -> None:
        self.shards: list[dict[str, Any]] = []
        self.kind: Kind | None = None  # that of the first pair
        self._folder = folder
        self._shard_pairs = shard_pairs
        self._pairs: list[Pair] = []
        self._ids: list[bytes] = []

    @property
    def num_pairs(self) -> int:
        return sum(shard["rows"] for shard in self.shards) + len(self._pairs)

    def add(self, pair: Pair, pair_id: bytes) -> None:
        """Append one pair; the caller has seen to it that all are of one kind."""
        if self.kind is None:
            self.kind = "messages" if pair.is_chat else "text"
        self._pairs.append(pair)
        self._ids.append(pair_id)
        if len(self._pairs) == self._shard_pairs:
            self._write()

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the last shard and the manifest, which also keeps the given facts."""
        assert self.kind is not None, "a folder of pairs holds at least one"
        if self._pairs:
            self._write()
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "pairs": self.num_pairs,
            **facts,
            "shards": self.shards,
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        (self._folder / MANIFEST).write_text(text + "\n", encoding="utf-8")

    def _write(self) -> None:
        assert self.kind is not None
        path = self._folder / shard_name(len(self.shards))
        table = to_table(self._pairs, self._ids, self.kind)
        pq.write_table(
            table,
            path,
            compression="zstd",
            row_group_size=len(self._pairs),
            use_dictionary=_SHORT + (_ROLES if self.kind == "messages" else []),
            write_statistics=_SHORT + _ORDERED,
        )
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.shards.append({"name": path.name, "rows": len(self._pairs), "sha256": digest})
        self._pairs, self._ids = [], []


def shard_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} holds no prepared pairs (no {MANIFEST}); "
            f"run `mrpo prepare SOURCE --out {path}`"
        ) from None
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not {"kind", "shards"} <= manifest.keys():
        raise UserError(f"{path / MANIFEST} is damaged; run `mrpo prepare` again")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{path} was written with schema version {manifest.get('schema_version')}, this mrpo "
            f"reads {SCHEMA_VERSION}; run `mrpo prepare` again"
        )
    return manifest
