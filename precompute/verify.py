"""`mrpo store verify`: every digest, and with --rescore a sample of pairs scored again.

`score` scores the sample into a temporary store, with the same engine in processes of its own.
Where the weights have changed, that store gets another identity, and this is reported instead of a
difference.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..data.config import VerifyConfig
from ..data.ids import IdIndex, identity_of, ids_to_numpy
from ..data.references import ReferenceSpec, inputs_here, load_refs
from ..data.shards import PairShards
from ..data.store import ReferenceRecord, Store, open_store
from ..data.store.commands import selected, verify_digests
from ..errors import UserError
from ..settings import command
from .preflight import SERVER
from .run import score
from .scoring import write_sample

COLUMNS = ["response_id", "reason", "logp", "tokens"]
# Nats per token that two runs in a precision may differ by: in 16 bits another batch size alone
# moves single tokens by 0.05, and means by far less.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.02}
FLOOR = 1e-3  # nats per response, however short
MEAN_SHARE = 0.2  # of the tolerance, for the mean over all responses, where errors cancel


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether a store is as it was written."""

    damaged: bool  # a file differs from its digest
    agrees: dict[str, bool]  # by `alias@identity`: whether its sample was scored the same again

    @property
    def exit_code(self) -> int:
        return int(self.damaged or not all(self.agrees.values()))


@command(VerifyConfig)
def verify(config: VerifyConfig) -> Verification:
    """Check every digest, and score a sample of pairs again; prints what was found.

    Raises `UserError` where there is no store, or no pairs to score again.
    """
    damaged = verify_digests(config) != 0
    agrees: dict[str, bool] = {}
    if config.rescore == 0:
        return Verification(damaged, agrees)
    store, specs = open_store(config.store), load_refs(config.refs_config)
    entries = {alias: spec.entry() for alias, spec in specs.items()}
    for identity in selected(store, config.refs):
        names = [record for record in store.names_of(identity) if not record.imported]
        current = [
            record
            for record in names
            if record.entry == entries.get(record.alias)
            and not _elsewhere(record, specs[record.alias])
        ]
        if current:
            record = current[-1]
            agrees[_title(record)] = _scored_again(store, record, specs[record.alias], config)
        elif names:
            aliases = ", ".join(record.alias for record in names)
            reason = f"{config.refs_config} has no equal entry of the same folder"
            print(f"skipped {aliases}@{identity[:12]}: {reason}")
    return Verification(damaged, agrees)


def _title(record: ReferenceRecord) -> str:
    return f"{record.alias}@{record.identity[:12]}"


def _elsewhere(record: ReferenceRecord, spec: ReferenceSpec) -> bool:
    """Whether an equal entry of another project scored it, from other files."""
    here = inputs_here(spec)
    if record.changed(here):
        return record.origin(spec, {}) == "elsewhere"
    return record.origin(spec, here) == "elsewhere"


def _scored_again(
    store: Store, record: ReferenceRecord, spec: ReferenceSpec, config: VerifyConfig
) -> bool:
    """Score a sample of a reference's pairs again; prints and returns whether the scores agree."""
    pairs = PairShards(config.pairs or _last_folder(record))
    stored = store.scores(record.identity).read(COLUMNS)
    stored = stored.filter(stored["reason"].is_null())
    engine = record.runs[-1].get("engine") if record.runs else None
    with tempfile.TemporaryDirectory(prefix="mrpo-verify-") as folder:
        ids = ids_to_numpy(stored["response_id"])
        sample = write_sample(pairs, config.rescore, Path(folder) / "pairs", ids)
        if sample is None:
            raise UserError(
                f"--rescore: {pairs.path} has no pair with a score of {_title(record)}; name "
                "others with --pairs"
            )
        again = Store(Path(folder) / "store")
        again.merge([record])  # so that the alias keeps the Hub commit it has in the store
        score(
            [spec],
            sample,
            again,
            engine=engine if engine in ("hf", "vllm") else "auto",
            bf16="autocast" in record.inputs,
        )
        # An unverified server's scores are compared with those of its reference.
        inputs = {key: value for key, value in record.inputs.items() if key != SERVER}
        rows = again.scores(identity_of(inputs))
        if rows.names():
            return _compare(record, stored, rows.read(COLUMNS))
    print(f"differs {_title(record)}: is another reference now (weights, tokenizer or template)")
    return False


def _last_folder(record: ReferenceRecord) -> str:
    for run in reversed(record.runs):
        folder = run.get("pairs_folder")
        if folder and Path(folder).is_dir():
            return str(folder)
    raise UserError(
        f"--rescore: the pairs that {record.alias} scored are not where they were; name a folder "
        "of pairs with --pairs"
    )


def _compare(record: ReferenceRecord, stored: pa.Table, again: pa.Table) -> bool:
    known = IdIndex(ids_to_numpy(stored["response_id"]))
    rows = known.find(ids_to_numpy(again["response_id"]))
    before = stored.take(pa.array(rows))
    refused = again["reason"].is_valid().to_numpy()
    if refused.any():
        print(
            f"differs {_title(record)}: {refused.sum()} of {len(again)} responses are refused now"
        )
        return False
    dtype = str(record.inputs.get("dtype"))
    tokens = before["tokens"].to_numpy()
    change = again["logp"].to_numpy() - before["logp"].to_numpy()
    tolerance = TOLERANCE.get(dtype, max(TOLERANCE.values()))
    same_tokens = bool((tokens == again["tokens"].to_numpy()).all())
    close = bool((np.abs(change) <= FLOOR + tolerance * tokens).all())
    centered = bool(abs(change.sum()) <= FLOOR + MEAN_SHARE * tolerance * tokens.sum())
    agrees = same_tokens and close and centered
    print(
        f"{'agrees ' if agrees else 'differs'} {_title(record)}: {len(again):,} responses scored "
        f"again in {dtype}, largest difference {np.abs(change).max():.2g} nats a response, "
        f"{change.sum() / tokens.sum():+.2g} a token on average"
        + ("" if same_tokens else "; the numbers of tokens differ")
    )
    return agrees
