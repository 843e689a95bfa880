"""Scoring on a real Ray cluster of three nodes on this machine, some of which are lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from mrpo.data.store import Store
from mrpo.errors import UserError
from mrpo.precompute.on_ray import package_copy
from mrpo.precompute.run import precompute
from mrpo.tests.precompute.workspace import Workspace, rows

SHARDS, SHARD = 40, 2  # pairs
FACTS = ("tokens", "prompt_tokens", "boundary", "checksum", "reason")
SMALL = {"object_store_memory": 80 * 2**20}


@pytest.fixture
def ray_cluster() -> Iterator[Cluster]:
    """Three nodes of one CPU each."""
    three = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **SMALL}
    )
    for _ in range(2):
        three.add_node(num_cpus=1, **SMALL)
    yield three
    three.shutdown()


@pytest.fixture
def workspace(tmp_path: Path, tiny_references: dict[str, Path]) -> Workspace:
    """Eighty pairs in forty shards, and two references."""
    names = ("llama", "qwen")
    made = Workspace(tmp_path, {name: tiny_references[name] for name in names})
    made.prepare(rows(SHARDS * SHARD), shard_pairs=SHARD)
    return made


def driver(workspace: Workspace, address: str, store: Path) -> subprocess.Popen[bytes]:
    """`mrpo precompute --engine ray` as a process of its own."""
    command = [sys.executable, "-m", "mrpo.cli", "precompute", "--engine", "ray"]
    command += ["--ray-address", address, "--refs", "llama,qwen", "--store", str(store)]
    command += ["--refs-config", str(workspace.refs_config)]
    command += ["--pairs", str(workspace.folder / "pairs")]
    with (workspace.folder / "driver.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def score_files(store: Path) -> dict[str, int]:
    """By name when each was written, ns. A shard that is scored again writes its file again."""
    found = {}
    for path in store.glob("*/scores/*.parquet"):
        found[f"{path.parent.parent.name}/{path.name}"] = path.stat().st_mtime_ns
    return found


def wait_for(store: Path, files: int, process: subprocess.Popen[bytes]) -> None:
    """Until the store has so many files; fails where the run ends before."""
    while len(score_files(store)) < files:
        assert process.poll() is None, "it was over before anything was lost"
        time.sleep(0.05)


def actors() -> list[int]:
    """The process ids of Ray Data's actors on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if b"MapWorker(MapBatches(ShardScorer))" in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def test_lost_nodes_actors_and_drivers_cost_no_score(
    workspace: Workspace, ray_cluster: Cluster, tmp_path: Path
) -> None:
    """A driver killed, then in the next one's run a node and an actor: every response once."""
    store = tmp_path / "ray-store"
    first = driver(workspace, ray_cluster.address, store)
    wait_for(store, 4, first)
    first.kill()
    first.wait()
    done = score_files(store)
    second = driver(workspace, ray_cluster.address, store)
    wait_for(store, len(done) + 4, second)
    ray_cluster.remove_node(next(iter(ray_cluster.worker_nodes)), allow_graceful=False)
    wait_for(store, len(done) + 12, second)
    alive = actors()
    assert alive
    os.kill(alive[0], signal.SIGKILL)
    log = (workspace.folder / "driver.log").read_text
    before = score_files(store)
    assert second.wait() == 0, log()
    after = score_files(store)
    assert len(after) == 2 * SHARDS
    assert before.items() | done.items() <= after.items(), "something was scored again"

    precompute(workspace.config())
    for alias in ("llama", "qwen"):
        alone = workspace.by_id(alias)
        workspace.store = Store(store)
        on_ray = workspace.by_id(alias)
        workspace.store = Store(workspace.folder / "store")
        assert on_ray.keys() == alone.keys()
        for response, row in alone.items():
            assert on_ray[response]["logp"] == pytest.approx(row["logp"], abs=1e-4)
            assert all(on_ray[response][name] == row[name] for name in FACTS)


def test_mistakes_have_one_line(workspace: Workspace) -> None:
    with pytest.raises(UserError, match=r"--ray-address 127\.0\.0\.1:1: "):
        precompute(workspace.config(engine="ray", ray_address="127.0.0.1:1"))
    with pytest.raises(UserError, match="--ray-address here: is no address"):
        precompute(workspace.config(engine="ray", ray_address="here"))
    with pytest.raises(UserError, match=r"--ray-address is auto.*on engine hf"):
        precompute(workspace.config(ray_address="auto"))


def test_the_package_that_is_sent_imports_by_its_own_name(tmp_path: Path) -> None:
    """As a node has it that lacks mrpo: everything that scoring needs, and nothing of the tests."""
    copy = package_copy(tmp_path / "mrpo")
    assert not {"tests", "docs", ".git"} & {path.name for path in copy.iterdir()}
    code = "import mrpo.precompute.on_ray as module; print(module.__file__)"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert ran.stdout.strip() == str(copy / "precompute" / "on_ray.py")
