"""A real vLLM engine on the CPU: log-probs as transformers computes them, in all corner cases."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mrpo.data.rendering import RenderedPair
from mrpo.errors import UserError
from mrpo.precompute.engines.protocol import EngineSettings, PairTokenLogps
from mrpo.precompute.engines.requests import Request, plan_requests, trial_pair
from mrpo.precompute.engines.vllm import (
    VllmEngine,
    _arguments,
    lora_arguments,
    plain_adapter,
    target_form,
)

CLOSE = 1e-3  # nats, of a whole sequence


@pytest.mark.vllm
def test_every_corner_pair_is_as_one_response_at_a_time(
    vllm_engine: Any, corner_pairs: list[RenderedPair], expected: list[PairTokenLogps], differ: Any
) -> None:
    scored = vllm_engine.score(corner_pairs)
    assert differ(scored, expected) < CLOSE
    assert vllm_engine.counters["finished"] == len(corner_pairs)
    # Prompts of a single pair are shared without a second attempt.
    assert vllm_engine.counters["asked_again"] <= 12
    assert vllm_engine.counters["cached_tokens"] > 20_000


@pytest.mark.vllm
def test_rows_that_the_cache_swallows_are_asked_for_again(
    vllm_engine: Any, corner_pairs: list[RenderedPair], expected: list[PairTokenLogps], differ: Any
) -> None:
    """The second time every block is cached, those of the responses too."""
    vllm_engine.score(corner_pairs)
    scored = vllm_engine.score(corner_pairs)
    assert vllm_engine.counters["asked_again"] > 100
    assert differ(scored, expected) < CLOSE


@pytest.mark.vllm
def test_order_and_neighbours_change_nothing(
    vllm_engine: Any, corner_pairs: list[RenderedPair], expected: list[PairTokenLogps], differ: Any
) -> None:
    places = random.Random(1).sample(range(len(corner_pairs)), 60)
    scored = vllm_engine.score([corner_pairs[place] for place in places])
    assert differ(scored, [expected[place] for place in places]) < CLOSE


@pytest.mark.vllm
def test_a_sequence_may_be_as_long_as_the_context(
    vllm_engine: Any, reference_folder: Any, make_pair: Any, one_by_one: Any, differ: Any
) -> None:
    """1,024 tokens are the model's context and five chunks; vLLM wants room for one token more."""
    assert vllm_engine.limit == 1024
    pairs = [make_pair(1000, 0, 24, 20), make_pair(960, 32, 32, 1)]
    assert differ(vllm_engine.score(pairs), one_by_one(reference_folder, pairs)) < CLOSE


@pytest.mark.vllm
def test_the_facts_name_engine_version_and_route(vllm_engine: Any) -> None:
    assert vllm_engine.facts["engine"] == "vllm"
    assert vllm_engine.facts["route"] == "prompt_logprobs"
    assert vllm_engine.facts["max_tokens"] == 192


class TestArguments:
    """The arguments that vLLM would be started with."""

    def test_there_is_room_for_the_longest_sequence_and_the_answer(
        self, reference_folder: Path
    ) -> None:
        settings = EngineSettings(alias="llama", model=str(reference_folder), longest=700)
        assert _arguments(settings, on_gpu=True)["max_model_len"] == 701

    def test_logits_of_a_large_vocabulary_make_small_batches(self, tmp_path: Path) -> None:
        sizes = {}
        for vocabulary in (1_000, 150_000, 1_000_000):
            AutoConfig.for_model("llama", vocab_size=vocabulary).save_pretrained(tmp_path)
            settings = EngineSettings(alias="large", model=str(tmp_path), longest=100)
            sizes[vocabulary] = _arguments(settings, on_gpu=True)["max_num_batched_tokens"]
        assert sizes == {1_000: 8192, 150_000: 2863, 1_000_000: 2048}

    def test_a_longrope_model_is_kept_to_where_vllm_computes_as_the_model_does(
        self, tmp_path: Path
    ) -> None:
        factors = {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48}
        AutoConfig.for_model(
            "phi3",
            pad_token_id=0,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            rope_scaling={"type": "longrope", **factors},
        ).save_pretrained(tmp_path)
        settings = EngineSettings(alias="phi", model=str(tmp_path), longest=9000)
        assert _arguments(settings, on_gpu=True)["max_model_len"] == 4096

    def test_an_adapter_is_given_its_own_modules_and_rank(self, adapter_folder: Path) -> None:
        assert lora_arguments("llama", adapter_folder) == {
            "enable_lora": True,
            "max_lora_rank": 8,
            "lora_target_modules": ["down_proj", "q_proj"],
        }

    def test_a_rank_that_vllm_does_not_take_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text('{"r": 513}')
        with pytest.raises(UserError, match="reference llama: vLLM takes no rank above 512"):
            lora_arguments("llama", tmp_path)

    def test_an_architecture_that_transformers_does_not_have_is_a_users_mistake(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "llama9"}')
        with pytest.raises(UserError, match="architecture 'llama9' is unknown to transformers"):
            _arguments(EngineSettings(alias="new", model=str(tmp_path), longest=9), on_gpu=True)


class TestAdapters:
    """Adapters as vLLM gets them: rewritten or refused where it would not compute as PEFT does."""

    def test_a_plain_adapter_is_taken_as_it_is(self, adapter_folder: Path, tmp_path: Path) -> None:
        assert plain_adapter("llama", adapter_folder, tmp_path) == adapter_folder
        assert not any(tmp_path.iterdir())

    def test_ranks_and_scales_of_single_modules_become_part_of_the_matrices(
        self, reference_folder: Path, uneven_adapter: Path, tmp_path: Path
    ) -> None:
        """The copy names neither ranks nor scales, and PEFT computes the same with it."""
        copy = plain_adapter("llama", uneven_adapter, tmp_path)
        assert copy == tmp_path
        config = json.loads((copy / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (6, 6)
        assert "rank_pattern" not in config
        weights = load_file(copy / "adapter_model.safetensors")
        assert {min(matrix.shape) for matrix in weights.values()} == {6}
        logits = [adapted_logits(reference_folder, folder) for folder in (uneven_adapter, copy)]
        assert torch.allclose(*logits, atol=1e-5)
        assert (logits[0] - adapted_logits(reference_folder)).abs().max() > 0.1

    @pytest.mark.parametrize(
        ("changed", "reason"),
        [
            ({"use_dora": True}, "use_dora"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"trainable_token_indices": [5]}, "trainable_token_indices"),
            ({"bias": "lora_only"}, "bias"),
            ({"lora_bias": True}, "lora_bias"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights"),
            ({"layer_replication": [[0, 2]]}, "layer_replication"),
            ({"peft_type": "IA3"}, "peft_type"),
            ({"a_key_of_next_year": 1}, "a_key_of_next_year"),
        ],
        ids=str,
    )
    def test_more_than_plain_lora_is_refused_by_name(
        self, adapter_folder: Path, tmp_path: Path, changed: dict[str, Any], reason: str
    ) -> None:
        shutil.copytree(adapter_folder, tmp_path / "adapter")
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
        with pytest.raises(UserError, match=f"reference llama: .* has {reason}; use --engine hf"):
            plain_adapter("llama", path.parent, tmp_path)

    @pytest.mark.parametrize(
        "name",
        [
            "lm_head.lora_A.weight",
            "model.embed_tokens.lora_embedding_A",
            "model.embed_tokens.weight",
            "model.embed_tokens.token_adapter.trainable_tokens_delta",
            "model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        ],
    )
    def test_weights_that_vllm_would_leave_out_are_refused(
        self, adapter_folder: Path, tmp_path: Path, name: str
    ) -> None:
        """Whatever the configuration says."""
        shutil.copytree(adapter_folder, tmp_path / "adapter")
        weights = {f"base_model.model.{name}": torch.zeros(4, 8)}
        save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
        with pytest.raises(UserError, match=f"has base_model.model.{name}; use --engine hf"):
            plain_adapter("llama", tmp_path / "adapter", tmp_path)

    def test_an_adapter_without_weights_is_a_users_mistake(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
        with pytest.raises(UserError, match=r"has no adapter_model\.safetensors; restore"):
            plain_adapter("llama", tmp_path, tmp_path)


@torch.inference_mode()
def adapted_logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model(torch.arange(20, 40)[None]).logits


class TestTrial:
    """The trial at the start, on an engine that scores as it is told."""

    def engine(self, off: float, error: Exception | None = None) -> VllmEngine:
        """Given ids are `off` nats from plain prompt log-probs, or not taken."""
        engine = object.__new__(VllmEngine)
        engine.limit, engine._by_token_ids, engine._share = 100, True, True
        engine._target_form, engine._max_tokens = "rows", 192
        engine._settings = EngineSettings(alias="llama", model="org/model")

        def score(pairs: list[RenderedPair]) -> list[PairTokenLogps]:
            if engine._by_token_ids and error is not None:
                raise error
            extra = off if engine._by_token_ids else 0
            counts = [branch.num_scored for branch in (pairs[0].chosen, pairs[0].rejected)]
            return [PairTokenLogps(*(np.full(n, extra - 5, np.float32) for n in counts))]

        engine.score = score  # type: ignore[method-assign, assignment]
        return engine

    def test_a_route_that_agrees_is_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = self.engine(1e-4)
        engine._try_route()
        assert (engine._by_token_ids, engine._share) == (True, True)

    @pytest.mark.parametrize("off", [0.1, float("nan")])
    def test_plain_prompt_logprobs_take_the_place_of_one_that_differs(
        self, off: float, capsys: pytest.CaptureFixture[str]
    ) -> None:
        engine = self.engine(off)
        engine._try_route()
        assert (engine._by_token_ids, engine._share) == (False, False)
        printed = capsys.readouterr().err
        assert f"on a trial pair it is {off:.2g} nats off plain prompt_logprobs" in printed

    def test_so_they_do_where_vllm_takes_no_such_request(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        engine = self.engine(0, ValueError("prompt_logprob_token_ids must be a list\nof ints"))
        engine._try_route()
        assert not engine._by_token_ids
        assert "is not used: prompt_logprob_token_ids must be a list of" in capsys.readouterr().err

    def test_the_pair_is_short_and_its_second_response_reads_the_cache(self) -> None:
        chosen, rejected = plan_requests([trial_pair(None)], 16)
        assert len(chosen.token_ids) == 64
        assert rejected.read_cache
        assert rejected.first > 16
        (only, *_) = plan_requests([trial_pair(3)], 16)
        assert len(only.token_ids) == 3

    def test_both_forms_of_the_ids_are_known(self) -> None:
        def parameters(annotation: Any) -> Any:
            return SimpleNamespace(__annotations__={"prompt_logprob_token_ids": annotation})

        assert target_form(parameters(np.ndarray | list[list[int]] | None)) == "rows"
        assert target_form(parameters("list[int] | None")) == "ids"
        assert target_form(SimpleNamespace(__annotations__={})) is None

    @pytest.mark.vllm
    def test_the_installed_vllm_takes_rows(self) -> None:
        from vllm import SamplingParams

        assert target_form(SamplingParams) == "rows"


class TestReading:
    """How an output is read on both routes, without an engine."""

    request_ = Request(pair=0, branch=1, token_ids=[5, 6, 7, 8, 9], first=3, read_cache=True)

    def engine(self, by_token_ids: bool) -> VllmEngine:
        engine = object.__new__(VllmEngine)
        engine._by_token_ids, engine._target_form = by_token_ids, "rows"
        return engine

    def output(self, cached: int, preemptions: int = 0, **columns: Any) -> SimpleNamespace:
        flat = SimpleNamespace(token_ids=[6, 7, 8, 9], logprobs=[-1.0, -2.0, -3.0, -4.0])
        metrics = SimpleNamespace(num_preemptions=preemptions)
        return SimpleNamespace(
            prompt_logprobs=flat, num_cached_tokens=cached, metrics=metrics, **columns
        )

    def test_the_row_before_the_first_wanted_token_must_be_computed(self) -> None:
        engine = self.engine(by_token_ids=False)
        assert engine._read(self.request_, self.output(cached=2)).tolist() == [-3.0, -4.0]
        assert engine._read(self.request_, self.output(cached=3)) is None

    def test_a_preempted_request_that_read_the_cache_is_asked_again(self) -> None:
        engine = self.engine(by_token_ids=False)
        assert engine._read(self.request_, self.output(cached=0, preemptions=1)) is None

    def test_scores_that_the_v2_runner_dropped_are_asked_again(self) -> None:
        engine = self.engine(by_token_ids=True)
        scores = np.array([[-3.0], [-4.0]], dtype=np.float32)
        output = self.output(cached=2, prompt_token_id_logprobs=scores)
        assert engine._read(self.request_, output).tolist() == [-3.0, -4.0]
        dropped = self.output(cached=4, prompt_token_id_logprobs=None)
        assert engine._read(self.request_, dropped) is None

    @pytest.mark.vllm
    def test_a_list_of_ids_is_scored_on_every_row(self) -> None:
        """Of a vLLM that takes one list for all rows, a row's own id is in its column."""
        engine = self.engine(by_token_ids=True)
        engine._target_form = "ids"
        request = replace(self.request_, token_ids=[5, 6, 7, 8, 9, 8])
        assert engine._params(request).prompt_logprob_token_ids == [8, 9]
        scores = np.array([[-3.0, -30.0], [-40.0, -4.0], [-5.0, -50.0]], dtype=np.float32)
        output = self.output(cached=2, prompt_token_id_logprobs=scores)
        assert engine._read(request, output).tolist() == [-3.0, -4.0, -5.0]

    @pytest.mark.vllm
    def test_the_v2_runner_is_given_the_ids_of_the_rows_it_is_to_score(self) -> None:
        params = self.engine(by_token_ids=True)._params(self.request_)
        assert params.prompt_logprob_start == 2  # the row that predicts token 3
        assert params.prompt_logprob_token_ids.tolist() == [[8], [9]]
        assert params.skip_reading_prefix_cache is False
        assert params.prompt_logprobs is None
