"""Pairs on disk: `part-00000.parquet` … and `manifest.json`, written once, read by every stage.

`PairShards` opens a finished folder. `ShardWriter` fills shards with pairs in the order they come,
so that more rows at the end change the last shard alone; it writes the manifest last, so a folder
that has one is complete. `replaced_shards` puts a folder's new files in place of the old ones once
all are written, unless somebody who uses the old ones still needs them. A shard is read only if its
bytes are those that the manifest says, so nobody meets other pairs than those that he opened.

`tables.py` has the columns. Folders of earlier versions lack the ids of prompts and responses,
which are then computed from the texts.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from ..files import fits, new_folder, read_json, sync, write_json
from .config import MAX_SHARD_PAIRS
from .ids import IdArray, ResponseIds, identity_of, ids_from_bytes, ids_to_numpy
from .pairs import Pair, Prompt
from .tables import PAIR_COLUMNS, RESPONSE_IDS, TURNS, Kind, from_table, pair_schema, pairs_to_table

MANIFEST = "manifest.json"
SHARDS = "part-*.parquet"
USERS = "used-by.txt"  # the stores and runs that these pairs were used for, a line each
STAGE = ".preparing-"  # begins the name of a hidden folder whose files are not complete
SCHEMA_VERSION = 2
WITHOUT_RESPONSE_IDS = 1  # the version whose shards lack the ids of prompts and responses

# Texts get neither dictionaries nor statistics, which would repeat whole texts.
_SHORT = ["split", "source", "tools", "chat_template_kwargs"]
_ROLES = [f"{name}.list.element.role" for name in TURNS]
_ORDERED = ["pair_id", "chosen_bytes", "rejected_bytes"]


class PairShards:
    """A folder of prepared pairs.

    Raises `UserError` where the folder holds no pairs, is incomplete, or has another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest: dict[str, Any] = _read_manifest(self.path)
        shards = self.manifest["shards"]
        self.kind: Kind = self.manifest["kind"]
        self.names: list[str] = [shard["name"] for shard in shards]
        self.rows: list[int] = [shard["rows"] for shard in shards]
        self.num_pairs = sum(self.rows)
        self._checked: dict[int, tuple[int, ...]] = {}  # by shard: the file whose digest was right
        self._computed: dict[int, ResponseIds] = {}  # by shard, of a folder that has none

    def __repr__(self) -> str:
        return f"PairShards({str(self.path)!r}: {self.num_pairs} pairs, {self.kind})"

    @property
    def digest(self) -> str:
        """A name of the content: that of every shard, in order."""
        return identity_of(self.manifest["shards"])

    def table(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One shard as an Arrow table, all columns or the named ones.

        Raises `UserError` where the file is not the one that the manifest was written with.
        """
        path = self.path / self.names[shard]
        schema = pair_schema(self.kind, with_response_ids=self.has_response_ids)
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns])
        try:
            with pa.OSFile(str(path)) as file:
                self._check(shard, file)
                with pq.ParquetFile(file) as parquet:
                    if parquet.metadata.num_rows != self.rows[shard]:
                        raise self._fault(shard, "has another number of rows")
                    return parquet.read(columns=schema.names).select(schema.names).cast(schema)
        except UserError:
            raise
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            missing = isinstance(error, FileNotFoundError)
            raise self._fault(shard, "is missing" if missing else "cannot be read") from None

    def pairs(self, shard: int, rows: Sequence[int] | None = None) -> list[Pair]:
        """The pairs of a shard, all in order or the given rows (numbers within the shard)."""
        table = self.table(shard, PAIR_COLUMNS)
        try:
            return from_table(table if rows is None else table.take(pa.array(rows, pa.int64())))
        except (ValueError, TypeError, RecursionError):
            path = self.path / self.names[shard]
            raise UserError(
                f"{path} holds something else than pairs; run `mrpo prepare` again"
            ) from None

    def pair_ids(self, shard: int) -> IdArray:
        """The ids of a shard's pairs, [rows] of 16 raw bytes."""
        return ids_to_numpy(self.table(shard, ["pair_id"]).column("pair_id"))

    @property
    def has_response_ids(self) -> bool:
        """Whether the shards have a column of them; folders of earlier versions have not."""
        return bool(self.manifest["schema_version"] > WITHOUT_RESPONSE_IDS)

    def response_ids(self, shard: int) -> ResponseIds:
        """The ids of the prompts and responses of a shard's pairs."""
        if self.has_response_ids:
            table = self.table(shard, RESPONSE_IDS)
            return ResponseIds(*(ids_to_numpy(table[name]) for name in RESPONSE_IDS))
        if shard not in self._computed:
            columns = zip(*(pair.response_ids for pair in self.pairs(shard)))
            self._computed[shard] = ResponseIds(*(ids_from_bytes(list(ids)) for ids in columns))
        return self._computed[shard]

    def linked(self, folder: Path) -> PairShards:
        """The same pairs in a folder of their own, which no later `mrpo prepare` changes.

        Its files are hard links where the disk has such, else copies.
        """
        with suppress(UserError):
            if (earlier := PairShards(folder)).digest == self.digest:
                return earlier
        with new_folder(folder) as links:
            for shard, name in enumerate(self.names):
                self.table(shard, [])  # checked while the message can say what happened to it
                path = (self.path / name).resolve()
                try:
                    os.link(path, links / name)
                except OSError:
                    shutil.copyfile(path, links / name)
            write_json(links / MANIFEST, self.manifest)
        return PairShards(folder)

    def note_use(self, kind: Literal["store", "run"], user: str | Path) -> None:
        """Remember a store or a run that uses these pairs, so that `mrpo prepare` keeps them."""
        line = f"{kind} {user.resolve() if isinstance(user, Path) else user}"
        if line not in _lines(self.path / USERS):
            path = self.path / USERS
            with suppress(OSError), path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")  # where nobody may write, nobody prepares again

    def _check(self, shard: int, file: pa.OSFile) -> None:
        """Raise `UserError` unless the open file has the manifest's digest; reads it once."""
        about = os.fstat(file.fileno())
        state = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
        if self._checked.get(shard) == state:
            return
        with open(file.fileno(), "rb", closefd=False) as data:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
        if digest != self.manifest["shards"][shard]["sha256"]:
            raise self._fault(shard, "has not the digest that it was written with")
        file.seek(0)
        self._checked[shard] = state

    def _fault(self, shard: int, fault: str) -> UserError:
        try:
            listed = _read_manifest(self.path)["shards"]
        except UserError:
            listed = None
        if listed != self.manifest["shards"]:
            return UserError(
                f"{self.path} was prepared again meanwhile and holds other pairs now; "
                "run the same command again"
            )
        return UserError(
            f"{self.path / self.names[shard]} {fault}, but {MANIFEST} lists it; "
            "run `mrpo prepare` again"
        )


class ShardWriter:
    """Writes pairs in the order they are added; holds one shard in memory at a time.

    A full shard takes further pairs of its last prompt, as many again at most, so that the prompt
    is computed once for all of its responses.
    """

    def __init__(self, folder: Path, shard_pairs: int) -> None:
        self.shards: list[dict[str, Any]] = []
        self.kind: Kind | None = None  # that of the first pair
        self.num_pairs = 0
        self._folder = folder
        self._shard_pairs = shard_pairs
        self._pairs: list[Pair] = []
        self._ids: list[bytes] = []

    def add(self, pair: Pair, pair_id: bytes) -> None:
        """Append a pair; the caller makes sure that all are of the same kind."""
        if self.kind is None:
            self.kind = "messages" if pair.is_chat else "text"
        size = len(self._pairs)
        if size >= self._shard_pairs and (
            size >= min(2 * self._shard_pairs, MAX_SHARD_PAIRS)
            or Prompt.of(pair) != Prompt.of(self._pairs[-1])
        ):
            self._write()
        self.num_pairs += 1
        self._pairs.append(pair)
        self._ids.append(pair_id)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the last shard and the manifest, which also holds the given facts."""
        assert self.kind is not None, "a folder holds at least one pair"
        if self._pairs:
            self._write()
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "pairs": self.num_pairs,
            **facts,
            "shards": self.shards,
        }
        write_json(self._folder / MANIFEST, manifest)

    def _write(self) -> None:
        assert self.kind is not None
        path = self._folder / shard_name(len(self.shards))
        table = pairs_to_table(self._pairs, self._ids, self.kind)
        pq.write_table(
            table,
            path,
            compression="zstd",
            row_group_size=len(self._pairs),
            use_dictionary=_SHORT + (_ROLES if self.kind == "messages" else []),
            write_statistics=_SHORT + _ORDERED,
        )
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.shards.append({"name": path.name, "rows": len(self._pairs), "sha256": digest})
        self._pairs, self._ids = [], []


@contextmanager
def replaced_shards(out: Path, beside: Sequence[str], *, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder whose files replace those of `out` when the block ends without error.

    `beside` names the files that may stand beside the shards and their manifest.
    Raises `UserError` where `out` cannot be a folder or holds something other than pairs, and
    unless `overwrite` where it holds other pairs that a store or an unfinished run uses.
    """
    missing: list[Path] = []
    try:
        _refuse_foreign(out, beside)
        missing = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        for leftover in out.glob(f"{STAGE}*"):
            shutil.rmtree(leftover)
        stage = Path(tempfile.mkdtemp(prefix=STAGE, dir=out.absolute()))
    except OSError as error:
        _remove_empty(missing)
        raise UserError(f"--out {out}: {error.strerror} ({error.filename})") from None
    try:
        yield stage
        for path in stage.iterdir():
            sync(path)
        _replace(stage, out, overwrite)
    except BaseException:
        shutil.rmtree(stage)
        _remove_empty(missing)
        raise
    stage.rmdir()
    sync(out)


def _refuse_foreign(out: Path, beside: Sequence[str]) -> None:
    first = next(folder for folder in (out, *out.parents) if folder.exists())
    if not first.is_dir():
        raise UserError(f"--out {out}: {first} is a file; name a folder that is not below one")
    ours = (MANIFEST, USERS, *beside, SHARDS, f"{STAGE}*")
    if first is not out or all(
        any(fnmatch(entry.name, pattern) for pattern in ours) for entry in out.iterdir()
    ):
        return
    try:
        PairShards(out)  # pairs with other files beside them, which stay
    except UserError:
        raise UserError(
            f"--out {out} holds other files; name a new folder or one with prepared pairs"
        ) from None


def _replace(stage: Path, out: Path, overwrite: bool) -> None:
    """Move all files, the manifest last: a folder with a manifest is complete."""
    if (out / MANIFEST).exists() and not _same_pairs(stage, out):
        users = [] if overwrite else _users(out)
        if users:
            more = f" and {len(users) - 1} more" if len(users) > 1 else ""
            raise UserError(
                f"{out} holds other pairs than these, and {users[0]}{more} uses them; name another "
                "folder (--out, or --pairs with --data), or replace them with "
                "`mrpo prepare --overwrite`"
            )
        (out / USERS).unlink(missing_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)
    names = {path.name for path in stage.iterdir()}
    for name in sorted(names - {MANIFEST}):
        (stage / name).replace(out / name)
    for shard in out.glob(SHARDS):
        if shard.name not in names:
            shard.unlink()
    (stage / MANIFEST).replace(out / MANIFEST)


def _same_pairs(folder: Path, out: Path) -> bool:
    """Whether both hold the same pairs, also where an earlier version wrote those of `out`."""
    try:
        new, old = PairShards(folder), PairShards(out)
        if new.digest == old.digest or new.has_response_ids == old.has_response_ids:
            return new.digest == old.digest
        columns = ["pair_id", "split", "source"]
        return new.rows == old.rows and all(
            new.table(shard, columns).equals(old.table(shard, columns))
            for shard in range(len(new.names))
        )
    except UserError:  # damaged
        return False


def _users(out: Path) -> list[str]:
    """The stores and the unfinished runs that use the pairs of a folder."""
    users = []
    for line in _lines(out / USERS):
        kind, _, user = line.partition(" ")
        folder = Path(user)
        if kind == "run" and (folder / "pairs").is_dir() and not (folder / "model").is_dir():
            users.append(f"the unfinished run {user}")
        elif kind == "store" and ("://" in user or folder.is_dir()):
            users.append(f"the store {user}")
    return users


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def shard_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = read_json(path / MANIFEST, {}, "run `mrpo prepare` again")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} holds no prepared pairs (no {MANIFEST}); "
            f"run `mrpo prepare SOURCE --out {path}`"
        ) from None
    shape = {"kind": str, "shards": [{"name": str, "rows": int, "sha256": str}]}
    valid = fits(manifest, shape) and manifest["kind"] in get_args(Kind)
    if not valid or not all(fnmatch(shard["name"], SHARDS) for shard in manifest["shards"]):
        raise UserError(f"{path / MANIFEST} is damaged; run `mrpo prepare` again")
    if manifest.get("schema_version") not in (WITHOUT_RESPONSE_IDS, SCHEMA_VERSION):
        raise UserError(
            f"{path} was written with schema version {manifest.get('schema_version')}, this mrpo "
            f"reads {WITHOUT_RESPONSE_IDS} and {SCHEMA_VERSION}; run `mrpo prepare` again"
        )
    return manifest
