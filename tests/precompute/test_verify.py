"""`mrpo store verify --rescore`: a sample scored again agrees, or is reported to differ."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from safetensors.torch import load_file, save_file

from mrpo.data.config import VerifyConfig
from mrpo.data.store import Store
from mrpo.errors import UserError
from mrpo.precompute.run import precompute
from mrpo.precompute.verify import verify
from mrpo.tests.precompute.workspace import Workspace, rows

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def workspace(
    tmp_path_factory: pytest.TempPathFactory, tiny_references: dict[str, Path]
) -> Workspace:
    """One reference, whose weights a test may change, with twelve scored pairs."""
    folder = tmp_path_factory.mktemp("verify")
    model = shutil.copytree(tiny_references["llama"], folder / "model")
    workspace = Workspace(folder, {"llama": model})
    workspace.prepare(rows(12))
    assert precompute(workspace.config()).exit_code == 0
    return workspace


def settings(workspace: Workspace, **more: object) -> VerifyConfig:
    given = {"store": workspace.store.root, "refs_config": str(workspace.refs_config)}
    return VerifyConfig(**{**given, "rescore": 5, **more})  # type: ignore[arg-type]


def test_an_untouched_reference_is_found_again(workspace: Workspace, capsys: Capture) -> None:
    before = workspace.store.references()
    assert verify(settings(workspace)).exit_code == 0
    printed = capsys.readouterr().out
    assert "agrees  llama@" in printed
    assert "10 responses scored again in float32" in printed
    assert workspace.store.references() == before


def test_pairs_that_moved_are_named_by_a_flag(workspace: Workspace, capsys: Capture) -> None:
    pairs = workspace.folder / "pairs"
    moved = pairs.rename(pairs.with_name("moved"))
    try:
        with pytest.raises(UserError, match="name a folder of pairs with --pairs"):
            verify(settings(workspace))
        assert verify(settings(workspace, pairs=str(moved), rescore=100)).exit_code == 0
    finally:
        moved.rename(pairs)
    assert "24 responses scored again" in capsys.readouterr().out


def test_a_reference_that_refs_yaml_lacks_is_skipped_with_a_line(
    workspace: Workspace, capsys: Capture
) -> None:
    other = workspace.folder / "other.yaml"
    other.write_text("other: org/name")
    assert verify(settings(workspace, refs_config=str(other))).exit_code == 0
    assert "skipped llama@" in capsys.readouterr().out


def test_another_projects_reference_of_the_same_entry_is_skipped(
    workspace: Workspace, tmp_path: Path, capsys: Capture
) -> None:
    (record,) = workspace.store.references()
    theirs = replace(record, folders={"model": "/theirs"}, inputs={"model": {"weights": "b"}})
    shared = Store(tmp_path / "shared")
    shared.record(theirs)
    assert verify(settings(workspace, store=shared.root)).exit_code == 0
    assert f"skipped {theirs.title}" in capsys.readouterr().out


def test_changed_weights_are_another_reference(workspace: Workspace, capsys: Capture) -> None:
    path = workspace.folder / "model" / "model.safetensors"
    original = path.read_bytes()
    tensors = load_file(path)
    tensors["model.norm.weight"] += 0.01
    save_file(tensors, path, metadata={"format": "pt"})
    try:
        assert verify(settings(workspace)).exit_code == 1
    finally:
        path.write_bytes(original)
    assert "is another reference now" in capsys.readouterr().out


def test_a_wrong_score_with_a_right_digest_is_found(workspace: Workspace, capsys: Capture) -> None:
    (record,) = workspace.store.references()
    scores = workspace.store.scores(record.identity)
    table = scores.read()
    for name in scores.names():
        (Path(workspace.store.root) / record.identity / "scores" / name).unlink()
    place = table.column_names.index("logp")
    wrong = pc.subtract(table["logp"], pa.scalar(0.5))
    scores.add(table.set_column(place, "logp", wrong))
    assert verify(settings(workspace)).exit_code == 1
    printed = capsys.readouterr().out
    assert "0 damaged" in printed
    assert "differs llama@" in printed
