"""The table at the end of the demo: who ranks how many of the held-out pairs rightly.

A model is right about a pair where the chosen response has the higher log-prob, summed over its
tokens. References are judged by the scores in the store, trained policies by scoring them here in
the same way. Printed as it came out, with the uncertainty that so few pairs leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.pairs import Pair
from ..data.references import load_refs
from ..data.rendering import Renderer
from ..data.shards import PairShards
from ..data.store import Store
from ..evaluation.figures import preferred
from ..evaluation.intervals import Interval, bootstrap_means, interval
from ..evaluation.score_table import load_scores
from ..precompute.engines.base import EngineSettings, load_engine
from .domains import DOMAINS

NAME_WIDTH, CELL_WIDTH = 37, 20
Z = 1.96  # standard deviations on either side that hold 95 % of a normal distribution
HEADING = """\
Held-out preference accuracy: the share of pairs, in %, whose right reply has the higher log-prob,
with its 95 % interval. No training pair asks for the same fact, sum or request.
"""

Right = np.ndarray  # [N] 1 or 0, whether a model ranks each held-out pair rightly


def held_out_table(out: Path, methods: dict[str, str]) -> str:
    """Judge the references and the policies in a demo's folder; `methods` by name of the run."""
    shards, store = PairShards(out / "pairs"), Store(out / "store")
    specs = load_refs(out / "refs.yaml")
    records = [store.resolve(alias, specs) for alias in specs]
    scores = load_scores(shards, store, records, split="validation")
    pairs = [
        pair
        for shard in range(len(shards.names))
        for pair in shards.pairs(shard, scores.places[scores.places[:, 0] == shard, 1].tolist())
    ]
    references = {f"reference {one.alias}": preferred(one.logps) for one in scores.references}
    policies = {
        f"trained with {method}": preferred(policy_logps(out / "runs" / run / "model", pairs))
        for run, method in methods.items()
    }
    base = f"policy untrained = {scores.aliases[0]}"
    start = {base: next(iter(references.values()))}
    lines = [HEADING, *_header(scores.sources)]
    lines += [_line(*row, scores.sources) for row in (references | start | policies).items()]
    return "\n".join([*lines, "", *_differences(policies, scores.prompts)]) + "\n"


def policy_logps(model: Path, pairs: Sequence[Pair]) -> np.ndarray:
    """Log-probs [N, 2] of chosen and rejected, from engine hf as in stage one."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    rendered = Renderer.load(model).render_many(pairs)
    engine = load_engine("hf", EngineSettings(alias="policy", model=str(model)))
    scored = engine.score(rendered)  # type: ignore[arg-type]  # it scored as reference: no refusal
    return np.array(
        [[one.chosen.sum(dtype=float), one.rejected.sum(dtype=float)] for one in scored]
    )


def wilson(right: Right) -> Interval:
    """A share with Wilson's 95 % interval, which also holds where all are right.

    >>> wilson(np.array([1, 1, 1, 1, 1, 1, 1, 1, 0, 0])).percent()
    '80.0 (49.0–94.3)'
    """
    n, share = len(right), float(np.mean(right))
    center = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * (share * (1 - share) / n + Z**2 / (4 * n**2)) ** 0.5
    return Interval(share, center - half, center + half)


def _header(sources: np.ndarray) -> list[str]:
    counts = [int((sources == domain).sum()) for domain in DOMAINS]
    pairs = [f"{count:,} pairs" for count in (*counts, len(sources))]
    return [_row("", names) for names in ((*DOMAINS, "overall"), pairs)]


def _line(name: str, right: Right, sources: np.ndarray) -> str:
    parts = [*(right[sources == domain] for domain in DOMAINS), right]
    return _row(name, [wilson(part).percent() if len(part) else "–" for part in parts])


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<{NAME_WIDTH}}{''.join(f'{cell:<{CELL_WIDTH}}' for cell in cells)}".rstrip()


def _differences(policies: dict[str, Right], prompts: np.ndarray) -> list[str]:
    """The last policy against each other one, on the same resamples of the pairs."""
    means, draws = bootstrap_means(np.stack(list(policies.values()), axis=1), prompts)
    *others, last = policies
    lines = [f"{last} minus, in points, with a 95 % bootstrap interval over the pairs:"]
    for column, other in enumerate(others):
        gain = interval(means[-1] - means[column], draws[:, -1] - draws[:, column])
        points = [f"{100 * x:+.1f}" for x in (gain.value, gain.low, gain.high)]
        lines.append(_row(f"  {other}", ["{} ({} to {})".format(*points)]))
    return lines
