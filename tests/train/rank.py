"""One process of several: `torchrun … rank.py RUNS.json` trains each run of the file in turn.

A run with `"short_of_memory"` has a rank 1 that can set aside memory for short rows only.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from mrpo.train import run
from mrpo.train.config import TrainConfig
from mrpo.train.distributed import Ranks
from mrpo.train.memory import TokenBudget


def main() -> None:
    # The processes join once: torchrun's store keeps the addresses of an earlier group.
    ranks = Ranks.start("cpu")
    Ranks.start = lambda device: ranks  # type: ignore[method-assign]
    Ranks.close = lambda self: None  # type: ignore[method-assign]
    for settings in json.loads(Path(sys.argv[1]).read_text()):
        short = settings.pop("short_of_memory", False) and os.environ["RANK"] == "1"

        def fits(self: TokenBudget, row_tokens: int, ranks: Ranks, short: bool = short) -> bool:
            return not short or row_tokens < 120

        TokenBudget.fits = fits  # type: ignore[method-assign]
        assert run.train(TrainConfig(**settings)).exit_code == 0


if __name__ == "__main__":
    main()
