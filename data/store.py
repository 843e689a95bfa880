"""The score store: what every reference said of every pair, computed once and kept for good.

`<store>/<identity>/reference.json` says what the scores come from, `<store>/<identity>/scores/`
holds them (`store_scores.py`). Identity is what makes the numbers and nothing else, so a pair
scored for one data set is scored for all. A store is a local path or an fsspec URL.

    store = Store("store")
    record = store.resolve("llama", load_refs("configs/refs.yaml"))
    table = store.scores(record.identity).read(["pair_id", "chosen_logp"])
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import UserError
from .digests import identity_of
from .references import ReferenceSpec, check_alias
from .store_files import open_files
from .store_schema import SCORE_SCHEMA
from .store_scores import ReferenceScores

__all__ = ["SCORE_SCHEMA", "ReferenceRecord", "ReferenceScores", "Store"]

IDENTITY = re.compile(r"[0-9a-f]{32}")
RECORD = "reference.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRecord:
    """One identity under one alias, as `reference.json` keeps it."""

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


class Store:
    """All references' records and scores under one root. Makes no folder until it writes."""

    def __init__(self, root: str | Path) -> None:
        self.files = open_files(root)
        self.root = self.files.root

    def scores(self, identity: str) -> ReferenceScores:
        assert IDENTITY.fullmatch(identity), identity
        return ReferenceScores(self.files, identity)

    def identities(self) -> list[str]:
        return [name for name in self.files.folders() if IDENTITY.fullmatch(name)]

    def references(self) -> list[ReferenceRecord]:
        """Every alias of every identity, the most recently recorded last."""
        records = [record for name in self.identities() for record in self._read(name)]
        return sorted(records, key=lambda record: (record.recorded, record.identity))

    def record(self, record: ReferenceRecord) -> ReferenceRecord:
        """Write or refresh an alias of an identity; returns it with its dates.

        Other aliases and earlier runs of the same identity stay. Two processes that record at
        once may lose one's run entry, never a score.
        """
        check_alias(record.alias)
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        earlier = self._read(record.identity)
        same = _named(earlier, record.alias, record.entry)
        names = [
            {"alias": other.alias, "entry": dict(other.entry), "recorded": other.recorded}
            for other in earlier
            if other is not same
        ]
        names.append({"alias": record.alias, "entry": dict(record.entry), "recorded": now})
        created = earlier[0].created if earlier else now
        runs = [*(earlier[0].runs if earlier else ()), *record.runs]
        content = {
            "identity": record.identity,
            "inputs": record.inputs,
            "resolved_commit": record.resolved_commit,
            "created": created,
            "names": names,
            "runs": runs,
        }
        content["digest"] = identity_of(content)
        data = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        self.files.write(f"{record.identity}/{RECORD}", data.encode())
        return ReferenceRecord(
            alias=record.alias,
            entry=record.entry,
            inputs=record.inputs,
            resolved_commit=record.resolved_commit,
            runs=tuple(runs),
            created=created,
            recorded=now,
        )

    def resolve(
        self, alias: str, specs: Mapping[str, ReferenceSpec] | None = None
    ) -> ReferenceRecord:
        """The reference that an alias means: never looks at weights.

        `alias`: the newest identity recorded under it with an equal refs.yaml entry; imported
        scores where refs.yaml has no such alias. `alias@prefix`: the identity that begins so.
        Raises `UserError` where none or several fit.
        """
        name, _, prefix = alias.partition("@")
        check_alias(name)
        records = [record for record in self.references() if record.alias == name]
        if prefix:
            return self._by_prefix(alias, prefix, records)
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
            raise UserError(
                f"reference {name!r} has no scores in {self.root} under its present entry in "
                f"refs.yaml; run `mrpo precompute --refs {name} …`, or name an identity of "
                f"`mrpo store status` as {name}@prefix"
            )
        return records[-1]

    def kept_commits(self, spec: ReferenceSpec) -> dict[str, str]:
        """The Hub commits an alias has resolved to: {"model": …, "adapter": …} where recorded.

        They hold until `precompute --update-refs`, so that a moved branch scores nothing anew.
        """
        entry = spec.entry()
        for record in reversed(self.references()):
            if record.alias == spec.alias and record.entry == entry:
                parts = ((key, record.inputs.get(key)) for key in ("model", "adapter"))
                return {key: part["commit"] for key, part in parts if part and "commit" in part}
        return {}

    def _by_prefix(
        self, alias: str, prefix: str, records: list[ReferenceRecord]
    ) -> ReferenceRecord:
        fitting = {r.identity: r for r in records if r.identity.startswith(prefix.lower())}
        if len(fitting) == 1:
            return next(iter(fitting.values()))
        known = ", ".join(sorted({r.identity[:12] for r in records})) or "none"
        problem = "fits several identities" if fitting else "fits no identity"
        raise UserError(f"{alias}: {problem} in {self.root}; recorded under it: {known}")

    def damaged_records(self) -> list[str]:
        """Identities whose `reference.json` is there and can't be right; changes nothing."""
        return [
            name
            for name in self.identities()
            if RECORD in self.files.names(name) and not self._read(name)
        ]

    def _read(self, identity: str) -> list[ReferenceRecord]:
        """The record of an identity, once for each of its names; empty where there is none.

        A damaged one counts as none: `precompute` finds the identity again by computing it, and
        its scores are untouched.
        """
        try:
            content = json.loads(self.files.read(f"{identity}/{RECORD}"))
            digest = content.pop("digest")
        except (FileNotFoundError, ValueError, AttributeError, KeyError):
            return []
        if digest != identity_of(content) or content["identity"] != identity:
            return []
        records = [
            ReferenceRecord(
                alias=name["alias"],
                entry=name["entry"],
                inputs=content["inputs"],
                resolved_commit=content["resolved_commit"],
                runs=tuple(content["runs"]),
                created=content["created"],
                recorded=name["recorded"],
            )
            for name in content["names"]
        ]
        return [record for record in records if record.identity == identity]


def _named(
    records: list[ReferenceRecord], alias: str, entry: Mapping[str, Any]
) -> ReferenceRecord | None:
    for record in records:
        if record.alias == alias and record.entry == entry:
            return record
    return None
