"""Two projects with one store: whose scores are read, and what a later change of a folder does.

From the scoring to the readers, where `tests/data/store/test_shared_names.py` has the rules.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from mrpo.data.references import load_refs
from mrpo.data.shards import PairShards
from mrpo.data.store import Store
from mrpo.errors import UserError
from mrpo.evaluation.score_table import scored_records
from mrpo.precompute.run import score
from mrpo.tests.precompute.workspace import Workspace, rows
from mrpo.train.export import export


@dataclass(frozen=True)
class Project:
    """A folder with a reference `./sft` and refs.yaml."""

    folder: Path
    pairs: PairShards
    store: Store

    @property
    def refs(self) -> str:
        return str(self.folder / "refs.yaml")

    def score(self) -> str:
        """The identity that the project's own reference has."""
        specs = list(load_refs(self.refs).values())
        return score(specs, self.pairs, self.store, in_process=True).records[0].identity

    def read(self) -> str:
        """The identity whose scores the project's commands read."""
        [record] = scored_records(self.pairs, self.store, ["sft"], self.refs)
        return record.identity


@pytest.fixture
def projects(workspace: Workspace, tiny_references: dict[str, Path]) -> list[Project]:
    pairs = workspace.prepare(rows(4))
    made = []
    for name, family in (("ours", "llama"), ("theirs", "qwen")):
        folder = workspace.folder / name
        shutil.copytree(tiny_references[family], folder / "sft")
        (folder / "refs.yaml").write_text("sft: {model: ./sft}")
        made.append(Project(folder, pairs, workspace.store))
    return made


def test_each_project_reads_the_scores_of_its_own_folder(projects: list[Project]) -> None:
    ours, theirs = projects
    theirs.score()
    with pytest.raises(UserError, match=r"theirs/sft under this name, not of .*ours/sft.*; run: "):
        ours.read()
    mine, other = ours.score(), theirs.score()
    assert (ours.read(), theirs.read()) == (mine, other)
    shutil.rmtree(ours.folder / "sft")
    assert ours.read() == mine


def test_an_overwritten_reference_is_refused_by_every_reader(
    projects: list[Project], tiny_references: dict[str, Path]
) -> None:
    ours = projects[0]
    before = ours.score()
    shutil.rmtree(ours.folder / "sft")
    shutil.copytree(tiny_references["mistral"], ours.folder / "sft")
    message = rf"the model and tokenizer of ./sft changed since sft@{before[:12]} was scored"
    with pytest.raises(UserError, match=rf"{message}.*; run: mrpo precompute"):
        ours.read()
    out = ours.folder / "export"
    where = {"pairs": str(ours.pairs.path), "refs_config": ours.refs, "store": ours.store.root}
    with pytest.raises(UserError, match=rf"{message}.*; run: mrpo precompute"):
        export(refs="sft", out=str(out), **where)
    assert not out.exists()
    export(refs=f"sft@{before[:8]}", out=str(out), **where)
    after = ours.score()
    assert ours.read() == after != before
