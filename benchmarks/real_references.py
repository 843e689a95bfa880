"""Three tiny references trained on real text, and real pairs that none of them has read.

    python benchmarks/real_references.py --data FOLDER --out real-run

FOLDER holds three sets as they are published, gzipped: HH-RLHF's harmless test set
(`hh_harmless_test.jsonl.gz`), GSM8K's solutions by four models (`gsm8k_model_solutions.jsonl.gz`)
and TruthfulQA (`truthfulqa.csv.gz`); `real_pairs.py` says how the latter two become pairs. All
pairs are divided by prompt. The references read half of the prompts with their chosen responses,
each reference one set three times as often as the others; the other half is for training and
held-out pairs:

    real-run/corpus-llama.jsonl …   what each reference reads
    real-run/references/…           llama: dialogues; mistral: arithmetic; qwen: facts
    real-run/refs.yaml              names them for `mrpo`
    real-run/pairs.jsonl            the pairs, for `mrpo prepare`

The references have a million parameters and read about a million tokens in ten minutes on two
cores, so they are poor models. docs/choosing-references.md shows the results.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mrpo.benchmarks.real_pairs import write_pairs
from mrpo.benchmarks.workload import HH, messages
from mrpo.data.config import PrepareConfig
from mrpo.data.pairs import Pair, canonical_json
from mrpo.data.prepare import prepare
from mrpo.demo.models import Family
from mrpo.demo.pretrain import Recipe, pretrain_all

FILES = {"hh": HH, "gsm8k": "gsm8k_model_solutions.jsonl.gz", "truthfulqa": "truthfulqa.csv.gz"}
STRENGTHS: dict[Family, str] = {"llama": "hh", "mistral": "gsm8k", "qwen": "truthfulqa"}
EPOCHS, OWN = 2, 3  # passes; how often each has a chat of the reference's own set
READ = 0.5  # share of the prompts that the references read
RECIPE = Recipe(
    vocab_size=4096, hidden_size=128, layers=2, context=2048, batch_chats=16, learning_rate=3e-3
)


def all_pairs(data: Path) -> list[Pair]:
    """The usable pairs of the three sets; `source` names the set."""
    pairs: list[Pair] = []
    with TemporaryDirectory() as scratch:
        for name, file in FILES.items():
            source = data / file
            if name != "hh":
                source = Path(scratch, f"{name}.jsonl")
                write_pairs(name, data / file, source)
            shards = prepare(PrepareConfig(source=str(source), out=str(Path(scratch, name))))
            for shard in range(len(shards.names)):
                pairs += [replace(pair, source=name) for pair in shards.pairs(shard)]
    return pairs


def is_read(pair: Pair) -> bool:
    """Whether the references read it: by its prompt alone, independently of the splits."""
    return random.Random(canonical_json(pair.prompt)).random() < READ


def corpus(own: str, pairs: Sequence[Pair], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Chats for a reference that is to be strong in the set `own`, in batches of similar length."""
    for _ in range(EPOCHS):
        chats = [pair for pair in pairs for _ in range(OWN if pair.source == own else 1)]
        rng.shuffle(chats)
        chats.sort(key=lambda pair: len(canonical_json([pair.prompt, pair.chosen])))
        size = RECIPE.batch_chats
        batches = [chats[i : i + size] for i in range(0, len(chats), size)]
        rng.shuffle(batches)
        for pair in chain.from_iterable(batches):
            row = messages([pair])[0]
            yield {"messages": row["prompt"] + row["chosen"], "source": pair.source}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as JSONL; returns their number."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def real_references(data: Path, out: Path, seed: int = 0) -> int:
    """Write everything; existing references are kept. Returns an exit code."""
    out.mkdir(parents=True, exist_ok=True)
    pairs = all_pairs(data)
    read, kept = [p for p in pairs if is_read(p)], [p for p in pairs if not is_read(p)]
    rows = ({**messages([pair])[0], "source": pair.source} for pair in kept)
    print(f"{write(out / 'pairs.jsonl', rows):,} pairs in {out / 'pairs.jsonl'}", flush=True)
    corpora: dict[Family, Path] = {}
    for family, own in STRENGTHS.items():
        corpora[family] = out / f"corpus-{family}.jsonl"
        chats = write(corpora[family], corpus(own, read, random.Random(f"{seed}/{family}")))
        print(f"{chats:,} chats for {family}, {own} {OWN} times as often", flush=True)
    lines = [f"{family}: {{model: references/{family}, dtype: float32}}\n" for family in corpora]
    (out / "refs.yaml").write_text("".join(lines))
    return pretrain_all(corpora, out / "references", seed, RECIPE)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the three sets")
    parser.add_argument("--out", type=Path, default=Path("real-run"), help="the folder to write")
    arguments = parser.parse_args()
    if missing := [file for file in FILES.values() if not (arguments.data / file).is_file()]:
        sys.exit(f"error: {arguments.data / missing[0]}: no such file")
    return real_references(arguments.data, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
