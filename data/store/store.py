"""The score store: every reference's scores of every response, computed once and kept.

`<store>/<identity>/reference.json` says what determines the scores, under which names they are
known (alias and refs.yaml entry) and what computed them; `<store>/<identity>/scores/` holds them
(`scores.py`). An identity is a digest of what determines the numbers and of nothing else, so a
response scored for one data set is scored for all. A store is a local path or an fsspec URL.

    store = Store("store")
    record = store.resolve("llama", load_refs("configs/refs.yaml"))
    table = store.scores(record.identity).read(["response_id", "logp"])
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ...errors import UserError
from ...files import fits
from ..ids import identity_of
from ..pairs import canonical_json
from ..references import ALIAS, PARTS, ReferenceSpec, check_alias, inputs_here
from .files import open_files
from .scores import BAD, EarlierLayout, ScoreFiles

IDENTITY = re.compile(r"[0-9a-f]{32}")
RECORD = "reference.json"
POLICIES = "policies"
LAYOUT = 2  # of the score files; records of earlier versions, whose rows are pairs, name none
TASK_RESULTS = "tasks"  # a policy's folder of what `evaluation/tasks` measured
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
        are untouched. Raises `EarlierLayout` where its scores are those of pairs.
        """
        records, layout = self._read_record(identity)
        if records and layout != LAYOUT:
            raise EarlierLayout(self.root)
        return records

    def upgrade_record(self, identity: str) -> None:
        """Write the record of an earlier version as that of scores of responses."""
        if records := self._read_record(identity)[0]:
            runs = tuple(_in_responses(run) for run in records[0].runs)
            records = [replace(record, runs=runs) for record in records]
            self.files.write(f"{identity}/{RECORD}", _encoded(records))

    def earlier_record(self, identity: str) -> list[ReferenceRecord]:
        """As `names_of` an identity whose scores are those of pairs; empty for another."""
        records, layout = self._read_record(identity)
        return [] if layout == LAYOUT else records

    def _read_record(self, identity: str) -> tuple[list[ReferenceRecord], Any]:
        try:
            return _decoded(identity, self.files.read(f"{identity}/{RECORD}"))
        except FileNotFoundError:
            return [], None

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
        """The reference that an alias means; no model is loaded.

        `alias`: the newest identity that its entry of refs.yaml can mean (`meant_by`); where
        refs.yaml has no such alias, the scores last imported under it, of a single model.
        `alias@prefix`: the identity that begins so.
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
            return self.meant_by(specs[name])[-1]
        if specs is not None:
            records = [record for record in records if record.imported]
            if not records:
                raise UserError(
                    f"unknown reference {name!r}; refs.yaml has {', '.join(specs)}, and no "
                    f"imported scores in {self.root} have that name"
                )
            newest = {record.entry.get("imported"): record for record in records}
            if len(newest) > 1:
                models = ", ".join(f"{r.title} ({model})" for model, r in newest.items())
                raise UserError(
                    f"reference {name}: {self.root} has imported scores of several models under "
                    f"this name; name one of {models}"
                )
        if not records:
            raise NotScored(f"reference {name!r} has no scores in {self.root}")
        return records[-1]

    def meant_by(self, spec: ReferenceSpec) -> list[ReferenceRecord]:
        """Every identity that an entry of refs.yaml can mean, the last recorded last.

        The alias and the entry must be equal. Two projects may share a store and both write
        `model: ./sft`, and a folder may be overwritten: so a local part must have the digests that
        were scored, or, where its files are not here, be the folder that was scored.

        Raises `NotScored` where nothing is left, and `UserError` where identities of different
        local files are, which nothing here can tell apart.
        """
        records = self._recorded(spec)
        here = inputs_here(spec)
        unchanged = [record for record in records if not record.changed(here)]
        origins = [record.origin(spec, here) for record in unchanged]
        for origin in ("here", "unknown"):  # unknown: recorded by a version that kept no folder
            meant = [record for record, known in zip(unchanged, origins) if known == origin]
            if len({canonical_json(record.local_inputs) for record in meant}) > 1:
                raise UserError(
                    f"reference {spec.alias}: {self.root} has scores of different files for its "
                    f"entry in refs.yaml, and {spec.model} is not here to compare; name one of "
                    f"{', '.join(dict.fromkeys(record.title for record in meant))}"
                )
            if meant:
                return meant
        raise NotScored(self._why_not_scored(spec, records, here))

    def described(self, record: ReferenceRecord, spec: ReferenceSpec | None) -> str:
        """A line that says which scores a name means, and which others its entry has."""
        recorded = self._recorded(spec) if spec else []
        same_files = [other for other in recorded if other.local_inputs == record.local_inputs]
        others = {other.identity: other for other in same_files if other.title != record.title}
        line = f"{record.title} ({record.facts})"
        if others:
            named = (f"{other.title} ({other.facts})" for other in others.values())
            line += f"; {record.alias} also has {', '.join(named)}"
        return line

    def _recorded(self, spec: ReferenceSpec) -> list[ReferenceRecord]:
        entry = spec.entry()
        return [r for r in self.references() if r.alias == spec.alias and r.entry == entry]

    def _why_not_scored(
        self, spec: ReferenceSpec, records: Sequence[ReferenceRecord], here: Mapping[str, Any]
    ) -> str:
        """What the store has in place of the reference; `records` have its alias and entry."""
        overwritten = [record for record in records if record.origin(spec, {}) != "elsewhere"]
        if overwritten:
            title, changed = overwritten[-1].title, overwritten[-1].changed(here)
            return (
                f"reference {spec.alias}: the {' and '.join(changed)} of {spec.model} changed "
                f"since {title} was scored; score it again, or name {title} to use those scores"
            )
        if records:
            last = records[-1]
            theirs = ", ".join(last.folders.values())
            ours = ", ".join(spec.possible_paths(part)[0] for part in last.folders)
            return (
                f"reference {spec.alias}: {self.root} has scores of {theirs} under this name, not "
                f"of {ours}; score it, or name {last.title} if these are the same files"
            )
        return (
            f"reference {spec.alias!r} has no scores in {self.root} under its present entry in "
            f"refs.yaml; score it, or name an identity of `mrpo store status` as "
            f"{spec.alias}@prefix"
        )

    def kept_commits(self, spec: ReferenceSpec) -> dict[str, str]:
        """The Hub commits an alias has resolved to: {"model": …, "adapter": …} where recorded.

        They hold until `precompute --update-refs`, so that a branch that moves on does not cause
        everything to be scored again.
        """
        commits: dict[str, str] = {}
        for record in self._recorded(spec):
            parts = {part: record.inputs.get(part) or {} for part in PARTS}
            commits |= {part: kept["commit"] for part, kept in parts.items() if "commit" in kept}
        return commits

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
    folders: Mapping[str, str] = field(default_factory=dict)  # of local parts: where they were
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

    @property
    def title(self) -> str:
        """The alias and the beginning of the identity, as `--refs` takes them."""
        return f"{self.alias}@{self.identity[:12]}"

    @property
    def precision(self) -> str:
        """What the numbers were computed in, as `float32 fp8`, or `float32 --bf16` for autocast."""
        parts = [self.inputs.get("dtype"), self.inputs.get("quantization")]
        parts += ["--bf16"] if "autocast" in self.inputs else []
        return " ".join(str(part) for part in parts if part)

    @property
    def facts(self) -> str:
        """What tells this identity from others of its name, in a few words."""
        commit = self.resolved_commit and f"commit {self.resolved_commit[:7]}"
        parts = ("imported" if self.imported else self.precision, self.inputs.get("server"), commit)
        return ", ".join(part for part in parts if part)

    @property
    def name_key(self) -> str:
        """What makes two names of an identity the same."""
        return canonical_json([self.alias, self.entry, self.folders])

    @property
    def local_inputs(self) -> dict[str, Any]:
        """The inputs that local files made: of model, tokenizer and adapter."""
        parts = {part: self.inputs.get(part) or {} for part in (*PARTS, "tokenizer")}
        return {part: made for part, made in parts.items() if made and "commit" not in made}

    def changed(self, here: Mapping[str, Any]) -> list[str]:
        """The parts whose files are here (`inputs_here`) and are not those that were scored."""
        return [part for part in here if self.inputs.get(part, here[part]) != here[part]]

    def origin(
        self, spec: ReferenceSpec, here: Mapping[str, Any]
    ) -> Literal["here", "elsewhere", "unknown"]:
        """Whether an equal entry named the same files, by digest (`here`) or else by folder."""
        known = True
        for part in set(PARTS) & self.local_inputs.keys() - here.keys():
            if part not in self.folders:
                known = False
            elif self.folders[part] not in spec.possible_paths(part):
                return "elsewhere"
        return "here" if known else "unknown"


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
        names[record.name_key] = record
    return [replace(record, runs=tuple(runs), created=created) for record in names.values()]


def _in_responses(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run that may have counted the pairs it scored, each two responses."""
    kept = {key: value for key, value in run.items() if key != "pairs"}
    return kept | {"responses": 2 * run["pairs"]} if "pairs" in run else kept


def _encoded(records: Sequence[ReferenceRecord]) -> bytes:
    """`reference.json` for all the names of one identity, with a digest of itself."""
    first = records[0]
    content = {
        "layout": LAYOUT,
        "identity": first.identity,
        "inputs": first.inputs,
        "resolved_commit": first.resolved_commit,
        "created": first.created,
        "names": [
            {
                "alias": record.alias,
                "entry": record.entry,
                **({"folders": record.folders} if record.folders else {}),
                "recorded": record.recorded,
            }
            for record in records
        ],
        "runs": list(first.runs),  # as it is read, for the digest
    }
    content["digest"] = identity_of(content)
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _decoded(identity: str, data: bytes) -> tuple[list[ReferenceRecord], Any]:
    """The names of an identity, none where the file is damaged or another identity's; the layout
    of its scores."""
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
        valid &= all(isinstance(path, str) for r in records for path in r.folders.values())
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return [], None
    return (records if valid else []), content.get("layout")
