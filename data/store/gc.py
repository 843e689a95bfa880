"""`mrpo store gc`: list what a store needs no longer, and remove it when told to.

Scores cost hours of GPU time, so nothing goes that anything still names: a reference stays while it
is the newest under any of its aliases, or while a file of any run has its identity in it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import UserError
from ..config import GcConfig
from ..ids import IdIndex
from ..pairs import canonical_json
from .commands import readable_size, require
from .files import TEMPORARY, Files, LocalFiles
from .scores import BAD, ScoreFiles
from .store import Store, open_store

ABANDONED = 3600  # seconds without a change after which nobody still writes a temporary file
MANIFESTS = (".json", ".jsonl", ".yaml", ".yml", ".md")  # files of a run that may name references
HEX_NAME = re.compile(rb"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")


@dataclass(frozen=True, slots=True)
class Garbage:
    """A file that nothing needs, relative to the store's root, and why."""

    name: str
    reason: str
    size: int


def gc(config: GcConfig) -> None:
    """Print what can go; with `config.delete` remove it."""
    store = open_store(config.store)
    require(store)
    garbage = list(find_garbage(store, replaced(store, config.runs.split(","))))
    for item in garbage:
        print(f"{item.reason:<20}  {readable_size(item.size):>9}  {item.name}")
        if config.delete:
            store.files.remove(item.name)
    if config.delete and isinstance(store.files, LocalFiles):
        store.files.remove_empty_folders()
    verb = "removed" if config.delete else "would remove"
    total = readable_size(sum(item.size for item in garbage))
    print(f"{verb} {len(garbage):,} files, {total}" + ("" if config.delete else "; --delete does"))
    print(f"store   {store.root}")


def find_garbage(store: Store, unneeded: set[str]) -> Iterator[Garbage]:
    """Everything that can go; of the references in `unneeded` that is all they have."""
    for identity in store.identities():
        whole = identity in unneeded
        covered = set() if whole else _covered(store.scores(identity))
        for folder in (identity, f"{identity}/scores", f"{identity}/leases"):
            for name, size in sorted(store.files.sizes(folder).items()):
                path = f"{folder}/{name}"
                unfinished = name.startswith(TEMPORARY) or folder.endswith("leases")
                if whole:
                    yield Garbage(path, "replaced reference", size)
                elif unfinished and _abandoned(store.files, path):
                    yield Garbage(path, "never finished", size)
                elif name.endswith(BAD):
                    yield Garbage(path, "damaged", size)
                elif name in covered:
                    yield Garbage(path, "rows stand elsewhere", size)


def replaced(store: Store, runs: list[str]) -> set[str]:
    """References that are the newest under none of their names, and that no run names."""
    newest = {
        canonical_json([record.alias, record.entry]): record.identity
        for record in store.references()  # the last recorded last
    }
    known = {record.identity for record in store.references()}
    older = known - set(newest.values())
    return older - _named_by(runs) if older else set()


def _named_by(folders: list[str]) -> set[str]:
    """Every 32-digit hex name in the manifests below the folders."""
    names: set[str] = set()
    for folder in (Path(part.strip()).expanduser() for part in folders):
        if not folder.is_dir():
            raise UserError(
                f"--runs {folder}: no such folder; name those that hold your runs, so that the "
                "references which they name are kept"
            )
        for path in folder.rglob("*"):
            if path.suffix in MANIFESTS and path.is_file():
                names.update(match.decode() for match in HEX_NAME.findall(path.read_bytes()))
    return names


def _covered(scores: ScoreFiles) -> set[str]:
    """Files whose rows all stand in files before them, so that no reader ever uses them."""
    if scores.damaged():
        return set()  # what stands in a damaged file stands nowhere
    names = scores.names()
    ids = [scores.ids_of(name) for name in names]
    if not names:
        return set()
    places = IdIndex(np.concatenate(ids)).find(np.concatenate(ids))
    starts = np.cumsum([0, *map(len, ids)])
    return {
        name
        for name, start, end in zip(names, starts, starts[1:])
        if end > start and (places[start:end] < start).all()
    }


def _abandoned(files: Files, path: str) -> bool:
    """Only local writers leave such files; a name that is gone by now is nobody's garbage."""
    try:
        return isinstance(files, LocalFiles) and time.time() - files.modified(path) > ABANDONED
    except FileNotFoundError:
        return False
