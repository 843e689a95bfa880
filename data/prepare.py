"""`mrpo prepare`: preference data of any known format to shards of pairs.

Rows stream through in batches: read (`sources.py`), made pairs (`formats.py`), checked against
the ids of all pairs before (`duplicates.py`), written (`shards.py`). Memory holds one shard and
16 bytes a pair. Nothing of the output is in place before all of it is complete (`staging.py`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from ..errors import UserError
from ..settings import write_resolved
from .config import PrepareConfig
from .files import DROPPED, SETTINGS, staged
from .formats import REASONS, Columns, PairReader, Unusable
from .ids import SeenIds, ids_from_bytes
from .messages import Broken
from .pairs import Pair, is_validation
from .reviewed import Review
from .shards import MANIFEST, PairShards, ShardWriter
from .sources import Row, Source, open_sources

PAIRS = "pairs"  # the folder where none is named
MAX_DROPPED_SHARE = 0.05
BATCH_ROWS = 4096
DUPLICATE = "duplicate"
EXCLUDED = "excluded"  # by a person, in a reviewed table
UNKNOWN_SHOWN = 5  # ids of a reviewed table that are not in the data, printed; all are kept


def prepare(config: PrepareConfig) -> PairShards:
    """Write `config.out` and return it opened; raises `UserError`, and then nothing is written."""
    sources = open_sources(config.source)
    out = Path(config.out)
    with staged(out) as folder:
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
    """What has been read so far, and where it goes."""

    def __init__(self, config: PrepareConfig, writer: ShardWriter, dropped: IO[str]) -> None:
        self._config = config
        self._columns = Columns(
            config.prompt_column, config.chosen_column, config.rejected_column, config.source_column
        )
        self._writer = writer
        self._dropped = dropped
        self._seen = SeenIds()
        self._review = Review(config.exclude, config.flip)
        self._sources: list[dict[str, str | int]] = []
        self._splits: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()  # of rows that gave no pair, duplicates too
        self._first_pair = ""  # the place of the row, for messages
        self._first_unusable = ""

    def read(self, source: Source) -> Iterator[int]:
        """Take in a source; yields the rows of each batch once they are done."""
        reader = PairReader(self._columns, source.name, self._config.chat)
        rows = source.rows(self._columns)
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
            left = f"no pair is left of {rows:,} rows (dropped: {_counts(self._reasons)})"
            raise UserError(
                f"{self._config.source}: {left if rows else 'there are no rows'}; "
                "at least one pair is needed"
            )
        if unusable > MAX_DROPPED_SHARE * rows and not self._config.allow_dropped:
            raise UserError(
                f"{self._config.source}: {unusable:,} of {rows:,} rows ({unusable / rows:.1%}) "
                f"cannot be used ({_counts(self._reasons)}; the first is {self._first_unusable}); "
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
        """Write the new pairs of a batch in order, list the rows that gave none."""
        read: list[tuple[int, Pair, bytes]] = []
        without: list[tuple[int, str]] = []
        for number, fields in rows:
            place = f"{source.given}, {source.unit} {number}"
            try:
                pair = reader.read(fields)
                reviewed = self._review.apply(pair, _identify(pair))
            except Broken as error:
                raise UserError(f"{place}, {error}") from None
            except Unusable as error:
                self._note_unusable(place, error.reason)
                without.append((number, error.reason))
            else:
                if reviewed is None:
                    without.append((number, EXCLUDED))
                else:
                    read.append((number, *reviewed))
        new = self._seen.add(ids_from_bytes([identity for _, _, identity in read]))
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

    def _note_unusable(self, place: str, reason: str) -> None:
        if self._config.strict:
            raise UserError(
                f"{place} cannot be used: {reason} ({REASONS[reason]}); without --strict such "
                "rows are dropped and listed"
            )
        self._first_unusable = self._first_unusable or place


def _identify(pair: Pair) -> bytes:
    try:
        pair.source.encode()
        return pair.id
    except UnicodeEncodeError:
        raise Unusable("not_unicode") from None


def _counts(reasons: Counter[str] | dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))


def _summary(shards: PairShards) -> str:
    """What became of the rows, and where the pairs are."""
    manifest = shards.manifest
    dropped, splits = manifest["dropped"], manifest["splits"]
    parts = f"{len(shards.names):,} shard{'s' if len(shards.names) > 1 else ''}"
    kept = f"{shards.num_pairs:,} pairs of {shards.kind} in {parts}"
    gone = f"{manifest['duplicates']:,} duplicates, {sum(dropped.values()):,} unusable"
    if dropped:
        gone += f" ({_counts(dropped)})"
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
    """What the reviewed tables did, if any were given."""
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
