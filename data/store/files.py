"""Where the store's bytes live: a folder on a disk; `store_remote.py` has object storage.

A write is all or nothing, and durable: a temporary file, fsync, rename, fsync of the folder. Names
are those of content, so a repeated write changes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import pyarrow as pa

from ...errors import UserError

TEMPORARY = ".tmp-"  # opens the name of a file that is still being written


class Files(Protocol):
    """The few operations that the store needs, on names relative to its root."""

    root: str
    is_local: bool

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder; empty where there is none."""

    def sizes(self, folder: str) -> dict[str, int]:
        """The same with their sizes in bytes."""

    def folders(self) -> list[str]:
        """Names of the folders directly under the root."""

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises `FileNotFoundError`."""

    def open(self, name: str) -> pa.NativeFile:
        """A file to read parts of. Raises `FileNotFoundError`."""

    def write(self, name: str, data: bytes) -> None:
        """Put a whole file there, durably; on any error nothing of it remains."""

    def write_all(self, files: Iterable[tuple[str, bytes]]) -> None:
        """Put many files there, each whole or not at all."""

    def rename(self, name: str, new: str) -> None:
        """Rename a file, replacing what has the new name."""

    def remove(self, name: str) -> None:
        """Delete a file; gone already is fine."""

    def lease(self, name: str) -> contextlib.AbstractContextManager[bool]:
        """Hold a lease if nobody does: yields whether it was got."""


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
    import fsspec

    from .remote import HubFiles, RemoteFiles

    try:
        system, path = fsspec.url_to_fs(text)
    except ImportError as error:
        raise UserError(f"--store {text}: {error}; install it, or use a local folder") from None
    except ValueError as error:
        raise UserError(f"--store {text}: {error}; use a path, s3:// or gs://") from None
    return (HubFiles if scheme == "hf" else RemoteFiles)(system, path, text)


class LocalFiles:
    """Files on a local disk, written atomically and durably, with leases by file lock."""

    is_local = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = str(folder)

    def names(self, folder: str) -> list[str]:
        try:
            with os.scandir(self.folder / folder) as entries:
                return [entry.name for entry in entries if entry.is_file()]
        except FileNotFoundError:
            return []

    def sizes(self, folder: str) -> dict[str, int]:
        names = self.names(folder)
        return {name: os.stat(self.folder / folder / name).st_size for name in names}

    def folders(self) -> list[str]:
        try:
            with os.scandir(self.folder) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def open(self, name: str) -> pa.NativeFile:
        return pa.OSFile(str(self.folder / name))

    def write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        _make_folder(path.parent)
        temporary = path.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)

    def write_all(self, files: Iterable[tuple[str, bytes]]) -> None:
        for name, data in files:
            self.write(name, data)

    def rename(self, name: str, new: str) -> None:
        os.replace(self.folder / name, self.folder / new)
        _sync_folder((self.folder / new).parent)

    def remove(self, name: str) -> None:
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
        """A file lock: the system drops it when the process ends, however it ends."""
        path = self.folder / name
        _make_folder(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            held = _lock(descriptor) and _same_file(descriptor, path)
            try:
                yield held
            finally:
                if held:
                    path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _local_files(folder: Path) -> LocalFiles:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        problem = "is a file" if existing == folder else f"is below a file, {existing}"
        raise UserError(f"--store {folder}: {problem}; a store is a folder")
    return LocalFiles(folder)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    """Whether the locked file still has its name: its last holder may just have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
