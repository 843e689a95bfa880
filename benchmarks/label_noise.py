"""Few pairs and wrong labels, in several of the demo's worlds: what each method keeps.

    python benchmarks/label_noise.py OUT [--worlds 0,1,2] [--seeds 5] [--jobs 2] [--chats 8000]

For every world, the demo's data and references of that seed, `mrpo compare` trains each method on
a twentieth and a tenth of the pairs, with right labels and with 15 and 30 % of them turned round;
each seed of training has pairs and turned labels of its own. Accuracy is by likelihood on the
held-out pairs. Printed are the means, and each method's gain over the best single reference with
compare's interval, which is over prompts and seeds and holds for all methods together; beside them
doctor's forecast from the scores of the same training pairs, with the labels as they were trained
on, and how its order of the methods agrees with that of the accuracies. Run again, it goes on where
it was; more seeds only add runs. `OUT/world-N/compare/compare.json` has all figures.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from mrpo.data.join import JoinedScores, join, resolve_references
from mrpo.data.prepare import prepare
from mrpo.data.shards import PairShards
from mrpo.data.store import Store
from mrpo.demo.data import write_data
from mrpo.demo.models import FAMILIES
from mrpo.demo.pretrain import pretrain_all
from mrpo.demo.run import CHATS, GRID, REFS
from mrpo.evaluation.compare.compare import compare
from mrpo.evaluation.compare.results import Comparison, Condition, points
from mrpo.evaluation.doctor.forecast import forecast
from mrpo.method.grammar import parse_method
from mrpo.method.objective import ReferenceLogps
from mrpo.precompute.run import precompute
from mrpo.terminal import print_table
from mrpo.train.dataset import TrainingPairs, stacked

METHODS = [
    *(f"dpo:{family}" for family in FAMILIES),
    "mrpo",
    "geometric",
    "dpo:llama+reliable",
    "geometric+reliable",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--worlds", default="0,1,2", help="seeds of the demo's data")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--fractions", default="0.05,0.1")
    parser.add_argument("--label-noise", default="0,0.15,0.3")
    parser.add_argument("--betas", default="0.5")
    parser.add_argument("--epsilons", default="0.1,0.2,0.5,none", help="of mrpo")
    parser.add_argument("--chats", type=int, default=CHATS, help="that each reference has read")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    orders = []
    for world in map(int, options.worlds.split(",")):
        folder = options.out / f"world-{world}"
        scored = make_world(folder, world, options.chats)
        grid = {
            "methods": options.methods,
            "fractions": options.fractions,
            "label_noise": options.label_noise,
            "seeds": options.seeds,
            "betas": options.betas,
            "epsilons": options.epsilons,
        }
        comparison = compare(
            **scored, **(GRID | grid), jobs=options.jobs, keep_models=False,
            output_dir=str(folder / "compare"),
        )  # fmt: skip
        for condition in reversed(comparison.conditions):
            expected = relative_weights(folder, scored, comparison, condition, options)
            show(world, comparison, condition, expected)
            if condition.label_noise:
                orders.append(agreement(comparison, condition, expected))
    if not orders:
        return
    print(
        f"\nOrder by the forecast against order by accuracy in {len(orders)} settings, Spearman's "
        f"correlation: mean {np.mean(orders):.2f}, {min(orders):.2f} to {max(orders):.2f}"
    )


def make_world(folder: Path, seed: int, chats: int) -> dict[str, str]:
    """The demo's data, references, pairs and scores of a seed; where they are."""
    files = write_data(folder / "data", pairs=3000, chats=chats, seed=seed)
    if pretrain_all(files.corpora, folder / "references", seed):
        raise SystemExit(f"{folder}: a reference could not be trained")
    entries = [f"{family}: {{model: references/{family}, dtype: float32}}\n" for family in FAMILIES]
    (folder / "refs.yaml").write_text("".join(entries))
    if not (folder / "pairs").exists():
        prepare(source=str(files.pairs), out=str(folder / "pairs"), validation_fraction=0.25)
    scored = {
        "pairs": str(folder / "pairs"),
        "refs": REFS,
        "refs_config": str(folder / "refs.yaml"),
        "store": str(folder / "store"),
    }
    precompute(**scored, engine="hf")
    return scored


def relative_weights(
    folder: Path,
    scored: dict[str, str],
    comparison: Comparison,
    condition: Condition,
    options: argparse.Namespace,
) -> dict[str, float]:
    """By row of the comparison: doctor's weight of contradicted labels, mean over the seeds.

    Over those seeds where doctor has one: with few wrong labels it says nothing.
    """
    pairs, joined = PairShards(scored["pairs"]), folder / "joined"
    if not joined.exists():
        store, aliases = Store(scored["store"]), scored["refs"].split(",")
        join(pairs, store, resolve_references(pairs, store, aliases, scored["refs_config"]), joined)
    weights: dict[str, list[float]] = {}
    for seed in comparison.seeds:  # --vary-subset: it draws the pairs and the labels too
        source = TrainingPairs(
            pairs, JoinedScores(joined), True, condition.fraction, condition.label_noise, seed, seed
        )
        outlook = forecast(
            trained_on(source),
            source.joined.aliases,
            methods=options.methods.split(","),
            betas=[float(beta) for beta in options.betas.split(",")],
        )
        for row in [*outlook.rows, *outlook.grid]:
            clips = row.method == "mrpo"
            epsilon = "none" if row.epsilon is None else f"{row.epsilon:g}"
            name = f"{row.method} beta={row.beta:g}{f' epsilon={epsilon}' if clips else ''}"
            weights.setdefault(name, []).append(row.relative_weight.value)
    known = {name: [q for q in values if np.isfinite(q)] for name, values in weights.items()}
    return {name: float(np.mean(values)) for name, values in known.items() if values}


def trained_on(source: TrainingPairs) -> ReferenceLogps:
    """The scores of the pairs that a run trains on, with the labels that it gives them."""
    usable = source.usable(parse_method("mrpo", source.joined.aliases))
    return stacked([(source.scores(n)[0], rows) for n, rows in enumerate(usable.training)])


def agreement(comparison: Comparison, condition: Condition, expected: dict[str, float]) -> float:
    """Spearman's correlation of the methods' accuracies with 1 less their expected weights."""
    results = comparison.results_at(condition, comparison.metric)
    known = [method for method in results if np.isfinite(expected.get(method, np.nan))]
    accuracies = [results[method].accuracy.value for method in known]
    return float(spearmanr([1 - expected[method] for method in known], accuracies).statistic)


def show(
    world: int, comparison: Comparison, condition: Condition, expected: dict[str, float]
) -> None:
    """Print the table of a condition, the most accurate method first."""
    print(f"\nworld {world}, {condition}: {len(comparison.seeds)} seeds")
    rows = [["", "accuracy, %", "gain over the best single reference", "forecast"]]
    for method, result in comparison.results_at(condition, comparison.metric).items():
        gain = points(result.gain) if result.gain else ""
        rows.append(
            [method, result.accuracy.percent(), gain, _number(expected.get(method, np.nan))]
        )
    print_table(rows)


def _number(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "–"


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
