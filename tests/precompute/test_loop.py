"""What a worker does with a reference's missing pairs, in this process with a real tiny model."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mrpo.data.ids import ids_from_bytes, unit_of
from mrpo.data.references import load_refs
from mrpo.data.rendering import Renderer
from mrpo.data.store import SCORE_SCHEMA, TOKEN_COLUMNS, Store
from mrpo.errors import UserError
from mrpo.precompute import scoring as loop
from mrpo.precompute.engines.hf import HfEngine
from mrpo.precompute.engines.protocol import EngineSettings
from mrpo.tests.precompute.workspace import Workspace, rows

CLOSE = 1e-3  # nats, of a whole sequence


def test_rows_are_the_sums_of_what_the_engine_gives(workspace: Workspace) -> None:
    pairs = workspace.prepare(rows(6))
    (event,) = workspace.score("llama", pairs, keep_token_logps=True)
    assert (event["pairs"], event["refused"], event["over_limit"]) == (6, 0, 0)
    model = workspace.job("llama", pairs).settings.model
    rendered = Renderer.load(model).render_many(pairs.pairs(0))
    scored = HfEngine(EngineSettings(alias="llama", model=model)).score(rendered)
    stored = workspace.by_id("llama", [*SCORE_SCHEMA.names, *TOKEN_COLUMNS])
    for pair_id, pair, score in zip(pairs.pair_ids(0), rendered, scored):
        row = stored[pair_id.tobytes()]
        for name, sequence, values in zip(("chosen", "rejected"), pair.responses, score):
            logps = values.astype(np.float64)
            end = sequence.end_start - sequence.start
            assert row[f"{name}_logp"] == pytest.approx(logps.sum(), abs=CLOSE)
            assert row[f"{name}_end_logp"] == pytest.approx(logps[end:].sum(), abs=CLOSE)
            assert row[f"{name}_end_logp"] < 0
            assert row[f"{name}_tokens"] == len(logps)
            assert row[f"{name}_boundary"] is False
            token_logps = np.array(row[f"{name}_token_logps"], dtype=np.float64)
            assert token_logps.sum() == row[f"{name}_logp"]
        assert row["prompt_tokens"] == pair.responses[0].start
        assert row["reason"] is None


def test_what_is_stored_is_not_scored_again_whatever_the_data_set(workspace: Workspace) -> None:
    pairs = workspace.prepare(rows(20))
    assert sum(event["pairs"] for event in workspace.score("qwen", pairs)) == 20
    assert workspace.score("qwen", pairs) == []
    files = workspace.scores("qwen").names()
    mixed = [*rows(5, start=100), *reversed(rows(20))]
    events = workspace.score("qwen", workspace.prepare(mixed, shard_pairs=4, name="mixed"))
    assert [event["pairs"] for event in events] == [4, 1]
    assert set(files) < set(workspace.scores("qwen").names())
    assert len(workspace.by_id("qwen")) == 25


@pytest.mark.parametrize("shard_pairs", [1, 7, 100])
def test_scores_do_not_depend_on_shard_size_or_order(
    workspace: Workspace, tmp_path: Path, shard_pairs: int
) -> None:
    workspace.score("mistral", workspace.prepare(rows(20)))
    (tmp_path / "other").mkdir()
    models = {alias: spec.model for alias, spec in load_refs(workspace.refs_config).items()}
    other = Workspace(tmp_path / "other", models)
    other.score("mistral", other.prepare(rows(20)[::-1], shard_pairs=shard_pairs))
    expected, reordered = workspace.by_id("mistral"), other.by_id("mistral")
    assert expected.keys() == reordered.keys()
    for pair_id, row in expected.items():
        for name in ("chosen_logp", "rejected_logp"):
            assert row[name] == pytest.approx(reordered[pair_id][name], abs=CLOSE)


def test_beyond_the_models_context_is_stored_and_a_users_limit_is_not(
    workspace: Workspace,
) -> None:
    data = rows(3)
    data[0]["chosen"][0]["content"] = "word " * 1200  # the context is 1,024 tokens
    data[1]["rejected"][0]["content"] = "word " * 60
    pairs = workspace.prepare(data)
    (event,) = workspace.score("llama", pairs, limit=80)
    assert (event["pairs"], event["refused"], event["over_limit"]) == (1, 1, 1)
    refused = workspace.by_id("llama")[pairs.pair_ids(0)[0].tobytes()]
    assert refused["reason"] == "beyond_context"
    assert refused["chosen_logp"] is refused["rejected_logp"] is None
    assert refused["chosen_tokens"] > 1024
    left_out = workspace.scores("llama").left_out().contains(pairs.pair_ids(0))
    assert left_out.tolist() == [False, True, False]
    (event,) = workspace.score("llama", pairs)
    assert (event["pairs"], event["refused"], event["over_limit"]) == (1, 0, 0)
    assert not workspace.scores("llama").missing(pairs.pair_ids(0)).any()


def test_a_pair_that_the_template_refuses_is_stored_with_its_reason(workspace: Workspace) -> None:
    data = rows(2)
    data[0]["prompt"].insert(0, {"role": "tool", "content": "42"})
    pairs = workspace.prepare(data)
    workspace.score("mistral", pairs)
    workspace.score("qwen", pairs)
    reasons = [row["reason"] for row in workspace.by_id("mistral").values()]
    assert sorted(reasons, key=str) == [None, "template_refused"]
    assert [row["reason"] for row in workspace.by_id("qwen").values()] == [None, None]


def test_refusals_alone_are_stored_without_an_engine(workspace: Workspace) -> None:
    data = rows(1)
    data[0]["chosen"][0]["content"] = "word " * 1200
    pairs = workspace.prepare(data)
    job = workspace.job("llama", pairs)
    nothing = replace(job.settings, longest=0)
    (event,) = workspace.score("llama", pairs, settings=nothing, engine="vllm")
    assert (event["pairs"], event["refused"]) == (0, 1)
    assert [row["reason"] for row in workspace.by_id("llama").values()] == ["beyond_context"]


@pytest.fixture
def broken(workspace: Workspace, tmp_path: Path) -> Path:
    """The llama with NaN as the embedding of the token "?"."""
    folder = tmp_path / "broken"
    source = load_refs(workspace.refs_config)["llama"].model
    renderer = Renderer.load(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    (token,) = renderer.tokenizer.encode("?", add_special_tokens=False)
    model.get_input_embeddings().weight.data[token] = float("nan")
    model.save_pretrained(folder)
    renderer.tokenizer.save_pretrained(folder)
    return folder


def test_a_score_that_is_not_finite_is_refused_and_the_others_stay(
    workspace: Workspace, broken: Path, tmp_path: Path
) -> None:
    data = rows(4)
    for row in data[1:]:
        row["prompt"][0]["content"] = row["prompt"][0]["content"].rstrip("?")
    (tmp_path / "nan").mkdir()
    other = Workspace(tmp_path / "nan", {"broken": broken})
    pairs = other.prepare(data)
    bad = pairs.pair_ids(0)[0].tobytes()
    with pytest.raises(
        UserError, match=f"reference broken: pair {bad.hex()}.*not finite"
    ) as raised:
        other.score("broken", pairs)
    assert "\n" not in str(raised.value)
    stored = other.by_id("broken")
    assert len(stored) == 3
    assert bad not in stored


def test_a_shard_that_another_process_holds_is_waited_for_and_not_scored_twice(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The other process takes the second shard, stores it and releases it while we wait."""
    monkeypatch.setattr(loop, "POLL_SECONDS", 0.02)
    pairs = workspace.prepare(rows(12), shard_pairs=6)
    (tmp_path / "other").mkdir()
    entries = {alias: spec.model for alias, spec in load_refs(workspace.refs_config).items()}
    other = Workspace(tmp_path / "other", entries)
    other.score("qwen", pairs)
    ids = {row["pair_id"] for row in other.table("qwen").to_pylist()}
    theirs = [pair_id.tobytes() for pair_id in pairs.pair_ids(1)]
    table = other.table("qwen")
    table = table.filter(np.isin(table["pair_id"].to_numpy(), theirs))
    scores = workspace.scores("qwen")
    waiting = threading.Event()
    events: list[dict[str, Any]] = []

    def hear(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "waiting":
            waiting.set()

    with scores.lease(unit_of(ids_from_bytes(theirs))) as held:
        assert held
        worker = threading.Thread(target=loop_over, args=(workspace, pairs, hear))
        worker.start()
        assert waiting.wait(60)
        scores.add(table)
    worker.join(60)
    assert [event["shard"] for event in events if event["event"] == "shard"] == [0]
    assert set(workspace.by_id("qwen")) == ids
    assert workspace.scores("qwen").num_rows() == 12


def test_workers_on_object_storage_have_shards_of_their_own(workspace: Workspace) -> None:
    """Every lease is granted there, so each would score every shard that it sees missing."""
    pairs = workspace.prepare(rows(18), shard_pairs=4)
    store = Store(f"memory://{workspace.folder.name}/store")
    options = {"store": store.root, "workers": 3}
    scored = [
        [e["shard"] for e in workspace.score("qwen", pairs, worker=worker, **options)]
        for worker in range(3)
    ]
    assert scored == [[0, 3], [1, 4], [2]]
    scores = store.scores(workspace.job("qwen", pairs).identity)
    assert scores.num_rows() == len(scores.pair_ids()) == 18


def loop_over(workspace: Workspace, pairs: Any, hear: Any) -> None:
    from mrpo.precompute.worker import run_job

    run_job(workspace.job("qwen", pairs), hear)
