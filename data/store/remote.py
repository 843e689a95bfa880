"""The store's files behind fsspec: s3://, gs://, memory://, and hf:// for push and pull.

A put appears whole or not at all. There are no file locks: one driver writes, and a race costs no
more than a second row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from ...errors import UserError

WRITERS = 8  # files sent at a time
COMMIT_FILES, COMMIT_BYTES = 500, 256 * 2**20  # what one commit on the Hub takes at most


class RemoteFiles:
    """Files behind fsspec. A put appears whole or not at all; one driver writes, so no leases."""

    is_local = False

    def __init__(self, system: Any, path: str, url: str) -> None:
        self.system, self.path, self.root = system, path.rstrip("/"), url.rstrip("/")

    def names(self, folder: str) -> list[str]:
        return list(self.sizes(folder))

    def sizes(self, folder: str) -> dict[str, int]:
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
        """What only the user can mend, in one line; everything else rises as it is."""
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
    """Files of a Hub repository: hf://datasets/org/name[@revision][/folder].

    Each write there is a commit, so that files are gathered and committed many at a time.
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


def _last(name: str) -> str:
    return PurePosixPath(name.rstrip("/")).name
