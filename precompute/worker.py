"""The process that scores one reference: `python -P -m mrpo.precompute.worker`.

`reference_run.py` starts it with one job and hears its events (`process.py`), or runs the job in
its own process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..data.shards import PairShards
from ..data.store import Store
from .engines import EngineName, load_engine
from .engines.protocol import EngineSettings
from .process import Report, serve
from .scoring import PairSelection, ReferenceWork, renderer_for, score_missing

# What a server's tokenizer must agree on: words, spaces, digits, accents, scripts, bytes.
PROBES = ("The answer is 42.", "  two\n\nlines\t", "naïve café, 東京 🙂", "x = [1, 2]; # ok")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything a worker needs to know, as plain values."""

    engine: EngineName
    settings: EngineSettings
    pairs: str
    split: str | None = None  # None: all pairs
    store: str
    identity: str
    chat_template: str | None
    chat_template_kwargs: dict[str, Any]
    context: int | None
    limit: int | None
    keep_token_logps: bool

    def values(self) -> dict[str, Any]:
        """As JSON, for a worker's stdin."""
        return asdict(self)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Job:
        """The job of which these are the `values`."""
        return cls(**{**values, "settings": EngineSettings(**values["settings"])})


def main() -> int:
    """One job; the exit code is 2 for a user's mistake, which an event has reported."""
    return serve(lambda values, report: run_job(Job.from_values(values), report), once=True)


def run_job(job: Job, report: Report) -> None:
    """Load the reference and score what the store lacks. Raises `UserError` as `score_missing`."""
    settings = job.settings
    renderer = renderer_for(
        job.identity,
        settings.model,
        settings.revision,
        job.chat_template,
        json.dumps(job.chat_template_kwargs),
    )
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
                alias=settings.alias,
                selection=PairSelection(PairShards(job.pairs), job.split),
                scores=Store(job.store).scores(job.identity),
                renderer=renderer,
                engine=engine,
                context=job.context,
                limit=min((limit for limit in limits if limit is not None), default=None),
                keep_token_logps=job.keep_token_logps,
                report=report,
            )
        )
        if engine:
            report({"event": "done", "facts": engine.facts})
    finally:
        if engine:
            engine.close()


if __name__ == "__main__":
    sys.exit(main())
