"""The process that holds one reference: `python -m mrpo.precompute.worker`, started by `run.py`.

It reads one job as a line of JSON on stdin and writes events as lines of JSON to what was its
stdout; file descriptor 1 itself then points at stderr, the log, so that nothing that a library
prints gets among the events. When stdin ends, the parent is gone, and the worker takes its whole
process group with it: no engine outlives its run, and the GPU's memory is really returned.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..data.rendering import Renderer
from ..data.shards import PairShards
from ..data.store import Store
from ..errors import UserError
from .engines import load_engine
from .engines.protocol import EngineName, EngineSettings
from .scoring import Report, Work, score_missing

# What a server's tokenizer must agree on: words, spaces, digits, accents, scripts, bytes.
PROBES = ("The answer is 42.", "  two\n\nlines\t", "naïve café, 東京 🙂", "x = [1, 2]; # ok")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything a worker needs to know, as plain values."""

    engine: EngineName
    settings: EngineSettings
    pairs: str
    store: str
    identity: str
    chat_template: str | None
    chat_template_kwargs: dict[str, Any]
    context: int | None
    limit: int | None
    keep_token_logps: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Job:
        values = json.loads(line)
        return cls(**{**values, "settings": EngineSettings(**values["settings"])})


def main() -> int:
    """One job; the exit code is 2 for a user's mistake, which an event has told."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as events:
        os.dup2(2, 1)

        def report(event: dict[str, Any]) -> None:
            print(json.dumps(event), file=events, flush=True)

        job = Job.from_json(sys.stdin.readline())
        threading.Thread(target=_end_with_parent, daemon=True).start()
        try:
            run(job, report)
        except UserError as error:
            report({"event": "error", "text": str(error)})
            return 2
    return 0


def run(job: Job, report: Report) -> None:
    """Load the reference and score what the store lacks."""
    settings = job.settings
    renderer = Renderer.load(
        settings.model,
        revision=settings.revision,
        chat_template=job.chat_template,
        chat_template_kwargs=job.chat_template_kwargs,
    )
    if job.engine == "server":
        encode = renderer.tokenizer.encode
        probes = {text: encode(text, add_special_tokens=False) for text in PROBES}
        settings = replace(settings, probes=probes)
    # Where every missing pair has a permanent reason, only these are to be stored.
    engine = load_engine(job.engine, settings) if settings.longest else None
    limits = [job.limit, engine.limit if engine else None]
    try:
        if engine:
            report({"event": "ready", "facts": engine.facts})
        score_missing(
            Work(
                alias=settings.alias,
                pairs=PairShards(job.pairs),
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


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
