"""`mrpo store upgrade`: a store of an earlier version, whose rows were pairs, as one of responses.

    <identity>/scores/*.parquet, a row a pair  ->  the same folder, a row a response
                                                   kept-aside/*.parquet, pairs of unknown texts

Nothing is scored. A reference's new files are all there before its first old one goes, and its
record says the new layout last, so a run that is killed leaves a store which every other command
still refuses, and the next run finishes. What a pair's refusal was about, its row does not say:
refusals are counted and not moved, and the next `mrpo precompute` finds them again by rendering.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import UserError
from ...settings import comma_separated, command
from ..config import UpgradeConfig
from ..ids import (
    IdArray,
    IdIndex,
    IdSet,
    ResponseIds,
    digest_of,
    ids_from_bytes,
    ids_to_arrow,
    ids_to_numpy,
    unit_of,
)
from ..shards import MANIFEST, PairShards
from .scores import (
    BAD,
    EARLIER_COLUMNS,
    KEPT_ASIDE,
    LEFT_OUT,
    SCORE_SCHEMA,
    TOKEN_COLUMN,
    TOKEN_TYPE,
    ScoreFiles,
    intact,
    to_bytes,
)
from .store import Store, open_store

BRANCHES = ("chosen", "rejected")
OF_A_BRANCH = ("logp", "end_logp", "tokens", "boundary", TOKEN_COLUMN)


@dataclass(slots=True)
class Moved:
    """What became of the rows of a store, over all of its references."""

    references: int = 0
    pairs: int = 0  # rows whose scores were moved
    responses: int = 0  # rows that they became
    kept_aside: int = 0  # rows of pairs that are in none of the folders
    refusals: int = 0  # rows without a score, which are not moved
    damaged: int = 0  # files, set aside

    def lines(self, root: str) -> list[str]:
        """The summary."""
        lines = [
            f"moved   {self.pairs:,} pairs of {self.references:,} references: "
            f"{self.responses:,} responses"
        ]
        if self.refusals:
            lines.append(
                f"left    {self.refusals:,} refusals, which `mrpo precompute` finds again "
                "without scoring"
            )
        if self.kept_aside:
            lines.append(
                f"kept    {self.kept_aside:,} rows aside, whose pairs are in none of the folders; "
                "run this again with --pairs FOLDER of theirs"
            )
        if self.damaged:
            lines.append(f"damaged {self.damaged:,} files, set aside as {BAD}")
        return [*lines, f"store   {root}"]


@command(UpgradeConfig)
def upgrade(config: UpgradeConfig) -> Moved:
    """Move every score of pairs whose texts are at hand; prints and returns the counts.

    Raises `UserError` where there is no store, or no folder of pairs to learn the texts from.
    """
    store, moved = open_store(config.store), Moved()
    stores = [store.policies, store]  # the references last: their records say what is done
    todo = [(one, identity) for one in stores for identity in one.identities()]
    if not todo:
        raise UserError(f"--store {store.root}: holds no references; there is nothing to upgrade")
    todo = [(one, identity) for one, identity in todo if _Earlier(one, identity).is_there]
    if not todo:
        print(f"nothing to upgrade\nstore   {store.root}")
        return moved
    texts = _Texts(_folders(config, todo))
    for one, identity in todo:
        _Earlier(one, identity).move(texts, moved)
    print("\n".join(moved.lines(store.root)))
    return moved


class _Texts:
    """The ids of prompts and responses of all the pairs in some folders, by pair id."""

    def __init__(self, folders: Sequence[PairShards]) -> None:
        places = [(pairs, shard) for pairs in folders for shard in range(len(pairs.names))]
        self._index = IdIndex(pairs.pair_ids(shard) for pairs, shard in places)
        parts = (pairs.response_ids(shard) for pairs, shard in places)
        self._ids = ResponseIds(*map(np.concatenate, zip(*parts)))

    def find(self, pair_ids: IdArray) -> tuple[np.ndarray, ResponseIds]:
        """Which of the pairs are known, [n] bool, and the ids of these."""
        places = self._index.find(pair_ids)
        return places >= 0, self._ids.take(places[places >= 0])


def _folders(config: UpgradeConfig, todo: Sequence[tuple[Store, str]]) -> list[PairShards]:
    """The folders that --pairs names, or those that the records name and that are here."""
    if config.pairs is not None:
        return [PairShards(folder) for folder in comma_separated(config.pairs, "--pairs")]
    records = [record for one, identity in todo for record in one.earlier_record(identity)]
    named = dict.fromkeys(str(run.get("pairs_folder", "")) for r in records for run in r.runs)
    here = [Path(folder) for folder in named if folder and (Path(folder) / MANIFEST).is_file()]
    if not here:
        raise UserError(
            f"--store {config.store or todo[0][0].root}: the pairs that it scored are not where "
            "they were; name their folders with --pairs"
        )
    return [PairShards(folder) for folder in here]


class _Earlier:
    """The files of an identity that an earlier version wrote."""

    def __init__(self, store: Store, identity: str) -> None:
        self._store, self._identity = store, identity
        self._files = store.files
        self._scores: ScoreFiles = store.scores(identity)

    @property
    def is_there(self) -> bool:
        """Whether there is anything to move: an earlier record, rows of pairs, rows kept aside."""
        if self._store.earlier_record(self._identity) or self._scores.kept_aside():
            return True
        return not self._store.names_of(self._identity) and bool(self._old_names())

    def move(self, texts: _Texts, moved: Moved) -> None:
        """Write the new files, remove the old ones, and have the record say so."""
        old = [f"{self._identity}/scores/{name}" for name in self._old_names()]
        old += [f"{self._identity}/{KEPT_ASIDE}/{name}" for name in self._scores.kept_aside()]
        known = IdSet()
        for name in self._scores.names():
            if f"{self._identity}/scores/{name}" not in old:
                known.add(self._scores.ids_of(name))  # of a run that was killed, or of new scores
        written: set[str] = set()
        for path in old:
            data = self._files.read(path)
            if not intact(path.rpartition("/")[2], data):
                self._files.rename(path, f"{path}{BAD}")
                moved.damaged += 1
                continue
            table = pq.read_table(pa.BufferReader(data))
            is_known, ids = texts.find(ids_to_numpy(table["pair_id"]))
            has_score = table["reason"].is_null().to_numpy()
            moved.refusals += int((is_known & ~has_score).sum())
            ids = ids.take(has_score[is_known])
            rows = _of_responses(table.filter(pa.array(is_known & has_score)), ids)
            new = known.add(ids_to_numpy(rows["response_id"]))
            moved.pairs += len(ids.prompts)
            moved.responses += int(new.sum())
            if new.any():
                self._scores.add(rows.filter(pa.array(new)))
            if not is_known.all():
                moved.kept_aside += int((~is_known).sum())
                written.add(self._keep_aside(table.filter(pa.array(~is_known))))
        self._move_left_out(texts)
        for path in old:
            if path not in written:
                self._files.remove(path)
        self._store.upgrade_record(self._identity)
        moved.references += 1

    def _old_names(self) -> list[str]:
        """The score files whose rows are pairs, and damaged ones of a store of earlier layout."""
        return [name for name in self._scores.names() if self._is_old(name)]

    def _is_old(self, name: str) -> bool:
        try:
            with self._files.open(f"{self._identity}/scores/{name}") as source:
                return set(pq.read_schema(source).names) >= EARLIER_COLUMNS
        except (pa.ArrowException, OSError):
            return True  # not to be read by anybody

    def _keep_aside(self, table: pa.Table) -> str:
        """Store rows as they are; the path of their file."""
        data = to_bytes(table)
        name = f"{unit_of(ids_to_numpy(table['pair_id']))}-{digest_of(data)}.parquet"
        path = f"{self._identity}/{KEPT_ASIDE}/{name}"
        self._files.write(path, data)
        return path

    def _move_left_out(self, texts: _Texts) -> None:
        """List both responses of a pair that a limit left out; one with a row is not missing."""
        folder = f"{self._identity}/{LEFT_OUT}"
        for name in self._files.names(folder):
            content = json.loads(self._files.read(f"{folder}/{name}"))
            if "pairs" in content:
                pairs = [bytes.fromhex(pair_id) for pair_id in content["pairs"]]
                self._scores.leave_out(texts.find(ids_from_bytes(pairs))[1].both)
                self._files.remove(f"{folder}/{name}")


def _of_responses(table: pa.Table, ids: ResponseIds) -> pa.Table:
    """Rows of pairs as rows of their responses, each once, the chosen ones first.

    What a row of a pair does not say is null: the tokens before the rejected response, checksums.
    """
    parts = []
    for branch, responses in zip(BRANCHES, (ids.chosen, ids.rejected)):
        named = {name: f"{branch}_{name}" for name in OF_A_BRANCH}
        named |= {"prompt_tokens": "prompt_tokens"} if branch == "chosen" else {}
        columns = {
            name: table[column] for name, column in named.items() if column in table.column_names
        }
        columns |= {
            "prompt_id": ids_to_arrow(ids.prompts),
            "response_id": ids_to_arrow(responses),
        }
        schema = SCORE_SCHEMA
        if TOKEN_COLUMN in columns:
            schema = schema.append(pa.field(TOKEN_COLUMN, TOKEN_TYPE))
        arrays = [
            columns[field.name] if field.name in columns else pa.nulls(len(table), field.type)
            for field in schema
        ]
        parts.append(pa.table(arrays, schema=schema))
    rows = pa.concat_tables(parts)
    return rows.take(IdIndex(ids_to_numpy(rows["response_id"])).firsts())
