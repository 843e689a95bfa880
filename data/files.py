"""All or nothing: files are made in a hidden folder and take their places once all are complete.

An error leaves what was there before, and nothing where there was nothing. Killed in the middle
of the last step, a folder is left without its manifest, which readers refuse and a rerun replaces.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from ..errors import UserError
from .shards import MANIFEST, PairShards

DROPPED = "dropped.jsonl"
SETTINGS = "prepare.yaml"
SHARDS = "part-*.parquet"
_STAGE = ".preparing-"


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """An empty folder whose files replace those of `out` when the block ends without error.

    Raises `UserError` where `out` cannot be a folder or holds something other than pairs.
    """
    missing: list[Path] = []
    try:
        _refuse_foreign(out)
        missing = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        for leftover in out.glob(f"{_STAGE}*"):
            shutil.rmtree(leftover)
        stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=out))
    except OSError as error:
        _remove_empty(missing)
        raise UserError(f"--out {out}: {error.strerror} ({error.filename})") from None
    try:
        yield stage
        _replace(stage, out)
    except BaseException:
        shutil.rmtree(stage)
        _remove_empty(missing)
        raise
    stage.rmdir()


def _refuse_foreign(out: Path) -> None:
    first = next(folder for folder in (out, *out.parents) if folder.exists())
    if not first.is_dir():
        raise UserError(f"--out {out}: {first} is a file; name a folder that is not below one")
    if first is not out or all(_is_ours(entry.name) for entry in out.iterdir()):
        return
    try:
        PairShards(out)  # pairs with something of the user's beside them, which stays
    except UserError:
        raise UserError(
            f"--out {out} holds other files; name a new folder or one with prepared pairs"
        ) from None


def _is_ours(name: str) -> bool:
    return name in (MANIFEST, DROPPED, SETTINGS) or any(
        fnmatch(name, pattern) for pattern in (SHARDS, f"{_STAGE}*")
    )


def _replace(stage: Path, out: Path) -> None:
    """Move all files, the manifest last: a folder that has one is complete."""
    (out / MANIFEST).unlink(missing_ok=True)
    names = sorted((path.name for path in stage.iterdir()), key=lambda name: name == MANIFEST)
    for name in names:
        if name == MANIFEST:
            for shard in out.glob(SHARDS):
                if shard.name not in names:
                    shard.unlink()
        (stage / name).replace(out / name)


def _remove_empty(folders: list[Path]) -> None:
    """Remove the folders made for `out`, the innermost first."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
