"""The score store: every reference's scores of every pair, computed once and kept.

`<store>/<identity>/reference.json` says what determines the scores, under which names they are
known (alias and refs.yaml entry) and what computed them; `<store>/<identity>/scores/` holds them
(`scores.py`). An identity is a digest of what determines the numbers and of nothing else, so a pair
scored for one data set is scored for all. A store is a local path or an fsspec URL.

    store = Store("store")
    record = store.resolve("llama", load_refs("configs/refs.yaml"))
    table = store.scores(record.identity).read(["pair_id", "chosen_logp"])
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import fits
from ..ids import identity_of
from ..references import ALIAS, ReferenceSpec, check_alias
from .files import open_files
from .scores import BAD, ScoreFiles

IDENTITY = re.compile(r"[0-9a-f]{32}")
RECORD = "reference.json"
POLICIES = "policies"
RECORD_SHAPE = {
    **{"identity": str, "inputs": {}, "resolved_commit": str | None, "created": str},
    "names": [{"alias": str, "entry": {}, "recorded": str}],
    "runs": [{}],
}


def open_store(given: str | None) -> Store:
    """The store of a command's --store, else of $MRPO_STORE, else the folder `store`."""
    root = given or os.environ.get("MRPO_STORE") or "store"
    if root.startswith("hf://"):
        raise UserError(
            f"--store {root}: each write there is a commit; work in another store, and copy with "
            "`mrpo store push` and `mrpo store pull`"
        )
    return Store(root)


class Store:
    """All references' records and scores under one root. Creates no folder until it writes."""

    def __init__(self, root: str | Path) -> None:
        self.files = open_files(root)
        self.root = self.files.root

    @property
    def policies(self) -> Store:
        """The scores of trained policies, a store of their own below this one.

        They serve a comparison and its repetition only: `mrpo store gc` may remove them at any
        time, and the other commands leave them alone.
        """
        return Store(f"{self.root}/{POLICIES}")

    def scores(self, identity: str) -> ScoreFiles:
        """The scores under an identity; nothing is read yet."""
        assert IDENTITY.fullmatch(identity), identity
        return ScoreFiles(self.files, identity)

    def identities(self) -> list[str]:
        """All identities that have a folder, sorted."""
        return [name for name in self.files.folders() if IDENTITY.fullmatch(name)]

    def references(self) -> list[ReferenceRecord]:
        """Every alias of every identity, the most recently recorded last."""
        records = [record for name in self.identities() for record in self.names_of(name)]
        return sorted(records, key=lambda record: (record.recorded, record.identity))

    def names_of(self, identity: str) -> list[ReferenceRecord]:
        """The record of an identity, once for each of its names; empty where there is none.

        A damaged record counts as none: `precompute` computes the identity again, and its scores
        are untouched.
        """
        try:
            return _decoded(identity, self.files.read(f"{identity}/{RECORD}"))
        except FileNotFoundError:
            return []

    def record(self, record: ReferenceRecord) -> ReferenceRecord:
        """Write or refresh an alias of an identity; returns it with its dates.

        Other aliases and earlier runs of the same identity stay. Two processes that record at
        once may lose what one of them wrote, until it records again; never a score.
        """
        check_alias(record.alias)
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        new = replace(record, created=now, recorded=now)
        return next(kept for kept in self.merge([new]) if kept.recorded == now)

    def merge(self, records: Sequence[ReferenceRecord]) -> list[ReferenceRecord]:
        """Add names to those of an identity, unchanged; returns all."""
        identity = records[0].identity
        if self.is_damaged(identity):
            self.files.rename(f"{identity}/{RECORD}", f"{identity}/{RECORD}{BAD}")
        kept = merged(self.names_of(identity), records)
        self.files.write(f"{identity}/{RECORD}", _encoded(kept))
        return kept

    def resolve(
        self, alias: str, specs: Mapping[str, ReferenceSpec] | None = None
    ) -> ReferenceRecord:
        """The reference that an alias means, found without looking at weights.

        `alias`: the newest identity recorded under it with an equal refs.yaml entry; imported
        scores where refs.yaml has no such alias. `alias@prefix`: the identity that begins so.
        Raises `UserError` where none or several match, `NotScored` where the alias is known.
        """
        name, _, prefix = alias.partition("@")
        check_alias(name)
        records = [record for record in self.references() if record.alias == name]
        if prefix:
            matching = {r.identity: r for r in records if r.identity.startswith(prefix.lower())}
            if len(matching) != 1:
                known = ", ".join(sorted({r.identity[:12] for r in records})) or "none"
                problem = "matches several identities" if matching else "matches no identity"
                raise UserError(f"{alias}: {problem} in {self.root}; recorded under it: {known}")
            return next(iter(matching.values()))
        if specs is not None and name in specs:
            records = [record for record in records if record.entry == specs[name].entry()]
        elif specs is not None:
            records = [record for record in records if record.imported]
            if not records:
                raise UserError(
                    f"unknown reference {name!r}; refs.yaml has {', '.join(specs)}, and no "
                    f"imported scores in {self.root} have that name"
                )
        if not records:
            raise NotScored(
                f"reference {name!r} has no scores in {self.root} under its present entry in "
                f"refs.yaml; run `mrpo precompute --refs {name} …`, or name an identity of "
                f"`mrpo store status` as {name}@prefix"
            )
        return records[-1]

    def kept_commits(self, spec: ReferenceSpec) -> dict[str, str]:
        """The Hub commits an alias has resolved to: {"model": …, "adapter": …} where recorded.

        They hold until `precompute --update-refs`, so that a branch that moves on does not cause
        everything to be scored again.
        """
        entry = spec.entry()
        for record in reversed(self.references()):
            if record.alias == spec.alias and record.entry == entry:
                parts = ((key, record.inputs.get(key)) for key in ("model", "adapter"))
                return {key: part["commit"] for key, part in parts if part and "commit" in part}
        return {}

    def is_damaged(self, identity: str) -> bool:
        """Whether the `reference.json` of an identity exists and is invalid."""
        return RECORD in self.files.names(identity) and not self.names_of(identity)


class NotScored(UserError):
    """An alias under whose present refs.yaml entry the store has nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRecord:
    """One identity under one alias: a name in `reference.json` with what all names share."""

    alias: str
    entry: Mapping[str, Any]  # ReferenceSpec.entry() at the time of recording
    inputs: Mapping[str, Any]  # what the identity is a digest of
    resolved_commit: str | None = None  # of a Hub model
    runs: tuple[Mapping[str, Any], ...] = ()  # engine, versions, machine, date: kept, not keyed
    created: str = ""  # when the identity was first recorded, UTC
    recorded: str = ""  # when it was last recorded under this alias and entry, UTC

    @property
    def identity(self) -> str:
        return identity_of(self.inputs)

    @property
    def imported(self) -> bool:
        """Whether the scores were computed elsewhere and came in by `mrpo store import`."""
        return "imported" in self.inputs


def merged(
    earlier: Sequence[ReferenceRecord], later: Sequence[ReferenceRecord]
) -> list[ReferenceRecord]:
    """All names of one identity with the date each was last recorded, and all runs once."""
    records = [*earlier, *later]
    runs: list[Mapping[str, Any]] = []
    for record in records:
        runs += [run for run in record.runs if run not in runs]
    created = min(record.created for record in records)
    names: dict[str, ReferenceRecord] = {}
    for record in sorted(records, key=lambda record: record.recorded):
        names[identity_of([record.alias, record.entry])] = record
    return [replace(record, runs=tuple(runs), created=created) for record in names.values()]


def _encoded(records: Sequence[ReferenceRecord]) -> bytes:
    """`reference.json` for all the names of one identity, with a digest of itself."""
    first = records[0]
    content = {
        "identity": first.identity,
        "inputs": first.inputs,
        "resolved_commit": first.resolved_commit,
        "created": first.created,
        "names": [
            {"alias": record.alias, "entry": record.entry, "recorded": record.recorded}
            for record in records
        ],
        "runs": first.runs,
    }
    content["digest"] = identity_of(content)
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _decoded(identity: str, data: bytes) -> list[ReferenceRecord]:
    """The names of an identity; none where the file is damaged or another identity's."""
    try:
        content = json.loads(data)
        digest = content.pop("digest")
        valid = fits(content, RECORD_SHAPE) and digest == identity_of(content)
        shared = {key: content[key] for key in ("inputs", "resolved_commit", "created")}
        records = [
            ReferenceRecord(**name, **shared, runs=tuple(content["runs"]))
            for name in content["names"]
        ]
        valid &= all(r.identity == identity and bool(ALIAS.fullmatch(r.alias)) for r in records)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return []
    return records if valid else []
