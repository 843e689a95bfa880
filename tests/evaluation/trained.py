"""Tiny references that learned a little from real pairs, and their scores in a store."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml

from mrpo.data.config import PrepareConfig
from mrpo.data.pairs import Message, Pair
from mrpo.data.prepare import prepare
from mrpo.data.references import ReferenceSpec, load_refs
from mrpo.data.rendering import Refusal, RenderedPrompt, Renderer
from mrpo.data.shards import PairShards
from mrpo.data.store import ReferenceRecord, Store
from mrpo.demo.models import FAMILIES, Family, build_model, build_tokenizer
from mrpo.evaluation.config import DoctorConfig
from mrpo.evaluation.doctor.doctor import Diagnosis, diagnose
from mrpo.precompute.engines.hf import HfEngine
from mrpo.precompute.engines.protocol import EngineSettings
from mrpo.precompute.identity import resolve_reference
from mrpo.precompute.scoring import ResponseSet, score_rows, sort_out
from mrpo.tests.response_rows import columns_of_pairs, ids_of_pairs, rows_of_pairs

CONTEXT = 1024
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "real_pairs.py"


def real_rows(shared_data: Path, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Short pairs of HH-RLHF, GSM8K's solutions and TruthfulQA, as rows for `prepare`."""
    spec = importlib.util.spec_from_file_location("real_pairs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for kind, name in (
        ("gsm8k", "gsm8k_model_solutions.jsonl.gz"),
        ("truthfulqa", "truthfulqa.csv.gz"),
    ):
        module.write_pairs(kind, shared_data / name, folder / f"{kind}.jsonl")
        lines = (folder / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
        rows[kind] = [json.loads(line) for line in lines]
    with gzip.open(shared_data / "hh_harmless_test.jsonl.gz", "rt", encoding="utf-8") as file:
        dialogues = [json.loads(line) | {"source": "hh"} for line in file]
    rows["hh"] = [row for row in dialogues if len(row["chosen"]) + len(row["rejected"]) < 1200]
    return rows


def train_reference(
    folder: Path,
    family: Family,
    conversations: Sequence[list[Message]],
    *,
    steps: int = 60,
    seed: int = 0,
    batch: int = 8,
    length: int = 128,
) -> Path:
    """Write a model that has read some conversations in its own template, packed end to end."""
    words = [str(message["content"]) for chat in conversations for message in chat]
    tokenizer = build_tokenizer(family, words, 700)
    model = build_model(family, len(tokenizer), hidden_size=48, layers=2, seed=seed)
    texts = [str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in conversations]
    stream = [i for ids in tokenizer(texts, add_special_tokens=False).input_ids for i in ids]
    blocks = torch.tensor(stream[: len(stream) // length * length]).view(-1, length)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps)
    model.train()
    for step in range(steps):
        rows = blocks[torch.arange(step * batch, (step + 1) * batch) % len(blocks)]
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def score(
    model: Path, pairs: Sequence[Pair], rendered: Sequence[RenderedPrompt] | None = None
) -> pa.Table:
    """What stage one makes of the pairs, or of other renderings of them, by `columns_of_pairs`."""
    engine = HfEngine(EngineSettings(alias="tiny", model=str(model)))
    shown = Renderer.load(model).render_many(pairs) if rendered is None else rendered
    ids, numbers = ids_of_pairs(pairs), np.arange(len(pairs)).repeat(2)
    asked = ResponseSet(
        ids=np.stack([ids.chosen, ids.rejected], 1).reshape(-1),
        prompt_ids=ids.prompts[numbers],
        rows=numbers,
        rejected=np.arange(2 * len(pairs)) % 2 == 1,
    )
    rendered = [[one] * 2 if isinstance(one, Refusal) else one.responses for one in shown]
    work = sort_out(asked, rendered, CONTEXT, None)
    rows = score_rows(work, engine, keep_token_logps=False, progress=lambda responses: None).table
    return columns_of_pairs(rows, ids)


@dataclass(frozen=True)
class Clinic:
    """Three healthy references with their scores of real pairs."""

    folder: Path
    models: dict[str, Path]
    shards: PairShards
    scores: dict[str, pa.Table]  # in the pairs' order

    @property
    def pairs(self) -> list[Pair]:
        return self.shards.pairs(0)

    def store(self, folder: Path, **changed: pa.Table) -> Store:
        """A store with every reference's scores, those given in place of its own."""
        store, specs = Store(folder), self.specs()
        for alias, table in (self.scores | changed).items():
            record = _record(specs[alias])
            store.record(record)
            rows = rows_of_pairs(ids_of_pairs(self.pairs), **columns(table))
            store.scores(record.identity).add(rows)
        return store

    def specs(self, **changed: Mapping[str, Any]) -> dict[str, ReferenceSpec]:
        """refs.yaml, read again; some entries changed."""
        entries = {alias: {"model": str(model)} for alias, model in self.models.items()}
        for alias, more in changed.items():
            entries[alias] = {**entries[alias], **more}
        (self.folder / "refs.yaml").write_text(yaml.safe_dump(entries), encoding="utf-8")
        return load_refs(self.folder / "refs.yaml")

    def diagnose(self, store: Store, refs: str = "llama,mistral,qwen", probe: int = 0) -> Diagnosis:
        return diagnose(self.config(store, refs, probe))

    def config(
        self, store: Store, refs: str = "llama,mistral,qwen", probe: int = 0
    ) -> DoctorConfig:
        return DoctorConfig(
            refs=refs,
            pairs=str(self.shards.path),
            refs_config=str(self.folder / "refs.yaml"),
            store=store.root,
            probe=probe,
            out=str(self.folder / "doctor.json"),
        )


def columns(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return dict(zip(table.column_names, table.columns))


def open_clinic(rows: Mapping[str, Sequence[dict[str, Any]]], folder: Path, seed: int) -> Clinic:
    """Train three references on some of the rows and score others."""
    rng = random.Random(seed)
    drawn = [rng.sample(list(some), 240) for some in rows.values()]
    shards = _prepared(folder / "pairs", [row for some in drawn for row in some[:50]])
    read = _prepared(folder / "read", [row for some in drawn for row in some[50:]])
    chats = [[*pair.prompt, *pair.chosen] for pair in read.pairs(0)]
    rng.shuffle(chats)
    models = {
        family: train_reference(folder / family, family, chats, seed=10 * seed + number)
        for number, family in enumerate(FAMILIES)
    }
    scores = {family: score(model, shards.pairs(0)) for family, model in models.items()}
    return Clinic(folder, dict(models), shards, dict(scores))


def _prepared(folder: Path, rows: Sequence[Mapping[str, Any]]) -> PairShards:
    source = folder.with_suffix(".jsonl")
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return prepare(PrepareConfig(source=str(source), out=str(folder), allow_dropped=True))


def _record(spec: ReferenceSpec) -> ReferenceRecord:
    return ReferenceRecord(
        alias=spec.alias, entry=spec.entry(), inputs=resolve_reference(spec).inputs
    )
