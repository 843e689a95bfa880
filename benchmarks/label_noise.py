"""Wrong labels on few pairs: which methods keep what the references know.

    python benchmarks/label_noise.py DEMO_RUN OUT [--noise 0.3 --subsets 3 --seeds 1 --pairs 224]

DEMO_RUN is the folder of a finished `mrpo demo`. Of its training pairs a random subset is taken,
the labels of a share of these turned round by a digest of the prompt, and the policy trained by
each method. Accuracy is by likelihood on the held-out pairs, whose labels stay. The table gives
means over subsets and seeds, and for each method the difference to the best single reference of
the same subset and seed (which nobody knows beforehand) and to the base, with Student's 95 %
interval over the subsets. Results are added to OUT/results.jsonl, and what is there is not done
again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from mrpo.data.join import join
from mrpo.data.pairs import Pair
from mrpo.data.prepare import prepare
from mrpo.data.references import ReferenceSpec, load_refs
from mrpo.data.shards import PairShards
from mrpo.data.store import Store
from mrpo.evaluation.figures import preferred
from mrpo.evaluation.policies import policy_of_run, references_of
from mrpo.evaluation.score_table import load_score_table
from mrpo.method import losses
from mrpo.method.fitted import fit_reliability
from mrpo.precompute.run import score
from mrpo.train.dataset import TrainingPairs
from mrpo.train.run import train

REFS = "llama,mistral,qwen"
ALIASES = REFS.split(",")
SINGLE = [f"dpo:{alias}" for alias in ALIASES]
METHODS = [
    *SINGLE,
    "mrpo",
    "geometric+arwc",
    "geometric+fitted",
    "dpo:llama+reliable",
    "geometric+reliable",
    "geometric+arwc+reliable",
    "dpo:llama, doubtful pairs dropped",
    "dpo:llama, pairs weighted by reliability",
    "dpo:llama, label smoothing 0.3",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--noise", type=float, default=0.3)
    parser.add_argument("--pairs", type=int, default=224)
    parser.add_argument("--first-subset", type=int, default=0)
    parser.add_argument("--subsets", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by semicolons")
    options = parser.parse_args()
    methods = options.methods.split(";")
    for subset in range(options.first_subset, options.first_subset + options.subsets):
        for seed in range(options.seeds):
            for method in methods:
                cell = cell_of(options, subset, seed, method)
                if cell not in [line["cell"] for line in results(options.out)]:
                    run(options, cell)
    table(results(options.out), methods)


def cell_of(options: argparse.Namespace, subset: int, seed: int, method: str) -> dict[str, Any]:
    return {
        "noise": options.noise, "pairs": options.pairs, "epochs": options.epochs,
        "beta": options.beta, "subset": subset, "seed": seed, "method": method,
    }  # fmt: skip


def results(out: Path) -> list[dict[str, Any]]:
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(options: argparse.Namespace, cell: dict[str, Any]) -> None:
    """Train and evaluate one method, and add its line to the results."""
    text, _, variant = cell["method"].partition(", ")
    world = make_world(options, cell["subset"], drop="dropped" in variant)
    folder = options.out / "runs" / hashlib.sha256(json.dumps(cell).encode()).hexdigest()[:12]
    changes: dict[str, Any] = {}
    if "smoothing" in variant:
        changes["label_smoothing"] = float(variant.rpartition(" ")[2])
    weighted = contextlib.nullcontext()
    if "weighted" in variant:
        text, weighted = f"{text}+reliable", patch.object(losses, "expected_loss", weighted_loss)
    with weighted, quiet(options.out / "runs.log"):
        train(
            pairs=str(world / "pairs"), refs=REFS, refs_config=str(options.demo / "refs.yaml"),
            store=str(world / "store"), method=text, output_dir=str(folder), beta=options.beta,
            seed=cell["seed"], batch_pairs=16, learning_rate=5e-4, save_steps=10**6,
            eval_steps=10**6, num_train_epochs=options.epochs, device="cpu", **changes,
        )  # fmt: skip
        accuracies = evaluate(options, world, folder)
    with (options.out / "results.jsonl").open("a") as file:
        print(json.dumps({"cell": cell, "accuracies": accuracies}), file=file)
    print(cell["subset"], cell["seed"], cell["method"], accuracies, flush=True)


def weighted_loss(margin: Any, beta: float, loss_type: str, wrong: Any) -> Any:
    """(1 − s)·L(h): a doubtful pair counts less, and never as its opposite."""
    return (1 - wrong.to(margin.dtype)) * losses.PLAIN_LOSSES[loss_type](margin, beta)


def make_world(options: argparse.Namespace, subset: int, drop: bool) -> Path:
    """The subset's pairs, scored by all references; with `drop` without the doubtful ones."""
    name = f"noise-{options.noise:g}-pairs-{options.pairs}-subset-{subset}"
    world = options.out / "worlds" / (name + "-dropped" * drop)
    if (world / "pairs").exists():
        return world
    world.mkdir(parents=True, exist_ok=True)
    pairs, held_out = demo_pairs(options.demo)
    order = sorted(pairs, key=lambda pair: digest(f"{subset} {prompt_of(pair)}"))
    chosen = [(pair, turned(pair, options.noise)) for pair in order[: options.pairs]]
    if drop:
        wrong = doubts(options, make_world(options, subset, drop=False))
        kept = [wrong[pair_text(pair, turn)] <= 0.5 for pair, turn in chosen]
        right = sum(turn for (_, turn), keep in zip(chosen, kept) if not keep)
        print(f"subset {subset}: {len(kept) - sum(kept)} dropped, {right} of them truly turned")
        chosen = [item for item, keep in zip(chosen, kept) if keep]
    lines = [line_of(pair, turn) for pair, turn in chosen]
    lines += [line_of(pair, False) for pair in held_out]
    (world / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with quiet(options.out / "runs.log"):
        shards = prepare(
            source=str(world / "pairs.jsonl"), out=str(world / "pairs"), validation_fraction=0.25
        )
        score(references(options.demo), shards, str(world / "store"), engine="hf", in_process=True)
    return world


def references(demo: Path) -> list[ReferenceSpec]:
    return list(load_refs(demo / "refs.yaml").values())


def doubts(options: argparse.Namespace, world: Path) -> dict[str, float]:
    """The chance that a training pair's label is wrong, by the pair's text."""
    shards = PairShards(world / "pairs")
    with quiet(options.out / "runs.log"):
        scored = score(
            references(options.demo), shards, str(world / "store"), engine="hf", in_process=True
        )
    joined = join(shards, Store(world / "store"), scored.records, world / "joined")
    source = TrainingPairs(shards, joined, prompt_numbers=True)
    scores, held_out = source.scores(0)
    margins = scores.ref_chosen_logps - scores.ref_rejected_logps
    fit = fit_reliability(margins[~held_out], scores.prompts[~held_out])
    chances = fit.chance_wrong(margins, scores.prompts)
    return {pair_text(pair, False): s for pair, s in zip(shards.pairs(0), chances)}


def demo_pairs(demo: Path) -> tuple[list[Pair], list[Pair]]:
    """The demo's training pairs and its held-out ones."""
    shards = PairShards(demo / "pairs")
    training, held_out = [], []
    for shard in range(len(shards.names)):
        splits = shards.table(shard, ["split"])["split"].to_pylist()
        for pair, split in zip(shards.pairs(shard), splits):
            (held_out if split == "validation" else training).append(pair)
    return training, held_out


def line_of(pair: Pair, turn: bool) -> dict[str, Any]:
    chosen, rejected = (pair.rejected, pair.chosen) if turn else (pair.chosen, pair.rejected)
    return {
        "prompt": pair.prompt, "chosen": chosen, "rejected": rejected, "source": pair.source,
    }  # fmt: skip


def pair_text(pair: Pair, turn: bool) -> str:
    line = line_of(pair, turn)
    return json.dumps([line["prompt"], line["chosen"], line["rejected"]])


def prompt_of(pair: Pair) -> str:
    return json.dumps(pair.prompt)


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def turned(pair: Pair, noise: float) -> bool:
    """Whether the pair's label is turned round: the same in every subset."""
    return digest(f"noise {prompt_of(pair)}") < noise * 2**64


def evaluate(options: argparse.Namespace, world: Path, folder: Path) -> dict[str, float]:
    """Accuracy by likelihood on the held-out pairs, in %: by domain, and of all."""
    shards, store = PairShards(world / "pairs"), Store(world / "store")
    policy = policy_of_run(folder, "policy")
    scored = score(
        references_of([policy]), shards, store.policies, split="validation", in_process=True
    )
    judges = score(references(options.demo), shards, store, engine="hf", in_process=True)
    parts = load_score_table(
        shards, store, judges.records, policies=scored.records, split="validation"
    )
    right = preferred(parts.references[-1].logps)
    domains = {name: right[parts.sources == name].mean() for name in np.unique(parts.sources)}
    return {name: round(100 * float(v), 2) for name, v in (domains | {"all": right.mean()}).items()}


@contextlib.contextmanager
def quiet(log: Path) -> Any:
    """What is printed goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def table(lines: list[dict[str, Any]], methods: list[str]) -> None:
    """Print each setting's table."""
    from scipy.stats import t as student

    settings = defaultdict(lambda: defaultdict(dict))  # type: ignore[var-annotated]
    for line in lines:
        cell = line["cell"]
        key = f"noise {cell['noise']:g}, {cell['pairs']} pairs, beta {cell['beta']:g}"
        settings[key][cell["subset"], cell["seed"]][cell["method"]] = line["accuracies"]
    for key, runs in settings.items():
        complete = {run: by for run, by in runs.items() if all(method in by for method in methods)}
        if not complete:
            continue
        subsets = sorted({subset for subset, _ in complete})
        print(f"\n{key}: {len(subsets)} subsets, {len(complete)} runs of each method")
        for method in methods:
            means = {
                name: np.mean([by[method][name] for by in complete.values()])
                for name in next(iter(complete.values()))[method]
            }
            gains = []
            for compared in (None, "dpo:llama"):
                per_subset = []
                for subset in subsets:
                    mine = [by for (number, _), by in complete.items() if number == subset]
                    best = [
                        by[compared]["all"] if compared else max(by[s]["all"] for s in SINGLE)
                        for by in mine
                    ]
                    per_subset.append(np.mean([by[method]["all"] for by in mine]) - np.mean(best))
                mean, n = np.mean(per_subset), len(per_subset)
                half = np.inf
                if n > 1:
                    half = student.ppf(0.975, n - 1) * np.std(per_subset, ddof=1) / np.sqrt(n)
                gains.append(f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})")
            shown = "  ".join(f"{name} {value:5.1f}" for name, value in means.items())
            print(f"{method:<44} {shown}   best single {gains[0]}   base {gains[1]}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
