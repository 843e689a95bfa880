"""A response that was once scored under a prompt is never scored again, whatever its pair.

Counted from what the engine is asked, with a real tiny model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from mrpo.data.join import join, matrix
from mrpo.data.rendering import RenderedPrompt
from mrpo.data.shards import PairShards
from mrpo.precompute.engines.hf import HfEngine
from mrpo.tests.precompute.workspace import Workspace, rows

Row = dict[str, Any]
PROMPTS, RANKED = 6, 4  # responses of each prompt


class Asked:
    """What the engine was asked since the last look."""

    def __init__(self) -> None:
        self.prompts: list[RenderedPrompt] = []

    @property
    def responses(self) -> int:
        number = sum(len(prompt.responses) for prompt in self.prompts)
        self.prompts.clear()
        return number


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Counts the engine's calls, which answer as always."""
    asked, score = Asked(), HfEngine.score

    def counting(engine: HfEngine, prompts: Sequence[RenderedPrompt], *more: Any) -> Any:
        asked.prompts += prompts
        return score(engine, prompts, *more)

    monkeypatch.setattr(HfEngine, "score", counting)
    return asked


def paired(better: Row, worse: Row) -> Row:
    return {"prompt": better["prompt"], "chosen": better["chosen"], "rejected": worse["chosen"]}


def ranked(prompts: Sequence[int] = range(PROMPTS)) -> list[Row]:
    """All pairings of four responses to each prompt, the better ones chosen."""
    data: list[Row] = []
    for number in prompts:
        answers = rows(RANKED, start=RANKED * number)
        for answer in answers:
            answer["prompt"] = answers[0]["prompt"]
        data += [paired(better, worse) for better, worse in combinations(answers, 2)]
    return data


def flipped(row: Row) -> Row:
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


def scored(workspace: Workspace, data: Sequence[Row], name: str, **options: Any) -> PairShards:
    pairs = workspace.prepare(data, name=name, **options)
    workspace.score("llama", pairs)
    return pairs


def test_all_pairings_of_four_responses_are_four_scorings_behind_one_prompt(
    workspace: Workspace, asked: Asked
) -> None:
    pairs = scored(workspace, ranked(), "ranked", shard_pairs=100)
    assert pairs.num_pairs == PROMPTS * 6
    assert [len(prompt.responses) for prompt in asked.prompts] == [RANKED] * PROMPTS
    assert workspace.scores("llama").num_rows() == PROMPTS * RANKED


@pytest.mark.parametrize("change", ["flip", "re-pair", "shuffle", "subset", "merge"])
def test_no_change_of_labels_pairs_or_data_sets_scores_anything_again(
    workspace: Workspace, asked: Asked, change: str
) -> None:
    data, dice = ranked(), random.Random(0)
    scored(workspace, data, "first", shard_pairs=7)
    assert asked.responses == PROMPTS * RANKED
    if change == "flip":
        changed = [flipped(row) if dice.random() < 0.3 else row for row in data]
    elif change == "re-pair":  # best against worst in place of all pairings
        changed = [data[6 * number + 2] for number in range(PROMPTS)]
    elif change == "shuffle":
        changed = dice.sample(data, len(data))
    elif change == "subset":
        changed = dice.sample(data, 9)
    else:  # another data set, of which nothing is new, together with a turned first one
        changed = [flipped(row) for row in data] + data[::2]
    pairs = scored(workspace, changed, "changed", shard_pairs=5)
    assert asked.responses == 0
    joined = join(pairs, workspace.store, workspace.store.references() or [record_of(workspace)],
                  workspace.folder / "joined")  # fmt: skip
    for shard in range(len(pairs.names)):
        assert not np.isnan(matrix(joined.table(shard), "ref_chosen_logps")).any()


def record_of(workspace: Workspace) -> Any:
    """The reference as `precompute` would have recorded it."""
    from mrpo.data.references import load_refs
    from mrpo.precompute.identity import resolve_reference

    reference = resolve_reference(load_refs(workspace.refs_config)["llama"])
    return workspace.store.record(reference.record())


def test_a_prompt_that_returns_in_a_later_shard_scores_only_what_is_new(
    workspace: Workspace, asked: Asked
) -> None:
    """Though the later shard is rendered while the first one is being scored."""
    data = ranked()
    later = [flipped(row) for row in data]
    new = rows(1, start=999)[0]
    later.append(paired(new | {"prompt": data[0]["prompt"]}, {"chosen": data[0]["chosen"]}))
    scored(workspace, data + later, "twice", shard_pairs=9)
    assert asked.responses == PROMPTS * RANKED + 1
    assert workspace.scores("llama").num_rows() == PROMPTS * RANKED + 1


def test_a_score_is_that_of_the_response_alone_under_its_prompt(workspace: Workspace) -> None:
    """Scored with its three rivals, or in a pair of its own: the same number but for rounding."""
    scored(workspace, ranked(), "ranked")
    together = workspace.by_id("llama")
    for path in workspace.folder.glob("store/*/scores/*.parquet"):
        path.unlink()
    scored(workspace, ranked()[:1], "alone")
    alone = workspace.by_id("llama")
    assert len(alone) == 2
    for response_id, row in alone.items():
        for name, value in row.items():
            expected = together[response_id][name]
            if name.endswith("logp"):
                assert value == pytest.approx(expected, abs=1e-3)
            else:
                assert value == expected


def test_another_prompt_tools_or_variables_make_another_response(
    workspace: Workspace, asked: Asked
) -> None:
    row = rows(1)[0]
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    other = rows(1, start=5)[0]["prompt"]
    variants = [row, row | {"prompt": other}, row | {"tools": [tool]}]
    pairs = workspace.prepare(variants, name="variants")
    ids = pairs.response_ids(0)
    assert len(set(ids.prompts.tolist())) == 3
    assert len(set(ids.both.tolist())) == 6
    workspace.score("qwen", pairs)
    assert asked.responses == 6
