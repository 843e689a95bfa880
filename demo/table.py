"""The table at the end of the demo: who ranks how many of the held-out pairs rightly.

Printed as it came out, with the uncertainty that so few pairs leave.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..data.references import load_refs
from ..data.shards import PairShards
from ..data.store import Store
from .accuracy import (
    HeldOutPairs,
    Right,
    difference,
    interval,
    policy_is_right,
    reference_is_right,
)
from .domains import DOMAINS

NAME_WIDTH, CELL_WIDTH = 38, 18
HEADING = """Held-out preference accuracy: the share of pairs, in %, whose right reply has the higher
log-prob (in brackets the 95 % interval). No fact, sum or request of these pairs was trained on."""


def held_out_table(out: Path, methods: dict[str, str]) -> str:
    """Judge the references and the trained policies in a demo's folder; `methods` by run."""
    held_out = HeldOutPairs.of(PairShards(out / "pairs"))
    specs, store = load_refs(out / "refs.yaml"), Store(out / "store")
    rows: dict[str, Right] = {}
    for number, alias in enumerate(specs):
        scores = store.scores(store.resolve(alias, specs).identity)
        label = f"reference {alias}" + " = policy untrained" * (number == 0)
        rows[label] = reference_is_right(scores, held_out.ids)
    trained = {
        f"trained with {method}": policy_is_right(out / "runs" / run / "model", held_out.pairs)
        for run, method in methods.items()
    }
    lines = [HEADING, "", *_header(held_out)]
    lines += [_line(label, right, held_out) for label, right in (rows | trained).items()]
    *others, last = trained
    lines += ["", f"{last}, against (paired, bootstrap over the pairs):"]
    lines += [
        "  {:<{}}{:+.1f} points ({:+.1f} to {:+.1f})".format(
            other, NAME_WIDTH - 2, *(100 * x for x in difference(trained[last], trained[other]))
        )
        for other in others
    ]
    return "\n".join(lines) + "\n"


def _header(held_out: HeldOutPairs) -> list[str]:
    names = [*DOMAINS, "overall"]
    counts = [int((held_out.domains == domain).sum()) for domain in DOMAINS]
    pairs = [f"{count:,} pairs" for count in [*counts, len(held_out.pairs)]]
    return [
        " " * NAME_WIDTH + "".join(f"{text:<{CELL_WIDTH}}" for text in row).rstrip()
        for row in (names, pairs)
    ]


def _line(label: str, right: Right, held_out: HeldOutPairs) -> str:
    parts = [*(right[held_out.domains == domain] for domain in DOMAINS), right]
    return f"{label:<{NAME_WIDTH}}" + "".join(f"{_cell(p):<{CELL_WIDTH}}" for p in parts).rstrip()


def _cell(right: Right) -> str:
    if not len(right):
        return "–"
    low, high = interval(right)
    return f"{100 * np.mean(right):.1f} ({100 * low:.1f}–{100 * high:.1f})"
