"""`mrpo store push` and `pull`: scores from one store to another, each file once.

Files are named by their bytes, so what has a name at both ends is equal and stays. Every file is
checked on its way, and a reference's record goes last: what is recorded is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .store import Store, open_store
from .store_common import readable_size, require, selected
from .store_config import PullConfig, PushConfig
from .store_records import merged
from .store_scores import intact


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
