"""A user's folder for tests: pairs, refs.yaml, a store, and `mrpo precompute` over them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from mrpo.data.config import PrepareConfig
from mrpo.data.prepare import prepare
from mrpo.data.references import load_refs
from mrpo.data.shards import PairShards
from mrpo.data.store import Store
from mrpo.precompute.config import PrecomputeConfig
from mrpo.precompute.engines.protocol import EngineSettings
from mrpo.precompute.identity import resolve_reference
from mrpo.precompute.preflight import model_context
from mrpo.precompute.scoring import Job
from mrpo.precompute.worker import run_job

WORDS = ["what", "is", "the", "capital", "of", "France", "Paris", "eggs", "polite", "thank", "you"]


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Preference rows of chat messages; row i is the same in every call."""
    made = []
    for number in range(start, start + count):
        words = random.Random(number)
        prompt, *answers = (
            " ".join(words.choices(WORDS, k=words.randint(2, 20))) for _ in range(3)
        )
        messages = {
            name: [{"role": role, "content": f"{text} {number}{mark}"}]
            for name, role, text, mark in (
                ("prompt", "user", prompt, "?"),
                ("chosen", "assistant", answers[0], "."),
                ("rejected", "assistant", answers[1], "!"),
            )
        }
        made.append(messages)
    return made


class Workspace:
    """Everything under one temporary folder."""

    def __init__(self, folder: Path, references: Mapping[str, Path | dict[str, Any]]) -> None:
        self.folder = folder
        self.refs_config = folder / "refs.yaml"
        self.store = Store(folder / "store")
        entries = {
            alias: entry if isinstance(entry, dict) else {"model": str(entry)}
            for alias, entry in references.items()
        }
        self.refs_config.write_text(yaml.safe_dump(entries))

    def prepare(
        self, data: Sequence[Mapping[str, Any]], shard_pairs: int = 8, name: str = "pairs"
    ) -> PairShards:
        source = self.folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in data))
        out = str(self.folder / name)
        settings = {"shard_pairs": shard_pairs, "overwrite": True}
        return prepare(PrepareConfig(source=str(source), out=out, **settings))

    def config(self, **options: Any) -> PrecomputeConfig:
        given = {
            "refs": ",".join(load_refs(self.refs_config)),
            "pairs": str(self.folder / "pairs"),
            "refs_config": str(self.refs_config),
            "store": self.store.root,
            "engine": "hf",
        }
        return PrecomputeConfig(**{**given, **options})

    def job(self, alias: str, pairs: PairShards, **options: Any) -> Job:
        """What `precompute` would hand to this reference's worker."""
        reference = resolve_reference(load_refs(self.refs_config)[alias])
        settings = EngineSettings(
            alias=alias, model=reference.model, dtype=reference.dtype, longest=1024
        )
        job = Job(
            engine="hf",
            settings=settings,
            pairs=str(pairs.path),
            store=self.store.root,
            identity=reference.identity,
            chat_template=None,
            chat_template_kwargs={},
            context=model_context(reference),
            limit=None,
            keep_token_logps=False,
        )
        return replace(job, **options)

    def score(self, alias: str, pairs: PairShards, **options: Any) -> list[dict[str, Any]]:
        """Do a worker's job in this process; returns its events of finished shards."""
        events: list[dict[str, Any]] = []
        run_job(self.job(alias, pairs, **options), events.append)
        return [event for event in events if event["event"] == "shard"]

    def table(self, alias: str, columns: Sequence[str] | None = None) -> pa.Table:
        return self.scores(alias).read(columns)

    def scores(self, alias: str) -> Any:
        return self.store.scores(resolve_reference(load_refs(self.refs_config)[alias]).identity)

    def by_id(
        self, alias: str, columns: Sequence[str] | None = None
    ) -> dict[bytes, dict[str, Any]]:
        """The stored rows by response id."""
        return {row["response_id"]: row for row in self.table(alias, columns).to_pylist()}
