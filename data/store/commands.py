"""What the commands of the store share: which references are meant, and sizes to read.

`mrpo store status`, and the digests of `mrpo store verify`.

status reads footers only; verify reads every byte and changes none (`precompute/verify.py` adds
the sample that is scored again). The other commands stand in files of their own.


`mrpo store push` and `pull`: scores from one store to another, each file once.

Files are named by their bytes, so what has a name at both ends is equal and stays. Every file is
checked on its way, and a reference's record goes last: what is recorded is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from ...errors import UserError
from ..config import PullConfig, PushConfig, StatusConfig, VerifyConfig
from ..ids import IdArray
from ..shards import PairShards
from .scores import ScoreFiles, intact
from .store import ReferenceRecord, Store, merged, open_store


def selected(store: Store, refs: str | None) -> list[str]:
    """The identities that a comma-separated list of aliases means; all without one.

    An alias means every identity it ever had; `alias@prefix` the one.
    """
    if refs is None:
        return store.identities()
    found: list[str] = []
    records = store.references()
    for alias in (part.strip() for part in refs.split(",")):
        same = [record.identity for record in records if record.alias == alias]
        if "@" in alias:
            same = [store.resolve(alias).identity]
        if not same:
            known = ", ".join(sorted({record.alias for record in records})) or "none"
            raise UserError(f"--refs: {store.root} knows no {alias!r}; it has {known}")
        found += [identity for identity in same if identity not in found]
    return found


def require(store: Store) -> None:
    """Raises `UserError` where there is no store, so that a wrong path is no healthy store."""
    if not store.identities():
        raise UserError(
            f"--store {store.root}: holds no references; `mrpo precompute` fills a store, "
            "--store or $MRPO_STORE names one"
        )


def readable_size(num_bytes: int) -> str:
    """Bytes in the decimal unit that leaves one to three digits before the point."""
    if num_bytes < 1000:
        return f"{num_bytes} B"
    power = min((len(str(num_bytes)) - 1) // 3, 4)
    return f"{num_bytes / 1000**power:.1f} {' kMGT'[power]}B"


SLICE = 2**20  # pairs looked up at a time
DAMAGED = "damaged"


def status(config: StatusConfig) -> None:
    """Print every reference with its rows, size, date and engine, the last recorded first."""
    store = open_store(config.store)
    lines = [["reference", "identity", "rows", "size", "recorded", "engine", "model"]]
    ids = _pair_ids(PairShards(config.pairs)) if config.pairs else None
    if ids is not None:
        lines[0].append(f"missing of {len(ids):,}")
    counted: dict[frozenset[str], int] = {}
    total, asides = 0, 0
    for identity in store.identities():
        scores = store.scores(identity)
        total += scores.num_bytes()
        asides += len(scores.set_aside())
        names = store.names_of(identity)
        line = _describe(identity, names, scores)
        if ids is not None:
            # Damage that the footers show is not looked for again in the rows.
            torn = line[2] == DAMAGED
            line.append(DAMAGED if torn else _shown(partial(_missing, scores, ids, counted)))
        lines.append(line)
    newest_first = sorted(lines[1:], key=lambda line: line[4], reverse=True)
    print(*_columns([lines[0], *newest_first]), sep="\n")
    if asides:
        print(f"{asides} damaged files are set aside as .bad; `mrpo store gc` removes them")
    print(f"store   {store.root} ({len(lines) - 1} references, {readable_size(total)})")


def verify_digests(config: VerifyConfig) -> int:
    """Check every digest; 1 where anything is damaged, else 0."""
    store = open_store(config.store)
    require(store)
    identities = selected(store, config.refs)
    broken = set(store.damaged_records())
    damaged = files = 0
    for identity in identities:
        scores = store.scores(identity)
        files += len(scores.names())
        names = [f"scores/{name}" for name in scores.damaged()]
        names += ["reference.json"] if identity in broken else []
        for name in names:
            print(f"damaged {store.root}/{identity}/{name}")
        damaged += len(names)
    print(f"checked {files:,} score files of {len(identities)} references: {damaged} damaged")
    if damaged:
        print("`mrpo precompute` sets damaged files aside and scores their rows again")
    print(f"store   {store.root}")
    return int(damaged > 0)


def _describe(identity: str, names: list[ReferenceRecord], scores: ScoreFiles) -> list[str]:
    if not names:
        return ["(no record)", identity[:12], _shown(scores.num_rows), "", "", "", ""]
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
        f"{model}@{commit[:7]}" if commit else model,
    ]


def _shown(count: Callable[[], int]) -> str:
    """The number; one file that can't be read must not hide the other references."""
    try:
        return f"{count():,}"
    except UserError:
        return DAMAGED


def _pair_ids(shards: PairShards) -> IdArray:
    return np.concatenate([shards.pair_ids(shard) for shard in range(len(shards.names))])


def _missing(scores: ScoreFiles, ids: IdArray, counted: dict[frozenset[str], int]) -> int:
    """How many pairs have no row. References of the same units lack the same: `counted` has them.

    In slices: ten million at once would take a gigabyte more.
    """
    units = scores.units()
    if units not in counted:
        starts = range(0, len(ids), SLICE)
        counted[units] = sum(
            int(scores.missing(ids[start : start + SLICE], refresh=start == 0).sum())
            for start in starts
        )
    return counted[units]


def _columns(lines: list[list[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()


@dataclass(slots=True)
class Transfer:
    """What one transfer did, in files and bytes."""

    copied: int = 0
    num_bytes: int = 0
    there: int = 0
    damaged: int = 0


def push(config: PushConfig) -> int:
    """Copy to `config.target`; 1 where a file was damaged and left behind, else 0."""
    return _run(open_store(config.store), Store(config.target), config.refs)


def pull(config: PullConfig) -> int:
    """Copy from `config.source`; 1 where a file was damaged and left behind, else 0."""
    return _run(Store(config.source), open_store(config.store), config.refs)


def transfer(source: Store, target: Store, identity: str, done: Transfer) -> None:
    """Copy what the target lacks of one reference, and its names."""
    scores, there = source.scores(identity), set(target.scores(identity).names())

    def missing() -> Iterator[tuple[str, bytes]]:
        for name in scores.names():
            if name in there:
                done.there += 1
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


def _run(source: Store, target: Store, refs: str | None) -> int:
    require(source)
    done = Transfer()
    for identity in selected(source, refs):
        transfer(source, target, identity, done)
    print(
        f"copied  {done.copied:,} files, {readable_size(done.num_bytes)}; "
        f"{done.there:,} were there already"
    )
    if done.damaged:
        print(f"left    {done.damaged:,} damaged files behind; `mrpo store verify` names them")
    print(f"store   {target.root}")
    return int(done.damaged > 0)
