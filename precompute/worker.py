"""The process that scores one reference: `python -P -m mrpo.precompute.worker`.

`reference_run.py` starts it with one job and hears its events (`process.py`), or runs the job in
its own process.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from ..data.shards import PairShards
from ..data.store import Store
from .engines import load_engine
from .engines.protocol import EngineSettings
from .process import Report, serve
from .scoring import Job, PairSelection, ReferenceWork, renderer_for, score_missing

# What a server's tokenizer must agree on: words, spaces, digits, accents, scripts, bytes.
PROBES = ("The answer is 42.", "  two\n\nlines\t", "naïve café, 東京 🙂", "x = [1, 2]; # ok")


def main() -> int:
    """One job; the exit code is 2 for a user's mistake, which an event has reported."""

    def handle(values: dict[str, Any], report: Report) -> None:
        run_job(Job(**{**values, "settings": EngineSettings(**values["settings"])}), report)

    return serve(handle, once=True)


def run_job(job: Job, report: Report) -> None:
    """Load the reference and score what the store lacks. Raises `UserError` as `score_missing`."""
    settings, renderer = job.settings, renderer_for(job)
    if job.engine == "server":
        encode = renderer.tokenizer.encode
        probes = {text: encode(text, add_special_tokens=False) for text in PROBES}
        settings = replace(settings, probes=probes)
    # Where every missing pair is refused for good, there is nothing to score, only to store.
    engine = load_engine(job.engine, settings) if settings.longest else None
    limits = [job.limit, engine.limit if engine else None]
    try:
        if engine:
            report({"event": "ready", "facts": engine.facts})
        score_missing(
            ReferenceWork(
                job,
                PairSelection(PairShards(job.pairs), job.split),
                Store(job.store).scores(job.identity),
                renderer,
                engine,
                min((limit for limit in limits if limit is not None), default=None),
                report,
            )
        )
        if engine:
            report({"event": "done", "facts": engine.facts})
    finally:
        if engine:
            engine.close()


if __name__ == "__main__":
    sys.exit(main())
