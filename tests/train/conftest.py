"""A small run's inputs: pairs on disk, three tiny references and their scores in a store."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from mrpo.data.config import PrepareConfig
from mrpo.data.ids import ids_to_arrow
from mrpo.data.join import JoinedScores, join
from mrpo.data.prepare import prepare
from mrpo.data.references import load_refs, local_inputs
from mrpo.data.rendering import Renderer
from mrpo.data.shards import PairShards
from mrpo.data.store import SCORE_SCHEMA, ReferenceRecord, Store
from mrpo.model.load import load_model
from mrpo.model.logps import SequenceLogps, sum_by_sequence
from mrpo.train.config import TrainConfig

WORDS = ["Paris", "is", "the", "capital", "of", "France", "she", "sells", "two", "eggs", "thanks"]

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Inputs:
    """Folders of a run, and settings that name them."""

    root: Path
    references: dict[str, Path]

    def settings(self, output_dir: Path, **changes: Any) -> dict[str, Any]:
        """Settings of a short run on the CPU; `changes` win."""
        given: dict[str, Any] = {
            "output_dir": str(output_dir),
            "pairs": str(self.root / "pairs"),
            "refs": "llama,mistral,qwen",
            "refs_config": str(self.root / "refs.yaml"),
            "store": str(self.root / "store"),
            "device": "cpu",
            "batch_pairs": 4,
            "learning_rate": 1e-3,
            "max_steps": 4,
            "save_steps": 2,
        }
        return given | changes

    def config(self, output_dir: Path, **changes: Any) -> TrainConfig:
        return TrainConfig(**self.settings(output_dir, **changes))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_references: dict[str, Path]) -> Inputs:
    """48 chat pairs in two shards, a quarter held out, scored by all three references."""
    root = tmp_path_factory.mktemp("inputs")
    rng = random.Random(0)
    lines = [json.dumps(_pair(rng, number)) for number in range(48)]
    (root / "pairs.jsonl").write_text("\n".join(lines))
    pairs = prepare(
        PrepareConfig(
            source=str(root / "pairs.jsonl"),
            out=str(root / "pairs"),
            shard_pairs=30,
            validation_fraction=0.25,
        )
    )
    entries = {alias: {"model": str(folder)} for alias, folder in tiny_references.items()}
    (root / "refs.yaml").write_text(yaml.safe_dump(entries))
    made = Inputs(root, tiny_references)
    score(made, root, pairs, list(tiny_references))
    return made


@pytest.fixture(scope="session")
def joined(
    inputs: Inputs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PairShards, JoinedScores]:
    """The pairs of `inputs`, and beside them the scores of the three references."""
    pairs, store = PairShards(inputs.root / "pairs"), Store(inputs.root / "store")
    records = [store.resolve(alias) for alias in inputs.references]
    return pairs, join(pairs, store, records, tmp_path_factory.mktemp("joined") / "scores")


@pytest.fixture(scope="session")
def scored(inputs: Inputs) -> Callable[..., None]:
    """Score pairs into `FOLDER/store`: see `score`."""
    return partial(score, inputs)


@pytest.fixture(scope="session")
def write_policy(
    tiny_references: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[PretrainedConfig], str]:
    """A function that writes an untrained model with llama's tokenizer, and returns its folder."""

    def write(config: PretrainedConfig) -> str:
        folder = tmp_path_factory.mktemp("policy") / "model"
        tokenizer = AutoTokenizer.from_pretrained(tiny_references["llama"])
        text = config.get_text_config()
        text.vocab_size = len(tokenizer)
        for part in {id(config): config, id(text): text}.values():
            part.bos_token_id = part.eos_token_id = part.pad_token_id = None
        tokenizer.save_pretrained(folder)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return str(folder)

    return write


@pytest.fixture(scope="session")
def mixture(write_policy: Callable[[PretrainedConfig], str]) -> str:
    """A policy of 4 experts of which 2 are used, whose balancing loss weighs much."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
    return write_policy(AutoConfig.for_model("mixtral", **SMALL, **experts))


def score(
    inputs: Inputs,
    folder: Path,
    pairs: PairShards,
    aliases: list[str],
    missing: dict[str, int] | None = None,
) -> None:
    """Fill `folder / "store"`; a reference lacks the first `missing` pairs of each shard."""
    specs, store = load_refs(inputs.root / "refs.yaml"), Store(folder / "store")
    for alias in aliases:
        record = ReferenceRecord(
            alias=alias,
            entry=specs[alias].entry(),
            inputs={"dtype": "float32", **local_inputs(specs[alias])},
        )
        store.record(record)
        for shard in range(len(pairs.names)):
            table = _scores(inputs.references[alias], pairs, shard, (missing or {}).get(alias, 0))
            store.scores(record.identity).add(table)


def _pair(rng: random.Random, number: int) -> dict[str, Any]:
    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    return {
        "prompt": [{"role": "user", "content": f"{number} {text(1, 12)}"}],
        "chosen": [{"role": "assistant", "content": text(1, 8) + " yes"}],
        "rejected": [{"role": "assistant", "content": text(1, 8) + " no"}],
    }


def _scores(folder: Path, pairs: PairShards, shard: int, missing: int) -> pa.Table:
    """What the reference says of a shard, straight from its forward."""
    policy, renderer = SequenceLogps(load_model(folder)), Renderer.load(folder)
    rendered = renderer.render_many(pairs.pairs(shard))
    batch = policy.collate(rendered, "cpu")
    with torch.no_grad():
        logps = sum_by_sequence(policy(batch), batch)
    columns: dict[str, list[Any]] = {
        "chosen_logp": logps[0::2].tolist(),
        "rejected_logp": logps[1::2].tolist(),
        "chosen_tokens": list(batch.token_counts[0::2]),
        "rejected_tokens": list(batch.token_counts[1::2]),
        "prompt_tokens": [pair.chosen.start for pair in rendered],
    }
    there = {name: [None] * missing + values[missing:] for name, values in columns.items()}
    there["reason"] = ["beyond_context"] * missing + [None] * (len(rendered) - missing)
    return pa.table(
        {
            field.name: pa.array(there.get(field.name, [None] * len(rendered)), field.type)
            for field in SCORE_SCHEMA
            if field.name != "pair_id"
        }
        | {"pair_id": ids_to_arrow(pairs.pair_ids(shard))}
    )
