"""The table at the end of the demo: who ranks how many of the held-out pairs rightly.

A model is right about a pair where the chosen response has the higher log-prob, summed over its
tokens. References are judged by the scores in the store, trained policies by scoring them here in
the same way. Printed as it came out, with the uncertainty that so few pairs leave.


`mrpo demo`: the whole method in one go, by the very commands that anyone would type.

    demo-run/data/          the pairs, and what the references read
    demo-run/references/    three tiny models, named in demo-run/refs.yaml
    demo-run/pairs/         what `mrpo prepare` made of the pairs
    demo-run/store/         what `mrpo precompute` found out: every reference's scores
    demo-run/runs/          what `mrpo train` made: DPO with each reference, MRPO with all
    demo-run/accuracy.txt   the table at the end

Nothing is tuned for any of the methods: all train from the same policy with the same settings.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.pairs import Pair
from ..data.references import load_refs
from ..data.rendering import Renderer
from ..data.shards import PairShards
from ..data.store import Store
from ..errors import UserError
from ..evaluation.figures import preferred
from ..evaluation.intervals import Interval, bootstrap_means, interval
from ..evaluation.score_table import load_score_table
from ..precompute.engines import load_engine
from ..precompute.engines.protocol import EngineSettings
from ..settings import build, write_resolved
from .config import DemoConfig
from .data import DOMAINS
from .models import FAMILIES

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
    scores = load_score_table(shards, store, records, split="validation")
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


REFS = ",".join(FAMILIES)  # the first is the base: the policy starts from it
METHODS = {**{f"dpo-{family}": f"dpo:{family}" for family in FAMILIES}, "mrpo": "mrpo"}
VALIDATION_FRACTION = 0.25
# The rate that gave DPO with the base the best accuracy in one pass, in a demo of another seed.
TRAINING = {"--batch-pairs": 16, "--num-train-epochs": 1, "--learning-rate": 5e-4}
CHATS = 26_000  # read by each reference
QUICK_PAIRS, QUICK_CHATS = 300, 1_280


def demo(config: DemoConfig) -> int:
    """Make everything that `config.out` does not have yet, and print the table.

    Returns the exit code of a command that failed, else 0.
    """
    from .data import write_data
    from .pretrain import pretrain_all

    pass

    out = Path(config.out)
    _claim(out, config)
    print("Making preference pairs and what the references read", flush=True)
    files = write_data(
        out / "data",
        pairs=min(config.pairs, QUICK_PAIRS) if config.quick else config.pairs,
        chats=QUICK_CHATS if config.quick else CHATS,
        seed=config.seed,
    )
    print("Training three tiny references side by side", flush=True)
    if code := pretrain_all(files.corpora, out / "references", config.seed):
        return code
    (out / "refs.yaml").write_text(
        "".join(
            f"{family}: {{model: references/{family}, dtype: float32}}\n" for family in FAMILIES
        )
    )
    for command, made in commands(out, files.pairs, config.seed):
        print(f"\n$ {shlex.join(['mrpo', *command])}", flush=True)
        if made is not None and made.exists():
            print(f"already there: {made}")
        elif code := subprocess.run([sys.executable, "-m", "mrpo.cli", *command]).returncode:
            return code
    table = held_out_table(out, METHODS)
    (out / "accuracy.txt").write_text(table)
    print(f"\n{table}\n{_whereabouts(out)}")
    return 0


def commands(out: Path, pairs: Path, seed: int) -> list[tuple[list[str], Path | None]]:
    """Each command's arguments, and what is there when it is done; None: it finds out itself."""
    scored = {
        "--pairs": out / "pairs",
        "--refs": REFS,
        "--refs-config": out / "refs.yaml",
        "--store": out / "store",
    }
    prepare = {"--out": out / "pairs", "--validation-fraction": VALIDATION_FRACTION}
    every: list[tuple[list[str], Path | None]] = [
        (["prepare", str(pairs), *_flags(prepare)], out / "pairs" / "manifest.json"),
        (["precompute", *_flags({**scored, "--engine": "hf"})], None),
    ]
    for name, method in METHODS.items():
        folder = out / "runs" / name
        own = {"--method": method, "--output-dir": folder, **TRAINING, "--seed": seed}
        every.append((["train", *_flags({**scored, **own}), "--resume"], folder / "model"))
    return every


def _flags(values: dict[str, object]) -> list[str]:
    return [str(part) for item in values.items() for part in item]


def _claim(out: Path, config: DemoConfig) -> None:
    """Keep the settings in the folder, and refuse to mix two demos in one."""
    kept = out / "demo.yaml"
    try:
        if not kept.exists():
            write_resolved(config, kept)
            return
        earlier = build(DemoConfig, {"out": config.out}, str(kept))
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; name another folder") from None
    if earlier != config:
        raise UserError(
            f"--out {out} holds a demo with --pairs {earlier.pairs} --seed {earlier.seed}"
            f"{' --quick' * earlier.quick}; run it with these, or name another --out"
        )


def _whereabouts(out: Path) -> str:
    """What was made, a line each."""
    lines = {
        "data": "the pairs, and what each reference read",
        "references": "the three references, named in refs.yaml",
        "pairs": "the pairs in shards",
        "store": "the references' scores",
        **{f"runs/{name}/model": f"the policy of {method}" for name, method in METHODS.items()},
        "accuracy.txt": "the table above",
    }
    width = max(len(str(out / path)) for path in lines)
    return "\n".join(f"{out / path!s:<{width}}  {text}" for path, text in lines.items())
