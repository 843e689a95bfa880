"""What a worker does with a reference's missing responses, here, with a real tiny model."""

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
from mrpo.data.store import SCORE_SCHEMA, TOKEN_COLUMN, Store
from mrpo.errors import UserError
from mrpo.precompute import scoring as loop
from mrpo.precompute.engines.hf import HfEngine
from mrpo.precompute.engines.protocol import EngineSettings
from mrpo.tests.precompute.workspace import Workspace, rows

CLOSE = 1e-3  # nats, of a whole sequence


def test_rows_are_the_sums_of_what_the_engine_gives(workspace: Workspace) -> None:
    pairs = workspace.prepare(rows(6))
    (event,) = workspace.score("llama", pairs, keep_token_logps=True)
    assert (event["responses"], event["refused"], event["over_limit"]) == (12, 0, 0)
    model = workspace.job("llama", pairs).settings.model
    rendered = Renderer.load(model).render_many(pairs.pairs(0))
    scored = HfEngine(EngineSettings(alias="llama", model=model)).score(rendered)
    stored = workspace.by_id("llama", [*SCORE_SCHEMA.names, TOKEN_COLUMN])
    for prompt_id, *ids, pair, score in zip(*pairs.response_ids(0), rendered, scored):
        for response_id, sequence, values in zip(ids, pair.responses, score):
            row = stored[response_id.tobytes()]
            assert row["prompt_id"] == prompt_id.tobytes()
            logps = values.astype(np.float64)
            end = sequence.end_start - sequence.start
            assert row["logp"] == pytest.approx(logps.sum(), abs=CLOSE)
            assert row["end_logp"] == pytest.approx(logps[end:].sum(), abs=CLOSE)
            assert row["end_logp"] < 0
            assert row["tokens"] == len(logps)
            assert row["boundary"] is False
            assert np.array(row["token_logps"], dtype=np.float64).sum() == row["logp"]
            assert row["prompt_tokens"] == sequence.start
            assert row["reason"] is None


def test_what_is_stored_is_not_scored_again_whatever_the_data_set(workspace: Workspace) -> None:
    pairs = workspace.prepare(rows(20))
    assert sum(event["responses"] for event in workspace.score("qwen", pairs)) == 40
    assert workspace.score("qwen", pairs) == []
    files = workspace.scores("qwen").names()
    mixed = [*rows(5, start=100), *reversed(rows(20))]
    events = workspace.score("qwen", workspace.prepare(mixed, shard_pairs=4, name="mixed"))
    assert [event["responses"] for event in events] == [8, 2]
    assert set(files) < set(workspace.scores("qwen").names())
    assert len(workspace.by_id("qwen")) == 50


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
    for response_id, row in expected.items():
        assert row["logp"] == pytest.approx(reordered[response_id]["logp"], abs=CLOSE)


def test_beyond_the_models_context_is_stored_and_a_users_limit_is_not(
    workspace: Workspace,
) -> None:
    data = rows(3)
    data[0]["chosen"][0]["content"] = "word " * 1200  # the context is 1,024 tokens
    data[1]["rejected"][0]["content"] = "word " * 60
    pairs = workspace.prepare(data)
    (event,) = workspace.score("llama", pairs, limit=80)
    assert (event["responses"], event["refused"], event["over_limit"]) == (4, 1, 1)
    ids = pairs.response_ids(0)
    refused = workspace.by_id("llama")[ids.chosen[0].tobytes()]
    assert refused["reason"] == "beyond_context"
    assert refused["logp"] is refused["end_logp"] is None
    assert refused["tokens"] > 1024
    assert workspace.by_id("llama")[ids.rejected[0].tobytes()]["logp"] < 0
    left_out = workspace.scores("llama").left_out()
    assert left_out.contains(ids.rejected).tolist() == [False, True, False]
    assert not left_out.contains(ids.chosen).any()
    (event,) = workspace.score("llama", pairs)
    assert (event["responses"], event["refused"], event["over_limit"]) == (1, 0, 0)
    assert not workspace.scores("llama").missing(ids.both).any()


def test_what_the_template_refuses_is_stored_with_its_reason(workspace: Workspace) -> None:
    data = rows(2)
    data[0]["prompt"].insert(0, {"role": "tool", "content": "42"})
    pairs = workspace.prepare(data)
    workspace.score("mistral", pairs)
    workspace.score("qwen", pairs)
    reasons = [row["reason"] for row in workspace.by_id("mistral").values()]
    assert sorted(reasons, key=str) == [None, None, "template_refused", "template_refused"]
    assert [row["reason"] for row in workspace.by_id("qwen").values()] == [None] * 4


def test_refusals_alone_are_stored_without_an_engine(workspace: Workspace) -> None:
    data = rows(1)
    for name in ("chosen", "rejected"):
        data[0][name][0]["content"] = f"{name} " * 1200
    pairs = workspace.prepare(data)
    job = workspace.job("llama", pairs)
    nothing = replace(job.settings, longest=0)
    (event,) = workspace.score("llama", pairs, settings=nothing, engine="vllm")
    assert (event["responses"], event["refused"]) == (0, 2)
    assert [row["reason"] for row in workspace.by_id("llama").values()] == ["beyond_context"] * 2


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
    bad = pairs.response_ids(0).chosen[0].tobytes()
    message = rf"reference broken: .* of response {bad.hex()} is not finite \(2 such"
    with pytest.raises(UserError, match=message) as raised:
        other.score("broken", pairs)
    assert "\n" not in str(raised.value)
    stored = other.by_id("broken")
    assert len(stored) == 6
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
    ids = {row["response_id"] for row in other.table("qwen").to_pylist()}
    theirs = [response_id.tobytes() for response_id in pairs.response_ids(1).both]
    table = other.table("qwen")
    table = table.filter(np.isin(table["response_id"].to_numpy(), theirs))
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
    assert workspace.scores("qwen").num_rows() == 24


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
    assert scores.num_rows() == len(scores.response_ids()) == 36


def loop_over(workspace: Workspace, pairs: Any, hear: Any) -> None:
    from mrpo.precompute.worker import run_job

    run_job(workspace.job("qwen", pairs), hear)
