"""The table that `mrpo audit` writes: one line a pair, an empty `decision`, evidence in words.

Texts are cut to what a person needs to decide; `mrpo inspect --row` shows a pair whole.


`mrpo audit`: the pairs that most deserve a human look, as a table to be reviewed and read back.

    scores → suspicion by references (suspicion.py)  \
                                                      rank → top of each reason → audit.csv
    texts  → near duplicates with opposite labels    /                         → audit.json

The table has an empty column `decision`. Filled in with keep, exclude or flip, it is what
`mrpo prepare --exclude audit.csv --flip audit.csv` reads. audit.json has the figures by source,
which `mrpo report` shows.
"""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...data.pairs import Pair
from ...data.prepare import SETTINGS
from ...data.reviewed import DECISION, ID
from ...data.shards import PairShards
from ...data.store import open_store
from ...errors import UserError
from ...settings import write_resolved
from ...terminal import print_table
from ..config import AuditConfig
from ..score_table import ScoreTable, byte_margins, load_complete_score_table, margins
from .near_duplicates import Opposites, band_keys, candidates, opposites, text_of
from .suspicion import Suspicion, suspicion

PROMPT_CHARACTERS, RESPONSE_CHARACTERS = 1000, 2000


@dataclass(slots=True)
class Suspect:
    """A listed pair: the reasons with the evidence for each, and its best rank among them."""

    row: int
    rank: int
    evidence: dict[str, str] = field(default_factory=dict)
    other: int | None = None  # the row of its near duplicate


def write_table(
    out: Path,
    data: ScoreTable,
    found: Suspicion,
    suspects: Sequence[Suspect],
    texts: Mapping[int, Pair],
) -> None:
    """One line a pair; complete or not there."""
    partial = out.with_name(f".{out.name}.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        table: csv.DictWriter[str] | None = None
        for line in _lines(data, found, suspects, texts):
            if table is None:
                table = csv.DictWriter(file, list(line))
                table.writeheader()
            table.writerow(line)
        if table is None:
            file.write(f"{ID},{DECISION}\n")
    partial.rename(out)


def _lines(
    data: ScoreTable,
    found: Suspicion,
    suspects: Sequence[Suspect],
    texts: Mapping[int, Pair],
) -> Iterator[dict[str, str]]:
    nats = margins(data)
    for suspect in suspects:
        row, pair = suspect.row, texts[suspect.row]
        by_reference = {
            f"margin {alias}": f"{margin:.2f}" if np.isfinite(margin) else ""
            for alias, margin in zip(data.aliases, nats[row])
        }
        probability = found.label_probability[row]
        other = None if suspect.other is None else data.ids[suspect.other].tobytes().hex()
        yield {
            ID: data.ids[row].tobytes().hex(),
            DECISION: "",
            "reasons": "; ".join(suspect.evidence),
            "evidence": "; ".join(suspect.evidence.values()),
            "source": _cell(pair.source),
            "split": pair.split,
            "row": str(row),
            "label probability": f"{probability:.3f}" if np.isfinite(probability) else "",
            **by_reference,
            "near duplicate of": other or "",
            "prompt": _cell(_last(text_of(pair.prompt), PROMPT_CHARACTERS)),
            "chosen": _cell(_first(text_of(pair.chosen), RESPONSE_CHARACTERS)),
            "rejected": _cell(_first(text_of(pair.rejected), RESPONSE_CHARACTERS)),
        }


def _first(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + " …"


def _last(text: str, length: int) -> str:
    return text if len(text) <= length else "… " + text[-length:]


def _cell(text: str) -> str:
    """Text that a spreadsheet shows and never runs as a formula."""
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


AGAINST, DIVIDED, LENGTH, DUPLICATE = REASONS = (
    "references against label",
    "references divided",
    "length alone explains label",
    "near duplicate with opposite label",
)
UNLIKELY = 0.1  # probability of a label below which the table by source counts it
SOURCES_SHOWN = 20
VERIFIED_AT_ONCE = 4096  # candidates whose texts are in memory


def audit(config: AuditConfig) -> Path:
    """Write the table and the figures; returns the table's path."""
    out = _free(Path(config.out))
    pairs = PairShards(config.pairs)
    data = load_complete_score_table(
        pairs, open_store(config.store), config.refs, config.refs_config
    )
    found = suspicion(byte_margins(data), data.response_bytes, data.prompts)
    duplicates = find_opposites(pairs)
    suspects = ranked(data, found, duplicates, config.top)
    texts = pairs_at(pairs, np.array(sorted(suspect.row for suspect in suspects), np.int64))
    figures = figures_by_source(data, found, duplicates)
    write_table(out, data, found, suspects, texts)
    content = json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False)
    out.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
    write_resolved(config, out.with_suffix(".yaml"))
    _print_summary(figures, len(suspects))
    review = ("mrpo", "prepare", "--config", str(pairs.path / SETTINGS))
    line = shlex.join([*review, "--exclude", str(out), "--flip", str(out)])
    print(f"review     fill in the column {DECISION}, then run: {line}")
    print(out)
    return out


def find_opposites(pairs: PairShards) -> list[Opposites]:
    """Near duplicates with opposite labels, by row over all shards."""
    keys = []
    with tqdm(total=pairs.num_pairs, desc="near duplicates", unit=" pairs", disable=None) as bar:
        for shard, rows in enumerate(pairs.rows):
            keys += [band_keys(pair) for pair in pairs.pairs(shard)]
            bar.update(rows)
    alike = candidates(np.array(keys))
    found: list[Opposites] = []
    for start in range(0, len(alike), VERIFIED_AT_ONCE):
        block = alike[start : start + VERIFIED_AT_ONCE]
        texts = pairs_at(pairs, np.unique(block))
        found += opposites(block, *([texts[row] for row in column] for column in block.T.tolist()))
    return sorted(found, key=lambda entry: -entry.similarity)


def pairs_at(pairs: PairShards, rows: np.ndarray) -> dict[int, Pair]:
    """The pairs of some rows, counted over all shards; reads each shard at most once."""
    starts = np.cumsum([0, *pairs.rows])
    found: dict[int, Pair] = {}
    for shard in np.unique(np.searchsorted(starts, rows, side="right") - 1):
        inside = rows[(rows >= starts[shard]) & (rows < starts[shard + 1])]
        read = pairs.pairs(int(shard), (inside - starts[shard]).tolist())
        found |= dict(zip(inside.tolist(), read))
    return found


def ranked(
    data: ScoreTable, found: Suspicion, duplicates: Sequence[Opposites], top: int
) -> list[Suspect]:
    """The first `top` pairs of each reason, one entry a pair, the best rank first."""
    suspects: dict[int, Suspect] = {}

    def note(row: int, rank: int, reason: str, evidence: str) -> Suspect:
        suspect = suspects.setdefault(row, Suspect(row, rank))
        suspect.rank = min(suspect.rank, rank)
        suspect.evidence.setdefault(reason, evidence)
        return suspect

    scores = {AGAINST: found.against, DIVIDED: found.divided, LENGTH: found.length}
    for reason, score in scores.items():
        for rank, row in enumerate(_largest(score, top)):
            note(row, rank, reason, _evidence(reason, data, found, row))
    for rank, both in enumerate(duplicates[:top]):
        for row, other in ((both.first, both.second), (both.second, both.first)):
            text = f"its responses are the other way round in row {other} ({both.similarity:.0%})"
            suspect = note(row, rank, DUPLICATE, text)
            suspect.other = other if suspect.other is None else suspect.other
    return sorted(suspects.values(), key=lambda suspect: (suspect.rank, suspect.row))


def figures_by_source(
    data: ScoreTable, found: Suspicion, duplicates: Sequence[Opposites]
) -> dict[str, Any]:
    """How many pairs of each source are suspect, and what the references are worth here."""
    in_duplicate = np.zeros(len(data), bool)
    in_duplicate[[row for both in duplicates for row in (both.first, both.second)]] = True
    flags = {
        AGAINST: found.label_probability < UNLIKELY if found.informed else found.against > 1,
        DIVIDED: ~np.isnan(found.divided),
        LENGTH: ~np.isnan(found.length),
        DUPLICATE: in_duplicate,
    }
    names = sorted(set(data.sources.tolist()))
    by_source = {
        name: {"pairs": int((data.sources == name).sum())}
        | {reason: int(flag[data.sources == name].sum()) for reason, flag in flags.items()}
        for name in names
    }
    return {
        "pairs": len(data),
        "reference_weights": dict(zip(data.aliases, found.weights.tolist())),
        "length_weight": found.length_weight,
        "unlikely_below": UNLIKELY,
        "sources": by_source,
    }


def _evidence(reason: str, data: ScoreTable, found: Suspicion, row: int) -> str:
    """In words, for the person who looks."""
    units = found.units[row]
    seen = int(np.isfinite(units).sum())
    if reason == AGAINST:
        objectors = f"{int((units < 0).sum())} of {seen} references prefer the rejected response"
        if not found.informed:
            return objectors
        return f"{objectors}: the label has {found.label_probability[row]:.1%}"
    if reason == DIVIDED:
        best, worst = int(np.nanargmax(units)), int(np.nanargmin(units))
        return (
            f"{data.aliases[best]} is for the label by {units[best]:.1f} usual margins, "
            f"{data.aliases[worst]} against it by {-units[worst]:.1f}"
        )
    chosen, rejected = data.response_bytes[row]
    lengths = f"{chosen:.0f} against {rejected:.0f} bytes"
    return (
        f"from its lengths ({lengths}) alone the label has {found.length_probability[row]:.0%}; "
        "length taken out, the references are against it"
    )


def _print_summary(figures: Mapping[str, Any], listed: int) -> None:
    """What the numbers rest on, and the table by source, the largest first."""
    weights = figures["reference_weights"]
    said = ", ".join(f"{alias} {weight:.2f}" for alias, weight in weights.items())
    print(f"weights    {said} (log-odds of the label per usual margin)")
    if not any(weights.values()):
        print("WARNING: no reference predicts the labels here; all count alike, look with care")
    longer = "longer" if figures["length_weight"] > 0 else "shorter"
    tendency = f"the {longer} response tends to be chosen" if figures["length_weight"] else ""
    print(f"length     {tendency or 'predicts no label here'}")
    sources = sorted(figures["sources"].items(), key=lambda item: -item[1]["pairs"])
    rows: list[tuple[str, ...]] = [
        ("source", "pairs", "label unlikely", "divided", "by length", "opposite")
    ]
    rows += [
        (ascii(name)[1:-1][:40], *(f"{count:,}" for count in counts.values()))
        for name, counts in sources[:SOURCES_SHOWN]
    ]
    print_table(rows)
    if len(sources) > SOURCES_SHOWN:
        print(f"and {len(sources) - SOURCES_SHOWN:,} smaller sources")
    print(f"listed     {listed:,} pairs")


def _largest(scores: np.ndarray, top: int) -> list[int]:
    """Rows by falling score, without those that have none."""
    order = np.argsort(-scores, kind="stable")  # NaN comes last
    return [row for row in order[:top].tolist() if not np.isnan(scores[row])]


def _free(out: Path) -> Path:
    """The path, unless writing there would lose decisions that somebody made."""
    if not out.is_file():
        if not out.absolute().parent.is_dir():
            raise UserError(f"--out {out}: {out.parent} is no folder; make it, or name another")
        return out
    with out.open(newline="", encoding="utf-8") as file:
        decided = sum(bool((line.get(DECISION) or "").strip()) for line in csv.DictReader(file))
    if decided:
        raise UserError(
            f"--out {out} holds {decided:,} decisions; name another file, or move it away"
        )
    return out
