"""`reference.json`: what an identity's scores come from, and the names it goes by.

One record for each name (alias and refs.yaml entry) of an identity. The file carries a digest of
itself and is read as data only: a damaged or foreign one counts as none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .digests import identity_of
from .references import ALIAS


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRecord:
    """One identity under one alias."""

    alias: str
    entry: Mapping[str, Any]  # ReferenceSpec.entry(): what refs.yaml said
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
        """Whether others computed the scores, and they were brought in by `mrpo store import`."""
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


def to_json(records: Sequence[ReferenceRecord]) -> bytes:
    """The file for all the names of one identity."""
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


def from_json(identity: str, data: bytes) -> list[ReferenceRecord]:
    """The names of an identity; none where the file is damaged or another identity's."""
    try:
        content = json.loads(data)
        digest = content.pop("digest")
        if digest != identity_of(content):
            return []
        shared = {key: content[key] for key in ("inputs", "resolved_commit", "created")}
        records = [
            ReferenceRecord(**name, **shared, runs=tuple(content["runs"]))
            for name in content["names"]
        ]
    except (ValueError, AttributeError, KeyError, TypeError):
        return []
    if all(record.identity == identity and ALIAS.fullmatch(record.alias) for record in records):
        return records
    return []
