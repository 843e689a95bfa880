"""The subclass of docs/trl.md in real TRL 1.16, beside `mrpo train` from the same scores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from mrpo.data.config import PrepareConfig
from mrpo.data.prepare import prepare
from mrpo.data.references import load_refs
from mrpo.data.rendering import RenderedPair, Renderer
from mrpo.data.shards import PairShards
from mrpo.data.store import SCORE_SCHEMA, ReferenceRecord, Store
from mrpo.model.load import load_model
from mrpo.model.logps import SequenceLogps, sum_by_sequence
from mrpo.tests.needs import needed
from mrpo.train.config import ExportConfig, TrainConfig
from mrpo.train.export import export
from mrpo.train.run import train

PAIRS, STEPS, BETA, RATE = 8, 2, 0.5, 1e-3
ALIASES = ["llama", "mistral", "qwen"]
DOCS = Path(__file__).resolve().parents[2] / "docs" / "trl.md"


@pytest.fixture(scope="module")
def trl() -> Any:
    return needed("trl")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_references: dict[str, Path]) -> Path:
    """Eight chat pairs, three references of as many architectures, and their real scores."""
    folder = tmp_path_factory.mktemp("project")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {a} + {a + 1}?"}],
            "chosen": [{"role": "assistant", "content": f"The sum is {2 * a + 1}, exactly."}],
            "rejected": [{"role": "assistant", "content": f"I think it is {a}." + " Maybe." * a}],
        }
        for a in range(PAIRS)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    prepare(PrepareConfig(source=str(folder / "pairs.jsonl"), out=str(folder / "pairs")))
    refs = {alias: {"model": str(tiny_references[alias]), "dtype": "float32"} for alias in ALIASES}
    (folder / "refs.yaml").write_text(json.dumps(refs))
    specs, store = load_refs(folder / "refs.yaml"), Store(folder / "store")
    for alias in ALIASES:
        record = ReferenceRecord(
            alias=alias, entry=specs[alias].entry(), inputs={"weights": alias, "dtype": "float32"}
        )
        store.record(record)
        scores = score(tiny_references[alias], PairShards(folder / "pairs"))
        store.scores(record.identity).add(scores)
    return folder


def score(model: Path, shards: PairShards) -> pa.Table:
    """Every pair under one model, in the store's columns."""
    rendered = Renderer.load(model).render_many(shards.pairs(0))
    pairs = [pair for pair in rendered if isinstance(pair, RenderedPair)]
    assert len(pairs) == PAIRS
    logps = SequenceLogps(load_model(str(model), dtype="float32", device="cpu"))
    with torch.no_grad():
        batch = logps.collate(pairs, "cpu")
        sums = sum_by_sequence(logps(batch), batch).tolist()
    columns: dict[str, Any] = dict.fromkeys(SCORE_SCHEMA.names, [0] * PAIRS)
    columns |= {
        "pair_id": [pair.id for pair in shards.pairs(0)],
        "chosen_logp": sums[::2],
        "rejected_logp": sums[1::2],
        "chosen_boundary": [False] * PAIRS,
        "rejected_boundary": [False] * PAIRS,
        "reason": [None] * PAIRS,
    }
    return pa.table(columns, schema=SCORE_SCHEMA)


def paths(folder: Path) -> dict[str, Any]:
    return {
        "pairs": str(folder / "pairs"),
        "refs": ",".join(ALIASES),
        "refs_config": str(folder / "refs.yaml"),
        "store": str(folder / "store"),
    }


def train_here(folder: Path, method: str, policy: Path) -> list[dict[str, float]]:
    """The log lines of two full-batch steps of `mrpo train`."""
    out = folder / f"ours-{method}-{policy.name}"
    config = TrainConfig(
        output_dir=str(out),
        method=method,
        policy=str(policy),
        beta=BETA,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        batch_pairs=PAIRS,
        max_steps=STEPS,
        device="cpu",
        **paths(folder),
    )
    assert not train(config).exit_code
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def train_in_trl(trl: Any, folder: Path, method: str, model: Path) -> list[dict[str, float]]:
    """The same in TRL, with the class that docs/trl.md shows."""
    exported = export(
        ExportConfig(method=method, out=str(folder / f"out-{method}-{model.name}"), **paths(folder))
    )
    pairs = load_dataset(str(exported), cache_dir=str(folder / "cache"))
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[0], names)
    losses: list[float] = []

    class Recording(names["CachedReferenceTrainer"]):  # type: ignore[misc]
        """Keeps the losses before TRL rounds them for its log."""

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach().item())
            return loss

    trainer = Recording(
        model=str(model),
        args=trl.DPOConfig(
            output_dir=str(folder / f"trl-{method}-{model.name}"),
            beta=BETA,
            precompute_ref_log_probs=True,
            max_length=None,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            per_device_train_batch_size=PAIRS,
            max_steps=STEPS,
            logging_steps=1,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=pairs["train"],
    )
    assert trainer.ref_model is None
    trainer.train()
    lines = [line for line in trainer.state.log_history if "rewards/margins" in line]
    return [line | {"loss": loss} for line, loss in zip(lines, losses, strict=True)]


@pytest.mark.parametrize("method", ["mrpo", "geometric"])
def test_two_steps_in_trl_and_in_ours_have_the_same_losses(
    trl: Any, project: Path, tiny_references: dict[str, Path], method: str
) -> None:
    ours = train_here(project, method, tiny_references["llama"])
    theirs = train_in_trl(trl, project, method, tiny_references["llama"])
    assert len(ours) == len(theirs) == STEPS
    for mine, other in zip(ours, theirs):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert mine[name] == pytest.approx(other[name], abs=1e-3), name
        assert mine["rewards/accuracies"] == pytest.approx(other["rewards/accuracies"])
    # The second step differs from the first: the optimizers have moved, and alike.
    assert abs(ours[1]["loss"] - ours[0]["loss"]) > 1e-3 * ours[0]["loss"]


def test_a_mixture_of_experts_has_the_balancing_loss_of_trl(
    trl: Any, project: Path, tiny_references: dict[str, Path]
) -> None:
    """With the coefficient of the model's config, here 0.3, over the whole batch."""
    folder = project / "mixture"
    tokenizer = AutoTokenizer.from_pretrained(tiny_references["llama"])
    tokenizer.save_pretrained(folder)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        router_aux_loss_coef=0.3,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    ours = train_here(project, "mrpo", folder)
    theirs = train_in_trl(trl, project, "mrpo", folder)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert mine["aux_loss"] == pytest.approx(other["aux_loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert mine["loss"] > 0.3 * mine["aux_loss"] > 0.5


def test_the_exported_columns_reach_trls_batches_unchanged(
    trl: Any, project: Path, tiny_references: dict[str, Path]
) -> None:
    """Were TRL to compute them again, or with the policy, the first loss would be log 2."""
    first = train_in_trl(trl, project, "dpo:mistral", tiny_references["llama"])[0]
    assert abs(first["loss"] - np.log(2)) > 0.01
