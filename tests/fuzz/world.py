"""The fuzz's world: command lines that work, and all valid inputs that they read."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from mrpo import cli
from mrpo.demo.models import write_reference
from mrpo.tests.fuzz.in_process import run


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """A command line that works in the world, what it reads, and what it may write."""

    name: str
    words: str
    reads: str  # globs of files that a case may damage
    writes: str  # paths that it may make or change, when it succeeds
    partly: str = ""  # of these, what may be there after a refusal: finished parts of the work
    weight: int = 4

    @property
    def config(self) -> type:
        table = cli.STORE_COMMANDS if self.name.startswith("store ") else cli.COMMANDS
        return cli.imported(table[self.name.removeprefix("store ")][0])


SCORED = "--pairs pairs --refs llama,qwen --refs-config refs.yaml --store store"
MODELS = "refs.yaml template.jinja adapter/* models/*/*"
STORED = "store/*/reference.json store/*/scores/*"
SCORING = "--engine hf"
STEPS = "--max-steps 1 --batch-pairs 4 --device cpu --logging-steps 1"
NEW_RUN = f"{SCORED} {STEPS} --output-dir new"
COMMANDS = [
    Command("prepare", "rows/chat.jsonl --out new", "rows/chat.jsonl", "new", weight=8),
    Command("prepare", "rows/real.jsonl --out new", "rows/real.jsonl", "new"),
    Command("prepare", "rows/table.csv --out new --chat", "rows/table.csv", "new"),
    Command("prepare", "rows/array.json --out new", "rows/array.json", "new"),
    Command("prepare", "rows/chat.parquet --out new", "rows/chat.parquet", "new", weight=6),
    Command("prepare", "rows/scored.jsonl --out new", "rows/scored.jsonl", "new"),
    Command("prepare", "rows/labelled.jsonl --out new", "rows/labelled.jsonl", "new"),
    Command("prepare", "rows/zipped.jsonl.gz --out new", "rows/zipped.jsonl.gz", "new"),
    Command("prepare", "rows --out pairs", "pairs/* rows/*", "pairs", weight=2),
    Command(
        "prepare",
        "rows/chat.jsonl --out new --exclude audit.csv --flip flip.csv",
        "audit.csv flip.csv",
        "new",
    ),
    Command("inspect", "--pairs pairs --refs-config refs.yaml --ref llama,qwen --tokens",
            f"{MODELS} pairs/*", "", weight=10),
    Command("inspect", "--templates templates --tokenizer models/llama",
            "templates/* models/llama/token*", ""),
    Command("refs", "--refs-config refs.yaml --pairs pairs --store store",
            f"{MODELS} pairs/* {STORED}", "", weight=6),
    Command("precompute", f"{SCORED} {SCORING} --dry-run", f"{MODELS} pairs/* {STORED}",
            "store", "store", weight=8),
    Command("precompute", f"{SCORED.replace('store', 'new')} {SCORING}", f"{MODELS} pairs/*",
            "new", "new", weight=14),
    Command("precompute", f"{SCORED} {SCORING} --data rows/chat.jsonl", f"rows/chat.jsonl {STORED}",
            "store pairs", "store pairs"),
    Command("train", NEW_RUN, f"{MODELS} pairs/* {STORED}", "new", "new", weight=14),
    Command("train", f"{NEW_RUN} --policy models/qwen --lora-rank 2 --resume",
            "models/qwen/*", "new", "new", weight=6),
    Command("train", "--config stopped/train.yaml --resume",
            "stopped/* stopped/*/* stopped/*/*/*", "stopped", "stopped", weight=12),
    Command("evaluate", "--runs run --out new.json", "run/* run/*/* pairs/*", "new store",
            "store", weight=8),
    Command("evaluate", f"{SCORED.replace('--refs llama,qwen', '--base llama')} "
            "--policies models/llama,adapter --engine hf --out new.json", f"{MODELS} {STORED}",
            "new store", "store", weight=6),
    Command("doctor", f"{SCORED} --out new.json", f"{STORED} pairs/*", "new", weight=6),
    Command("doctor", f"{SCORED} --probe 2 --out new.json", MODELS, "new", weight=6),
    Command("compare", f"{SCORED} {STEPS} --methods dpo:llama --seeds 1 --output-dir new",
            f"{MODELS} pairs/* {STORED}", "new store", "new store"),
    Command("compare", f"{SCORED} {STEPS} --methods dpo:llama,mrpo --seeds 1 --output-dir compare",
            "compare/* compare/*/* compare/*/*/*", "compare store", "compare store", weight=8),
    Command("report", "run,compare --audit audit.csv --out new.html",
            "run/* compare/* compare/*/* compare/*/*/* audit.csv* pairs/*", "new", weight=12),
    Command("report", f"{SCORED} --out new.html", f"{STORED} pairs/* refs.yaml", "new"),
    Command("audit", f"{SCORED} --out new.csv", f"{STORED} pairs/* refs.yaml", "new", weight=8),
    Command("export", f"{SCORED} --out new", f"{STORED} pairs/* refs.yaml", "new", weight=8),
    Command("demo", "--quick --out new", "", "new", "new", weight=1),
    Command("store status", "--store store --pairs pairs", f"{STORED} pairs/*", "", weight=6),
    Command("store verify", "--store store", STORED, ""),
    Command("store verify", "--store store --rescore 2 --refs-config refs.yaml --pairs pairs",
            f"{STORED} {MODELS} pairs/*", ""),
    Command("store gc", "--store store --runs run,compare --delete",
            f"{STORED} run/* compare/*/*/*", "store"),
    Command("store push", "new --store store", STORED, "new", "new"),
    Command("store pull", "store --store new", STORED, "new", "new"),
    Command("store import", "scores.csv --store store --alias judge --model judge",
            "scores.csv", "store"),
    Command("store import", "scores.jsonl --by-id --store store --alias judge --model judge",
            "scores.jsonl", "store"),
]  # fmt: skip


def make_world(folder: Path, shared: Path) -> None:
    """Write all valid inputs into a new folder, with paths relative to it."""
    folder.mkdir(parents=True)
    chat, real = _chat_rows(), _real_rows(shared / "hh_harmless_test.jsonl.gz")
    rows = folder / "rows"
    rows.mkdir()
    _write_lines(rows / "chat.jsonl", chat)
    _write_lines(rows / "real.jsonl", real)
    (rows / "array.json").write_text(json.dumps(chat, indent=1))
    (rows / "zipped.jsonl.gz").write_bytes(gzip.compress((rows / "chat.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(chat), rows / "chat.parquet")
    text = [{name: row[name][-1]["content"] for name in row} for row in chat]
    _write_table(rows / "table.csv", text)
    _write_lines(
        rows / "scored.jsonl",
        [
            {
                "instruction": row["prompt"],
                "completions": [
                    {"response": row["chosen"], "overall_score": 8.5},
                    {"response": row["rejected"], "overall_score": 3},
                ],
            }
            for row in text
        ],
    )
    _write_lines(
        rows / "labelled.jsonl",
        [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in text
            for name in ("chosen", "rejected")
        ],
    )
    words = [message["content"] for row in chat for turns in row.values() for message in turns]
    for number, family in enumerate(("llama", "qwen")):
        write_reference(
            folder / "models" / family,
            family,
            words,
            vocab_size=300,
            hidden_size=16,
            seed=number,
        )
    _write_adapter(folder / "models" / "qwen", folder / "adapter")
    (folder / "templates").mkdir()
    for path in sorted((shared / "templates").glob("*.jinja"))[::4]:
        shutil.copy(path, folder / "templates")
    template = (folder / "models" / "llama" / "chat_template.jinja").read_text()
    (folder / "template.jinja").write_text(template)
    entries = {
        "llama": {"model": "models/llama", "chat_template": "template.jinja", "dtype": "float32"},
        "qwen": {"model": "models/qwen", "adapter": "adapter", "chat_template_kwargs": {"a": 1}},
    }
    (folder / "refs.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
    for line in (
        "prepare rows/chat.jsonl --out pairs --validation-fraction 0.3 --shard-pairs 9",
        f"precompute {SCORED} {SCORING}",
        f"train {SCORED} {STEPS} --output-dir run --policy models/llama",
        f"train {SCORED} {STEPS} --output-dir stopped --max-steps 2 --save-steps 1",
        "evaluate --runs run --base llama --out run/evaluation.json",
        f"compare {SCORED} {STEPS} --methods dpo:llama,mrpo --seeds 1 --output-dir compare",
        f"audit {SCORED} --out audit.csv",
    ):
        ran = run(folder, line.split())
        assert ran.code == 0, f"{line}: {ran.err}"
    shutil.rmtree(folder / "stopped" / "model")
    shutil.rmtree(folder / "stopped" / "checkpoints" / "step-00000002")
    pairs = pq.read_table(folder / "pairs" / "part-00000.parquet")
    ids = [value.hex() for value in pairs["pair_id"].to_pylist()]
    _write_table(folder / "flip.csv", [{"pair_id": i, "decision": "flip"} for i in ids[:2]])
    scores = [{"ref_chosen_logps": -7.5 - n, "ref_rejected_logps": -9.25} for n in range(len(ids))]
    _write_table(folder / "scores.csv", [row | score for row, score in zip(text, scores)])
    by_id = [{"pair_id": pair_id} | score for pair_id, score in zip(ids, scores)]
    _write_lines(folder / "scores.jsonl", by_id)


def _chat_rows() -> list[dict[str, Any]]:
    words = ["Paris", "is", "the", "capital", "of", "France", "zwölf", "eggs", "thanks", "🙂"]
    rng = random.Random(0)
    rows = []
    for number in range(16):
        texts = [" ".join(rng.choices(words, k=rng.randint(2, 9))) for _ in range(3)]
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows.append(
            {
                name: [{"role": role, "content": f"{text} {number}"}]
                for (name, role), text in zip(roles.items(), texts)
            }
        )
    return rows


def _real_rows(path: Path) -> list[dict[str, Any]]:
    """Short dialogues of HH-RLHF."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(400))]
    return [row for row in rows if len(row["chosen"]) + len(row["rejected"]) < 700][:20]


def _write_lines(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write_adapter(model: Path, folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)  # the adapter is part of an identity, and so of names and their order
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "models/qwen"
    config["target_modules"].sort()  # written as a set has them
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
