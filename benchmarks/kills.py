"""Kills a real `mrpo precompute` many times until it is done, and checks the store it leaves.

    python benchmarks/kills.py --kills 100 --publish

Two runs at a time work on the same store, each until SIGKILL ends its parent, its worker, or both:
at a random moment while it starts, loads or scores, or around the flush and the rename of a score
file or of the reference's record. A last run finishes; the store is then compared with that of an
undisturbed run. A row counts as scored when the scoring of its shard begins. The test
tests/precompute/test_kills.py is the same with 8 kills.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mrpo.benchmarks.killed_run import VICTIMS, Kill, Run, finish, killed, make_kills
from mrpo.data.config import PrepareConfig
from mrpo.data.prepare import prepare
from mrpo.data.store import ScoreFiles, Store
from mrpo.demo.models import write_reference
from mrpo.files import TEMPORARY

WRITERS = 2  # runs at a time
SHARD = 4  # pairs
ROWS = 2 * SHARD  # of different responses
SHARDS_A_KILL = 6  # enough for all kills to come before the end
CLOSE = 1e-3  # nats
PAGE = Path(__file__).resolve().parents[1] / "docs" / "store.md"


@dataclass(slots=True)
class Result:
    """The store after the last run, compared with that of an undisturbed run."""

    kills: list[Kill]
    responses: int
    scored: int  # rows, over all runs
    repeated: int  # rows scored again, the most for a single kill
    unscored: int  # responses
    differing: int  # responses that only one of the stores has, or with other counts
    duplicates: int  # rows beyond one per response in the files
    damaged: int  # files, after any kill
    difference: float  # nats, the largest
    verified: bool
    left: int  # temporary files of killed writers
    seconds: float

    def broken(self) -> list[str]:
        """The guarantees that did not hold."""
        promises = {
            "the same ids and counts": self.unscored == self.differing == 0,
            f"log-probs within {CLOSE:g} nats": self.difference <= CLOSE,
            "no row twice": self.duplicates == 0,
            "no damaged file": self.damaged == 0,
            "each kill repeats at most one shard": self.repeated <= ROWS
            and 0 <= self.scored - self.responses <= len(self.kills) * ROWS,
            "`mrpo store verify` passes": self.verified,
        }
        return [text for text, held in promises.items() if not held]

    def table(self) -> str:
        """Markdown: measured values beside the promised ones."""
        victims = Counter(kill.victim for kill in self.kills)
        who = ", ".join(f"{name} {victims[name]}" for name in VICTIMS)
        rows = [
            (
                f"SIGKILLs of a run over {self.responses:,} responses ({who})",
                f"{len(self.kills)}",
                "–",
            ),
            ("responses without a score", f"{self.unscored}", "0"),
            ("responses that differ in id or counts", f"{self.differing}", "0"),
            ("largest difference of a log-prob, nats", f"{self.difference:.1e}", f"{CLOSE:g}"),
            ("duplicate rows", f"{self.duplicates}", "0"),
            ("damaged files after any kill", f"{self.damaged}", "0"),
            (
                "rows scored again in all",
                f"{self.scored - self.responses}",
                f"{len(self.kills) * ROWS}",
            ),
            ("… by a single kill, at most", f"{self.repeated}", f"{ROWS} (a shard)"),
            ("`mrpo store verify`", "passes" if self.verified else "FAILS", "passes"),
        ]
        lines = ["| | measured | promised |", "|---|---|---|"]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def kill_test(folder: Path, kills: Sequence[Kill]) -> Result:
    """Prepare pairs in an empty folder and score them in spite of all these kills."""
    started = time.monotonic()
    responses = 2 * write_workload(folder, SHARDS_A_KILL * len(kills))
    with ThreadPoolExecutor(WRITERS) as pool:
        undisturbed = pool.submit(lambda: finish(Run(folder, "undisturbed", store="undisturbed")))
        damaged = sum(pool.map(lambda at: killed(folder, *at), enumerate(kills)))
        undisturbed.result()
    finish(Run(folder, "run-last"))
    store, expected = Store(folder / "store"), Store(folder / "undisturbed")
    (identity,) = store.identities()
    rows, expected_rows = by_id(store.scores(identity)), by_id(expected.scores(identity))
    all_ids = rows.keys() | expected_rows
    begun = scored_rows(folder)
    verify = [sys.executable, "-P", "-m", "mrpo.cli", "store", "verify", "--store", store.root]
    return Result(
        kills=list(kills),
        responses=responses,
        scored=sum(len(ids) for _, ids in begun),
        repeated=worst_repeat(begun),
        differing=sum(
            counts(rows.get(name)) != counts(expected_rows.get(name)) for name in all_ids
        ),
        unscored=responses - len(rows),
        duplicates=store.scores(identity).num_rows() - len(rows),
        damaged=damaged,
        difference=max(
            difference(rows[name], expected_rows[name]) for name in rows.keys() & expected_rows
        ),
        verified=subprocess.run(verify, check=False, stdout=subprocess.DEVNULL).returncode == 0,
        left=len(list(folder.glob(f"store/*/**/{TEMPORARY}*"))),
        seconds=time.monotonic() - started,
    )


def write_workload(folder: Path, shards: int) -> int:
    """An untrained tiny reference, refs.yaml and prepared pairs; the number of pairs."""
    texts = ["How many eggs are left? She has 16 - 3 - 4 = 9 eggs, and sells them."] * 8
    model = write_reference(folder / "model", "llama", texts, vocab_size=300, hidden_size=32)
    (folder / "refs.yaml").write_text(json.dumps({"tiny": {"model": str(model)}}))
    dice = random.Random(0)
    lines = []
    for number in range(shards * SHARD):
        prompt, chosen, rejected = (
            " ".join(dice.choices(texts[0].split(), k=dice.randint(2, 40))) for _ in range(3)
        )
        turns = {"prompt": ("user", f"{number}: {prompt}")}
        turns |= {"chosen": ("assistant", chosen + "."), "rejected": ("assistant", rejected + "!")}
        row = {name: [{"role": role, "content": text}] for name, (role, text) in turns.items()}
        lines.append(json.dumps(row) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    source, out = str(folder / "pairs.jsonl"), str(folder / "pairs")
    return prepare(PrepareConfig(source=source, out=out, shard_pairs=SHARD)).num_pairs


def by_id(scores: ScoreFiles) -> dict[bytes, dict[str, Any]]:
    """The rows as a reader gets them. Raises where it gets a response twice."""
    rows = scores.read().to_pylist()
    rows_by_id = {row["response_id"]: row for row in rows}
    assert len(rows_by_id) == len(rows), "a reader gets a response twice"
    return rows_by_id


def counts(row: dict[str, Any] | None) -> dict[str, Any] | None:
    """Everything in a row except its log-probs."""
    return row and {name: value for name, value in row.items() if not name.endswith("logp")}


def difference(row: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference between a response's log-probs, in nats."""
    return max(abs(row[name] - expected[name]) for name in row if name.endswith("logp"))


def scored_rows(folder: Path) -> list[tuple[str, list[str]]]:
    """(run, ids of a shard whose scoring it began), in the order of time."""
    entries = [
        (line["time"], path.stem, line["ids"])
        for path in folder.glob("run-*.scored")
        for line in map(json.loads, path.read_text().splitlines())
    ]
    return [(run, ids) for _, run, ids in sorted(entries)]


def worst_repeat(begun: Sequence[tuple[str, list[str]]]) -> int:
    """The largest number of rows of a run that later runs had to score again."""
    lost: Counter[str] = Counter()
    later: set[str] = set()
    for run, ids in reversed(begun):
        lost[run] += len(later.intersection(ids))
        later.update(ids)
    return max(lost.values())


def publish(result: Result) -> None:
    """Replace the table in docs/store.md."""
    begin, end = "<!-- kills -->\n", "<!-- end of kills -->"
    before, rest = PAGE.read_text().split(begin)
    PAGE.write_text(f"{before}{begin}{result.table()}\n{end}{rest.split(end)[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of counts and delays")
    parser.add_argument("--publish", action="store_true", help="write the table to docs/store.md")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        result = kill_test(Path(folder), make_kills(arguments.kills, arguments.seed))
    print(result.table())
    print(f"\n{result.seconds:.0f} s; {result.left} temporary files of killed writers are left")
    for promise in result.broken():
        print(f"broken: {promise}", file=sys.stderr)
    if arguments.publish:
        publish(result)
    return bool(result.broken())


if __name__ == "__main__":
    sys.exit(main())
