"""Every GPU path at small size, in one command: what holds, what does not, with figures.

    make gpu-check                       # or: python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --only training --out table.md

Models and pairs are made on the spot and nothing is downloaded. Of the package's dependencies it
takes torch, transformers, peft and what reads and writes files; not datasets, and vLLM only where
it is installed. Scores are compared with transformers' own forward of one response at a time on the
CPU in float32, training with the same run there. Without a GPU the same checks run on the CPU as
far as they can, and the others say "not here". The exit code is 1 where a check failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers.utils import logging

from mrpo.benchmarks.common import machine, machine_line, table
from mrpo.benchmarks.gpu_checks import memory, scoring, training  # noqa: F401 their checks
from mrpo.benchmarks.gpu_checks.check import CHECKS, free_memory
from mrpo.benchmarks.gpu_checks.world import World


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="checks whose name contains this")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    options = parser.parse_args()
    checks = [one for one in CHECKS if options.only in one.name]
    if not checks:
        names = "\n  ".join(one.name for one in CHECKS)
        parser.error(f"--only {options.only}: no such check; there are\n  {names}")
    rows, failed = [], 0
    logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        world = World(Path(folder))
        for one in checks:
            started = time.perf_counter()
            outcome, figures = one.outcome(world)
            failed += outcome == "FAIL"
            rows.append([one.name, outcome, figures, f"{time.perf_counter() - started:.0f} s"])
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
            free_memory()
    text = f"{machine_line(machine())}.\n\n{table(['', 'outcome', 'figures', 'time'], rows)}"
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
