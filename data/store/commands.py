"""The commands on a whole store: status, the digests of verify, gc, push and pull.

`status` reads footers only; `verify` reads every byte and changes none (`precompute/verify.py` adds
the sample that is scored again). `gc` lists what a store no longer needs and removes it on request:
scores cost hours of GPU time, so a reference stays while it is the newest under any of its aliases,
or while a file of any run contains its identity. `push` and `pull` copy scores between stores, each
file once: files are named by their bytes, so a name at both ends is the same file. Every file is
checked on the way, and a reference's record goes last, so what is recorded is complete.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.filesize import decimal as readable_size

from ...errors import UserError
from ...files import TEMPORARY
from ...settings import comma_separated, command
from ...terminal import print_table
from ..config import GcConfig, PullConfig, PushConfig, StatusConfig, VerifyConfig
from ..ids import ID_DTYPE, IdArray, IdIndex
from ..shards import PairShards
from .files import Files, LocalFiles
from .scores import BAD, LEFT_OUT, ScoreFiles, intact
from .store import POLICIES, TASK_RESULTS, ReferenceRecord, Store, merged, open_store

SLICE = 2**20  # pairs looked up at a time: ten million at once would take a gigabyte more
DAMAGED = "damaged"
ABANDONED = 3600  # seconds without a change after which a temporary file has no writer any more
RUN_FILES = (".json", ".jsonl", ".yaml", ".yml", ".md")  # files of a run that may name references
HEX_NAME = re.compile(rb"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")


@command(StatusConfig)
def status(config: StatusConfig) -> None:
    """Print every reference with its rows, size, date and engine, the last recorded first.

    With `config.pairs` also how many of these pairs it lacks; with `config.policies` the trained
    policies in place of the references.
    """
    references = open_store(config.store)
    store = references.policies if config.policies else references
    heading = ["reference", "identity", "rows", "size", "recorded", "engine", "precision", "model"]
    ids = None
    if config.pairs:
        pairs = PairShards(config.pairs)
        ids = np.concatenate([pairs.pair_ids(shard) for shard in range(len(pairs.names))])
        heading.append(f"missing of {len(ids):,}")
    lines = []
    counted: dict[frozenset[str], int] = {}
    total, num_bad = 0, 0
    for identity in store.identities():
        scores = store.scores(identity)
        total += scores.num_bytes()
        num_bad += len(scores.set_aside())
        line = _status_line(identity, store.names_of(identity), scores)
        if ids is not None:
            # Damage that the footers show is not looked for again in the rows.
            torn = line[2] == DAMAGED
            line.append(DAMAGED if torn else _shown(partial(_missing, scores, ids, counted)))
        lines.append(line)
    newest_first = sorted(lines, key=lambda line: line[4], reverse=True)
    print_table([heading, *newest_first], justify="left")
    if num_bad:
        print(f"{num_bad} damaged files are set aside as .bad; `mrpo store gc` removes them")
    kind = "policies" if config.policies else "references"
    print(f"store   {store.root} ({len(lines)} {kind}, {readable_size(total)})")
    hidden = 0 if config.policies else len(store.policies.identities())
    if hidden:
        print(f"{hidden:,} scored policies are not shown; --policies lists them")


def verify_digests(config: VerifyConfig) -> int:
    """Check every digest; 1 where anything is damaged, else 0."""
    store = open_store(config.store)
    identities = selected(store, config.refs)
    damaged = files = 0
    for identity in identities:
        scores = store.scores(identity)
        files += len(scores.names())
        names = [f"scores/{name}" for name in scores.damaged()]
        names += ["reference.json"] if store.is_damaged(identity) else []
        for name in names:
            print(f"damaged {store.root}/{identity}/{name}")
        damaged += len(names)
    print(f"checked {files:,} score files of {len(identities)} references: {damaged} damaged")
    if damaged:
        print("`mrpo precompute` sets damaged files aside and scores their rows again")
    print(f"store   {store.root}")
    return int(damaged > 0)


@dataclass(frozen=True, slots=True)
class Garbage:
    """A file that is no longer needed, by its name relative to the store's root, and why."""

    name: str
    reason: str
    size: int  # bytes


@command(GcConfig)
def gc(config: GcConfig) -> list[Garbage]:
    """Print what can go, and remove it with `config.delete`; returns what was listed."""
    store = open_store(config.store)
    if not store.policies.identities():
        _require(store)
    garbage = list(find_garbage(store, replaced(store, comma_separated(config.runs))))
    if garbage:
        lines = [[item.name, readable_size(item.size), item.reason] for item in garbage]
        print_table([["file", "size", "reason"], *lines])
    for item in garbage if config.delete else ():
        store.files.remove(item.name)
    if config.delete and isinstance(store.files, LocalFiles):
        store.files.remove_empty_folders()
    verb = "removed" if config.delete else "would remove"
    total = readable_size(sum(item.size for item in garbage))
    print(f"{verb} {len(garbage):,} files, {total}" + ("" if config.delete else "; --delete does"))
    print(f"store   {store.root}")
    return garbage


def find_garbage(store: Store, unneeded: set[str]) -> Iterator[Garbage]:
    """Everything that can go; this includes all of the references in `unneeded`, and policies."""
    for identity in store.identities():
        whole = identity in unneeded
        covered = set() if whole else _covered(store.scores(identity))
        for path, name, size in _files_of(store.files, identity):
            if whole:
                yield Garbage(path, "replaced reference", size)
            elif _unfinished(path):
                if _abandoned(store.files, path):
                    yield Garbage(path, "never finished", size)
            elif name.endswith(BAD):
                yield Garbage(path, "damaged", size)
            elif name in covered:
                yield Garbage(path, "rows in other files", size)
    for identity in store.policies.identities():
        for path, _, size in _files_of(store.files, f"{POLICIES}/{identity}"):
            if not _unfinished(path) or _abandoned(store.files, path):
                yield Garbage(path, "policy scores", size)


def replaced(store: Store, runs: list[str]) -> set[str]:
    """References that are the newest under none of their names, and that no run names."""
    records = store.references()  # the last recorded last
    newest = {record.name_key: record.identity for record in records}
    older = {record.identity for record in records} - set(newest.values())
    return older - _named_by(runs) if older else set()


def _named_by(folders: list[str]) -> set[str]:
    """Every 32-digit hex name in the text files below the folders."""
    names: set[str] = set()
    for folder in (Path(part).expanduser() for part in folders):
        if not folder.is_dir():
            raise UserError(
                f"--runs {folder}: no such folder; name those that hold your runs, so that the "
                "references which they name are kept"
            )
        for path in folder.rglob("*"):
            if path.suffix in RUN_FILES and path.is_file():
                names.update(match.decode() for match in HEX_NAME.findall(path.read_bytes()))
    return names


def _files_of(files: Files, folder: str) -> Iterator[tuple[str, str, int]]:
    """(path, name, bytes) of every file of an identity."""
    for part in ("", "/scores", f"/{LEFT_OUT}", f"/{TASK_RESULTS}", "/leases"):
        inner = f"{folder}{part}"
        for name, size in sorted(files.sizes(inner).items()):
            yield f"{inner}/{name}", name, size


def _unfinished(path: str) -> bool:
    """Whether a writer or a lease holder may still be using the file."""
    *_, folder, name = path.split("/")
    return name.startswith(TEMPORARY) or folder == "leases"


def _abandoned(files: Files, path: str) -> bool:
    """Whether nobody writes the file any more; only local writers leave such files."""
    try:
        return isinstance(files, LocalFiles) and time.time() - files.modified(path) > ABANDONED
    except FileNotFoundError:  # finished and renamed by now
        return False


def _covered(scores: ScoreFiles) -> set[str]:
    """Files whose rows are all in files before them, so that no reader ever uses them."""
    if scores.damaged():
        return set()  # rows in a damaged file cover nothing
    names = scores.names()
    ids = [scores.ids_of(name) for name in names]
    all_ids = np.concatenate([np.empty(0, ID_DTYPE), *ids])
    places = IdIndex(all_ids).find(all_ids)
    starts = np.cumsum([0, *map(len, ids)])
    return {
        name
        for name, start, end in zip(names, starts, starts[1:])
        if end > start and (places[start:end] < start).all()
    }


@dataclass(slots=True)
class Transfer:
    """The result of a push or a pull, in files and bytes."""

    copied: int = 0
    num_bytes: int = 0
    already_there: int = 0
    damaged: int = 0

    @property
    def exit_code(self) -> int:
        """1 where a file was damaged and left behind, else 0."""
        return int(self.damaged > 0)


@command(PushConfig)
def push(config: PushConfig) -> Transfer:
    """Copy what `config.target` lacks to it."""
    return _transfer_all(open_store(config.store), Store(config.target), config.refs)


@command(PullConfig)
def pull(config: PullConfig) -> Transfer:
    """Copy what the store lacks from `config.source`."""
    return _transfer_all(Store(config.source), open_store(config.store), config.refs)


def _transfer_all(source: Store, target: Store, refs: str | None) -> Transfer:
    done = Transfer()
    for identity in selected(source, refs):
        _transfer(source, target, identity, done)
    print(
        f"copied  {done.copied:,} files, {readable_size(done.num_bytes)}; "
        f"{done.already_there:,} were there already"
    )
    if done.damaged:
        print(f"left    {done.damaged:,} damaged files behind; `mrpo store verify` names them")
    print(f"store   {target.root}")
    return done


def _transfer(source: Store, target: Store, identity: str, done: Transfer) -> None:
    """Copy the files of a reference that the target lacks, and its names."""
    scores, target_names = source.scores(identity), set(target.scores(identity).names())

    def missing() -> Iterator[tuple[str, bytes]]:
        for name in scores.names():
            if name in target_names:
                done.already_there += 1
                continue
            data = scores.read_file(name)
            if not intact(name, data):
                done.damaged += 1
                continue
            done.copied += 1
            done.num_bytes += len(data)
            yield f"{identity}/scores/{name}", data

    target.files.write_all(missing())
    names, known = source.names_of(identity), target.names_of(identity)
    if names and merged(known, names) != known:
        target.merge(names)


def selected(store: Store, refs: str | None) -> list[str]:
    """The identities that a comma-separated list of aliases means; all without a list.

    An alias means every identity it ever had, `alias@prefix` a single one. Raises `UserError`
    where the store holds none.
    """
    _require(store)
    if refs is None:
        return store.identities()
    identities: list[str] = []
    records = store.references()
    for alias in comma_separated(refs):
        named = [record.identity for record in records if record.alias == alias]
        if "@" in alias:
            named = [store.resolve(alias).identity]
        if not named:
            known = ", ".join(sorted({record.alias for record in records})) or "none"
            raise UserError(f"--refs: {store.root} knows no {alias!r}; it has {known}")
        identities += [identity for identity in named if identity not in identities]
    return identities


def _require(store: Store) -> None:
    """Raises `UserError` where there is no store, so that a wrong path never looks healthy."""
    if not store.identities():
        raise UserError(
            f"--store {store.root}: holds no references; `mrpo precompute` fills a store, "
            "--store or $MRPO_STORE names one"
        )


def _status_line(identity: str, names: list[ReferenceRecord], scores: ScoreFiles) -> list[str]:
    if not names:
        return ["(no record)", identity[:12], _shown(scores.num_rows), "", "", "", "", ""]
    newest = names[-1]
    run = newest.runs[-1] if newest.runs else {}
    model = str(newest.entry.get("model", newest.entry.get("imported", "")))
    commit = newest.resolved_commit
    return [
        ",".join(dict.fromkeys(record.alias for record in names)),
        identity[:12],
        _shown(scores.num_rows),
        readable_size(scores.num_bytes()),
        newest.recorded[:16].replace("T", " "),
        "imported" if newest.imported else str(run.get("engine", "")),
        newest.precision,
        f"{model}@{commit[:7]}" if commit else model,
    ]


def _shown(count: Callable[[], int]) -> str:
    """The number; a file that can't be read must not hide the other references."""
    try:
        return f"{count():,}"
    except UserError:
        return DAMAGED


def _missing(scores: ScoreFiles, ids: IdArray, counted: dict[frozenset[str], int]) -> int:
    """How many pairs have no row. `counted` keeps the answer for references of equal units."""
    units = scores.units()
    if units not in counted:
        starts = range(0, len(ids), SLICE)
        counted[units] = sum(
            int(scores.missing(ids[start : start + SLICE], refresh=start == 0).sum())
            for start in starts
        )
    return counted[units]
