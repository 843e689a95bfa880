"""`mrpo demo`: the whole method in one go, by the functions behind the commands that it shows.

    demo-run/data/          the pairs, and what the references read
    demo-run/references/    three tiny models, named in demo-run/refs.yaml
    demo-run/pairs/         the pairs in shards, from `mrpo prepare`
    demo-run/store/         every reference's scores, from `mrpo precompute`
    demo-run/runs/          DPO with each reference and MRPO with all, from `mrpo train`
    demo-run/accuracy.txt   the table at the end

Nothing is tuned for any of the methods: all train from the same policy with the same settings. The
table counts the held-out pairs that a model ranks rightly, that is whose chosen response has the
higher log-prob, summed over its tokens; policies are scored as references are. It is printed
whatever it says, with its uncertainty.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.prepare import prepare
from ..data.references import load_refs
from ..data.shards import PairShards
from ..data.store import Store
from ..errors import UserError
from ..evaluation.figures import preferred
from ..evaluation.intervals import bootstrap_means, interval, wilson
from ..evaluation.policies import policy_of_run, references_of
from ..evaluation.score_table import load_score_table
from ..files import write_text
from ..precompute.run import precompute, score
from ..settings import build, command, write_resolved
from ..terminal import table_lines
from ..train.run import train
from .config import DemoConfig
from .data import DOMAINS, write_data
from .models import FAMILIES
from .pretrain import pretrain_all

REFS = ",".join(FAMILIES)  # the first is the base: the policy starts from it
METHODS = {**{f"dpo-{family}": f"dpo:{family}" for family in FAMILIES}, "mrpo": "mrpo"}
# The rate that gave DPO with the base the best accuracy in one pass, in a demo of another seed.
TRAINING = {"batch_pairs": 16, "num_train_epochs": 1, "learning_rate": 5e-4}
CHATS = 26_000  # read by each reference
QUICK_PAIRS, QUICK_CHATS = 300, 1_280
HEADING = """\
Held-out preference accuracy: the share of pairs, in %, whose right reply has the higher log-prob,
with its 95 % interval. No training pair asks for the same fact, sum or request.
"""


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
            if name != "source":
                words.append(f"--{name.replace('_', '-')}")
            if value is not True:
                words.append(str(value))
        return shlex.join(words)

    def run(self) -> int:
        """Run it in this process; returns its exit code."""
        return getattr(self.command(**self.settings), "exit_code", 0)


@command(DemoConfig)
def demo(config: DemoConfig) -> Demonstration:
    """Make everything that `config.out` does not have yet, and print the table."""
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
    for step in steps(out, files.pairs, config.seed):
        print(f"\n$ {step.line()}", flush=True)
        if step.made is not None and step.made.exists():
            print(f"already there: {step.made}")
        elif exit_code := step.run():
            return Demonstration(out, exit_code)
    table = held_out_table(out, METHODS)
    write_text(out / "accuracy.txt", table)
    print(f"\n{table}\n{_whereabouts(out)}")
    return Demonstration(out)


def steps(out: Path, pairs: Path, seed: int) -> list[Step]:
    """What the demo does once its pairs and references are there."""
    scored = {
        "pairs": out / "pairs",
        "refs": REFS,
        "refs_config": out / "refs.yaml",
        "store": out / "store",
    }
    prepared = {"source": pairs, "out": out / "pairs", "validation_fraction": 0.25}
    every = [
        Step(prepare, prepared, out / "pairs" / "manifest.json"),
        Step(precompute, {**scored, "engine": "hf"}),
    ]
    for name, method in METHODS.items():
        folder = out / "runs" / name
        own = {"method": method, "output_dir": folder, **TRAINING, "seed": seed, "resume": True}
        every.append(Step(train, {**scored, **own}, folder / "model"))
    return every


def held_out_table(out: Path, methods: Mapping[str, str]) -> str:
    """Judge the references and the policies in a demo's folder; `methods` by name of the run."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    shards, store = PairShards(out / "pairs"), Store(out / "store")
    specs = load_refs(out / "refs.yaml")
    policies = [policy_of_run(out / "runs" / run, method) for run, method in methods.items()]
    scored = score(
        references_of(policies), shards, store.policies, split="validation", in_process=True
    )
    table = load_score_table(
        shards,
        store,
        [store.resolve(alias, specs) for alias in specs],
        policies=scored.records,
        split="validation",
    )
    every = [preferred(column.logps) for column in table.references]
    right = {f"reference {alias}": answers for alias, answers in zip(specs, every)}
    right[f"policy untrained = {table.aliases[0]}"] = every[0]
    trained = {
        f"trained with {policy.name}": answers
        for policy, answers in zip(policies, every[len(specs) :])
    }
    rows = domain_rows(right | trained, table.sources)
    gains = [[f"  {name}", text] for name, text in differences(trained, table.prompts).items()]
    title = f"{list(trained)[-1]} minus, in points, with a 95 % bootstrap interval over the pairs:"
    return "\n".join(
        [HEADING, *table_lines(rows, "left"), "", title, *table_lines(gains, "left"), ""]
    )


def domain_rows(right: Mapping[str, np.ndarray], sources: np.ndarray) -> list[list[str]]:
    """A heading of two rows, then for each model its accuracy by domain, and over all.

    `right` [N] is 1 where a model ranks a pair rightly, else 0; `sources` [N] are the domains.
    """
    parts = [*(sources == domain for domain in DOMAINS), np.ones(len(sources), dtype=bool)]
    rows = [["", *DOMAINS, "overall"], ["", *(f"{part.sum():,} pairs" for part in parts)]]
    for name, values in right.items():
        cells = [wilson(values[part]).percent() if part.any() else "–" for part in parts]
        rows.append([name, *cells])
    return rows


def differences(policies: Mapping[str, np.ndarray], prompts: np.ndarray) -> dict[str, str]:
    """The last policy against each other one, on the same resamples of the pairs."""
    means, draws = bootstrap_means(np.stack(list(policies.values()), axis=1), prompts)
    gains = {}
    for column, name in enumerate(list(policies)[:-1]):
        gain = interval(means[-1] - means[column], draws[:, -1] - draws[:, column])
        gains[name] = f"{100 * gain.value:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
    return gains


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
        **{f"runs/{name}/model": f"the policy of {method}" for name, method in METHODS.items()},
        "accuracy.txt": "the table above",
    }
    return "\n".join(table_lines([[str(out / path), text] for path, text in made.items()], "left"))
