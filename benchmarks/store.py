"""The score store at scale: generated pairs of short texts, generated scores, real code.

    python benchmarks/store.py --pairs 1000000 --folder /tmp/store-benchmark
    python benchmarks/store.py --pairs 10000000 --folder /tmp/store-benchmark    # the full run
    … --publish                                         # keeps it: benchmarks/results, docs

Generates a folder of chat pairs (and a small one, to compare memory with), a store with scores of
several references, and the same pairs with 1 % new ones; then measures each step in a process of
its own, including peak memory, and prints a table beside the promised values. The 10 million
pairs with 5 references take about 7 GB of disk and 15 minutes, most of it to generate. A second run
uses what the first one generated; delete the folder when done.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrpo.benchmarks.store_generated import SMALL, generate
from mrpo.data.config import StatusConfig
from mrpo.data.join import JoinedScores, join
from mrpo.data.rendering import RenderedPrompt, RenderedSequence
from mrpo.data.shards import PairShards
from mrpo.data.store import Store
from mrpo.data.store.commands import status

if TYPE_CHECKING:
    from mrpo.train.stream import PairStream

STREAMED = 1_000_000  # rows after which the rate is taken
MB = 10**6


class OneToken:
    """Replaces the renderer: tokenizing is not the store's work."""

    def render_many(self, pairs: list[Any]) -> list[RenderedPrompt]:
        sequence = RenderedSequence([1, 2], 1, 2, False)
        return [RenderedPrompt((sequence, sequence), 1)] * len(pairs)


def measure_status(folder: Path) -> dict[str, float]:
    started = time.perf_counter()
    status(StatusConfig(store=str(folder / "store")))
    return {"seconds": time.perf_counter() - started}


def measure_missing(folder: Path) -> dict[str, float]:
    """How many pairs of the grown data set each reference lacks: the same command with --pairs."""
    started = time.perf_counter()
    status(StatusConfig(store=str(folder / "store"), pairs=str(folder / "grown")))
    return {"seconds": time.perf_counter() - started}


def measure_join(folder: Path) -> dict[str, float]:
    store, pairs = Store(folder / "store"), PairShards(folder / "pairs")
    started = time.perf_counter()
    join(pairs, store, store.references()[:3], folder / "joined")
    seconds = time.perf_counter() - started
    join(PairShards(folder / "small"), store, store.references()[:3], folder / "joined-small")
    return {"seconds": seconds}


def open_stream(pairs: Path, joined: Path, resumed: bool = False) -> PairStream:
    """The stream as a training run of method mrpo opens it, except for the tokenizer."""
    # Imported here, so that steps without torch are measured without its memory.
    from mrpo.method.grammar import parse_method
    from mrpo.train.dataset import TrainingPairs
    from mrpo.train.stream import PairStream

    scores = JoinedScores(joined)
    source = TrainingPairs(PairShards(pairs), scores, prompt_numbers=False)
    method = parse_method("mrpo", scores.aliases)
    training, *_ = source.usable(method, resumed=resumed)
    return PairStream(
        source,
        training,
        OneToken(),  # type: ignore[arg-type]
        method,
        seed=0,
        batch_pairs=64,
        total_rows=sum(map(len, training)),
        limits={},
    )


def measure_stream(folder: Path) -> dict[str, float]:
    return streamed(folder / "pairs", folder / "joined")


def measure_small_stream(folder: Path) -> dict[str, float]:
    return streamed(folder / "small", folder / "joined-small")


def streamed(pairs: Path, joined: Path) -> dict[str, float]:
    """The rate from files to batches, targets included, and the memory in use."""
    stream = open_stream(pairs, joined)
    started = time.perf_counter()
    rows = sum(len(batch) for batch in islice(stream.batches(), STREAMED // stream.batch_pairs))
    return {"seconds": time.perf_counter() - started, "rows": rows, "resident": resident()}


def measure_resume(folder: Path) -> dict[str, float]:
    """From the start to the first batch in the middle of the epoch."""
    from mrpo.train.stream import Position

    started = time.perf_counter()
    stream = open_stream(folder / "pairs", folder / "joined", resumed=True)
    opened = time.perf_counter()
    windows = stream.epoch_rows // stream.window_rows
    next(stream.batches(Position(0, windows // 2, 1234)))
    finished = time.perf_counter()
    return {"seconds": finished - started, "open": opened - started, "batch": finished - opened}


def resident() -> float:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


STEPS: dict[str, Callable[[Path], dict[str, float]]] = {
    "status": measure_status,
    "missing": measure_missing,
    "join": measure_join,
    "small stream": measure_small_stream,
    "stream": measure_stream,
    "resume": measure_resume,
}


def measured(folder: Path, step: str) -> dict[str, float]:
    """A step in a process of its own: its figures, with its peak memory in bytes."""
    command = [sys.executable, __file__, "--folder", str(folder), "--step", step]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    print(step, figures, file=sys.stderr)
    return figures


def table(*, pairs: int, references: int, machine: str, steps: dict[str, dict[str, float]]) -> str:
    """Markdown: measured values beside those promised for 10 million pairs."""
    stream, small = steps["stream"], steps["small stream"]
    growth = stream["resident"] - small["resident"]
    lines = [
        ("status", seconds(steps["status"]), "5 s"),
        (
            f"missing after 1 % new rows, {references} references of the same shards",
            seconds(steps["missing"]),
            "30 s",
        ),
        ("… peak memory", megabytes(steps["missing"]["peak"]), "1,500 MB"),
        ("join of 3 references", seconds(steps["join"]), "–"),
        ("… peak memory", megabytes(steps["join"]["peak"]), "1,500 MB"),
        ("streaming, pairs/s", f"{stream['rows'] / stream['seconds']:,.0f}", "20,000"),
        (f"… memory beyond that for {SMALL:,} pairs", megabytes(growth), "200 MB"),
        ("first batch after a resume", seconds(steps["resume"]), "2 s"),
    ]
    head = [f"{pairs:,} pairs, {references} references; {machine}", ""]
    head += ["| | measured | promised |", "|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines)])


def seconds(figures: dict[str, float]) -> str:
    return f"{figures['seconds']:.1f} s"


def megabytes(size: float) -> str:
    return f"{size / MB:,.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--references", type=int, default=5)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--publish", action="store_true", help="write benchmarks/results and docs")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        figures = STEPS[arguments.step](arguments.folder)
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu = used.ru_utime + used.ru_stime
        print(json.dumps({**figures, "cpu": cpu, "peak": used.ru_maxrss * 1024}))
        return
    if arguments.pairs < SMALL:
        parser.error(f"--pairs must be at least {SMALL:,}, the size that memory is compared with")
    folder = arguments.folder / f"{arguments.pairs}-{arguments.references}"
    generate(folder, arguments.pairs, arguments.references)
    figures = {step: measured(folder, step) for step in STEPS}
    # Imported here, so that it adds nothing to the memory of a step.
    from mrpo.benchmarks.common import machine, machine_line, publish

    settings = {"pairs": arguments.pairs, "references": arguments.references, "steps": figures}
    results = {**settings, "machine": machine_line(machine())}
    print(table(**results))
    if arguments.publish:
        publish("store", results, table(**results))


if __name__ == "__main__":
    main()
