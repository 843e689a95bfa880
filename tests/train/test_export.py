"""`mrpo export`: what lies in the folder is the method's virtual reference, pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, load_dataset

from mrpo import arwc_weights, ctro_clip, virtual_reference
from mrpo.data.pairs import Pair
from mrpo.data.references import load_refs
from mrpo.data.shards import ShardWriter
from mrpo.data.store import ReferenceRecord, Store
from mrpo.errors import UserError
from mrpo.method.fitted import fit_weights
from mrpo.tests.response_rows import ids_of_pairs, rows_of_pairs
from mrpo.train.config import ExportConfig
from mrpo.train.export import export

ALIASES = ["llama", "mistral", "qwen"]
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "add"}}]


def text_pairs(n: int) -> list[Pair]:
    return [
        Pair(f"Question {i // 2}?", f" Yes, {i}.", f" No, {i}.", split=_split(i)) for i in range(n)
    ]


def chat_pairs(n: int) -> list[Pair]:
    def turn(role: str, text: str, **more: Any) -> dict[str, Any]:
        return {"role": role, "content": text, **more}

    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
    return [
        Pair(
            [turn("system", "Be brief."), turn("user", f"Question {i}?")],
            [turn("assistant", f"Yes, {i}.", tool_calls=[call])],
            [turn("assistant", f"No, {i}.")],
            tools=TOOLS if i % 2 else None,
            chat_template_kwargs={"enable_thinking": False} if i % 3 == 0 else None,
            split=_split(i),
        )
        for i in range(n)
    ]


def _split(i: int) -> str:
    return "validation" if i % 4 == 3 else "train"


class Project:
    """A folder with pairs, refs.yaml and a store of made-up scores; NaN: missing for good."""

    def __init__(self, folder: Path, pairs: Sequence[Pair], scores: np.ndarray) -> None:
        self.folder, self.pairs, self.scores = folder, pairs, scores  # [2, N, K]
        (folder / "pairs").mkdir()
        writer = ShardWriter(folder / "pairs", 7)
        for pair in pairs:
            writer.add(pair, pair.id)
        writer.finish({"source": "made up"})
        lines = [f"{alias}: {{model: org/{alias}}}" for alias in ALIASES]
        (folder / "refs.yaml").write_text("\n".join(lines))
        specs, store = load_refs(folder / "refs.yaml"), Store(folder / "store")
        for column, alias in enumerate(ALIASES):
            record = ReferenceRecord(
                alias=alias, entry=specs[alias].entry(), inputs={"weights": alias}
            )
            store.record(record)
            store.scores(record.identity).add(self._table(column))

    def _table(self, column: int) -> pa.Table:
        chosen, rejected = self.scores[:, :, column]
        columns = {"chosen_logp": chosen, "rejected_logp": rejected}
        reasons = ["beyond_context" if gone else None for gone in np.isnan(chosen)]
        tokens = {f"{branch}_tokens": np.ones(len(chosen)) for branch in ("chosen", "rejected")}
        return rows_of_pairs(ids_of_pairs(self.pairs), reason=reasons, **columns, **tokens)

    def export(self, method: str = "mrpo", **flags: Any) -> DatasetDict:
        folder = export(
            ExportConfig(
                **{
                    "pairs": str(self.folder / "pairs"),
                    "refs": ",".join(ALIASES),
                    "refs_config": str(self.folder / "refs.yaml"),
                    "store": str(self.folder / "store"),
                    "out": str(self.folder / "out"),
                    "method": method,
                }
                | flags
            )
        )
        return load_dataset(str(folder), cache_dir=str(self.folder / "cache"))


def made(
    folder: Path, pairs: Sequence[Pair], *, missing: dict[int, list[int]] | None = None
) -> Project:
    scores = -np.random.default_rng(0).uniform(5, 90, (2, len(pairs), len(ALIASES)))
    for row, columns in (missing or {}).items():
        scores[:, row, columns] = np.nan
    return Project(folder, pairs, scores)


def by_id(dataset: Dataset) -> dict[str, dict[str, Any]]:
    return {row["pair_id"]: row for row in dataset}


@pytest.mark.parametrize("make", [text_pairs, chat_pairs])
def test_every_pair_comes_through_unchanged_in_order_with_its_virtual_reference(
    tmp_path: Path, make: Any
) -> None:
    pairs = make(20)
    project = made(tmp_path, pairs)
    exported = project.export()
    alpha = arwc_weights(*project.scores)
    virtual = [virtual_reference(r, alpha) for r in ctro_clip(*project.scores, 0.1)]
    for split in ("train", "validation"):
        expected = [i for i, pair in enumerate(pairs) if pair.split == split]
        rows = list(exported[split])
        assert [row["pair_id"] for row in rows] == [pairs[i].id.hex() for i in expected]
        for i, row in zip(expected, rows):
            assert (row["prompt"], row["chosen"], row["rejected"]) == (
                pairs[i].prompt,
                pairs[i].chosen,
                pairs[i].rejected,
            )
            assert row["ref_chosen_logps"] == virtual[0][i]
            assert row["ref_rejected_logps"] == virtual[1][i]
            if make is chat_pairs:
                assert row["tools"] == pairs[i].tools
                assert row["chat_template_kwargs"] == (pairs[i].chat_template_kwargs or {})
            else:
                assert not {"tools", "chat_template_kwargs"} & row.keys()


def test_pairs_without_a_usable_score_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = text_pairs(12)
    project = made(tmp_path, pairs, missing={0: [0], 3: [0, 1], 5: [2]})
    exported = project.export()
    kept = by_id(exported["train"]) | by_id(exported["validation"])
    assert len(kept) == 10
    assert not {pairs[0].id.hex(), pairs[3].id.hex()} & kept.keys()
    scores = project.scores[:, 5:6, :2]
    alpha = arwc_weights(*scores)
    virtual = [virtual_reference(r, alpha) for r in ctro_clip(*scores, 0.1)]
    row = kept[pairs[5].id.hex()]
    assert [row["ref_chosen_logps"], row["ref_rejected_logps"]] == [virtual[0][0], virtual[1][0]]
    output = capsys.readouterr().out
    assert "train      8 pairs" in output
    assert "left out   2 pairs" in output
    assert output.splitlines()[-1] == str(tmp_path / "out")


def test_fitted_gives_training_pairs_the_weights_of_their_fold(tmp_path: Path) -> None:
    pairs = text_pairs(60)
    project = made(tmp_path, pairs)
    exported = project.export("geometric+fitted")
    keys = {text: number for number, text in enumerate(sorted({str(p.prompt) for p in pairs}))}
    training = [i for i, pair in enumerate(pairs) if pair.split == "train"]
    margins = (project.scores[0] - project.scores[1])[training]
    fit = fit_weights(margins, np.array([keys[str(pairs[i].prompt)] for i in training]))
    held_out = next(i for i, pair in enumerate(pairs) if pair.split == "validation")
    row = by_id(exported["validation"])[pairs[held_out].id.hex()]
    expected = virtual_reference(project.scores[0, [held_out]], fit.weights, "geometric")
    assert row["ref_chosen_logps"] == pytest.approx(expected[0], rel=1e-9)
    distinct = {
        round(row["ref_chosen_logps"], 6) != round(float(value), 6)
        for row, value in zip(
            exported["train"],
            virtual_reference(project.scores[0, training], fit.weights, "geometric"),
        )
    }
    assert distinct == {True}  # none has the weights of the full fit


def test_only_the_references_of_the_method_need_scores(tmp_path: Path) -> None:
    pairs = text_pairs(4)
    project = made(tmp_path, pairs)
    first = by_id(project.export("dpo:qwen")["train"])
    assert first[pairs[0].id.hex()]["ref_chosen_logps"] == project.scores[0, 0, 2]
    again = by_id(project.export("dpo:mistral", refs=None)["train"])
    assert again[pairs[0].id.hex()]["ref_chosen_logps"] == project.scores[0, 0, 1]


def test_flags_reach_the_method_and_are_written_beside_the_data(tmp_path: Path) -> None:
    pairs = text_pairs(4)
    project = made(tmp_path, pairs)
    flags: dict[str, Any] = {"reference_kind": "geometric", "weights": "0,1,1", "epsilon": "none"}
    exported = project.export("mrpo", **flags)
    expected = project.scores[0, 0, 1:].mean()
    assert by_id(exported["train"])[pairs[0].id.hex()]["ref_chosen_logps"] == pytest.approx(
        expected
    )
    assert "reference_kind: geometric" in (tmp_path / "out" / "export.yaml").read_text()
    fixed = by_id(project.export("mrpo+uniform", adaptive_epsilon=False)["train"])
    clipped = ctro_clip(*project.scores[:, :1], 0.1, adaptive=False)
    virtual = virtual_reference(clipped[0], [1, 1, 1])
    assert fixed[pairs[0].id.hex()]["ref_chosen_logps"] == virtual[0]


def test_no_held_out_pairs_make_a_data_set_of_one_split(tmp_path: Path) -> None:
    pairs = [Pair(f"Q{i}", " a", " b") for i in range(3)]
    assert set(made(tmp_path, pairs).export()) == {"train"}


def mistakes() -> dict[str, tuple[dict[str, Any], str]]:
    return {
        "multi-dpo": ({"method": "multi-dpo"}, "has no virtual reference to export; export mrpo"),
        "no references": ({"refs": None}, "no references: give --refs, or name them in --method"),
        "twice": ({"refs": "llama,llama"}, "a reference is given twice"),
        "unknown": ({"method": "mrpo:gemma"}, "'gemma' is not among llama, mistral, qwen"),
    }


@pytest.mark.parametrize("name", mistakes())
def test_a_mistake_writes_nothing(tmp_path: Path, name: str) -> None:
    flags, message = mistakes()[name]
    project = made(tmp_path, text_pairs(4))
    with pytest.raises(UserError, match=message):
        project.export(**flags)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_pairs_that_the_base_could_not_score_at_all_are_a_mistake(tmp_path: Path) -> None:
    project = made(tmp_path, text_pairs(3), missing={i: [0] for i in range(3)})
    with pytest.raises(UserError, match="no pair has a usable score for mrpo"):
        project.export()
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    project = made(tmp_path, text_pairs(4))
    with pytest.raises(UserError, match="is neither empty nor an earlier export"):
        project.export(out=str(tmp_path / "pairs"))
    with pytest.raises(UserError, match="is a file; name a folder that is not below one"):
        project.export(out=str(tmp_path / "refs.yaml" / "below"))
    assert (tmp_path / "pairs" / "manifest.json").is_file()
    project.export()
    project.export("dpo:qwen")  # an earlier export is replaced
