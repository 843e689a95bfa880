"""Stores of earlier versions, whose rows are pairs: refused by all, and moved over in one pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mrpo.data.config import ImportConfig, PrepareConfig, StatusConfig, VerifyConfig
from mrpo.data.ids import digest_of, identity_of, ids_to_arrow, unit_of
from mrpo.data.join import join, matrix
from mrpo.data.prepare import prepare
from mrpo.data.shards import PairShards
from mrpo.data.store import EarlierLayout, Store
from mrpo.data.store.commands import gc, pull, push, status, verify_digests
from mrpo.data.store.files import LocalFiles
from mrpo.data.store.import_scores import import_scores
from mrpo.data.store.scores import to_bytes
from mrpo.data.store.upgrade import upgrade
from mrpo.errors import UserError

Capture = pytest.CaptureFixture[str]


def prepared(folder: Path, name: str, numbers: Sequence[int]) -> PairShards:
    """For each number a prompt with three responses, in all three pairings."""
    rows = [
        {"prompt": f"Count to {n}.", "chosen": f"{better} {n}", "rejected": f"{worse} {n}"}
        for n in numbers
        for better, worse in (("a", "b"), ("a", "c"), ("b", "c"))
    ]
    lines = map(json.dumps, rows)
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    source, out = str(folder / f"{name}.jsonl"), str(folder / name)
    return prepare(PrepareConfig(source=source, out=out, shard_pairs=6))


@pytest.fixture
def pairs(tmp_path: Path) -> PairShards:
    return prepared(tmp_path, "pairs", range(8))


def old_table(pair_ids: np.ndarray, chosen: Any, rejected: Any, reasons: Any = None) -> pa.Table:
    """Rows as the version before this one wrote them."""
    n = len(pair_ids)
    reasons = [None] * n if reasons is None else reasons
    there = np.array([reason is None for reason in reasons])

    def number(values: Any, kind: pa.DataType) -> pa.Array:
        return pa.array(values, kind, mask=~there)

    floats = {"chosen_logp": chosen, "rejected_logp": rejected}
    floats |= {"chosen_end_logp": np.full(n, -0.25), "rejected_end_logp": np.full(n, -0.5)}
    columns = {
        "pair_id": ids_to_arrow(pair_ids),
        **{name: number(np.array(values), pa.float64()) for name, values in floats.items()},
        "chosen_tokens": pa.array(np.full(n, 3), pa.int32()),
        "rejected_tokens": pa.array(np.full(n, 4), pa.int32()),
        "prompt_tokens": pa.array(np.full(n, 5), pa.int32()),
        "chosen_boundary": pa.array([False] * n),
        "rejected_boundary": pa.array([True] * n),
        "reason": pa.array(reasons, pa.string()),
    }
    return pa.table(columns)


def write_old(root: Path, record: Any, tables: Sequence[pa.Table]) -> list[Path]:
    """An identity's record and files; returns the files."""
    folder = root / record.identity
    (folder / "scores").mkdir(parents=True)
    content = {
        "identity": record.identity,
        "inputs": dict(record.inputs),
        "resolved_commit": record.resolved_commit,
        "created": "2026-01-01T00:00:00.000000+00:00",
        "names": [{"alias": record.alias, "entry": dict(record.entry), "recorded": "2026"}],
        "runs": list(record.runs),
    }
    content["digest"] = identity_of(content)
    (folder / "reference.json").write_text(json.dumps(content))
    paths = []
    for table in tables:
        data = to_bytes(table)
        unit = unit_of(np.frombuffer(b"".join(table["pair_id"].to_pylist()), "V16"))
        paths.append(folder / "scores" / f"{unit}-{digest_of(data)}.parquet")
        paths[-1].write_bytes(data)
    return paths


def logps(pairs: PairShards, shard: int) -> tuple[list[float], list[float]]:
    """A score that is a response's own: a digest of its id, whatever pair it stands in."""
    ids = pairs.response_ids(shard)
    chosen, rejected = (
        [-1.0 - response.tobytes()[0] for response in part] for part in (ids.chosen, ids.rejected)
    )
    return chosen, rejected


def old_store(root: Path, record: Any, pairs: PairShards) -> Store:
    """A store of one reference that scored every pair."""
    tables = [
        old_table(pairs.pair_ids(shard), *logps(pairs, shard)) for shard in range(len(pairs.names))
    ]
    write_old(root, record, tables)
    return Store(root)


def expect_all(store: Store, pairs: PairShards, out: Path) -> None:
    """Every pair joins with its own two scores."""
    joined = join(pairs, store, store.references(), out)
    for shard in range(len(pairs.names)):
        for name, expected in zip(("chosen", "rejected"), logps(pairs, shard)):
            assert matrix(joined.table(shard), f"ref_{name}_logps")[:, 0].tolist() == expected


def test_scores_of_pairs_become_those_of_their_responses_each_once(
    tmp_path: Path, make: Any, pairs: PairShards, capsys: Capture
) -> None:
    store = old_store(tmp_path / "store", make.record(), pairs)
    moved = upgrade(store=store.root, pairs=str(pairs.path))
    assert (moved.pairs, moved.responses, moved.kept_aside, moved.refusals) == (24, 24, 0, 0)
    assert "moved   24 pairs of 1 references: 24 responses" in capsys.readouterr().out
    (record,) = store.references()
    scores = store.scores(record.identity)
    assert scores.num_rows() == len(scores.response_ids()) == 24  # 8 prompts, 3 responses each
    expect_all(store, pairs, tmp_path / "joined")
    rows = scores.read()
    shards = range(len(pairs.names))
    prompts = np.concatenate([pairs.response_ids(shard).prompts for shard in shards])
    assert set(rows["prompt_id"].to_pylist()) == {prompt.tobytes() for prompt in prompts}
    names = ["end_logp", "tokens", "prompt_tokens", "boundary"]
    kinds = {tuple(row.values()) for row in rows.select(names).to_pylist()}
    assert kinds == {(-0.25, 3, 5, False), (-0.5, 4, None, True)}
    assert set(rows["checksum"].to_pylist()) == {None}
    assert upgrade(store=store.root).references == 0
    assert "nothing to upgrade" in capsys.readouterr().out


def commands(store: Store, folder: Path) -> dict[str, Callable[[], Any]]:
    """Every other command on a store."""
    source = folder / "scores.jsonl"
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    source.write_text(json.dumps(row | {"ref_chosen_logps": -1, "ref_rejected_logps": -2}))
    root = store.root
    given = {"source": str(source), "alias": "judge", "model": "m", "store": root}
    new = str(folder / "new")
    return {
        "status": lambda: status(StatusConfig(store=root)),
        "verify": lambda: verify_digests(VerifyConfig(store=root)),
        "gc": lambda: gc(store=root, runs=str(folder)),
        "push": lambda: push(target=new, store=root),
        "pull": lambda: pull(source=root, store=new),
        "import": lambda: import_scores(ImportConfig(**given)),
        "every reader": lambda: store.resolve("llama"),
        "a reader of files": lambda: store.scores(store.identities()[0]).read(),
    }


@pytest.mark.parametrize(
    "name",
    ["status", "verify", "gc", "push", "pull", "import", "every reader", "a reader of files"],
)
def test_every_other_command_refuses_an_old_store_in_one_line(
    tmp_path: Path, make: Any, pairs: PairShards, name: str
) -> None:
    store = old_store(tmp_path / "store", make.record(), pairs)
    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*.*")}
    with pytest.raises(EarlierLayout) as raised:
        commands(store, tmp_path)[name]()
    message = str(raised.value)
    assert "\n" not in message
    assert f"--store {store.root}: written by an earlier version" in message
    assert f"`mrpo store upgrade --store {store.root}`" in message
    assert before == {path: path.read_bytes() for path in (tmp_path / "store").rglob("*.*")}


def test_rows_of_pairs_in_no_folder_are_kept_aside_until_their_folder_is_named(
    tmp_path: Path, make: Any, pairs: PairShards, capsys: Capture
) -> None:
    others = prepared(tmp_path, "others", range(100, 103))
    tables = [
        old_table(part.pair_ids(0), *logps(part, 0)) for part in (pairs, others)
    ]  # fmt: skip
    root = tmp_path / "store"
    write_old(root, make.record(), tables)
    moved = upgrade(store=str(root), pairs=str(pairs.path))
    assert (moved.pairs, moved.kept_aside) == (6, 6)
    assert "6 rows aside" in capsys.readouterr().out
    store = Store(root)
    (record,) = store.references()  # is of today
    assert store.scores(record.identity).num_rows() == 6
    status(StatusConfig(store=str(root)))
    assert "1 files of an earlier version are kept aside" in capsys.readouterr().out
    moved = upgrade(store=str(root), pairs=f"{pairs.path},{others.path}")
    assert (moved.pairs, moved.kept_aside) == (6, 0)
    assert not list(root.rglob("kept-aside/*"))
    assert not store.scores(record.identity).missing(others.response_ids(0).both).any()


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_upgrade_that_is_killed_is_finished_by_the_next(
    tmp_path: Path, make: Any, pairs: PairShards, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Killed among the removals of old files: the store is refused, and nothing is lost."""
    store = old_store(tmp_path / "store", make.record(), pairs)
    removed: list[str] = []
    remove = LocalFiles.remove

    def killed(files: LocalFiles, name: str) -> None:
        if len(removed) == after:
            raise KeyboardInterrupt
        removed.append(name)
        remove(files, name)

    monkeypatch.setattr(LocalFiles, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        upgrade(store=store.root, pairs=str(pairs.path))
    monkeypatch.undo()
    with pytest.raises(EarlierLayout):
        store.references()
    assert upgrade(store=store.root, pairs=str(pairs.path)).references == 1
    assert store.scores(store.identities()[0]).num_rows() == 24
    expect_all(store, pairs, tmp_path / "joined")


def test_refusals_stay_behind_and_what_a_limit_left_out_is_kept(
    tmp_path: Path, make: Any, pairs: PairShards, capsys: Capture
) -> None:
    """Which response a pair was refused for, its row does not say."""
    ids = pairs.pair_ids(0)
    reasons = ["beyond_context", *[None] * 4]
    chosen, rejected = logps(pairs, 0)
    root = tmp_path / "store"
    write_old(root, make.record(), [old_table(ids[:5], chosen[:5], rejected[:5], reasons)])
    left_out = root / make.record().identity / "left-out" / f"{'a' * 32}.json"
    left_out.parent.mkdir()
    left_out.write_text(json.dumps({"reason": "over_limit", "pairs": [ids[5].tobytes().hex()]}))
    moved = upgrade(store=str(root), pairs=str(pairs.path))
    assert (moved.pairs, moved.refusals) == (4, 1)
    assert "left    1 refusals" in capsys.readouterr().out
    scores = Store(root).scores(make.record().identity)
    assert scores.read(["reason"])["reason"].null_count == scores.num_rows()
    last = pairs.response_ids(0).take(np.array([5]))
    assert scores.left_out().contains(last.both).all()
    assert not left_out.exists()


def test_policies_and_damaged_files(tmp_path: Path, make: Any, pairs: PairShards) -> None:
    store = old_store(tmp_path / "store", make.record(), pairs)
    table = old_table(pairs.pair_ids(0), *logps(pairs, 0))
    (path,) = write_old(tmp_path / "store" / "policies", make.record("policy", "b" * 40), [table])
    victim = min((tmp_path / "store" / make.record().identity / "scores").iterdir())
    victim.write_bytes(victim.read_bytes()[:-9])
    moved = upgrade(store=store.root, pairs=str(pairs.path))
    assert (moved.references, moved.damaged) == (2, 1)
    assert victim.with_name(f"{victim.name}.bad").exists()
    assert not path.exists()
    (policy,) = store.policies.references()
    assert not store.policies.scores(policy.identity).missing(pairs.response_ids(0).both).any()


def test_the_folders_that_were_scored_are_found_by_themselves(
    tmp_path: Path, make: Any, pairs: PairShards
) -> None:
    run = {"engine": "hf", "pairs": 24, "pairs_folder": str(pairs.path)}
    store = old_store(tmp_path / "store", make.record(runs=(run,)), pairs)
    assert upgrade(store=store.root).pairs == 24
    (record,) = store.references()
    assert record.runs == ({"engine": "hf", "pairs_folder": str(pairs.path), "responses": 48},)
    gone = {"engine": "hf", "pairs_folder": str(tmp_path / "gone")}
    other = old_store(tmp_path / "other", make.record(runs=(gone,)), pairs)
    with pytest.raises(UserError, match="name their folders with --pairs"):
        upgrade(store=other.root)
    with pytest.raises(UserError, match="there is nothing to upgrade"):
        upgrade(store=str(tmp_path / "nowhere"))
