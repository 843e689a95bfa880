"""The memory plan: figures known from published models, and the ways out that it names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from mrpo.errors import UserError
from mrpo.model.head import KEEP_BYTES, chunk_rows
from mrpo.train import memory as plan
from mrpo.train import policy
from mrpo.train.config import TrainConfig
from mrpo.train.distributed import Ranks
from mrpo.train.memory import GIB, Sizes, memory_plan, refuse_what_cannot_fit
from mrpo.train.policy import PolicySource

LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    return Sizes.of(LLAMA_8B)


@pytest.fixture(autouse=True)
def _card_of_80_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "available_bytes", lambda ranks: 80 * GIB)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(output_dir="run", **changes)


def on_gpus(count: int) -> Ranks:
    return Ranks(0, count, torch.device("cuda"))


def test_parameters_are_those_of_the_published_model(sizes: Sizes) -> None:
    assert sizes.parameters == 8_030_261_248
    # Rank 16 on q, k, v, o, gate, up and down of 32 layers, as peft counts it.
    assert sizes.lora(16, "all-linear") == 41_943_040
    assert sizes.lora(16, "q_proj,v_proj") == 6_815_744
    outputs = 2 * 4096 + 2 * 1024 + 2 * 14_336 + 4096  # q, o, k, v, gate, up, down
    assert sizes.lora(16, "all-linear", dora=True) == 41_943_040 + 32 * outputs


def test_full_training_takes_16_bytes_a_parameter_and_autocasts_copies(sizes: Sizes) -> None:
    whole = memory_plan(sizes, config(), on_gpus(1), bf16=True)
    assert whole.weights + whole.gradients + whole.optimizer == 18 * sizes.parameters
    exact = memory_plan(sizes, config(), on_gpus(1), bf16=False)
    assert exact.weights + exact.gradients + exact.optimizer == 16 * sizes.parameters
    assert exact.activations > whole.activations


def test_micro_batches_begin_as_long_as_fits(sizes: Sizes) -> None:
    assert memory_plan(sizes, config(), on_gpus(8), bf16=True).tokens == 4096
    assert memory_plan(sizes, config(), on_gpus(2), bf16=True).tokens == 1024
    assert memory_plan(sizes, config(max_tokens=3000), on_gpus(8), bf16=True).tokens == 3000
    small = memory_plan(sizes, config(gradient_checkpointing=True), on_gpus(8), bf16=True)
    assert small.tokens == 8192


def test_checkpointing_and_shards_take_less(sizes: Sizes) -> None:
    tokens = {"max_tokens": 2048}
    whole = memory_plan(sizes, config(**tokens), on_gpus(1), bf16=True)
    less = memory_plan(sizes, config(**tokens, gradient_checkpointing=True), on_gpus(1), bf16=True)
    assert less.activations < whole.activations / 5
    shard = memory_plan(sizes, config(**tokens), on_gpus(4), bf16=True)
    assert shard.optimizer == whole.optimizer // 4
    assert shard.activations == whole.activations


def test_the_heads_part_is_what_its_chunks_take(sizes: Sizes) -> None:
    """1,046 rows of 128,256 logits, three times in float32, and 128 MiB of slopes kept."""
    tokens = {"max_tokens": 8192, "gradient_checkpointing": True}
    whole = memory_plan(sizes, config(**tokens), on_gpus(1), bf16=True)
    width = 4096 * (7 * 2 + 6 * 4) + 14336 * 4 * 2 + 32 * 4096 * 4
    chunk = chunk_rows(128256, torch.device("cuda"))
    assert chunk == 2**27 // 128256 == 1046
    assert whole.activations - 8192 * width == 3 * chunk * 128256 * 4 + KEEP_BYTES
    few = config(max_tokens=100, gradient_checkpointing=True)
    less = memory_plan(sizes, few, on_gpus(1), bf16=True)
    assert less.activations - 100 * width == 3 * 100 * 128256 * 4 + 100 * 128256 * 2


def test_what_cannot_fit_is_refused_with_the_ways_out(sizes: Sizes) -> None:
    settings, ranks = config(gradient_checkpointing=True), on_gpus(1)
    whole = memory_plan(sizes, settings, ranks, bf16=True)
    with pytest.raises(UserError, match=r"--lora-rank 16 or torchrun --nproc-per-node 2") as raised:
        refuse_what_cannot_fit(whole, sizes, settings, ranks, bf16=True)
    assert "needs about 137." in str(raised.value)
    for fitting, devices in ((config(lora_rank=16), 1), (settings, 2)):
        ranks = on_gpus(devices)
        fits = memory_plan(sizes, fitting, ranks, bf16=True)
        refuse_what_cannot_fit(fits, sizes, fitting, ranks, bf16=True)


def test_free_memory_is_at_most_the_machines() -> None:
    free = plan._free_memory()
    assert 0 < free < 2**45


def test_shards_of_gpus_get_the_attention_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP loads on the CPU first: the attention is that of the device it will run on."""
    asked = []

    def load_model(path: str, **how: object) -> None:
        asked.append((how["device"], how["attn"]))
        raise InterruptedError

    monkeypatch.setattr(policy, "load_model", load_model)
    for world, device in ((2, "cuda"), (1, "cuda"), (2, "cpu")):
        ranks = Ranks(0, world, torch.device(device))
        with pytest.raises(InterruptedError):
            policy.load_policy(PolicySource("model"), config(), ranks, bf16=True)
    cuda = torch.device("cuda")
    assert asked == [("cpu", "flex_attention"), (cuda, "flex_attention"), ("cpu", "sdpa")]
