"""`mrpo prepare`: preference data of any known format to shards of pairs.

Rows stream through in batches: read (`sources.py`), made examples (`layouts.py`) and pairs
(`formats.py`), corrected by reviewed tables, checked against the ids of all earlier pairs
(`ids.py`), written (`shards.py`). Memory holds one shard and about 20 bytes a pair.

What is held out comes first: sources of its own, and before any pair is written the groups of the
rows that a split column holds out, so that no training pair of such a group is kept.

The output is all or nothing: its files are written to a hidden folder and moved into place once all
are complete. An error leaves what was there before; a run killed during the move leaves a folder
without its manifest, which readers refuse and a rerun replaces.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from ..errors import UserError
from ..settings import command, write_resolved
from .config import PrepareConfig
from .fields import split_of
from .formats import CHAT_UNUSED, REASONS, Broken, PairReader, RawPair, Unusable, by_reason
from .ids import IdSet, Review, ids_from_bytes
from .layouts import IN_VALIDATION, LEFT_OUT, RowReader
from .pairs import EvaluationTexts, Pair, Turns, first_turn, group_id, is_validation
from .shards import MANIFEST, PairShards, ShardWriter, replaced_shards
from .sources import Source, open_sources, unread_files

PAIRS = "pairs"  # the default folder
DROPPED = "dropped.jsonl"
SETTINGS = "prepare.yaml"
HELD_OUT = 0.05  # of what --data names
MAX_DROPPED_SHARE = 0.05
BATCH_ROWS = 4096
DUPLICATE = "duplicate"
EXCLUDED = "excluded"  # by a reviewed table
CONTAMINATED = "contaminated"
UNKNOWN_SHOWN = 5  # ids of a reviewed table that are not in the data; the manifest lists all


@command(PrepareConfig)
def prepare(config: PrepareConfig) -> PairShards:
    """Write the pairs of `config.source` to `config.out`; returns the folder opened.

    Raises `UserError` for data or settings that cannot be used, and then writes nothing.
    """
    return _prepared(config)


def open_pairs(folder: str | None, source: str | None) -> PairShards:
    """The pairs in a folder (by default `pairs`), prepared there first where a source is given.

    Then 5 % are held out, unless a split column says which pairs are.
    """
    if source is None:
        return PairShards(folder or PAIRS)
    return _prepared(PrepareConfig(source=source, out=folder or PAIRS), HELD_OUT)


def _prepared(config: PrepareConfig, otherwise: float = 0.0) -> PairShards:
    """`otherwise` is the share to hold out where no row and no setting says what is held out."""
    sources = open_sources(config.source)
    held_out = open_sources(config.validation_source) if config.validation_source else []
    out = Path(config.out)
    with replaced_shards(out, (DROPPED, SETTINGS), overwrite=config.overwrite) as folder:
        with (folder / DROPPED).open("w", encoding="utf-8") as dropped:
            preparation = _Preparation(config, ShardWriter(folder, config.shard_pairs), dropped)
            with tqdm(unit=" rows", unit_scale=True, disable=None) as progress:
                for source in sources:
                    preparation.find_held_out(source)
                if otherwise and not preparation.has_split:
                    config = replace(config, validation_fraction=otherwise)
                    preparation.config = config
                # What is held out comes first, so that its groups are known.
                for held, source in [
                    *((True, s) for s in held_out),
                    *((False, s) for s in sources),
                ]:
                    for rows in preparation.read(source, held):
                        progress.update(rows)
        preparation.finish()
        write_resolved(replace(config, overwrite=False), folder / SETTINGS)
    shards = PairShards(out)
    print(_summary(shards))
    return shards


def prepare_line(pairs: PairShards, suffix: str, **tables: str) -> str:
    """The command that prepares pairs again with further tables, into a folder beside them.

    `tables` are by their option, exclude or flip; those that the pairs were prepared with stay.
    """
    options = ["--config", str(pairs.path / SETTINGS)]
    for name, table in tables.items():
        earlier = pairs.manifest.get("options", {}).get(name)
        options += [f"--{name}", f"{earlier},{table}" if earlier else table]
    return shlex.join(["mrpo", "prepare", *options, "--out", f"{pairs.path}-{suffix}"])


Numbered = tuple[int, Mapping[str, Any], RawPair | str]  # the row's number, the row, its example
Read = tuple[int, Pair, bytes, Turns]  # the row's number, the pair, its id and its group


class _Preparation:
    """Reads sources one after the other, writes their pairs and counts what was dropped."""

    def __init__(self, config: PrepareConfig, writer: ShardWriter, dropped: IO[str]) -> None:
        self.config = config
        self._writer = writer
        self._dropped = dropped
        self._known = IdSet()
        self._review = Review(config.exclude, config.flip)
        texts = config.decontaminate
        self._evaluation = None if texts is None else EvaluationTexts(texts)
        self._held_out = IdSet()  # groups that a split column or a source of their own holds out
        self._with_split: set[Source] = set()
        self._sources: list[dict[str, Any]] = []
        self._unused: dict[str, None] = {}
        self._ignored_nowhere = set(config.ignored())
        self._examples = 0
        self._wrapped = 0  # texts that --chat, or their layout, made messages of
        self._splits: Counter[str] = Counter()
        self._split_values: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()  # of what gave no pair, duplicates too
        self._first_pair = ""  # where its row is, for messages
        self._first_unusable = ""

    @property
    def has_split(self) -> bool:
        """Whether a source has a split column, as far as `find_held_out` has read it."""
        return bool(self._with_split)

    def find_held_out(self, source: Source) -> None:
        """Remember the groups of the rows that the split column of a source holds out."""
        reader, pairs = RowReader(self.config), PairReader(source.name)
        groups: list[bytes] = []
        for number, _, example in reader.examples(source):
            if not reader.has_split:
                break  # rows of JSON that have one later are refused then
            self._with_split.add(source)
            if (
                isinstance(example, RawPair)
                and self._split(source, number, example) == "validation"
            ):
                try:
                    pair, _ = pairs.read(example)
                except (Broken, Unusable):
                    continue  # counted or refused when the pairs are written
                groups.append(group_id(self._group(pair, example)))
            if len(groups) == BATCH_ROWS:
                self._held_out.add(ids_from_bytes(groups))
                groups.clear()
        self._held_out.add(ids_from_bytes(groups))
        if source in self._with_split and self.config.validation_fraction:
            raise UserError(
                f"{source.given} has a split column, so --validation-fraction "
                f"{self.config.validation_fraction} holds out nothing; leave one of them out "
                "(--ignore-columns split)"
            )

    def read(self, source: Source, held_out: bool) -> Iterator[int]:
        """Read a source; yields the number of rows of each batch once they are written."""
        reader, pairs = RowReader(self.config), PairReader(source.name)
        examples = reader.examples(source)
        total = 0
        while batch := list(islice(examples, BATCH_ROWS)):
            if reader.has_split and not held_out and source not in self._with_split:
                raise UserError(
                    f"{source.given}: field 'split' is in a later row but not in the first; give "
                    "every row one, or leave it out with --ignore-columns split"
                )
            self._take(source, pairs, batch, held_out)
            yield reader.rows - total
            total = reader.rows
        self._unused |= reader.unused
        self._wrapped += pairs.wrapped
        self._ignored_nowhere &= set(reader.ignored_nowhere)
        about = {"given": source.given, "name": source.name, "rows": reader.rows}
        self._sources.append(about | {"format": list(reader.formats), "unused": [*reader.unused]})

    def finish(self) -> None:
        """Write the last shard and the manifest, unless too little of the data could be used."""
        rows = sum(source["rows"] for source in self._sources)
        duplicates = self._reasons.pop(DUPLICATE, 0)
        left_out = {reason: self._reasons[reason] for reason in LEFT_OUT}
        unusable = self._reasons.total() - self._reasons[EXCLUDED] - sum(left_out.values())
        if self._writer.num_pairs == 0:
            left = f"no pair is left of {rows:,} rows (dropped: {by_reason(self._reasons)})"
            raise UserError(
                f"{self.config.source}: {left if rows else 'there are no rows'}; "
                "at least one pair is needed"
            )
        if unusable > MAX_DROPPED_SHARE * self._examples and not self.config.allow_dropped:
            raise UserError(
                f"{self.config.source}: {unusable:,} of {self._examples:,} "
                f"{'rows' if rows == self._examples else 'pairs of responses'} "
                f"({unusable / self._examples:.1%}) "
                f"cannot be used ({by_reason(self._reasons)}; the first: {self._first_unusable}); "
                f"more than {MAX_DROPPED_SHARE:.0%} needs --allow-dropped"
            )
        excluded = self._reasons.pop(EXCLUDED, 0)
        for reason in left_out:
            self._reasons.pop(reason, None)
        options = asdict(self.config)
        del options["source"], options["out"], options["overwrite"]
        self._writer.finish(
            {
                "splits": {name: self._splits[name] for name in ("train", "validation")},
                "rows": rows,
                "duplicates": duplicates,
                "wrapped": self._wrapped,
                "left_out": {reason: count for reason, count in left_out.items() if count},
                "unused_columns": list(self._unused),
                "ignored_nowhere": sorted(self._ignored_nowhere),
                "unread_files": unread_files(
                    f"{self.config.source},{self.config.validation_source or ''}"
                ),
                "split_values": dict(sorted(self._split_values.items())),
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

    def _take(
        self, source: Source, pairs: PairReader, batch: Iterable[Numbered], held_out: bool
    ) -> None:
        """Write the new pairs of a batch in order and list what gave none."""
        read: list[Read] = []
        without: list[tuple[int, str, str]] = []  # row, reason, the text that the prompt contains
        for number, _, example in batch:
            if isinstance(example, str):
                without.append((number, example, ""))
                continue
            place = f"{source.given}, {source.unit} {number}"
            split = "validation" if held_out else self._split(source, number, example)
            if split and not held_out:
                self._split_values[str(example.values["split"])] += 1
            self._examples += 1
            try:
                reviewed = self._review.apply(*pairs.read(example))
            except Broken as error:
                raise UserError(f"{place}, {error}") from None
            except Unusable as error:
                if self.config.strict:
                    raise UserError(
                        f"{place} cannot be used: {error.reason} ({REASONS[error.reason]}); "
                        "without --strict such rows are dropped and listed"
                    ) from None
                self._first_unusable = self._first_unusable or place
                without.append((number, error.reason, ""))
            else:
                if reviewed is None:
                    without.append((number, EXCLUDED, ""))
                    continue
                pair, identity = reviewed
                group = self._group(pair, example)
                held_out_pair = split == "validation" or (
                    split is None and is_validation(group, self.config.validation_fraction)
                )
                pair = replace(pair, split="validation") if held_out_pair else pair
                read.append((number, pair, identity, group))
        if self._evaluation is not None:
            texts = self._evaluation.find([pair.prompt for _, pair, *_ in read])
            without += [(row[0], CONTAMINATED, text) for row, text in zip(read, texts) if text]
            read = [row for row, text in zip(read, texts) if not text]
        kept = []
        for (number, pair, identity, _), is_held_out in zip(
            read, self._in_held_out(read, held_out)
        ):
            if is_held_out and pair.split == "train":
                without.append((number, IN_VALIDATION, ""))
            else:
                kept.append((number, pair, identity))
        new = self._known.add(ids_from_bytes([identity for _, _, identity in kept]))
        for (number, pair, identity), is_new in zip(kept, new.tolist()):
            if is_new:
                self._write(f"{source.given}, {source.unit} {number}", pair, identity)
            else:
                without.append((number, DUPLICATE, ""))
        for number, reason, text in sorted(without):
            self._reasons[reason] += 1
            line = {"source": source.given, "row": number, "reason": reason}
            line |= {"contains": text} if text else {}
            self._dropped.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _in_held_out(self, read: list[Read], held_out: bool) -> list[bool]:
        """Whether the group of each pair is held out; those of a held-out source join them."""
        if not (self._with_split or self.config.validation_source):
            return [False] * len(read)  # drawn by group, so that none stands on both sides
        groups = ids_from_bytes([group_id(group) for *_, group in read])
        if held_out:
            self._held_out.add(groups)
        return self._held_out.contains(groups).tolist()

    def _split(self, source: Source, number: int, example: RawPair) -> str | None:
        """The split that the row names, if it names any."""
        try:
            return split_of(example.values.get("split"))
        except Broken as error:
            raise UserError(f"{source.given}, {source.unit} {number}, {error}") from None

    def _group(self, pair: Pair, example: RawPair) -> Turns:
        """What must not stand on both sides of the split."""
        group = example.values.get("group")
        if group is not None:
            return json.dumps(group, sort_keys=True)
        return first_turn(pair.prompt) if self.config.group_by == "first-turn" else pair.prompt

    def _write(self, place: str, pair: Pair, identity: bytes) -> None:
        kind = "messages" if pair.is_chat else "text"
        self._first_pair = self._first_pair or place
        if self._writer.kind not in (None, kind):
            raise UserError(
                f"{place} holds {kind}, but the first pair ({self._first_pair}) "
                f"{self._writer.kind}; prepare them apart, or --chat to make messages of text"
            )
        self._splits[pair.split] += 1
        self._writer.add(pair, identity)


def _summary(shards: PairShards) -> str:
    """How the rows were read, how many were kept and dropped, and where the pairs are."""
    manifest = shards.manifest
    dropped, splits, left_out = (manifest[name] for name in ("dropped", "splits", "left_out"))
    formats = dict.fromkeys(name for source in manifest["sources"] for name in source["format"])
    parts = f"{len(shards.names):,} shard{'s' if len(shards.names) > 1 else ''}"
    kept = f"{shards.num_pairs:,} pairs of {shards.kind} in {parts}"
    gone = f"{manifest['duplicates']:,} duplicates, {sum(dropped.values()):,} unusable"
    if dropped:
        gone += f" ({by_reason(dropped)})"
    lines = [f"rows    {manifest['rows']:,}: {'; '.join(formats)}"]
    if manifest["unused_columns"]:
        lines.append(f"unused  columns {', '.join(manifest['unused_columns'])}")
    if manifest["unread_files"]:
        lines.append(f"unread  {', '.join(manifest['unread_files'])}")
    if manifest["split_values"]:
        values = ", ".join(f"{name} {rows:,}" for name, rows in manifest["split_values"].items())
        lines.append(f"split   {values} (train is for training, the rest is held out)")
    lines.append(f"kept    {kept}: {splits['train']:,} train, {splits['validation']:,} validation")
    if not splits["validation"]:
        lines.append("held    nothing: no run can validate; see --validation-fraction")
    lines.append(f"dropped {gone}; see {shards.path / DROPPED}")
    for reason, count in left_out.items():
        lines.append(f"left    {count:,} {reason}: {LEFT_OUT[reason]}")
    lines += _reviewed(manifest)
    if manifest["ignored_nowhere"]:
        names = ", ".join(manifest["ignored_nowhere"])
        lines.append(f"WARNING: columns of --ignore-columns that the data has not: {names}")
    if manifest["options"]["chat"] and not manifest["wrapped"]:
        lines.append(CHAT_UNUSED)
    return "\n".join([*lines, f"pairs   {shards.path}"])


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
