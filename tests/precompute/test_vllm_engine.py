"""A real vLLM engine on the CPU: log-probs as transformers computes them, in all corner cases."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from mrpo.data.rendering import RenderedPair
from mrpo.errors import UserError
from mrpo.precompute.engines.protocol import EngineSettings, PairTokenLogps
from mrpo.precompute.engines.requests import Request
from mrpo.precompute.engines.vllm import VllmEngine, _arguments, _lora_arguments

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
        assert _lora_arguments("llama", adapter_folder) == {
            "enable_lora": True,
            "max_lora_rank": 8,
            "lora_target_modules": ["down_proj", "q_proj"],
        }

    def test_an_adapter_on_the_head_is_refused(self, adapter_folder: Path, tmp_path: Path) -> None:
        shutil.copytree(adapter_folder, tmp_path, dirs_exist_ok=True)
        name = "base_model.model.lm_head.lora_A.weight"
        save_file({name: torch.zeros(4, 8)}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(UserError, match="reference llama: vLLM takes no adapter on head"):
            _lora_arguments("llama", tmp_path)


class TestReading:
    """How an output is read on both routes, without an engine."""

    request_ = Request(pair=0, branch=1, token_ids=[5, 6, 7, 8, 9], first=3, read_cache=True)

    def engine(self, by_token_ids: bool) -> VllmEngine:
        engine = object.__new__(VllmEngine)
        engine._by_token_ids = by_token_ids
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
    def test_the_v2_runner_is_given_the_ids_of_the_rows_it_is_to_score(self) -> None:
        params = self.engine(by_token_ids=True)._params(self.request_)
        assert params.prompt_logprob_start == 2  # the row that predicts token 3
        assert params.prompt_logprob_token_ids.tolist() == [[8], [9]]
        assert params.skip_reading_prefix_cache is False
        assert params.prompt_logprobs is None
