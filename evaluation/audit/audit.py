"""`mrpo audit`: the pairs that most deserve a human look, as a table to review and read back.

    scores → doubts of the references (suspicion.py)  \
                                                       rank → top of each reason → audit.csv
    texts  → near duplicates with opposite labels     /                         → audit.csv.json

The table has one line a pair, evidence in words and an empty column `decision`. Filled in with
keep, exclude or flip, it is what `mrpo prepare --exclude audit.csv --flip audit.csv` reads.
audit.csv.json has the figures by source, which `mrpo report` shows; the settings are in
audit.csv.yaml. Full names, so that no other command's output of the same stem is overwritten.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...data.ids import DECISION, ID
from ...data.pairs import Pair
from ...data.prepare import prepare_line
from ...data.shards import PairShards
from ...data.store import open_store
from ...errors import UserError
from ...files import output_file, write_json, write_text
from ...settings import command, write_resolved
from ...terminal import print_table
from ..config import AuditConfig
from ..score_table import ScoreTable, byte_margins, load_complete_score_table, margins, pairs_at
from .near_duplicates import Opposites, candidates, contradiction, signature, text_of
from .suspicion import Suspicion, suspicion

AGAINST, DIVIDED, LENGTH, DUPLICATE = REASONS = (
    "references against label",
    "references divided",
    "length alone explains label",
    "near duplicate with opposite label",
)
UNLIKELY = 0.1  # probability of a label below which the table by source counts it
SOURCES_SHOWN = 20
VERIFIED_AT_ONCE = 4096  # candidates whose texts are in memory
PROMPT_CHARACTERS, RESPONSE_CHARACTERS = 1000, 2000  # of a cell; `mrpo inspect --row` shows all


@dataclass(slots=True)
class Suspect:
    """A listed pair: the reasons with the evidence for each, and its best rank among them."""

    row: int
    rank: int
    evidence: dict[str, str] = field(default_factory=dict)
    near_duplicate: int | None = None  # the row of the most alike


@command(AuditConfig)
def audit(config: AuditConfig) -> Path:
    """Write the table and the figures; returns the table's path."""
    out = output_file(config.out)
    _refuse_to_overwrite_decisions(out)
    pairs = PairShards(config.pairs)
    store = open_store(config.store)
    table = load_complete_score_table(pairs, store, config.refs, config.refs_config)
    doubts = suspicion(byte_margins(table), table.response_bytes, table.prompts)
    duplicates = find_opposites(pairs, table.places)
    suspects = ranked(table, doubts, duplicates, config.top)
    texts = pairs_at(pairs, table.places[[suspect.row for suspect in suspects]])
    figures = figures_by_source(table, doubts, duplicates)
    content = io.StringIO(newline="")
    csv.writer(content).writerows(_lines(table, doubts, suspects, texts))
    write_text(out, content.getvalue())
    write_json(Path(f"{out}.json"), figures)
    write_resolved(config, Path(f"{out}.yaml"))
    _print_summary(figures, len(suspects))
    review = prepare_line(pairs, "reviewed", exclude=str(out), flip=str(out))
    print(f"review     fill in the column {DECISION}, then run: {review}")
    print(out)
    return out


def find_opposites(pairs: PairShards, places: np.ndarray) -> list[Opposites]:
    """Near duplicates with opposite labels, by row over all shards; `places` as in `ScoreTable`."""
    signatures = []
    with tqdm(total=pairs.num_pairs, desc="near duplicates", unit=" pairs", disable=None) as bar:
        for shard, rows in enumerate(pairs.rows):
            signatures += [signature(pair) for pair in pairs.pairs(shard)]
            bar.update(rows)
    similar = candidates(np.array(signatures))
    verified: list[Opposites] = []
    for start in range(0, len(similar), VERIFIED_AT_ONCE):
        block = similar[start : start + VERIFIED_AT_ONCE]
        distinct = np.unique(block)
        texts = dict(zip(distinct.tolist(), pairs_at(pairs, places[distinct])))
        for row, twin in block.tolist():
            similarity = contradiction(texts[row], texts[twin])
            if similarity is not None:
                verified.append(Opposites(row, twin, similarity))
    return sorted(verified, key=lambda entry: -entry.similarity)


def ranked(
    table: ScoreTable, doubts: Suspicion, duplicates: Sequence[Opposites], top: int
) -> list[Suspect]:
    """The first `top` pairs of each reason, one entry a pair, the best rank first."""
    suspects: dict[int, Suspect] = {}

    def add(row: int, rank: int, reason: str, evidence: str) -> Suspect:
        suspect = suspects.setdefault(row, Suspect(row, rank))
        suspect.rank = min(suspect.rank, rank)
        suspect.evidence.setdefault(reason, evidence)
        return suspect

    scores = {AGAINST: doubts.against, DIVIDED: doubts.divided, LENGTH: doubts.length}
    for reason, score in scores.items():
        largest = np.argsort(-score, kind="stable")[:top].tolist()  # NaN, not suspect, comes last
        for rank, row in enumerate(largest):
            if not np.isnan(score[row]):
                add(row, rank, reason, _evidence(reason, table, doubts, row))
    for rank, match in enumerate(duplicates[:top]):
        for row, twin in ((match.first, match.second), (match.second, match.first)):
            evidence = f"row {twin} has its responses exchanged ({match.similarity:.0%} alike)"
            suspect = add(row, rank, DUPLICATE, evidence)
            if suspect.near_duplicate is None:
                suspect.near_duplicate = twin
    return sorted(suspects.values(), key=lambda suspect: (suspect.rank, suspect.row))


def figures_by_source(
    table: ScoreTable, doubts: Suspicion, duplicates: Sequence[Opposites]
) -> dict[str, Any]:
    """How many pairs of each source are suspect, and how well the references predict labels."""
    in_duplicate = np.zeros(len(table), bool)
    in_duplicate[[row for match in duplicates for row in (match.first, match.second)]] = True
    flags = {
        "pairs": np.ones(len(table), bool),
        AGAINST: doubts.label_probability < UNLIKELY if doubts.informed else doubts.against > 1,
        DIVIDED: ~np.isnan(doubts.divided),
        LENGTH: ~np.isnan(doubts.length),
        DUPLICATE: in_duplicate,
    }
    by_source = {
        name: {counted: int(flag[table.sources == name].sum()) for counted, flag in flags.items()}
        for name in sorted(set(table.sources.tolist()))
    }
    return {
        "pairs": len(table),
        "reference_weights": dict(zip(table.aliases, doubts.weights.tolist())),
        "length_weight": doubts.length_weight,
        "unlikely_below": UNLIKELY,
        "sources": by_source,
    }


def _evidence(reason: str, table: ScoreTable, doubts: Suspicion, row: int) -> str:
    """In words, for the reviewer."""
    units = doubts.units[row]
    if reason == AGAINST:
        against, scored = int((units < 0).sum()), int(np.isfinite(units).sum())
        objectors = f"{against} of {scored} references prefer the rejected response"
        if not doubts.informed:
            return objectors
        return f"{objectors}: the label has {doubts.label_probability[row]:.1%}"
    if reason == DIVIDED:
        best, worst = int(np.nanargmax(units)), int(np.nanargmin(units))
        return (
            f"{table.aliases[best]} supports the label by {units[best]:.1f} usual margins, "
            f"{table.aliases[worst]} opposes it by {-units[worst]:.1f}"
        )
    chosen, rejected = table.response_bytes[row]
    return (
        f"from its lengths ({chosen:.0f} against {rejected:.0f} bytes) alone the label has "
        f"{doubts.length_probability[row]:.0%}; adjusted for length, the references are against it"
    )


def _lines(
    table: ScoreTable, doubts: Suspicion, suspects: Sequence[Suspect], pairs: Sequence[Pair]
) -> Iterator[list[str]]:
    """The heading, and a line for each suspect with its pair."""
    yield [
        *(ID, DECISION, "reasons", "evidence", "source", "split", "row", "label probability"),
        *(f"margin {alias}" for alias in table.aliases),
        *("near duplicate of", "prompt", "chosen", "rejected"),
    ]
    nats = margins(table)
    for suspect, pair in zip(suspects, pairs):
        row, twin = suspect.row, suspect.near_duplicate
        probability = doubts.label_probability[row]
        yield [
            table.ids[row].tobytes().hex(),
            "",
            "; ".join(suspect.evidence),
            "; ".join(suspect.evidence.values()),
            _cell(pair.source),
            pair.split,
            str(row),
            f"{probability:.3f}" if np.isfinite(probability) else "",
            *(f"{margin:.2f}" if np.isfinite(margin) else "" for margin in nats[row]),
            "" if twin is None else table.ids[twin].tobytes().hex(),
            _cell(_last(text_of(pair.prompt), PROMPT_CHARACTERS)),
            _cell(_first(text_of(pair.chosen), RESPONSE_CHARACTERS)),
            _cell(_first(text_of(pair.rejected), RESPONSE_CHARACTERS)),
        ]


def _first(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + " …"


def _last(text: str, length: int) -> str:
    return text if len(text) <= length else "… " + text[-length:]


def _cell(text: str) -> str:
    """Text that a spreadsheet shows and never runs as a formula."""
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _print_summary(figures: Mapping[str, Any], listed: int) -> None:
    """The fitted weights, and the table by source, the largest first."""
    weights = figures["reference_weights"]
    shown = ", ".join(f"{alias} {weight:.2f}" for alias, weight in weights.items())
    print(f"weights    {shown} (log-odds of the label per usual margin)")
    if not any(weights.values()):
        print("WARNING: no reference predicts these labels; all count equally, so review with care")
    longer = "longer" if figures["length_weight"] > 0 else "shorter"
    tendency = f"the {longer} response tends to be chosen" if figures["length_weight"] else ""
    print(f"length     {tendency or 'predicts no label here'}")
    sources = sorted(figures["sources"].items(), key=lambda item: -item[1]["pairs"])
    rows = [
        [ascii(name)[1:-1][:40], *(f"{count:,}" for count in counts.values())]
        for name, counts in sources[:SOURCES_SHOWN]
    ]
    print_table([["source", "pairs", "label unlikely", "divided", "by length", "opposite"], *rows])
    if len(sources) > SOURCES_SHOWN:
        print(f"and {len(sources) - SOURCES_SHOWN:,} smaller sources")
    print(f"listed     {listed:,} pairs")


def _refuse_to_overwrite_decisions(out: Path) -> None:
    """Raises `UserError` where the file holds decisions that somebody made."""
    if not out.is_file():
        return
    with out.open(newline="", encoding="utf-8") as file:
        decided = sum(bool((line.get(DECISION) or "").strip()) for line in csv.DictReader(file))
    if decided:
        raise UserError(
            f"--out {out} holds {decided:,} decisions; name another file, or move it away"
        )
