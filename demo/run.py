"""`mrpo demo`: the whole method in one go, by the functions behind the commands that it shows.

    demo-run/data/          the pairs, and what the references read
    demo-run/references/    three tiny models, named in demo-run/refs.yaml
    demo-run/pairs/         the pairs in shards, from `mrpo prepare`
    demo-run/store/         every reference's scores, from `mrpo precompute`
    demo-run/compare/       every method on few pairs, some of them labelled wrongly: `mrpo compare`
    demo-run/report.html    curves of accuracy against label noise and number of pairs
    demo-run/accuracy.txt   the tables at the end

All methods train from the same policy with the same settings, and are judged by how often the
right reply to a held-out question is the likelier. The tables are printed whatever they say.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ..data.prepare import prepare
from ..data.references import load_refs
from ..data.shards import PairShards
from ..data.store import Store
from ..errors import UserError
from ..evaluation.compare.compare import RESULT, compare
from ..evaluation.compare.results import (
    Comparison,
    Condition,
    noise_rows,
    percent,
    read_comparison,
)
from ..evaluation.figures import preferred
from ..evaluation.report.report import report
from ..evaluation.score_table import load_score_table
from ..files import write_text
from ..precompute.run import precompute
from ..settings import build, command, write_resolved
from ..terminal import Rows, table_lines
from ..train.run_folder import RunFolder, read_evaluation
from .config import DemoConfig
from .data import DOMAINS, write_data
from .models import FAMILIES
from .pretrain import pretrain_all

REFS = ",".join(FAMILIES)  # the first is the base: the policy starts from it
PAPER, RECOMMENDED = "mrpo", "geometric+reliable"
METHODS = [*(f"dpo:{family}" for family in FAMILIES), PAPER, RECOMMENDED]
CHATS = 8_000  # read by each reference
GRID = {
    "methods": ",".join(METHODS),
    "fractions": "0.05,0.1",
    "label_noise": "0,0.15,0.3",
    "seeds": 3,
    "vary_subset": True,
    "metric": "sum",
    "beta": 0.5,
    # The rate at which DPO with the base did best on clean labels, in a demo of another seed.
    "learning_rate": 2e-3,
    "batch_pairs": 16,
    "max_steps": 84,
}
SHOWN = Condition(fraction=0.1, label_noise=0.3)  # in the table by domain
QUICK_PAIRS, QUICK_CHATS = 300, 1_280
QUICK = {"fractions": "0.1,0.5", "label_noise": "0,0.3", "seeds": 2, "max_steps": 4}


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A demo's folder, and 0 or the exit code of the step that ended it early."""

    folder: Path
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """A command with its settings."""

    command: Callable[..., Any]
    settings: Mapping[str, Any]
    made: Path | None = None  # there when the step is done; None: the command itself finds out

    def line(self) -> str:
        """What one would type for it."""
        words = ["mrpo", self.command.__name__]
        for name, value in self.settings.items():
            if name not in ("source", "folders"):
                words.append(f"--{name.replace('_', '-')}")
            if value is not True:
                words.append(str(value))
        return shlex.join(words)

    def run(self) -> int:
        """Run it in this process; returns its exit code."""
        return getattr(self.command(**self.settings), "exit_code", 0)


@command(DemoConfig)
def demo(config: DemoConfig) -> Demonstration:
    """Make everything that `config.out` does not have yet, and print the tables."""
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
    if exit_code := pretrain_all(files.corpora, out / "references", config.seed):
        return Demonstration(out, exit_code)
    entries = [f"{family}: {{model: references/{family}, dtype: float32}}" for family in FAMILIES]
    write_text(out / "refs.yaml", "\n".join(entries) + "\n")
    for step in steps(out, files.pairs, config):
        print(f"\n$ {step.line()}", flush=True)
        if step.made is not None and step.made.exists():
            print(f"already there: {step.made}")
        elif exit_code := step.run():
            return Demonstration(out, exit_code)
    tables = "\n".join(tables_of(out)) + "\n"
    write_text(out / "accuracy.txt", tables)
    print(f"\n{tables}\n{_whereabouts(out)}")
    return Demonstration(out)


def steps(out: Path, pairs: Path, config: DemoConfig) -> list[Step]:
    """What the demo does once its pairs and references are there."""
    scored = {
        "pairs": out / "pairs",
        "refs": REFS,
        "refs_config": out / "refs.yaml",
        "store": out / "store",
    }
    prepared = {"source": pairs, "out": out / "pairs", "validation_fraction": 0.25}
    grid = GRID | (QUICK if config.quick else {})
    own = {"seed": config.seed, "jobs": os.cpu_count() or 1, "output_dir": out / "compare"}
    return [
        Step(prepare, prepared, out / "pairs" / "manifest.json"),
        Step(precompute, {**scored, "engine": "hf"}),
        Step(compare, {**scored, **grid, **own}),
        Step(report, {"folders": out / "compare", "out": out / "report.html"}),
    ]


def tables_of(out: Path) -> list[str]:
    """Lines: accuracy by domain with few pairs and noisy labels, and against the noise."""
    comparison = read_comparison(out / "compare" / RESULT)
    shown = SHOWN if SHOWN in comparison.conditions else comparison.conditions[0]
    clean = shown._replace(label_noise=0)
    seeds = len(comparison.seeds)
    return [
        f"Accuracy in % on {comparison.pairs:,} held-out questions: how often the right reply is "
        "the likelier.",
        f"The references, and policies trained on {shown}: means",
        f"over {seeds} runs, each with pairs of its own; with 95 % intervals.",
        "",
        *table_lines(domain_rows(out, comparison, shown), "left"),
        "",
        f"Trained on {clean}, against the share of labels turned round:",
        "",
        *table_lines(noise_rows(comparison, shown.fraction), "left"),
        "",
        *(gain_sentence(comparison, condition) for condition in (clean, shown)),
    ]


def domain_rows(out: Path, comparison: Comparison, condition: Condition) -> Rows:
    """A heading, the references, and the methods: accuracy by domain, and over all."""
    rows = [["", *DOMAINS, "overall"]]
    for alias, shares in reference_accuracies(out).items():
        rows.append([f"reference {alias}", *(f"{100 * share:.1f}" for share in shares)])
    results = comparison.results_at(condition, comparison.metric)
    for method, result in sorted(results.items(), key=lambda item: METHODS.index(item[0])):
        runs = [
            run
            for run in comparison.runs
            if (run.method, run.fraction, run.label_noise) == (method, *condition)
        ]
        cells = []
        for domain in DOMAINS:
            accuracies = [_by_source(Path(run.folder))[domain] for run in runs]
            cells.append(f"{100 * fmean(accuracies):.1f}")
        note = {PAPER: " (the paper's setting)", RECOMMENDED: " (recommended)"}.get(method, "")
        rows.append([f"{method}{note}", *cells, result.accuracy.percent()])
    return rows


def reference_accuracies(out: Path) -> dict[str, list[float]]:
    """By alias: the shares of held-out pairs that it ranks rightly, by domain and of all."""
    specs, store = load_refs(out / "refs.yaml"), Store(out / "store")
    records = [store.resolve(alias, specs) for alias in specs]
    table = load_score_table(PairShards(out / "pairs"), store, records, split="validation")
    accuracies = {}
    for column in table.references:
        right = preferred(column.logps)
        by_domain = [right[table.sources == domain].mean() for domain in DOMAINS]
        accuracies[column.alias] = [*map(float, by_domain), float(np.mean(right))]
    return accuracies


def gain_sentence(comparison: Comparison, condition: Condition) -> str:
    """The recommended method against the best single reference, in a sentence."""
    results = comparison.results_at(condition, comparison.metric)
    result = results[RECOMMENDED]
    gain = result.gain
    assert gain is not None, "a method with several references has a gain"
    words = f"{100 * gain.value:+.1f} points ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
    if gain.low > 0:
        meaning = "several references help here"
    elif gain.high < 0:
        meaning = "one reference is better here"
    else:
        meaning = "no difference that can be told from chance"
    noise = percent(condition.label_noise)
    return f"{noise} of the labels wrong: {RECOMMENDED} against {result.over}, {words}: {meaning}."


def _by_source(folder: Path) -> dict[str, float]:
    """A run's accuracy by likelihood in each domain."""
    (policy,) = read_evaluation(RunFolder(folder).evaluation)["policies"]
    return {name: part["accuracy"]["sum"]["value"] for name, part in policy["by_source"].items()}


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
    made = {
        "data": "the pairs, and what each reference read",
        "references": "the three references, named in refs.yaml",
        "pairs": "the pairs in shards",
        "store": "the references' scores",
        "compare": "a folder of `mrpo train` for each run, with its model",
        "report.html": "curves of accuracy against label noise and number of pairs",
        "accuracy.txt": "the tables above",
    }
    return "\n".join(table_lines([[str(out / path), text] for path, text in made.items()], "left"))
