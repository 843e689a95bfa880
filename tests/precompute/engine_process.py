"""An engine in a process of its own, for tests: `python engine_process.py NAME`.

Reads pickles from stdin (first the settings, then lists of rendered prompts) and answers each list
with a pickle of the scores and the engine's counters. vLLM changes its process for good (threads,
torch.distributed), which other tests must not see.
"""

from __future__ import annotations

import os
import pickle
import sys

from mrpo.precompute.engines import load_engine


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    engine = load_engine(sys.argv[1], pickle.load(sys.stdin.buffer))
    finished: list[int] = []
    while True:
        pickle.dump((engine.facts, engine.limit), answers)
        answers.flush()
        try:
            prompts = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        scored = engine.score(prompts, finished.append)
        counters = {
            "cached_tokens": getattr(engine, "cached_tokens", 0),
            "asked_again": getattr(engine, "asked_again", 0),
            "finished": sum(finished),
        }
        finished.clear()
        pickle.dump((scored, counters), answers)
    engine.close()


if __name__ == "__main__":
    main()
