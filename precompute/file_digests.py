"""Digests of local model files: fast on many gigabytes, kept until a file's stat changes.

A file is hashed in blocks by several threads (SHA-256 of the blocks' SHA-256), and the result is
kept in `MRPO_CACHE` (by default `~/.cache/mrpo`) beside the stat it belongs to. A file written
moments ago is hashed again, because a second write could leave the same time stamps.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..data.digests import digest_of, identity_of
from ..data.store_files import LocalFiles
from ..errors import UserError

BLOCK = 16 * 2**20  # bytes hashed at a time by one thread
SETTLED = 2 * 10**9  # nanoseconds after which a file's time stamps are trusted


def cache_folder() -> Path:
    """Where digests of local files are kept between runs."""
    given = os.environ.get("MRPO_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(given or f"{home}/mrpo").expanduser()


def files_digest(folder: Path, names: Iterable[str]) -> str:
    """One digest of several files of a folder, by name and content; 32 hex digits."""
    return identity_of({name: file_digest(folder / name) for name in names})


def file_digest(path: Path) -> str:
    """The digest of a file's content, from the cache where its stat is unchanged; 64 hex digits."""
    before = _stat(path)
    note = f"digests/{digest_of(str(path.resolve()).encode())}.json"
    cache = LocalFiles(cache_folder())
    if (known := _read(cache, note)).get("stat") == before:
        return str(known["digest"])
    started = time.time_ns()
    digest = _hash(path, before["size"])
    if _stat(path) != before:
        raise UserError(f"{path}: changed while it was read; run again when it is complete")
    if started - max(before["mtime_ns"], before["ctime_ns"]) > SETTLED:
        _write(cache, note, {"path": str(path.resolve()), "stat": before, "digest": digest})
    return digest


def _hash(path: Path, size: int) -> str:
    """SHA-256 over the blocks' SHA-256, so that one large file keeps every core busy."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:

            def block(start: int) -> bytes:
                return hashlib.sha256(os.pread(descriptor, BLOCK, start)).digest()

            blocks = pool.map(block, range(0, max(size, 1), BLOCK))
            return hashlib.sha256(b"".join(blocks)).hexdigest()
    finally:
        os.close(descriptor)


def _stat(path: Path) -> dict[str, int]:
    """What changes when a file does, whether it is rewritten, replaced or restored by a copy."""
    stat = os.stat(path)
    return {
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
        "device": stat.st_dev,
    }


def _read(cache: LocalFiles, note: str) -> dict[str, Any]:
    try:
        known = json.loads(cache.read(note))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and "digest" in known else {}


def _write(cache: LocalFiles, note: str, known: dict[str, Any]) -> None:
    try:
        cache.write(note, json.dumps(known).encode())
    except OSError:  # a home that can't be written: the next run hashes again, no more
        return
