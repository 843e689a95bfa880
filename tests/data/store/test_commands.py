"""`mrpo store …` on a local store: what each command prints, changes, and never touches."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mrpo.data.config import (
    GcConfig,
    PrepareConfig,
    PushConfig,
    StatusConfig,
    VerifyConfig,
)
from mrpo.data.prepare import prepare
from mrpo.data.shards import PairShards
from mrpo.data.store import ScoreFiles, Store, open_store
from mrpo.data.store.commands import gc, pull, push, status, verify_digests
from mrpo.errors import UserError

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def files_of(store: Store) -> dict[str, bytes]:
    root = Path(store.root)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


@pytest.fixture
def pairs(tmp_path: Path) -> PairShards:
    lines = [
        json.dumps({"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": f"{n + 1}"})
        for n in range(25)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return prepare(
        PrepareConfig(
            source=str(tmp_path / "data.jsonl"), out=str(tmp_path / "pairs"), shard_pairs=10
        )
    )


def test_status_shows_every_reference_and_what_of_the_pairs_is_missing(
    store: Store, make: Any, pairs: PairShards, capsys: Capture
) -> None:
    whole = store.record(make.record("a", "a" * 40, runs=({"engine": "hf", "pairs": "pairs"},)))
    part = store.record(make.record("b", "b" * 40))
    for shard in range(3):
        store.scores(whole.identity).add(make.scores(pairs.response_ids(shard).both))
    store.scores(part.identity).add(make.scores(pairs.response_ids(2).both))
    status(StatusConfig(store=store.root, pairs=str(pairs.path)))
    header, *lines, last = capsys.readouterr().out.splitlines()[-4:]
    assert header.split()[:3] == ["reference", "identity", "rows"]
    assert header.endswith("missing of 25")
    assert lines[0].split()[:3] == ["b", part.identity[:12], "10"]
    assert lines[0].split()[-1] == "20"
    assert lines[1].split()[:3] == ["a", whole.identity[:12], "50"]
    assert "hf" in lines[1].split()
    assert lines[1].split()[-2:] == ["org/name@aaaaaaa", "0"]
    assert last.startswith(f"store   {store.root} (2 references, ")
    halves = store.record(make.record("c", "c" * 40))  # a pair lacks what one response lacks
    store.scores(halves.identity).add(make.scores(pairs.response_ids(0).chosen))
    status(StatusConfig(store=store.root, pairs=str(pairs.path)))
    line = capsys.readouterr().out.splitlines()[-4].split()
    assert (line[0], line[2], line[-1]) == ("c", "10", "25")


def test_references_that_scored_the_same_shards_are_looked_up_once(
    store: Store, make: Any, pairs: PairShards, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, shards in (("a", [0, 1]), ("b", [1, 0]), ("c", [1, 2])):
        record = store.record(make.record(name, name * 40))
        for shard in shards:
            store.scores(record.identity).add(
                make.scores(pairs.response_ids(shard).both, first=-len(name))
            )
    looked = []
    missing = ScoreFiles.missing
    monkeypatch.setattr(
        ScoreFiles, "missing", lambda *given, **how: looked.append(1) or missing(*given, **how)
    )
    status(StatusConfig(store=store.root, pairs=str(pairs.path)))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert {line[0]: line[-1] for line in lines} == {"a": "5", "b": "5", "c": "10"}
    assert len(looked) == 2 * 3  # shards of pairs


def test_status_shows_the_other_references_beside_a_torn_file(
    store: Store, make: Any, pairs: PairShards, capsys: Capture
) -> None:
    for name in "ab":
        record = store.record(make.record(name, name * 40))
        scores = store.scores(record.identity)
        file = scores.add(make.scores(pairs.response_ids(0).both))
    (Path(store.root) / record.identity / "scores" / file).write_bytes(b"PAR1 torn")
    status(StatusConfig(store=store.root, pairs=str(pairs.path)))
    torn, good = (line.split() for line in capsys.readouterr().out.splitlines()[-3:-1])
    assert (torn[0], torn[2], torn[-1]) == ("b", "damaged", "damaged")
    assert (good[0], good[2], good[-1]) == ("a", "20", "15")


@pytest.fixture
def with_policy(store: Store, make: Any) -> Store:
    """A store of one reference and one scored policy."""
    for part, name in ((store, "llama"), (store.policies, "policy-seed-2")):
        record = part.record(make.record(name, name[0] * 40))
        part.scores(record.identity).add(make.scores(make.ids(5)))
    return store


def test_status_shows_policies_on_request_only(with_policy: Store, capsys: Capture) -> None:
    status(store=with_policy.root)
    out = capsys.readouterr().out
    assert "policy-seed-2" not in out
    assert "(1 references, " in out
    assert "1 scored policies are not shown; --policies lists them" in out
    status(store=with_policy.root, policies=True)
    out = capsys.readouterr().out
    assert "policy-seed-2" in out
    assert "llama" not in out
    assert f"store   {with_policy.root}/policies (1 policies, " in out


def test_gc_may_always_take_the_scores_of_policies(
    with_policy: Store, tmp_path: Path, capsys: Capture
) -> None:
    before = files_of(with_policy)
    (identity,) = with_policy.policies.identities()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run.json").write_text(identity)  # even where a run names it
    listed = gc(store=with_policy.root, runs=str(tmp_path / "runs"))
    assert {item.reason for item in listed} == {"policy scores"}
    assert files_of(with_policy) == before
    gc(store=with_policy.root, runs=str(tmp_path / "runs"), delete=True)
    assert f"policies/{identity}/reference.json" in capsys.readouterr().out
    assert not (Path(with_policy.root) / "policies").exists()
    kept = {name: data for name, data in before.items() if not name.startswith("policies/")}
    assert files_of(with_policy) == kept


def test_gc_leaves_a_policy_that_is_being_scored_its_lease_and_unfinished_file(
    with_policy: Store, tmp_path: Path
) -> None:
    (identity,) = with_policy.policies.identities()
    unfinished = Path(with_policy.root) / "policies" / identity / "scores" / ".tmp-1-new"
    unfinished.write_bytes(b"x")
    (tmp_path / "runs").mkdir()
    with with_policy.policies.scores(identity).lease("a" * 32) as held:
        gc(store=with_policy.root, runs=str(tmp_path / "runs"), delete=True)
        assert held
        assert (unfinished.parents[1] / "leases" / ("a" * 32)).exists()
    assert unfinished.exists()


def test_the_other_commands_leave_policies_alone(with_policy: Store, tmp_path: Path) -> None:
    (identity,) = with_policy.policies.identities()
    damage(next((Path(with_policy.root) / "policies" / identity / "scores").iterdir()))
    assert verify_digests(VerifyConfig(store=with_policy.root)) == 0
    assert push(target=str(tmp_path / "pushed"), store=with_policy.root).exit_code == 0
    assert pull(source=with_policy.root, store=str(tmp_path / "pulled")).exit_code == 0
    for name in ("pushed", "pulled"):
        assert [r.alias for r in Store(tmp_path / name).references()] == ["llama"]
        assert Store(tmp_path / name).policies.identities() == []
    assert [record.alias for record in with_policy.references()] == ["llama"]


def test_status_of_a_store_that_is_not_there_makes_none(tmp_path: Path, capsys: Capture) -> None:
    status(StatusConfig(store=str(tmp_path / "none")))
    assert capsys.readouterr().out.endswith("(0 references, 0 bytes)\n")
    assert not (tmp_path / "none").exists()


def test_the_store_is_the_flag_then_the_environment_then_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MRPO_STORE", raising=False)
    assert open_store(None).root == "store"
    monkeypatch.setenv("MRPO_STORE", "/else/where")
    assert open_store(None).root == "/else/where"
    assert open_store("given").root == "given"
    with pytest.raises(UserError, match="store push"):
        open_store("hf://datasets/org/name")


def test_verify_names_each_damaged_file_exits_1_and_changes_nothing(
    store: Store, make: Any, capsys: Capture
) -> None:
    record = store.record(make.record())
    bad = store.scores(record.identity).add(make.scores(make.ids(5)))
    store.scores(record.identity).add(make.scores(make.ids(5, seed=1)))
    assert verify_digests(VerifyConfig(store=store.root)) == 0
    damage(Path(store.root) / record.identity / "scores" / bad)
    damage(Path(store.root) / record.identity / "reference.json")
    before = files_of(store)
    assert verify_digests(VerifyConfig(store=store.root)) == 1
    out = capsys.readouterr().out
    assert f"damaged {store.root}/{record.identity}/scores/{bad}\n" in out
    assert f"damaged {store.root}/{record.identity}/reference.json\n" in out
    assert "checked 2 score files of 1 references: 2 damaged" in out
    assert files_of(store) == before


def test_verify_of_chosen_references(store: Store, make: Any) -> None:
    good, bad = (store.record(make.record(name, name * 40)) for name in "ab")
    for record in (good, bad):
        store.scores(record.identity).add(make.scores(make.ids(5)))
    damage(next((Path(store.root) / bad.identity / "scores").iterdir()))
    assert verify_digests(VerifyConfig(store=store.root, refs="a")) == 0
    assert verify_digests(VerifyConfig(store=store.root, refs=f"b@{bad.identity[:6]}")) == 1
    with pytest.raises(UserError, match="knows no 'c'; it has a, b"):
        verify_digests(VerifyConfig(store=store.root, refs="a,c"))


def test_a_wrong_path_is_no_healthy_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no references"):
        verify_digests(VerifyConfig(store=str(tmp_path)))


@pytest.fixture
def littered(store: Store, make: Any, tmp_path: Path) -> dict[str, str]:
    """A store with one of every kind of garbage beside what must stay; names by kind."""
    old, new = (store.record(make.record(commit=letter * 40)) for letter in "ab")
    unrelated = store.record(make.record("other", "c" * 40))
    for record in (old, new, unrelated):
        store.scores(record.identity).add(make.scores(make.ids(10)))
    scores = store.scores(new.identity)
    names = [
        scores.add(make.scores(make.ids(10)[part], first=-9.0)) for part in (range(4), range(2))
    ]
    first = min([*names, *scores.names()])
    covered = [name for name in names if name != first]
    folder = Path(store.root) / new.identity / "scores"
    for name in (".tmp-1-old", ".tmp-1-new", f"{'d' * 32}-{'e' * 32}.parquet.bad"):
        (folder / name).write_bytes(b"x")
    os.utime(folder / ".tmp-1-old", (0, 0))
    leases = folder.parent / "leases"
    leases.mkdir()
    (leases / ("f" * 32)).touch()
    os.utime(leases / ("f" * 32), (0, 0))
    return {"old": old.identity, "new": new.identity, "covered": covered[-1]}


def test_gc_lists_first_and_removes_only_when_told(
    store: Store, littered: dict[str, str], make: Any, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "runs").mkdir()
    before = files_of(store)
    rows = store.scores(littered["new"]).read()
    gc(GcConfig(store=store.root, runs=str(tmp_path / "runs")))
    out = capsys.readouterr().out
    assert "--delete does" in out
    assert files_of(store) == before
    gc(GcConfig(store=store.root, runs=str(tmp_path / "runs"), delete=True))
    gone = set(before) - set(files_of(store))
    assert {name.split("/")[0] for name in gone} == {littered["old"], littered["new"]}
    assert f"{littered['new']}/scores/.tmp-1-old" in gone
    assert f"{littered['new']}/scores/.tmp-1-new" not in gone
    assert littered["old"] not in store.identities()
    assert not (Path(store.root) / littered["new"] / "leases").exists()
    assert store.scores(littered["new"]).set_aside() == []
    kept = store.scores(littered["new"]).read()
    assert kept.sort_by("response_id").equals(rows.sort_by("response_id"))
    gc(GcConfig(store=store.root, runs=str(tmp_path / "runs")))
    assert "would remove 0 files" in capsys.readouterr().out


def test_gc_never_takes_a_reference_that_a_runs_manifest_names(
    store: Store, littered: dict[str, str], tmp_path: Path
) -> None:
    manifest = tmp_path / "runs" / "mine" / "scores" / "joined.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"references": [{"identity": littered["old"]}]}))
    gc(GcConfig(store=store.root, runs=str(tmp_path / "runs"), delete=True))
    assert littered["old"] in store.identities()
    assert store.scores(littered["old"]).num_rows() == 10
    with pytest.raises(UserError, match="no such folder"):
        gc(GcConfig(store=store.root, runs=str(tmp_path / "elsewhere"), delete=True))


def test_gc_spares_doubled_rows_where_a_file_is_damaged(
    store: Store, make: Any, tmp_path: Path
) -> None:
    record = store.record(make.record())
    scores = store.scores(record.identity)
    for first in (-1.0, -2.0):
        scores.add(make.scores(make.ids(10), first=first))
    damage(Path(store.root) / record.identity / "scores" / scores.names()[0])
    gc(GcConfig(store=store.root, runs=str(tmp_path), delete=True))
    assert len(scores.names()) == 2


def test_push_leaves_damaged_files_behind_and_says_so(
    store: Store, make: Any, tmp_path: Path, capsys: Capture
) -> None:
    record = store.record(make.record())
    for seed in range(3):
        name = store.scores(record.identity).add(make.scores(make.ids(5, seed=seed)))
    damage(Path(store.root) / record.identity / "scores" / name)
    assert push(PushConfig(target=str(tmp_path / "other"), store=store.root)).exit_code == 1
    assert "left    1 damaged files behind" in capsys.readouterr().out
    target = Store(tmp_path / "other")
    assert target.scores(record.identity).num_rows() == 10
    assert verify_digests(VerifyConfig(store=target.root)) == 0


def test_pull_joins_names_and_keeps_the_newer_date(store: Store, make: Any, tmp_path: Path) -> None:
    source = Store(tmp_path / "other")
    mine = store.record(make.record("mine", "a" * 40))
    theirs = source.record(make.record("theirs", "a" * 40))
    source.scores(theirs.identity).add(make.scores(make.ids(5)))
    assert pull(source=source.root, store=store.root, refs="theirs").exit_code == 0
    assert store.resolve("mine").recorded == mine.recorded
    assert store.resolve("theirs").recorded == theirs.recorded
    assert store.scores(mine.identity).num_rows() == 5


def test_no_token_reaches_a_manifest_or_the_output(
    store: Store, make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "very-secret")
    record = store.record(make.record())
    store.scores(record.identity).add(make.scores(make.ids(5)))
    push(PushConfig(target=str(tmp_path / "other"), store=store.root))
    status(StatusConfig(store=str(tmp_path / "other")))
    captured = capsys.readouterr()
    assert "very-secret" not in captured.out + captured.err
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"very-secret" not in path.read_bytes()
