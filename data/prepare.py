"""`mrpo prepare`: preference data of any known format to shards of pairs.

Rows stream through in batches: read (`sources.py`), turned into pairs (`formats.py`), corrected by
reviewed tables (`reviewed.py`), checked against the ids of all earlier pairs (`ids.py`), written
(`shards.py`). Memory holds one shard and about 20 bytes a pair.

The output is all or nothing: its files are written to a hidden folder and moved into place once all
are complete. An error leaves what was there before; a run killed during the move leaves a folder
without its manifest, which readers refuse and a rerun replaces.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from ..errors import UserError
from ..files import sync
from ..settings import command, write_resolved
from .config import PrepareConfig
from .formats import REASONS, Broken, PairReader, Unusable, by_reason, pair_columns
from .ids import IdSet, ids_from_bytes
from .pairs import Pair, is_validation
from .reviewed import Review
from .shards import MANIFEST, PairShards, ShardWriter
from .sources import Row, Source, open_sources

PAIRS = "pairs"  # the default folder
DROPPED = "dropped.jsonl"
SETTINGS = "prepare.yaml"
SHARDS = "part-*.parquet"
STAGE = ".preparing-"  # begins the name of the hidden folder
MAX_DROPPED_SHARE = 0.05
BATCH_ROWS = 4096
DUPLICATE = "duplicate"
EXCLUDED = "excluded"  # by a reviewed table
UNKNOWN_SHOWN = 5  # ids of a reviewed table that are not in the data; the manifest lists all


@command(PrepareConfig)
def prepare(config: PrepareConfig) -> PairShards:
    """Write the pairs of `config.source` to `config.out`; returns the folder opened.

    Raises `UserError` for data or settings that cannot be used, and then writes nothing.
    """
    sources = open_sources(config.source)
    out = Path(config.out)
    with _staged(out) as folder:
        with (folder / DROPPED).open("w", encoding="utf-8") as dropped:
            preparation = _Preparation(config, ShardWriter(folder, config.shard_pairs), dropped)
            with tqdm(unit=" rows", unit_scale=True, disable=None) as progress:
                for source in sources:
                    for rows in preparation.read(source):
                        progress.update(rows)
        preparation.finish()
        write_resolved(config, folder / SETTINGS)
    shards = PairShards(out)
    print(_summary(shards))
    return shards


def open_pairs(folder: str | None, source: str | None) -> PairShards:
    """The pairs in a folder (by default `pairs`), prepared there first where a source is given."""
    if source is not None:
        return prepare(PrepareConfig(source=source, out=folder or PAIRS))
    return PairShards(folder or PAIRS)


class _Preparation:
    """Reads sources one after the other, writes their pairs and counts what was dropped."""

    def __init__(self, config: PrepareConfig, writer: ShardWriter, dropped: IO[str]) -> None:
        self._config = config
        self._writer = writer
        self._dropped = dropped
        self._known = IdSet()
        self._review = Review(config.exclude, config.flip)
        self._sources: list[dict[str, str | int]] = []
        self._splits: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()  # of rows that gave no pair, duplicates too
        self._first_pair = ""  # where its row is, for messages
        self._first_unusable = ""

    def read(self, source: Source) -> Iterator[int]:
        """Read a source; yields the number of rows of each batch once they are written."""
        reader = PairReader(self._config, source.name)
        rows = source.rows(pair_columns(self._config))
        total = 0
        while batch := list(islice(rows, BATCH_ROWS)):
            self._take(source, reader, batch)
            total += len(batch)
            yield len(batch)
        self._sources.append({"given": source.given, "name": source.name, "rows": total})

    def finish(self) -> None:
        """Write the last shard and the manifest, unless too little of the data could be used."""
        rows = sum(int(source["rows"]) for source in self._sources)
        duplicates = self._reasons.pop(DUPLICATE, 0)
        unusable = self._reasons.total() - self._reasons[EXCLUDED]
        if self._writer.num_pairs == 0:
            left = f"no pair is left of {rows:,} rows (dropped: {by_reason(self._reasons)})"
            raise UserError(
                f"{self._config.source}: {left if rows else 'there are no rows'}; "
                "at least one pair is needed"
            )
        if unusable > MAX_DROPPED_SHARE * rows and not self._config.allow_dropped:
            raise UserError(
                f"{self._config.source}: {unusable:,} of {rows:,} rows ({unusable / rows:.1%}) "
                f"cannot be used ({by_reason(self._reasons)}; the first: {self._first_unusable}); "
                f"more than {MAX_DROPPED_SHARE:.0%} needs --allow-dropped"
            )
        excluded = self._reasons.pop(EXCLUDED, 0)
        options = asdict(self._config)
        del options["source"], options["out"]
        self._writer.finish(
            {
                "splits": {name: self._splits[name] for name in ("train", "validation")},
                "rows": rows,
                "duplicates": duplicates,
                "reviewed": {
                    "excluded": excluded,
                    "flipped": self._review.flipped,
                    "unknown": self._review.unknown(),
                },
                "dropped": dict(sorted(self._reasons.items())),
                "sources": self._sources,
                "options": options,
            }
        )

    def _take(self, source: Source, reader: PairReader, rows: Iterable[Row]) -> None:
        """Write the new pairs of a batch in order and list the rows that gave none."""
        read: list[tuple[int, Pair, bytes]] = []
        without: list[tuple[int, str]] = []
        for number, fields in rows:
            place = f"{source.given}, {source.unit} {number}"
            try:
                reviewed = self._review.apply(*reader.read(fields))
            except Broken as error:
                raise UserError(f"{place}, {error}") from None
            except Unusable as error:
                if self._config.strict:
                    raise UserError(
                        f"{place} cannot be used: {error.reason} ({REASONS[error.reason]}); "
                        "without --strict such rows are dropped and listed"
                    ) from None
                self._first_unusable = self._first_unusable or place
                without.append((number, error.reason))
            else:
                if reviewed is None:
                    without.append((number, EXCLUDED))
                else:
                    read.append((number, *reviewed))
        new = self._known.add(ids_from_bytes([identity for _, _, identity in read]))
        for (number, pair, identity), is_new in zip(read, new.tolist()):
            if is_new:
                self._write(f"{source.given}, {source.unit} {number}", pair, identity)
            else:
                without.append((number, DUPLICATE))
        for number, reason in sorted(without):
            self._reasons[reason] += 1
            line = {"source": source.given, "row": number, "reason": reason}
            self._dropped.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _write(self, place: str, pair: Pair, identity: bytes) -> None:
        kind = "messages" if pair.is_chat else "text"
        self._first_pair = self._first_pair or place
        if self._writer.kind not in (None, kind):
            raise UserError(
                f"{place} holds {kind}, but the first pair ({self._first_pair}) "
                f"{self._writer.kind}; prepare them apart, or --chat to make messages of text"
            )
        if is_validation(pair.prompt, self._config.validation_fraction):
            pair = replace(pair, split="validation")
        self._splits[pair.split] += 1
        self._writer.add(pair, identity)


def _summary(shards: PairShards) -> str:
    """How many rows were kept and dropped, and where the pairs are."""
    manifest = shards.manifest
    dropped, splits = manifest["dropped"], manifest["splits"]
    parts = f"{len(shards.names):,} shard{'s' if len(shards.names) > 1 else ''}"
    kept = f"{shards.num_pairs:,} pairs of {shards.kind} in {parts}"
    gone = f"{manifest['duplicates']:,} duplicates, {sum(dropped.values()):,} unusable"
    if dropped:
        gone += f" ({by_reason(dropped)})"
    return "\n".join(
        [
            f"rows    {manifest['rows']:,}",
            f"kept    {kept}: {splits['train']:,} train, {splits['validation']:,} validation",
            f"dropped {gone}; see {shards.path / DROPPED}",
            *_reviewed(manifest),
            f"pairs   {shards.path}",
        ]
    )


def _reviewed(manifest: dict[str, Any]) -> list[str]:
    """The effect of the reviewed tables, if any were given."""
    options, reviewed = manifest["options"], manifest["reviewed"]
    if not (options["exclude"] or options["flip"]):
        return []
    lines = [f"review  {reviewed['excluded']:,} excluded, {reviewed['flipped']:,} flipped"]
    for file, ids in reviewed["unknown"].items():
        shown = ", ".join(ids[:UNKNOWN_SHOWN]) + (", …" if len(ids) > UNKNOWN_SHOWN else "")
        lines.append(
            f"WARNING: pairs of {file} that are not in the data: {len(ids):,} ({shown}); "
            f"all are in {MANIFEST}"
        )
    return lines


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """An empty folder whose files replace those of `out` when the block ends without error.

    Raises `UserError` where `out` cannot be a folder or holds something other than pairs.
    """
    missing: list[Path] = []
    try:
        _refuse_foreign(out)
        missing = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        for leftover in out.glob(f"{STAGE}*"):
            shutil.rmtree(leftover)
        stage = Path(tempfile.mkdtemp(prefix=STAGE, dir=out))
    except OSError as error:
        _remove_empty(missing)
        raise UserError(f"--out {out}: {error.strerror} ({error.filename})") from None
    try:
        yield stage
        for path in stage.iterdir():
            sync(path)
        _replace(stage, out)
    except BaseException:
        shutil.rmtree(stage)
        _remove_empty(missing)
        raise
    stage.rmdir()
    sync(out)


def _refuse_foreign(out: Path) -> None:
    first = next(folder for folder in (out, *out.parents) if folder.exists())
    if not first.is_dir():
        raise UserError(f"--out {out}: {first} is a file; name a folder that is not below one")
    ours = (MANIFEST, DROPPED, SETTINGS, SHARDS, f"{STAGE}*")
    if first is not out or all(
        any(fnmatch(entry.name, pattern) for pattern in ours) for entry in out.iterdir()
    ):
        return
    try:
        PairShards(out)  # pairs with other files beside them, which stay
    except UserError:
        raise UserError(
            f"--out {out} holds other files; name a new folder or one with prepared pairs"
        ) from None


def _replace(stage: Path, out: Path) -> None:
    """Move all files, the manifest last: a folder with a manifest is complete."""
    (out / MANIFEST).unlink(missing_ok=True)
    names = {path.name for path in stage.iterdir()}
    for name in sorted(names - {MANIFEST}):
        (stage / name).replace(out / name)
    for shard in out.glob(SHARDS):
        if shard.name not in names:
            shard.unlink()
    (stage / MANIFEST).replace(out / MANIFEST)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
