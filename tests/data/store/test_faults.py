"""Faults of disks, processes and files: what a store detects, and that nothing else is lost."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mrpo import files as root_files
from mrpo.data.ids import digest_of
from mrpo.data.store import ScoreFiles, Store
from mrpo.data.store.files import LocalFiles, open_files
from mrpo.data.store.scores import to_bytes
from mrpo.errors import UserError


@pytest.fixture
def scores(tmp_path: Path, make: Any) -> ScoreFiles:
    store = Store(tmp_path / "store")
    return store.scores(store.record(make.record()).identity)


def folder_of(scores: ScoreFiles, tmp_path: Path) -> Path:
    return next((tmp_path / "store").glob("*/scores"))


def test_any_flipped_bit_is_noticed_and_only_its_file_is_set_aside(
    scores: ScoreFiles, tmp_path: Path, make: Any
) -> None:
    ids = make.ids(40)
    bad, good = scores.add(make.scores(ids[:20])), scores.add(make.scores(ids[20:]))
    path = folder_of(scores, tmp_path) / bad
    data = path.read_bytes()
    for bit in np.random.default_rng(0).choice(8 * len(data), 300, replace=False):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert scores.damaged() == [bad]
    assert not scores.missing(ids[20:]).any()
    assert scores.check() == [bad]
    assert scores.names() == [good]
    assert (scores.missing(ids) == (np.arange(40) < 20)).all()
    assert path.with_name(f"{bad}.bad").exists()
    scores.add(make.scores(ids[:20]))  # scored again: the same rows under the same name
    assert scores.check() == []
    assert not scores.missing(ids).any()


@pytest.mark.parametrize("keep", [0, 3, 0.5, -1])
def test_a_torn_file_is_damage_and_readers_say_so(
    scores: ScoreFiles, tmp_path: Path, make: Any, keep: float
) -> None:
    name = scores.add(make.scores(make.ids(20)))
    path = folder_of(scores, tmp_path) / name
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=r"damaged .* `mrpo precompute` sets it aside"):
        scores.read()
    assert scores.damaged() == [name]


def test_a_file_that_goes_unreadable_is_damage(
    scores: ScoreFiles, tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = scores.add(make.scores(make.ids(20)))

    def bad_sector(self: LocalFiles, name: str) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(LocalFiles, "read", bad_sector)
    assert scores.damaged() == [name]


def test_a_file_whose_pages_do_not_decode_is_damage_to_every_reader(
    scores: ScoreFiles, tmp_path: Path, make: Any
) -> None:
    name = scores.add(make.scores(make.ids(500)))
    path = folder_of(scores, tmp_path) / name
    data = bytearray(path.read_bytes())
    for at in range(4, len(data) // 2, 3):  # the footer stays, so that the file opens
        data[at] ^= 255
    path.write_bytes(data)
    for reader in (scores.read, scores.response_ids):
        with pytest.raises(UserError, match="damaged"):
            reader()
    assert scores.check() == [name]
    assert scores.missing(make.ids(500)).all()


def test_a_file_of_other_columns_is_no_score_file_whatever_its_digest(
    scores: ScoreFiles, tmp_path: Path, make: Any
) -> None:
    folder = folder_of(scores, tmp_path) if scores.add(make.scores(make.ids(20))) else tmp_path
    (path,) = folder.iterdir()
    table = pq.read_table(path)
    for other in (
        table.drop_columns(["reason"]),
        table.set_column(1, "prompt_id", [["x"] * 20]),
        table.append_column("reason", table["reason"]),
        table.set_column(0, "prompt_id", table["prompt_id"]),  # which may then be null
    ):
        path.unlink()
        data = to_bytes(other)
        path = folder / f"{path.name[:32]}-{digest_of(data)}.parquet"
        path.write_bytes(data)
        for reader in (scores.read, scores.response_ids, scores.num_rows):
            with pytest.raises(UserError, match="its columns are not those of scores; remove it"):
                reader()


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failed_write_leaves_nothing(
    scores: ScoreFiles,
    tmp_path: Path,
    make: Any,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    error: int,
) -> None:
    scores.add(make.scores(make.ids(2)))
    before = sorted(os.listdir(folder_of(scores, tmp_path)))

    def fail(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    if call == "open":
        monkeypatch.setattr(root_files, "open", fail, raising=False)
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=os.strerror(error)):
        scores.add(make.scores(make.ids(2, seed=1)))
    monkeypatch.undo()
    assert sorted(os.listdir(folder_of(scores, tmp_path))) == before


def run_child(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


WRITE_MUCH = """
import sys
from pathlib import Path
from mrpo.data.store.files import LocalFiles
files = LocalFiles(Path(sys.argv[1]))
files.write("small", b"x")
try:
    files.write("large", bytes(1_000_000))
except OSError as error:
    print(error.strerror)
"""


def test_a_disk_that_fills_in_mid_write_leaves_nothing_half_written(tmp_path: Path) -> None:
    """The system itself refuses: a limit on file size acts where a full disk does."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    child = run_child(WRITE_MUCH, tmp_path, preexec_fn=limit)
    assert child.communicate(timeout=60)[0] == "File too large\n"
    assert os.listdir(tmp_path) == ["small"]


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from mrpo.data.store.files import LocalFiles
call, real = sys.argv[2], getattr(os, sys.argv[2])
def killed(*arguments, **options):
    if sys.argv[3] == "after":
        real(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, call, killed)
LocalFiles(Path(sys.argv[1])).write("file", bytes(100_000))
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_writer_killed_around_fsync_and_rename_leaves_all_or_nothing(
    tmp_path: Path, call: str, when: str
) -> None:
    child = run_child(KILLED_AT, tmp_path, call, when)
    assert child.wait(timeout=60) == -signal.SIGKILL
    complete = [name for name in os.listdir(tmp_path) if not name.startswith(".tmp-")]
    assert complete == (["file"] if (call, when) == ("replace", "after") else [])
    for name in complete:
        assert (tmp_path / name).read_bytes() == bytes(100_000)


def test_a_temporary_file_left_by_a_kill_is_no_score_file(
    scores: ScoreFiles, tmp_path: Path, make: Any
) -> None:
    name = scores.add(make.scores(make.ids(2)))
    (folder_of(scores, tmp_path) / ".tmp-1-aa").write_bytes(b"PAR1")
    assert scores.names() == [name]
    assert scores.check() == []


HOLD = """
import sys, time
from mrpo.data.store import Store
with Store(sys.argv[1]).scores(sys.argv[2]).lease(sys.argv[3]) as held:
    print(held, flush=True)
    time.sleep(60)
"""
UNIT = "c" * 32


def test_a_lease_is_held_against_other_processes_and_gone_with_its_own(
    scores: ScoreFiles, tmp_path: Path
) -> None:
    identity = next((tmp_path / "store").iterdir()).name
    with scores.lease(UNIT) as held:
        assert held
        with scores.lease(UNIT) as again:
            assert not again
    child = run_child(HOLD, tmp_path / "store", identity, UNIT)
    assert child.stdout is not None
    assert child.stdout.readline() == "True\n"
    with scores.lease(UNIT) as held:
        assert not held
    with scores.lease("d" * 32) as free:
        assert free
    child.kill()
    child.communicate()
    with scores.lease(UNIT) as held:
        assert held
    assert os.listdir(tmp_path / "store" / identity / "leases") == []


WORK = """
import sys, time
from mrpo.data.ids import unit_of
from mrpo.data.store import Store
from mrpo.tests.data.conftest import make_ids, score_table
scores = Store(sys.argv[1]).scores(sys.argv[2])
ids, done = make_ids(2000), 0
while scores.missing(ids).any():
    for start in range(0, 2000, 100):
        shard = ids[start:start + 100]
        with scores.lease(unit_of(shard)) as held:
            if held and scores.missing(shard).any():
                time.sleep(0.02)
                scores.add(score_table(shard))
                done += 1
print(done)
"""


def test_two_processes_share_the_work_and_no_row_stands_twice(
    scores: ScoreFiles, tmp_path: Path, make: Any
) -> None:
    identity = next((tmp_path / "store").iterdir()).name
    children = [run_child(WORK, tmp_path / "store", identity) for _ in range(2)]
    done = [int(child.communicate(timeout=60)[0]) for child in children]
    assert sum(done) == 20
    assert min(done) > 0
    assert scores.num_rows() == len(scores.response_ids()) == 2000


def test_a_record_refused_by_the_disk_keeps_the_old_one(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    before = store.record(make.record())

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        store.record(make.record("other"))
    assert store.references() == [before]


@pytest.mark.parametrize(
    ("root", "message"),
    [
        (lambda path: path / "file", "is a file; a store is a folder"),
        (lambda path: "nosuch://bucket/store", "nosuch:// is no store"),
        (lambda path: "s3://key:secret@bucket/store", "credentials in a URL"),
    ],
)
def test_a_root_that_cannot_be_a_store_is_refused(
    tmp_path: Path, root: Callable[[Path], Any], message: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message) as caught:
        open_files(root(tmp_path))
    assert "secret" not in str(caught.value)


def test_a_folder_below_a_regular_file_is_refused_in_one_line(tmp_path: Path, make: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is below a file"):
        Store(tmp_path / "file" / "store").record(make.record())
