"""The table that `mrpo audit` writes: one line a pair, an empty `decision`, evidence in words.

Texts are cut to what a person needs to decide; `mrpo inspect --row` shows a pair whole.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..data.pairs import Pair
from ..data.reviewed import DECISION, ID
from .near_duplicates import text_of
from .score_table import ScoreTable
from .scored import margins
from .suspicion import Suspicion

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
