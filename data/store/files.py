"""Where the store's bytes live: a folder on a disk, or object storage behind fsspec.

A write is all or nothing: on a disk by `mrpo.files` (durable too), on object storage one put. Names
are those of content, so a repeated write changes nothing. Locks exist on a local disk alone; on
object storage one run should write, whose workers have shards of their own, and a race costs no
more than a second row.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from ...errors import UserError
from ...files import locked, sync, write_bytes

WRITERS = 8  # files sent at a time
COMMIT_FILES, COMMIT_BYTES = 500, 256 * 2**20  # what one commit on the Hub takes at most


# Protocols that can put a file; memory:// is for tests.
REMOTE = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hf", "memory")


def open_files(root: str | Path) -> Files:
    """The files under a local path or an fsspec URL.

    Raises `UserError` where the path is a file or below one, the URL carries a password, or its
    protocol needs a package that is not there.
    """
    text = str(root)
    if "://" not in text:
        return _local_files(Path(text).expanduser())
    scheme, _, rest = text.partition("://")
    if "@" in urlsplit(text).netloc:
        raise UserError(
            f"--store {scheme}://…: credentials in a URL end up in logs; "
            "put them into the environment or the provider's configuration"
        )
    if scheme in ("file", "local"):
        return _local_files(Path(rest).expanduser())
    if scheme not in REMOTE:
        raise UserError(f"--store {text}: {scheme}:// is no store; use a folder, s3:// or gs://")
    import fsspec

    try:
        system, path = fsspec.url_to_fs(text)
    except ImportError as error:
        raise UserError(f"--store {text}: {error}; install it, or use a local folder") from None
    except ValueError as error:
        raise UserError(f"--store {text}: {error}; use a path, s3:// or gs://") from None
    return (HubFiles if scheme == "hf" else RemoteFiles)(system, path, text)


class LocalFiles:
    """Files on a local disk; all names are relative to the root."""

    is_local = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = str(folder)

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder; empty where there is none."""
        try:
            with os.scandir(self.folder / folder) as entries:
                return [entry.name for entry in entries if entry.is_file()]
        except FileNotFoundError:
            return []

    def sizes(self, folder: str) -> dict[str, int]:
        """The same with their sizes in bytes."""
        names = self.names(folder)
        return {name: os.stat(self.folder / folder / name).st_size for name in names}

    def folders(self) -> list[str]:
        """Names of the folders directly under the root."""
        try:
            with os.scandir(self.folder) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises `FileNotFoundError`, as `open` does."""
        return (self.folder / name).read_bytes()

    def open(self, name: str) -> pa.NativeFile:
        """A file to read parts of."""
        return pa.OSFile(str(self.folder / name))

    def write(self, name: str, data: bytes) -> None:
        """Put a whole file there, durably; on any error nothing of it remains."""
        write_bytes(self.folder / name, data)

    def write_all(self, files: Iterable[tuple[str, bytes]]) -> None:
        for name, data in files:
            self.write(name, data)

    def rename(self, name: str, new: str) -> None:
        """Rename a file, replacing what has the new name."""
        os.replace(self.folder / name, self.folder / new)
        sync((self.folder / new).parent)

    def remove(self, name: str) -> None:
        """Delete a file; gone already is fine."""
        (self.folder / name).unlink(missing_ok=True)

    def modified(self, name: str) -> float:
        """When a file was last written, seconds since 1970."""
        return (self.folder / name).stat().st_mtime

    def remove_empty_folders(self) -> None:
        """Delete folders under the root that hold nothing."""
        for folder, _, _ in os.walk(self.folder, topdown=False):
            if folder != str(self.folder):
                with contextlib.suppress(OSError):  # holds something, or is being filled now
                    os.rmdir(folder)

    @contextlib.contextmanager
    def lease(self, name: str) -> Iterator[bool]:
        """Hold a lease if nobody does: yields whether it was got. It ends with the process."""
        path = self.folder / name
        with locked(path) as held:
            try:
                yield held
            finally:
                if held:  # removed before it is released: a lock of a removed file is no lock
                    path.unlink(missing_ok=True)


class RemoteFiles:
    """The same behind fsspec: s3://, gs://, memory://. Every lease is granted."""

    is_local = False

    def __init__(self, system: Any, path: str, url: str) -> None:
        self.system, self.path, self.root = system, path.rstrip("/"), url.rstrip("/")

    def names(self, folder: str) -> list[str]:
        return list(self.sizes(folder))

    def sizes(self, folder: str) -> dict[str, int]:
        return {
            PurePosixPath(entry["name"]).name: int(entry["size"] or 0)
            for entry in self._entries(folder)
            if entry["type"] == "file"
        }

    def folders(self) -> list[str]:
        entries = self._entries("")
        return sorted(PurePosixPath(e["name"]).name for e in entries if e["type"] == "directory")

    def read(self, name: str) -> bytes:
        return bytes(self.system.cat_file(self._at(name)))

    def open(self, name: str) -> pa.NativeFile:
        return pa.BufferReader(self.read(name))

    def write(self, name: str, data: bytes) -> None:
        with self._explained():
            self.system.pipe_file(self._at(name), data)

    def write_all(self, files: Iterable[tuple[str, bytes]]) -> None:
        files = iter(files)
        with ThreadPoolExecutor(WRITERS) as pool:
            while batch := list(islice(files, WRITERS)):
                list(pool.map(lambda item: self.write(*item), batch))

    def rename(self, name: str, new: str) -> None:
        self.system.mv(self._at(name), self._at(new))

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(self._at(name))

    @contextlib.contextmanager
    def lease(self, name: str) -> Iterator[bool]:
        yield True

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def _entries(self, folder: str) -> list[dict[str, Any]]:
        self.system.invalidate_cache()
        with self._explained():
            try:
                return list(self.system.ls(self._at(folder), detail=True))
            except FileNotFoundError:
                return []

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors that only the user can fix, in one line; all others rise unchanged."""
        try:
            yield
        except PermissionError as error:
            raise UserError(
                f"--store {self.root}: access denied ({error}); check the credentials in the "
                "environment and what they may do"
            ) from None
        except FileNotFoundError as error:
            raise UserError(
                f"--store {self.root}: can't be written ({error}); create the bucket or "
                "repository first"
            ) from None


class HubFiles(RemoteFiles):
    """Files of a Hub repository, for push and pull: hf://datasets/org/name[@revision][/folder].

    Each write is a commit, so files are gathered and committed many at a time.
    """

    def write(self, name: str, data: bytes) -> None:
        self.write_all([(name, data)])

    def write_all(self, files: Iterable[tuple[str, bytes]]) -> None:
        batch: list[tuple[str, bytes]] = []
        for item in files:
            batch.append(item)
            if len(batch) == COMMIT_FILES or sum(len(data) for _, data in batch) > COMMIT_BYTES:
                self._commit(batch)
                batch = []
        if batch:
            self._commit(batch)

    def _commit(self, files: list[tuple[str, bytes]]) -> None:
        from huggingface_hub import CommitOperationAdd, HfApi

        place = self.system.resolve_path(self.path)
        inside = f"{place.path_in_repo}/" if place.path_in_repo else ""
        HfApi(endpoint=self.system.endpoint, token=self.system.token).create_commit(
            place.repo_id,
            [CommitOperationAdd(f"{inside}{name}", data) for name, data in files],
            commit_message=f"Add scores: {len(files)} files",
            repo_type=place.repo_type,
            revision=place.revision,
        )


def _local_files(folder: Path) -> LocalFiles:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        problem = "is a file" if existing == folder else f"is below a file, {existing}"
        raise UserError(f"--store {folder}: {problem}; a store is a folder")
    return LocalFiles(folder)


Files = LocalFiles | RemoteFiles
