"""What scoring will take, and whether a server gives the scores of its reference.

Every missing response is rendered for every reference: refusals are counted, tokens and disk space
added up, time estimated. `survey` completes the references' plans, `print_plans` shows them.
A server does not say with which weights and in which precision it computes, so `verify_server`
compares a sample of its scores with stored ones or with engine hf's before any is stored.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..data.ids import IdArray, IdIndex, ids_to_numpy
from ..data.references import from_pretrained
from ..data.shards import MANIFEST, PairShards
from ..data.store import Store
from ..errors import UserError
from .estimate import estimated_seconds, num_parameters, precision_warning
from .identity import ResolvedReference
from .reference_run import ReferenceRun
from .scoring import Job, PairSelection, renderer_for, sort_out, write_sample

POOL_RESPONSES = 40_000  # renderings from which starting further processes pays
ROW_BYTES = 70  # of a response in a score file, measured; token log-probs come on top

# The key of an identity's inputs, and its value, for scores that nothing could be compared with.
SERVER, UNVERIFIED = "server", "unverified server"
SERVER_PAIRS = 16  # compared before a server's scores are stored
# `spread` up to which two ways to compute in a precision agree. Of SmolLM2-135M: bfloat16 differs
# from float32 by 0.046 and from itself in other batches by 0.016, float16 from float32 by 0.006,
# weights in fp8 from bfloat16 by 0.23.
SPREAD = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
QUANTIZED = 3  # times the spread: quantized activations depend on what else is computed
# How far a server may be from float32, in 16 bits, times as far as engine hf is in that precision.
# Of SmolLM2-135M: float16 in place of bfloat16 0.13, weights in fp8 5.
LEAST_ERROR, MOST_ERROR = 1 / 3, 2.0


@dataclass(slots=True)
class Shortfall:
    """The responses that the store lacks under one reference, and their cost; sums add up."""

    todo: int = 0  # responses to score
    tokens: int = 0  # to compute, a prompt once for all of its responses
    scored_tokens: int = 0  # of the responses
    longest: int = 0  # tokens of the longest sequence to score
    left_out: list[IdArray] = field(default_factory=list)  # responses beyond --max-model-len
    refused: Counter[str] = field(default_factory=Counter)  # permanent reasons

    def add(self, other: Shortfall) -> None:
        self.todo += other.todo
        self.tokens += other.tokens
        self.scored_tokens += other.scored_tokens
        self.longest = max(self.longest, other.longest)
        self.left_out += other.left_out
        self.refused.update(other.refused)

    @property
    def over_limit(self) -> int:
        return sum(map(len, self.left_out))

    @property
    def num_responses(self) -> int:
        return self.todo + self.over_limit + self.refused.total()


@dataclass(slots=True)
class ReferencePlan:
    """What one reference is and what it has to do."""

    reference: ResolvedReference
    job: Job
    damaged: list[str] = field(default_factory=list)  # score files (to be) set aside
    missing: Shortfall = field(default_factory=Shortfall)

    @property
    def num_bytes(self) -> int:
        """Of new score files, estimated."""
        rows = self.missing.todo + self.missing.refused.total()
        return ROW_BYTES * rows + 4 * self.missing.scored_tokens * self.job.keep_token_logps


def survey(
    plans: Sequence[ReferencePlan],
    selection: PairSelection,
    store: Store,
    *,
    dry_run: bool = False,
    many_processes: bool = True,
) -> None:
    """Find what the store lacks, and render every such response for every reference.

    Where there are many, it uses all cores if `many_processes`. Sets damaged score files
    aside unless it is a dry run, and changes nothing else. Raises `UserError` where the disk has no
    room.
    """
    tasks: list[tuple[ReferencePlan, int, np.ndarray]] = []  # missing ones as `PairSelection` marks
    for plan in plans:
        scores = store.scores(plan.job.identity)
        plan.damaged = scores.damaged() if dry_run else scores.check()
        tasks += [(plan, shard, missing) for shard, missing in selection.all_missing(scores)]
    jobs = [(plan.job, selection, shard, missing) for plan, shard, missing in tasks]
    many = many_processes and sum(int(missing.sum()) for *_, missing in tasks) > POOL_RESPONSES
    processes = min(os.cpu_count() or 1, 32, len(tasks)) if many else 1
    pool = ProcessPoolExecutor(processes, get_context("spawn")) if processes > 1 else None
    with pool or nullcontext():
        results: Iterable[Shortfall] = (pool.map if pool else map)(_survey_shard, jobs)
        for (plan, _, _), missing in zip(tasks, results):
            plan.missing.add(missing)
    _check_disk(store, sum(plan.num_bytes for plan in plans))


def print_plans(plans: Sequence[ReferencePlan], selection: PairSelection, store: Store) -> None:
    """What was derived, on stdout."""
    pairs, engine = selection.pairs, plans[0].job.engine
    print(
        f"{selection.num_pairs:,} pairs of {pairs.path}, {selection.num_responses:,} responses, "
        f"engine {engine}, store {store.root}"
    )
    for plan in plans:
        reference = plan.reference
        revision = f" at {reference.revision[:8]}" if reference.revision else ""
        adapter = f" with adapter {reference.adapter}" if reference.adapter else ""
        print(
            f"{reference.alias}: {reference.model}{revision}{adapter}, {reference.dtype}, "
            f"identity {reference.identity[:12]}"
        )
        if reference.moved:
            newest = ", ".join(f"{part} at {new[:8]}" for part, new in reference.moved.items())
            print(f"  the Hub has newer commits ({newest}); --update-refs takes them")
        for name in plan.damaged:
            print(f"  damaged, set aside, its rows are scored again: {name}")
        if pairs.kind == "text" and renderer_for(plan.job).chat_template is not None:
            print("  warning: the pairs are plain text and this model has a chat template;")
            print("  `mrpo prepare --chat` makes them messages")
        print("  " + "; ".join(_described(plan, selection, store)))
        if (
            plan.missing.todo
            and engine != "server"
            and (slow := precision_warning(plan.job.settings))
        ):
            print(f"  warning: {slow}")


def duration(seconds: float) -> str:
    """Seconds as text, rounded as an estimate may be."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def model_context(reference: ResolvedReference) -> int | None:
    """Tokens of the longest sequence that the model's configuration allows; None: no limit."""
    from transformers import AutoConfig

    try:
        config = from_pretrained(AutoConfig, reference.model, reference.revision)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"reference {reference.alias}: {reference.model}: {reason}") from None
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _described(plan: ReferencePlan, selection: PairSelection, store: Store) -> list[str]:
    missing = plan.missing
    parts = [
        f"{selection.num_responses - missing.num_responses:,} responses in the store",
        f"{missing.todo:,} to score",
    ]
    if missing.todo:
        seconds = estimated_seconds(plan.job, plan.missing.tokens, store)
        about = "time unknown" if seconds is None else f"about {duration(seconds)}"
        parts[-1] += (
            f" ({missing.tokens:,} tokens, the longest sequence {missing.longest:,}, {about}, "
            f"{plan.num_bytes / 1e6:.1f} MB)"
        )
    if missing.refused:
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in missing.refused.most_common())
        parts.append(f"{missing.refused.total():,} that can't be ({reasons})")
    if missing.over_limit:
        parts.append(f"{missing.over_limit:,} left out by --max-model-len")
    return parts


def _check_disk(store: Store, needed: int) -> None:
    if not store.files.is_local:
        return
    folder = Path(store.root).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"--store {store.root}: about {needed / 1e9:.1f} GB of scores, but only "
            f"{free / 1e9:.1f} GB free; make room or use another store"
        )


def _survey_shard(task: tuple[Job, PairSelection, int, np.ndarray]) -> Shortfall:
    """What some responses of a shard cost under one reference."""
    job, selection, shard, marked = task
    missing = selection.responses(shard, marked)
    rendered = renderer_for(job).render_responses(missing.asked(selection.pairs, shard))
    work = sort_out(missing, rendered, job.context, job.limit)
    responses = [response for prompt in work.prompts for response in prompt.responses]
    return Shortfall(
        todo=len(responses),
        tokens=work.tokens,
        scored_tokens=sum(response.num_scored for response in responses),
        longest=max((len(response.token_ids) for response in responses), default=0),
        left_out=[work.left_out],
        refused=Counter(row["reason"] for row in work.refused),
    )


def verify_server(
    job: Job, selection: PairSelection, store: Store, *, stored_only: bool = False
) -> str | None:
    """What a sample of a server's scores agrees with; None where there is nothing to compare with.

    That is stored scores, where their pairs are on this machine, or those of engine hf, where the
    weights are. In 16 bits engine hf comes first, which also shows how far the precision itself is
    off. With `stored_only` only stored scores count, and these even from an unverified server.

    Raises `UserError` where the scores differ, and as the server's engine does.
    """
    ways: list[Callable[[Job, PairSelection, Store, Path], str | None]]
    ways = [_compared_with_weights, _compared_with_store]
    if stored_only:
        ways = [partial(_compared_with_store, trust_all=True)]
    elif job.settings.dtype == "float32":
        ways.reverse()
    for way in ways:
        with tempfile.TemporaryDirectory(prefix="mrpo-server-") as folder:
            compared = way(job, selection, store, Path(folder))
        if compared is not None:
            return compared
    return None


def spread(scores: pa.Table, expected: pa.Table) -> float:
    """How far the log-probs of the responses in both tables differ, a number of any length.

    The root mean square of difference / sqrt(tokens), in nats; infinite where the numbers of
    tokens differ, NaN where no response is in both.
    """
    known = IdIndex(ids_to_numpy(expected["response_id"]))
    places = known.find(ids_to_numpy(scores["response_id"]))
    scores, expected = scores.filter(pa.array(places >= 0)), expected.take(places[places >= 0])
    tokens = scores["tokens"].to_numpy()
    if (tokens != expected["tokens"].to_numpy()).any():
        return float("inf")
    squares = (scores["logp"].to_numpy() - expected["logp"].to_numpy()) ** 2 / tokens
    return float(np.sqrt(squares.mean())) if len(squares) else float("nan")


def _compared_with_store(
    job: Job, selection: PairSelection, store: Store, folder: Path, *, trust_all: bool = False
) -> str | None:
    names = store.names_of(job.identity)
    runs = names[0].runs if names else ()
    known = [run.get("engine") != "server" or "verified" in run for run in runs]
    if not trust_all and not (known and all(known)):
        return None
    try:
        stored = _scored(store, job.identity)
    except UserError:  # a damaged file, which `survey` sets aside
        return None
    ids = ids_to_numpy(stored["response_id"])
    folders = [Path(run["pairs_folder"]) for run in reversed(runs) if "pairs_folder" in run]
    for pairs in (selection.pairs.path, *folders):
        if not (pairs / MANIFEST).is_file():
            continue
        if sample := write_sample(PairShards(pairs), SERVER_PAIRS, folder / "pairs", ids):
            error = spread(_scored_by("server", job, sample, folder), stored)
            most = SPREAD[job.settings.dtype]
            if job.settings.quantization is not None:
                most *= QUANTIZED
            return _judged(job, error, (0.0, most), "stored scores")
    return None


def _compared_with_weights(
    job: Job, selection: PairSelection, store: Store, folder: Path
) -> str | None:
    settings = job.settings
    if settings.quantization is not None or not _weights_here(settings.model, settings.revision):
        return None
    if 4 * num_parameters(settings.model, settings.revision) > _free_memory():
        return None
    sample = write_sample(selection.pairs, SERVER_PAIRS, folder / "pairs")
    assert sample is not None
    served = _scored_by("server", job, sample, folder)
    try:
        exact = _scored_by("hf", job, sample, folder, "float32")
        allowed = (0.0, SPREAD["float32"])
        if settings.dtype != "float32":
            own = spread(_scored_by("hf", job, sample, folder, settings.dtype), exact)
            allowed = (LEAST_ERROR * own, MOST_ERROR * own)
    except UserError as error:
        print(
            f"{settings.alias}: the server is not compared with engine hf: {error}", file=sys.stderr
        )
        return None
    return _judged(job, spread(served, exact), allowed, "engine hf")


def _judged(job: Job, error: float, allowed: tuple[float, float], with_what: str) -> str | None:
    """`with_what` where a server's error is allowed, None where nothing could be compared."""
    if np.isnan(error):
        return None
    if allowed[0] <= error <= allowed[1]:
        return with_what
    raise UserError(
        f"reference {job.settings.alias}: the scores of {job.settings.server} are {error:.2g} nats "
        f"per square root of a token off {with_what}, where {job.settings.dtype} is "
        f"{allowed[0]:.2g} to {allowed[1]:.2g} off; serve the weights that refs.yaml names, in "
        "that dtype and without other quantization, or correct refs.yaml"
    )


def _scored_by(
    engine: str, job: Job, sample: PairShards, folder: Path, dtype: str | None = None
) -> pa.Table:
    """The scores of a sample; raises `UserError` where there are none."""
    settings = replace(job.settings, longest=1, dtype=dtype or job.settings.dtype)
    root = folder / f"{engine}-{dtype}"
    job = replace(
        job, engine=engine, settings=settings, pairs=str(sample.path), split=None, store=str(root)
    )
    run = ReferenceRun(job, PairSelection(sample).num_responses)
    # Engine hf on the CPU: the GPU may be the server's.
    outcome = run.run_here() if engine == "server" else run.run([""], folder)
    if problems := outcome.mistakes + outcome.crashes:
        raise UserError(" ".join(problems[0].split()))
    return _scored(Store(root), job.identity)


def _scored(store: Store, identity: str) -> pa.Table:
    table = store.scores(identity).read(["response_id", "logp", "tokens", "reason"])
    return table.filter(table["reason"].is_null())


def _weights_here(model: str, revision: str | None) -> bool:
    """Whether a model is a folder or a file, or whole in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if Path(model).is_absolute():
        return True
    weights = {"model.safetensors"}
    index = try_to_load_from_cache(model, "model.safetensors.index.json", revision=revision)
    if isinstance(index, str):
        weights = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    files = (try_to_load_from_cache(model, name, revision=revision) for name in weights)
    return all(isinstance(file, str) for file in files)


def _free_memory() -> float:
    """Bytes of this machine's memory that are free; infinite where nothing says."""
    with suppress(OSError, AttributeError):
        text = Path("/proc/meminfo").read_text()
        free = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.M)
        return 1024 * int(free[1]) if free else float("inf")
    return float("inf")
