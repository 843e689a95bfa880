"""Scores of several references beside the pairs: the part of the store that training reads.

`join` writes one file for each shard of pairs, row for row, so that a trainer streams both side by
side and a store that grows in the meantime changes nothing. It holds one reference in memory at a
time. A joined file has these columns besides `pair_id`:

    ref_chosen_logps, ref_rejected_logps    [K] float64 nats, NaN where permanently missing
    ref_chosen_tokens, ref_rejected_tokens  [K] int32, null where unknown
    reasons                                 [K] text, null where there is a score

The store has responses; what makes a pair of two of them is decided here: a pair has a score where
both responses have one, and their token ids differ.

Pairs without a score are listed in missing.csv, by which `mrpo prepare --exclude` leaves them out.
"""

from __future__ import annotations

import shlex
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import UserError
from ..files import new_folder, read_json, write_json
from .ids import IdArray, IdIndex, ResponseIds, digest_of, ids_to_arrow
from .references import load_refs
from .store import OVER_LIMIT, NotScored, ReferenceRecord, ScoreFiles, Store

if TYPE_CHECKING:
    from .shards import PairShards

MANIFEST = "joined.json"
MISSING = "missing.csv"  # the pairs without a score under a reference, where there are any
ROW_GROUP = 8192  # rows that a reader of part of a file holds in memory
JOINED = {
    "ref_chosen_logps": "chosen_logp",
    "ref_rejected_logps": "rejected_logp",
    "ref_chosen_tokens": "chosen_tokens",
    "ref_rejected_tokens": "rejected_tokens",
    "reasons": "reason",
}
RENDER_EQUAL = "responses_render_equal"  # the reason of a pair whose token ids are the same


@dataclass(frozen=True, slots=True)
class JoinedReference:
    """A column of the joined scores: its reference, and the pairs that this could not score."""

    alias: str
    identity: str
    entry: dict[str, Any]
    missing: dict[str, int]  # permanently missing pairs by reason


class JoinedScores:
    """A folder that `join` wrote. Shards are those of the pairs, in their order."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        shape = {
            "references": [{"alias": str, "identity": str, "entry": {}, "missing": {}}],
            "files": [{"name": str, "rows": int, "digest": str}],
        }
        try:
            way_out = f"delete {self.path} and start the run again"
            manifest = read_json(self.path / MANIFEST, shape, way_out)
        except FileNotFoundError:
            raise UserError(f"{self.path}: holds no joined scores; start the run again") from None
        self.references = [JoinedReference(**entry) for entry in manifest["references"]]
        self.names: list[str] = [entry["name"] for entry in manifest["files"]]
        self.rows: list[int] = [entry["rows"] for entry in manifest["files"]]
        self._digests: list[str] = [entry["digest"] for entry in manifest["files"]]
        self.aliases = [reference.alias for reference in self.references]
        self.num_pairs = sum(self.rows)
        self.pairs_digest: str | None = manifest.get("pairs")  # None: of an earlier version

    def table(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """A shard's rows. Raises `UserError` where its bytes have changed."""
        path = self.path / self.names[shard]
        data = path.read_bytes() if path.is_file() else b""
        if digest_of(data) != self._digests[shard]:
            raise UserError(f"{path}: damaged; delete {self.path} and start the run again")
        return pq.read_table(pa.BufferReader(data), columns=columns)


def matrix(table: pa.Table, name: str) -> np.ndarray:
    """A `[K]` number column of a joined table as float64 [n, K], NaN where null."""
    values = table[name].combine_chunks()
    flat = values.flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float64).reshape(len(table), values.type.list_size)


def resolve_references(
    pairs: PairShards, store: Store, aliases: Sequence[str], refs_config: str
) -> list[ReferenceRecord]:
    """What each alias means in the store (`Store.resolve`).

    Raises `UserError` with the precompute line to run where one has no scores.
    """
    specs, records, problems = load_refs(refs_config), [], {}
    for alias in aliases:
        try:
            records.append(store.resolve(alias, specs))
        except NotScored as error:
            problems[alias] = str(error)
    if problems:
        line = precompute_line(pairs, store, list(problems), refs_config)
        raise UserError(f"{'; '.join(problems.values())}; run: {line}")
    return records


def join(
    pairs: PairShards,
    store: Store,
    records: Sequence[ReferenceRecord],
    out: Path,
    *,
    refs_config: str = "configs/refs.yaml",
) -> JoinedScores:
    """Write every pair's scores under `records` into the folder `out`, all of it or nothing.

    Raises `UserError` with the precompute line to run where a pair is not yet scored.
    """
    assert records, "nothing to join"
    with new_folder(Path(out)) as folder:
        unscored: dict[str, int] = {}
        references = []
        columns = [folder / f"column-{column}" for column in range(len(records))]
        for record, column in zip(records, columns):
            column.mkdir()
            reference, absent = _gather(pairs, store, record, column)
            references.append(reference)
            if absent:
                unscored[record.alias] = absent
        if unscored:
            counts = ", ".join(f"{count} for {alias}" for alias, count in unscored.items())
            line = precompute_line(pairs, store, list(unscored), refs_config)
            raise UserError(
                f"{pairs.path}: pairs not yet scored in {store.root}: {counts}; run: {line}"
            )
        files = [_merge(pairs, shard, columns, folder) for shard in range(len(pairs.names))]
        for column in columns:
            shutil.rmtree(column)
        manifest = {"pairs": pairs.digest, "references": references, "files": files}
        write_json(folder / MANIFEST, manifest)
    return JoinedScores(out)


def _gather(
    pairs: PairShards, store: Store, record: ReferenceRecord, folder: Path
) -> tuple[JoinedReference, int]:
    """Write one reference's rows in the order of the pairs; returns how many are not scored.

    Its scores are in memory meanwhile, about 45 bytes a response.
    """
    scores = _Responses(store.scores(record.identity))
    unscored, missing = 0, Counter[str]()
    for shard in range(len(pairs.names)):
        rows, lacking = scores.of_pairs(pairs.response_ids(shard))
        unscored += lacking
        if unscored:
            continue  # the join will fail; only the count is still needed
        missing.update(rows["reason"].drop_null().to_pylist())
        if rows["reason"].null_count < len(rows):
            _list_missing(
                folder.parent / MISSING, record.alias, pairs.pair_ids(shard), rows["reason"]
            )
        pq.write_table(rows, folder / f"{shard}.parquet", compression="none")
    entry = dict(record.entry)
    return JoinedReference(record.alias, record.identity, entry, dict(missing)), unscored


class _Responses:
    """All the scores of one reference in memory, found by response id."""

    def __init__(self, scores: ScoreFiles) -> None:
        self._left_out = scores.left_out()
        names = scores.names()  # once: files that appear later belong to a later join
        # The index finds the first of equal ids, and the tables come in the order that decides.
        self._index = IdIndex(scores.ids_of(name) for name in names)
        self.reasons: list[str | None] = [None, OVER_LIMIT]
        # One more row, the last: that of responses which only a limit of a run left out.
        size = self._index.size + 1
        self._logps = np.full(size, np.nan)
        self._tokens = np.zeros(size, np.int32)  # 0: unknown
        self._checksums = np.zeros(size, np.uint32)  # of unknown token ids: 0
        self._reasons = np.zeros(size, np.int16)  # place in `reasons`
        self._reasons[-1] = 1
        start = 0
        for table in scores.tables(["logp", "tokens", "checksum", "reason"], names):
            rows = slice(start, start := start + len(table))
            self._logps[rows] = table["logp"].to_numpy()
            self._tokens[rows] = pc.fill_null(table["tokens"], 0).to_numpy()
            self._checksums[rows] = pc.fill_null(table["checksum"], 0).to_numpy()
            if table["reason"].null_count < len(table):
                self._reasons[rows] = self._numbers(table["reason"].combine_chunks())

    def of_pairs(self, ids: ResponseIds) -> tuple[pa.Table, int]:
        """The scores of n pairs, and how many have a response that is not yet scored."""
        places = [self._index.find(responses) for responses in (ids.chosen, ids.rejected)]
        for place, responses in zip(places, (ids.chosen, ids.rejected)):
            unknown = np.flatnonzero(place < 0)
            place[unknown[self._left_out.contains(responses[unknown])]] = len(self._logps) - 1
        lacking = int(((places[0] < 0) | (places[1] < 0)).sum())
        chosen, rejected = places
        tokens = [self._tokens[place] for place in places]
        reasons = np.where(
            self._reasons[chosen] > 0, self._reasons[chosen], self._reasons[rejected]
        )
        alike = alike_rendered(*(self._checksums[place] for place in places), *tokens)
        alike &= (ids.chosen != ids.rejected) & (reasons == 0)
        columns: dict[str, pa.Array] = {}
        for branch, place in zip(("chosen", "rejected"), places):
            logps = np.where((reasons > 0) | alike, np.nan, self._logps[place])
            columns[f"{branch}_logp"] = pa.array(logps)
        for branch, counts in zip(("chosen", "rejected"), tokens):
            columns[f"{branch}_tokens"] = pa.array(counts, mask=counts == 0)
        texts = pa.array([*self.reasons, RENDER_EQUAL], pa.string())
        columns["reason"] = texts.take(pa.array(np.where(alike, len(texts) - 1, reasons)))
        return pa.table(columns), lacking

    def _numbers(self, reasons: pa.Array) -> np.ndarray:
        """The places of the texts in `self.reasons`, [n]."""
        coded = reasons.dictionary_encode()
        for text in coded.dictionary.to_pylist():
            if text not in self.reasons:
                self.reasons.append(text)
        place = np.array([self.reasons.index(text) for text in coded.dictionary.to_pylist()])
        codes = pc.fill_null(coded.indices, -1).to_numpy()
        return np.where(codes < 0, 0, place[codes])


def alike_rendered(
    chosen_checksums: np.ndarray,
    rejected_checksums: np.ndarray,
    chosen_tokens: np.ndarray,
    rejected_tokens: np.ndarray,
) -> np.ndarray:
    """[n] whether the two responses of a pair were rendered to the same token ids.

    Checksums are 0 or NaN where unknown. CRC-32 tells any two sequences of one length apart that
    differ in a single token, and others except for one in 4 billion.
    """
    known = chosen_checksums > 0
    return known & (chosen_checksums == rejected_checksums) & (chosen_tokens == rejected_tokens)


def _list_missing(path: Path, alias: str, ids: IdArray, reasons: pa.ChunkedArray) -> None:
    """Append the pairs that have a reason to a table that `mrpo prepare --exclude` takes."""
    rows = np.flatnonzero(reasons.is_valid().to_numpy())
    if len(rows):
        new = not path.exists()
        with path.open("a", encoding="utf-8") as file:
            file.write("pair_id,reference,reason\n" if new else "")
            for row in rows.tolist():
                file.write(f"{ids[row].tobytes().hex()},{alias},{reasons[row].as_py()}\n")


def _merge(pairs: PairShards, shard: int, columns: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Write one joined shard from the references' rows; returns its entry in the manifest."""
    parts = [pq.read_table(column / f"{shard}.parquet") for column in columns]
    table = pa.table(
        {"pair_id": ids_to_arrow(pairs.pair_ids(shard))}
        | {name: _side_by_side(parts, value) for name, value in JOINED.items()}
    )
    path = folder / pairs.names[shard]
    pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP)
    return {"name": path.name, "rows": len(table), "digest": digest_of(path.read_bytes())}


def _side_by_side(references: list[pa.Table], name: str) -> pa.Array:
    """A column of K references as [n, K]; a missing log-prob becomes NaN, others stay null."""
    parts = [reference[name].combine_chunks() for reference in references]
    if pa.types.is_floating(parts[0].type):
        parts = [part.fill_null(float("nan")) for part in parts]
    n, k = len(parts[0]), len(parts)
    order = np.arange(n * k).reshape(k, n).T.reshape(-1)  # pair by pair
    flat = pa.concat_arrays(parts).take(pa.array(order))
    return pa.FixedSizeListArray.from_arrays(flat, k)


def precompute_line(
    pairs: PairShards, store: Store, aliases: Sequence[str], refs_config: str
) -> str:
    """The command that scores the pairs under the references."""
    names = dict.fromkeys(alias.partition("@")[0] for alias in aliases)
    options = ["--pairs", str(pairs.path), "--refs", ",".join(names)]
    options += ["--refs-config", refs_config, "--store", store.root]
    return shlex.join(["mrpo", "precompute", *options])
