"""Where the store's bytes live: a local folder, or any fsspec URL (s3://, gs://, memory://).

A write is all or nothing in both. Locally: a temporary file, fsync, rename, fsync of the folder.
On object storage: one put, which appears whole or not at all. Names are those of content, so a
repeated write changes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import urlsplit

import pyarrow as pa

from ..errors import UserError

TEMPORARY = ".tmp-"  # opens the name of a file that is still being written


class Files(Protocol):
    """The few operations that the store needs, on names relative to its root."""

    root: str
    is_local: bool

    def names(self, folder: str) -> dict[str, int]:
        """Names of the files in a folder with their sizes in bytes; empty where there is none."""

    def folders(self) -> list[str]:
        """Names of the folders directly under the root."""

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises `FileNotFoundError`."""

    def open(self, name: str) -> pa.NativeFile:
        """A file to read parts of. Raises `FileNotFoundError`."""

    def write(self, name: str, data: bytes) -> None:
        """Put a whole file there, durably; on any error nothing of it remains."""

    def rename(self, name: str, new: str) -> None:
        """Rename a file, replacing what has the new name."""

    def remove(self, name: str) -> None:
        """Delete a file; gone already is fine."""

    def lease(self, name: str) -> contextlib.AbstractContextManager[bool]:
        """Hold a lease if nobody does: yields whether it was got."""


def open_files(root: str | Path) -> Files:
    """The files under a local path or an fsspec URL.

    Raises `UserError` where the URL carries a password or its protocol needs a package that is
    not there.
    """
    text = str(root)
    if "://" not in text:
        return LocalFiles(Path(text).expanduser())
    scheme, _, rest = text.partition("://")
    if "@" in urlsplit(text).netloc:
        raise UserError(
            f"--store {scheme}://…: credentials in a URL end up in logs; "
            "put them into the environment or the provider's configuration"
        )
    if scheme in ("file", "local"):
        return LocalFiles(Path(rest).expanduser())
    import fsspec

    try:
        system, path = fsspec.url_to_fs(text)
    except ImportError as error:
        raise UserError(f"--store {text}: {error}; install it, or use a local folder") from None
    except ValueError as error:
        raise UserError(f"--store {text}: {error}; use a path, s3:// or gs://") from None
    return RemoteFiles(system, path, text)


class LocalFiles:
    """Files on a local disk, written atomically and durably, with leases by file lock."""

    is_local = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = str(folder)
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            problem = "is a file" if existing == folder else f"is below a file, {existing}"
            raise UserError(f"--store {folder}: {problem}; a store is a folder")

    def names(self, folder: str) -> dict[str, int]:
        try:
            with os.scandir(self.folder / folder) as entries:
                return {e.name: e.stat().st_size for e in entries if e.is_file()}
        except FileNotFoundError:
            return {}

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

    def rename(self, name: str, new: str) -> None:
        os.replace(self.folder / name, self.folder / new)
        _sync_folder((self.folder / new).parent)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

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


class RemoteFiles:
    """Files behind fsspec. A put appears whole or not at all; one driver writes, so no leases."""

    is_local = False

    def __init__(self, system: Any, path: str, url: str) -> None:
        self.system, self.path, self.root = system, path.rstrip("/"), url.rstrip("/")

    def names(self, folder: str) -> dict[str, int]:
        return {
            _last(entry["name"]): int(entry["size"] or 0)
            for entry in self._entries(folder)
            if entry["type"] == "file"
        }

    def folders(self) -> list[str]:
        return sorted(_last(e["name"]) for e in self._entries("") if e["type"] == "directory")

    def read(self, name: str) -> bytes:
        return bytes(self.system.cat_file(self._at(name)))

    def open(self, name: str) -> pa.NativeFile:
        return pa.BufferReader(self.read(name))

    def write(self, name: str, data: bytes) -> None:
        self.system.pipe_file(self._at(name), data)

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
        try:
            return list(self.system.ls(self._at(folder), detail=True))
        except FileNotFoundError:
            return []


def _last(name: str) -> str:
    return PurePosixPath(name.rstrip("/")).name


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
