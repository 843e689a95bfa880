"""Engine hf: log-probs as for one response at a time, whatever else is in a pair's row."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mrpo.data.rendering import RenderedPrompt
from mrpo.demo.models import FAMILIES, build_model
from mrpo.errors import UserError
from mrpo.model.packing import packed_tokens
from mrpo.precompute.engines.hf import HfEngine
from mrpo.precompute.engines.protocol import EngineSettings, Logps
from mrpo.tests.precompute.conftest import model_logps, write_adapter

CLOSE = 1e-3  # nats, of a whole sequence


def engine(folder: Path, **settings: Any) -> HfEngine:
    return HfEngine(EngineSettings(alias="tiny", model=str(folder), **settings))


def test_every_corner_prompt_is_as_one_response_at_a_time(
    reference_folder: Path,
    corner_prompts: list[RenderedPrompt],
    expected: list[tuple[Logps, ...]],
    differ: Any,
) -> None:
    finished: list[int] = []
    scored = engine(reference_folder).score(corner_prompts, finished.append)
    assert differ(scored, expected) < CLOSE
    assert sum(finished) == sum(len(prompt.responses) for prompt in corner_prompts)


@pytest.mark.parametrize("max_tokens", [1, 300, 8192])
def test_order_neighbours_and_row_length_change_nothing(
    reference_folder: Path,
    corner_prompts: list[RenderedPrompt],
    expected: list[tuple[Logps, ...]],
    differ: Any,
    max_tokens: int,
) -> None:
    places = random.Random(max_tokens).sample(range(len(corner_prompts)), 40)
    tight = engine(reference_folder, max_tokens=max_tokens)
    scored = tight.score([corner_prompts[place] for place in places])
    assert differ(scored, [expected[place] for place in places]) < CLOSE


def test_no_pairs_are_no_work(reference_folder: Path) -> None:
    assert engine(reference_folder).score([]) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_each_architecture(
    tmp_path: Path, family: Any, corner_prompts: list[RenderedPrompt], one_by_one: Any, differ: Any
) -> None:
    build_model(family, 320, seed=5).save_pretrained(tmp_path)
    pairs = corner_prompts[::20]
    assert differ(engine(tmp_path).score(pairs), one_by_one(tmp_path, pairs)) < CLOSE


def test_an_architecture_that_cannot_share_rows_runs_one_response_a_row(
    tmp_path: Path, corner_prompts: list[RenderedPrompt], one_by_one: Any, differ: Any
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mamba", vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    pairs = corner_prompts[::30]
    single = engine(tmp_path)
    assert single.facts["route"] == "one response a row"
    assert differ(single.score(pairs), one_by_one(tmp_path, pairs)) < CLOSE


def test_an_adapter_is_part_of_the_reference(
    tmp_path: Path,
    adapter_folder: Path,
    reference_folder: Path,
    corner_prompts: list[RenderedPrompt],
    expected: list[tuple[Logps, ...]],
    differ: Any,
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(reference_folder, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, str(adapter_folder)).merge_and_unload()
    merged.save_pretrained(tmp_path)
    pairs = corner_prompts[::20]
    adapted = engine(reference_folder, adapter=str(adapter_folder)).score(pairs)
    assert differ(adapted, engine(tmp_path).score(pairs)) < CLOSE
    assert differ(adapted, expected[::20]) > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 24}},
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"trainable_token_indices": [21, 22, 23, 150]},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        {"lora_bias": True},
    ],
    ids=str,
)
def test_every_kind_of_lora_is_computed_as_peft_does(
    tmp_path: Path,
    reference_folder: Path,
    corner_prompts: list[RenderedPrompt],
    expected: list[tuple[Logps, ...]],
    differ: Any,
    options: dict[str, Any],
) -> None:
    """vLLM refuses most of these, and the refusals send users here."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = write_adapter(reference_folder, tmp_path, **options)
    base = AutoModelForCausalLM.from_pretrained(reference_folder, dtype=torch.float32)
    pairs = corner_prompts[::40]
    by_peft = model_logps(PeftModel.from_pretrained(base, str(adapter)).eval(), pairs)
    adapted = engine(reference_folder, adapter=str(adapter)).score(pairs)
    assert differ(adapted, by_peft) < CLOSE
    assert differ(adapted, expected[::40]) > 0.1


def test_autocast_computes_in_bfloat16(
    reference_folder: Path, corner_prompts: list[RenderedPrompt], expected: list[tuple[Logps, ...]]
) -> None:
    scored = engine(reference_folder, autocast=True).score(corner_prompts[::20])
    differences = np.concatenate([a[0] - b[0] for a, b in zip(scored, expected[::20])])
    assert 1e-4 < np.abs(differences).max() < 0.2


class ShortOfMemory:
    """Computes rows of up to `room` tokens; remembers the sizes of all rows."""

    def __init__(self, engine: HfEngine, room: int) -> None:
        self.launch, self.room, self.sizes = engine._launch, room, []

    def __call__(self, prompts: list[RenderedPrompt]) -> Any:
        size = sum(map(packed_tokens, prompts))
        self.sizes.append(size)
        if size > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.launch(prompts)


def test_out_of_memory_halves_the_rows_says_so_and_goes_on(
    reference_folder: Path,
    corner_prompts: list[RenderedPrompt],
    expected: list[tuple[Logps, ...]],
    differ: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rows of 1,536 and 768 tokens do not fit into 600; those of 384 do."""
    small = engine(reference_folder)
    short = ShortOfMemory(small, 600)
    monkeypatch.setattr(small, "_launch", short)
    finished: list[int] = []
    scored = small.score(corner_prompts[:60], finished.append)
    assert differ(scored, expected[:60]) < CLOSE
    assert small.max_tokens == 384
    assert sum(finished) == 120
    assert "rows of 384 tokens" in capsys.readouterr().err


def test_a_prompt_is_repeated_where_its_responses_do_not_fit_together(
    reference_folder: Path, make_prompt: Any, one_by_one: Any, differ: Any
) -> None:
    """A prompt of 100 tokens and responses of 40: two fit into rows of 200, one alone is beyond."""
    prompts = [make_prompt(100, [40, 40, 40, 150, 40]), make_prompt(9, [3])]
    small = engine(reference_folder, max_tokens=200)
    remembered = ShortOfMemory(small, 250)
    small._launch = remembered  # type: ignore[method-assign]
    finished: list[int] = []
    assert (
        differ(small.score(prompts, finished.append), one_by_one(reference_folder, prompts)) < CLOSE
    )
    assert sorted(remembered.sizes) == [140, 140, 180 + 12, 250]
    assert sum(finished) == 6


def test_out_of_memory_takes_a_prompt_apart(
    reference_folder: Path, make_prompt: Any, one_by_one: Any, differ: Any, monkeypatch: Any
) -> None:
    """A row of one prompt is too long: its responses go into several, none of them twice."""
    prompts = [make_prompt(100, [40] * 8), make_prompt(30, [5, 6])]
    small = engine(reference_folder, max_tokens=480)
    short = ShortOfMemory(small, 300)
    monkeypatch.setattr(small, "_launch", short)
    finished: list[int] = []
    assert (
        differ(small.score(prompts, finished.append), one_by_one(reference_folder, prompts)) < CLOSE
    )
    assert sum(finished) == 10
    assert small.max_tokens == 240


def test_a_response_that_does_not_fit_alone_is_refused_in_one_line(
    reference_folder: Path, corner_prompts: list[RenderedPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = engine(reference_folder)
    monkeypatch.setattr(small, "_launch", ShortOfMemory(small, 0))
    with pytest.raises(UserError, match="--max-model-len"):
        small.score(corner_prompts[:60])


def test_vllms_quantization_is_refused(reference_folder: Path) -> None:
    with pytest.raises(UserError, match="quantization 'fp8'"):
        engine(reference_folder, quantization="fp8")
