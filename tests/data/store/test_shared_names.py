"""Which identity a name means where projects share a store, and where local files change."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mrpo.data.config import GcConfig
from mrpo.data.references import ReferenceSpec, load_refs, local_inputs
from mrpo.data.store import NotScored, ReferenceRecord, Store
from mrpo.data.store.commands import gc, pull
from mrpo.errors import UserError

ENTRY = {"model": "./sft"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def write(folder: Path, weights: str) -> Path:
    """The files of a model folder, as far as an identity reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama", "dtype": "float32"}')
    (folder / "model.safetensors").write_text(weights)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def project(folder: Path, weights: str = "", **entry: Any) -> ReferenceSpec:
    """The reference `sft` of a project whose refs.yaml says `./sft`, with such a folder."""
    if weights:
        write(folder / "sft", weights)
    folder.mkdir(exist_ok=True)
    (folder / "refs.yaml").write_text(json.dumps({"sft": ENTRY | entry}))
    return load_refs(folder / "refs.yaml")["sft"]


def record(store: Store, spec: ReferenceSpec, **inputs: Any) -> ReferenceRecord:
    """Record the reference as `precompute` does."""
    return store.record(
        ReferenceRecord(
            alias=spec.alias,
            entry=spec.entry(),
            folders=spec.local_paths(),
            inputs={"dtype": "float32", **local_inputs(spec), **inputs},
        )
    )


def meant(store: Store, spec: ReferenceSpec) -> str:
    return store.resolve(spec.alias, {spec.alias: spec}).identity


@pytest.mark.parametrize("gone", [False, True])
def test_two_projects_that_write_the_same_entry_each_have_their_own_scores(
    store: Store, tmp_path: Path, gone: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = project(tmp_path / "ours", "a"), project(tmp_path / "theirs", "b")
    assert ours.entry() == theirs.entry() == ENTRY
    mine, other = record(store, ours).identity, record(store, theirs).identity
    if gone:
        for name in ("ours", "theirs"):
            shutil.rmtree(tmp_path / name / "sft")
    assert (meant(store, ours), meant(store, theirs)) == (mine, other)
    assert gc(GcConfig(store=store.root, runs="", delete=True)) == []  # neither replaced the other


def test_another_projects_scores_are_no_scores_of_ours(store: Store, tmp_path: Path) -> None:
    theirs = record(store, project(tmp_path / "theirs", "b"))
    for weights in ("a", ""):  # without the folder there is nothing to compare but its place
        ours = project(tmp_path / f"ours{weights}", weights)
        with pytest.raises(NotScored) as refused:
            meant(store, ours)
        place = f"has scores of {tmp_path}/theirs/sft under this name, not of {ours.folder}/sft"
        assert place in str(refused.value)
        assert f"name {theirs.title} if these are the same files" in str(refused.value)
        assert store.resolve(theirs.title, {"sft": ours}).identity == theirs.identity


def test_a_pull_of_another_projects_scores_changes_no_name(store: Store, tmp_path: Path) -> None:
    ours, theirs = project(tmp_path / "ours", "a"), project(tmp_path / "theirs", "b")
    mine, shared = record(store, ours).identity, Store(tmp_path / "shared")
    record(shared, theirs)
    pull(source=shared.root, store=store.root, refs="sft")
    assert len(store.identities()) == 2
    assert meant(store, ours) == mine
    shutil.rmtree(tmp_path / "ours" / "sft")
    assert meant(store, ours) == mine


def test_a_project_that_moved_keeps_its_scores(store: Store, tmp_path: Path) -> None:
    scored = record(store, project(tmp_path / "before", "a")).identity
    (tmp_path / "before").rename(tmp_path / "after")
    assert meant(store, project(tmp_path / "after")) == scored


def test_an_overwritten_folder_is_not_what_was_scored(store: Store, tmp_path: Path) -> None:
    spec = project(tmp_path, "a")
    first = record(store, spec)
    write(tmp_path / "sft", "b")
    message = rf"the model of ./sft changed since {first.title} was scored; .* name {first.title}"
    with pytest.raises(NotScored, match=message):
        meant(store, spec)
    assert store.resolve(first.title, {"sft": spec}).identity == first.identity
    second = record(store, spec)
    assert meant(store, spec) == second.identity
    write(tmp_path / "sft", "a")  # back again, though the other was recorded later
    assert meant(store, spec) == first.identity
    write(tmp_path / "sft", "b")
    (tmp_path / "sft" / "tokenizer.json").write_text('{"added": 1}')
    with pytest.raises(NotScored, match="the tokenizer of"):
        meant(store, spec)


def test_of_two_identities_of_a_folder_that_is_gone_neither_is_guessed(
    store: Store, tmp_path: Path
) -> None:
    spec = project(tmp_path, "a")
    first = record(store, spec)
    write(tmp_path / "sft", "b")
    second = record(store, spec)
    shutil.rmtree(tmp_path / "sft")
    with pytest.raises(UserError, match=rf"different files.*{first.title}, {second.title}"):
        meant(store, spec)


def test_precisions_of_the_same_files_are_named_and_the_last_counts(
    store: Store, tmp_path: Path
) -> None:
    spec = project(tmp_path, "a")
    fast, exact = record(store, spec, autocast="bfloat16"), record(store, spec)
    chosen = store.resolve("sft", {"sft": spec})
    assert chosen.identity == exact.identity
    line = f"{exact.title} (float32); sft also has {fast.title} (float32 --bf16)"
    assert store.described(chosen, spec) == line
    asked = store.resolve(fast.title, {"sft": spec})
    line = f"{fast.title} (float32 --bf16); sft also has {exact.title} (float32)"
    assert store.described(asked, spec) == line


@pytest.mark.parametrize("gone", [False, True])
def test_records_of_earlier_versions_say_no_folder_and_are_found(
    store: Store, tmp_path: Path, gone: bool
) -> None:
    spec = project(tmp_path, "a")
    named = replace(spec, folder=tmp_path / "another")  # its `./sft` is elsewhere

    def old(weights: str) -> ReferenceRecord:
        write(tmp_path / "sft", weights)
        inputs = {"dtype": "float32", **local_inputs(spec)}
        return store.record(ReferenceRecord(alias="sft", entry=ENTRY, inputs=inputs))

    first = old("a")
    assert "folders" not in (Path(store.root) / first.identity / "reference.json").read_text()
    if gone:
        shutil.rmtree(tmp_path / "sft")
    assert meant(store, spec) == meant(store, named) == first.identity
    second = old("b")
    if not gone:
        assert meant(store, spec) == second.identity
    shutil.rmtree(tmp_path / "sft")
    with pytest.raises(UserError, match=rf"{first.title}, {second.title}"):
        meant(store, spec)


def test_an_adapter_is_told_apart_like_a_model(store: Store, tmp_path: Path) -> None:
    def adapted(name: str, weights: str) -> ReferenceSpec:
        folder = tmp_path / name / "lora"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_text(weights)
        return project(tmp_path / name, model="org/base", adapter="lora")

    hub = {"model": {"commit": "a" * 40}}
    ours, theirs = adapted("ours", "a"), adapted("theirs", "b")
    mine, other = record(store, ours, **hub).identity, record(store, theirs, **hub).identity
    assert (meant(store, ours), meant(store, theirs)) == (mine, other)
    shutil.rmtree(tmp_path / "ours" / "lora")
    assert meant(store, ours) == mine
    assert store.kept_commits(ours) == {"model": "a" * 40}


def test_a_folder_named_like_a_hub_model_is_not_the_hub_model(store: Store, tmp_path: Path) -> None:
    local = project(tmp_path / "local", model="org/name")
    write(tmp_path / "local" / "org" / "name", "a")
    on_hub = project(tmp_path / "hub", model="org/name")
    downloaded = record(store, on_hub, model={"commit": "c" * 40})
    folder = record(store, local)
    assert meant(store, on_hub) == downloaded.identity
    assert meant(store, local) == folder.identity
    assert store.kept_commits(on_hub) == {"model": "c" * 40}
