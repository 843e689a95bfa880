"""`mrpo export`: pairs with the virtual reference's log-probs, for other people's trainers.

The folder holds one Parquet file a split, which `datasets.load_dataset(folder)` reads: `prompt`,
`chosen`, `rejected` as TRL expects them, `tools` and `chat_template_kwargs` where pairs have
them, `ref_chosen_logps` and `ref_rejected_logps` (float64, nats, of the whole response) and
`pair_id`. The method is reduced to one number a response, so multi-dpo, which has no virtual
reference, is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, Features, Json, List, Value

from ..data.join import join, resolve_references
from ..data.shards import PairShards
from ..data.store import open_store
from ..data.tables import TURNS
from ..errors import UserError
from ..files import new_folder
from ..method.grammar import epsilon_warning
from ..method.objective import SEPARATE, Method
from ..settings import command, write_resolved
from .config import ExportConfig
from .dataset import TrainingPairs, method_of

SETTINGS = "export.yaml"
SPLITS = ("train", "validation")


@command(ExportConfig)
def export(config: ExportConfig) -> Path:
    """Write the folder `out`, which appears complete or not at all; returns it.

    Prints the method and the number of pairs. Raises `UserError` for a method without a virtual
    reference, pairs that are not scored, and a folder that is not an earlier export.
    """
    method = method_of(config)
    if method.kind == SEPARATE:
        raise UserError(
            f"method {config.method!r} averages losses and has no virtual reference to export; "
            "export mrpo or geometric, or train it here with `mrpo train`"
        )
    if method.reliable or method.online:
        part = "+reliable" if method.reliable else f"+{method.weighting}"
        raise UserError(
            f"method {config.method!r}: {part} acts on the loss while it trains, which an export "
            "can't hold; leave it out, or train it here with `mrpo train`"
        )
    pairs = PairShards(config.pairs)
    store = open_store(config.store)
    records = resolve_references(pairs, store, method.references, config.refs_config)
    out = Path(config.out)
    _check_out(out)
    with new_folder(out) as folder:
        joined = join(pairs, store, records, folder / "scores", refs_config=config.refs_config)
        source = TrainingPairs(pairs, joined, prompt_numbers=method.reads_prompts)
        method = source.prepared(method)
        counts = _write(source, method, folder)
        shutil.rmtree(joined.path)
        write_resolved(config, folder / SETTINGS)
    print(f"method     {method}")
    if warning := epsilon_warning(method.epsilon):
        print(f"WARNING: {warning}")
    for line in method.describe():
        print(line)
    for split in SPLITS:
        print(f"{split:<10} {counts[split]:,} pairs")
    print(f"left out   {pairs.num_pairs - sum(counts.values()):,} pairs without a usable score")
    print(f'load       datasets.load_dataset("{out}"); for TRL see docs/trl.md')
    print(out)
    return out


def _check_out(out: Path) -> None:
    """Raise `UserError` unless the folder can be created, is empty, or is an earlier export."""
    first = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not first.is_dir():
        raise UserError(f"--out {out}: {first} is a file; name a folder that is not below one")
    if out.exists() and any(out.iterdir()) and not (out / SETTINGS).is_file():
        raise UserError(f"--out {out} is neither empty nor an earlier export; name another folder")


def _write(source: TrainingPairs, method: Method, folder: Path) -> dict[str, int]:
    """Write a Parquet file for each split; returns its number of pairs.

    One shard is in memory at a time.
    """
    features = _features(source.pairs)
    counts = {}
    for split in SPLITS:
        counts[split] = 0
        path = folder / f"{split}.parquet"
        with pq.ParquetWriter(path, features.arrow_schema, compression="zstd") as writer:
            for shard in range(source.num_shards):
                rows = list(_rows(source, method, shard, split, features))
                if rows:
                    writer.write_table(Dataset.from_list(rows, features=features).data.table)
                counts[split] += len(rows)
        if not counts[split]:
            path.unlink()  # load_dataset refuses a file without rows
    if not any(counts.values()):
        raise UserError(
            f"{source.pairs.path}: no pair has a usable score for {method}; "
            "choose another base, the first of --refs"
        )
    return counts


def _rows(
    source: TrainingPairs, method: Method, shard: int, split: str, features: Features
) -> Iterator[dict[str, Any]]:
    scores, held_out = source.scores(shard)
    targets = method.targets(scores, held_out=split == "validation")
    exported = method.usable(scores) & (held_out == (split == "validation"))
    pairs, ids = source.pairs.pairs(shard), source.pairs.pair_ids(shard)
    for row in exported.nonzero()[0]:
        pair = pairs[row]
        values = {name: getattr(pair, name) for name in (*TURNS, "tools")} | {
            "chat_template_kwargs": pair.chat_template_kwargs or {},
            "ref_chosen_logps": float(targets.virtual_chosen_logps[row]),
            "ref_rejected_logps": float(targets.virtual_rejected_logps[row]),
            "pair_id": ids[row].tobytes().hex(),
        }
        yield {name: values[name] for name in features}


def _features(pairs: PairShards) -> Features:
    """The columns; messages as JSON columns of `datasets`, which keep all of their fields."""
    turns = List(Json()) if pairs.kind == "messages" else Value("string")
    columns: dict[str, Any] = dict.fromkeys(TURNS, turns)
    for name, kind in (("tools", List(Json())), ("chat_template_kwargs", Json())):
        shards = range(len(pairs.names))
        if any(pairs.table(shard, [name])[name].null_count < pairs.rows[shard] for shard in shards):
            columns[name] = kind
    logps = dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), Value("float64"))
    return Features(columns | logps | {"pair_id": Value("string")})
