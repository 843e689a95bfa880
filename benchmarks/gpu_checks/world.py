"""What the checks work with: random words as pairs, small random models, and their scores."""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mrpo.benchmarks.workload import (
    learned_tokenizer,
    write_pairs,
    write_random_model,
    write_scores,
)
from mrpo.data.pairs import Pair
from mrpo.data.shards import PairShards
from mrpo.train.config import TrainConfig

from .check import GPU

DEVICE = "cuda" if GPU else "cpu"
VOCABULARY = 2048 if GPU else 512
SIZE: dict[str, int] = {"num_hidden_layers": 4 if GPU else 2, "head_dim": 64 if GPU else 16}


@dataclass(eq=False)
class World:
    """Models and pairs in a folder, made when a check first asks for them."""

    folder: Path

    @cached_property
    def pairs(self) -> list[Pair]:
        """Random words: on a GPU prompts of 5 to 400, responses of 5 to 150."""
        return list(random_pairs(1024 if GPU else 32, longest=400 if GPU else 60))

    @cached_property
    def shards(self) -> PairShards:
        with contextlib.redirect_stdout(sys.stderr):
            return write_pairs(self.folder / "pairs", self.pairs, len(self.pairs))

    def model(self, architecture: str, name: str | None = None, **shape: int) -> Path:
        """The folder of a small model with a tokenizer learned from the pairs.

        Its weights are larger than they usually start, so that masks matter.
        """
        folder = self.folder / (name or architecture)
        if not folder.exists():
            tokenizer = learned_tokenizer(self.pairs, VOCABULARY)
            sizes = SIZE | SHAPES[architecture] | shape
            width = sizes["num_attention_heads"] * sizes["head_dim"]
            sizes |= {"hidden_size": width, "intermediate_size": 3 * width}
            sizes |= {"vocab_size": len(tokenizer), "initializer_range": 0.06}
            write_random_model(folder, architecture, tokenizer, "float32", **sizes)
        return folder

    @cached_property
    def scored(self) -> Path:
        """The folder of a store with two references' scores of all pairs, and their `model`."""
        self.model("llama", "model")
        write_scores(self.folder, self.shards, 2)
        return self.folder

    def config(self, **settings: Any) -> TrainConfig:
        """Settings of a run of MRPO on these scores: 6 steps in float32, each of 16 pairs."""
        defaults: dict[str, Any] = {
            "output_dir": str(self.folder / f"run-{time.time_ns()}"),
            "pairs": str(self.shards.path),
            "refs": "ref0,ref1",
            "refs_config": str(self.scored / "refs.yaml"),
            "store": str(self.scored / "store"),
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
            "max_steps": 6 if GPU else 3,
            "batch_pairs": 16 if GPU else 8,
            "max_tokens": 4096,
            "bf16": False,
            "device": DEVICE,
            "eval_steps": 2**31,
            "save_steps": 2**31,
        }
        return TrainConfig(**defaults | settings)


def random_pairs(count: int, longest: int) -> Iterator[Pair]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(1, 7))) for _ in range(3000)]

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(5, most)))

    for _ in range(count):
        answers = (text(longest * 3 // 8) for _ in range(2))
        prompt = [{"role": "user", "content": text(longest)}]
        chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in answers)
        yield Pair(prompt, chosen, rejected)


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "gemma2": {  # sliding windows in every other layer, and attention scores with a softcap
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 100},
        **{"query_pre_attn_scalar": 64, "attn_logit_softcapping": 5.0},
    },
    "qwen2": {"num_attention_heads": 6, "num_key_value_heads": 2},
}
