"""The process that scores one reference: `python -P -m mrpo.precompute.worker`.

`reference_run.py` starts it with one job and hears its events (`process.py`), or runs the job in
its own process.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from typing import Any

from .engines import load_engine
from .engines.protocol import EngineSettings
from .process import Report, serve
from .scoring import Job, ReferenceScorer, renderer_for

# What a server's tokenizer must agree on: words, spaces, digits, accents, scripts, bytes.
PROBES = ("The answer is 42.", "  two\n\nlines\t", "naïve café, 東京 🙂", "x = [1, 2]; # ok")


def main() -> int:
    """One job; the exit code is 2 for a user's mistake, which an event has reported."""

    def handle(values: dict[str, Any], report: Report) -> None:
        run_job(Job(**{**values, "settings": EngineSettings(**values["settings"])}), report)

    return serve(handle, once=True)


def run_job(job: Job, report: Report) -> None:
    """Load the reference and score what the store lacks. Raises `UserError` as the scorer does."""
    settings = job.settings
    if job.engine == "server":
        encode = renderer_for(job).tokenizer.encode
        probes = {text: encode(text, add_special_tokens=False) for text in PROBES}
        settings = replace(settings, probes=probes)
    if not settings.longest:  # every missing pair is refused for good, and only to be stored
        ReferenceScorer(job, None, report).run()
        return
    with contextlib.closing(load_engine(job.engine, settings)) as engine:
        report({"event": "ready", "facts": engine.facts})
        ReferenceScorer(job, engine, report).run()
        report({"event": "done", "facts": engine.facts})


if __name__ == "__main__":
    sys.exit(main())
