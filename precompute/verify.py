"""`mrpo store verify`: every digest, and with --rescore a sample of pairs scored again.

The sample is a small folder of pairs and a store of its own, filled by `mrpo precompute` as the
first time: the same processes, engine and weights. Where the weights are others now, that store
gets another identity, and this is said instead of a difference.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..data.config import VerifyConfig
from ..data.ids import IdIndex, ids_to_numpy
from ..data.references import ReferenceSpec, load_refs
from ..data.shards import PairShards, ShardWriter
from ..data.store import ReferenceRecord, ScoreFiles, Store, open_store
from ..data.store.commands import selected, verify_digests
from ..errors import UserError
from .config import PrecomputeConfig

COLUMNS = ["pair_id", "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"]
# Nats a token that two runs in that precision may differ by: in 16 bits another batch size alone
# moves single tokens by 0.05, and means by far less.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.02}
FLOOR = 1e-3  # nats a response, however short
MEAN_SHARE = 0.2  # of the tolerance, for the mean over all responses, where errors cancel


def verify(config: VerifyConfig) -> int:
    """1 where a file is damaged or a score is not found again, else 0."""
    code = verify_digests(config)
    if config.rescore == 0:
        return code
    if config.rescore < 0:
        raise UserError(f"--rescore {config.rescore}: must be a number of pairs, from 0")
    store, specs = open_store(config.store), load_refs(config.refs_config)
    for identity in selected(store, config.refs):
        names = [record for record in store.names_of(identity) if not record.imported]
        named = [record for record in names if _is_entry(record, specs)]
        if named:
            code |= not _found_again(store, named[-1], config)
        elif names:
            aliases = ", ".join(record.alias for record in names)
            print(f"skipped {aliases}@{identity[:12]}: {config.refs_config} has no equal entry")
    return int(code)


def _is_entry(record: ReferenceRecord, specs: dict[str, ReferenceSpec]) -> bool:
    return record.alias in specs and record.entry == specs[record.alias].entry()


def _found_again(store: Store, record: ReferenceRecord, config: VerifyConfig) -> bool:
    """Score a sample of a reference's pairs again, print how it compares; whether it agrees."""
    title = f"{record.alias}@{record.identity[:12]}"
    pairs = PairShards(config.pairs or _last_folder(record))
    stored = store.scores(record.identity).read([*COLUMNS, "reason"])
    stored = stored.filter(stored["reason"].is_null())
    with tempfile.TemporaryDirectory(prefix="mrpo-verify-") as folder:
        sample = _write_sample(pairs, stored, config.rescore, Path(folder) / "pairs")
        if sample == 0:
            raise UserError(
                f"--rescore: {pairs.path} has no pair with a score of {title}; name others "
                "with --pairs"
            )
        again = Store(Path(folder) / "store")
        again.merge([record])  # so that an alias means the commit that it meant then
        _score(record, config, Path(folder))
        rows = again.scores(record.identity)
        if not rows.names():
            print(f"differs {title}: is another reference now (weights, tokenizer or template)")
            return False
        return _agrees(title, str(record.inputs.get("dtype")), stored, rows)


def _last_folder(record: ReferenceRecord) -> str:
    for run in reversed(record.runs):
        folder = run.get("pairs_folder")
        if folder and Path(folder).is_dir():
            return str(folder)
    raise UserError(
        f"--rescore: the pairs that {record.alias} scored are not where they were; name a folder "
        "of pairs with --pairs"
    )


def _write_sample(pairs: PairShards, stored: pa.Table, count: int, folder: Path) -> int:
    """Write up to `count` pairs that have a score, chosen at random; returns how many."""
    index = IdIndex(ids_to_numpy(stored["pair_id"]))
    known = [index.find(pairs.pair_ids(shard)) >= 0 for shard in range(len(pairs.names))]
    places = np.array(
        [(shard, row) for shard, rows in enumerate(known) for row in np.flatnonzero(rows)]
    )
    chosen = np.random.default_rng().permutation(len(places))[:count]
    if len(chosen) == 0:
        return 0
    folder.mkdir()
    writer = ShardWriter(folder, len(chosen))
    for shard, row in places[np.sort(chosen)].tolist():
        (pair,) = pairs.pairs(shard, [row])
        writer.add(pair, pair.id)
    writer.finish({})
    return len(chosen)


def _score(record: ReferenceRecord, config: VerifyConfig, folder: Path) -> None:
    from .run import precompute

    engine = record.runs[-1].get("engine") if record.runs else None
    precompute(
        PrecomputeConfig(
            refs=record.alias,
            pairs=str(folder / "pairs"),
            refs_config=config.refs_config,
            store=str(folder / "store"),
            engine=engine if engine in ("hf", "vllm") else "auto",
            bf16="autocast" in record.inputs,
        )
    )


def _agrees(title: str, dtype: str, stored: pa.Table, scores: ScoreFiles) -> bool:
    again = scores.read([*COLUMNS, "reason"])
    places = IdIndex(ids_to_numpy(stored["pair_id"])).find(ids_to_numpy(again["pair_id"]))
    before = stored.take(pa.array(places))
    refused = again["reason"].is_valid().to_numpy()
    if refused.any():
        print(f"differs {title}: {refused.sum()} of {len(again)} pairs are refused now")
        return False
    tokens = _both(before, "tokens")
    moved = _both(again, "logp") - _both(before, "logp")
    tolerance = TOLERANCE.get(dtype, max(TOLERANCE.values()))
    same_tokens = bool((tokens == _both(again, "tokens")).all())
    close = bool((np.abs(moved) <= FLOOR + tolerance * tokens).all())
    centered = bool(abs(moved.sum()) <= FLOOR + MEAN_SHARE * tolerance * tokens.sum())
    agrees = same_tokens and close and centered
    print(
        f"{'agrees ' if agrees else 'differs'} {title}: {len(again):,} pairs scored again in "
        f"{dtype}, largest difference {np.abs(moved).max():.2g} nats a response, "
        f"{moved.sum() / tokens.sum():+.2g} a token on average"
        + ("" if same_tokens else "; the numbers of tokens differ")
    )
    return agrees


def _both(table: pa.Table, quantity: str) -> np.ndarray:
    """[2n]: the column of the chosen responses, then that of the rejected ones."""
    names: Sequence[str] = [f"chosen_{quantity}", f"rejected_{quantity}"]
    return np.concatenate([table[name].to_numpy() for name in names]).astype(np.float64)
