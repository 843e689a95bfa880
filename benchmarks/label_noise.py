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
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from mrpo.data.pairs import in_fraction, label_turned
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
from mrpo.evaluation.score_table import load_score_table, pairs_at, scored_records
from mrpo.method.objective import ReferenceLogps
from mrpo.precompute.run import precompute
from mrpo.terminal import print_table

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
        }
        comparison = compare(
            **scored, **(GRID | grid), jobs=options.jobs, keep_models=False,
            output_dir=str(folder / "compare"),
        )  # fmt: skip
        for condition in reversed(comparison.conditions):
            expected = relative_weights(scored, comparison, condition, options)
            show(world, comparison, condition, expected)
            if condition.label_noise:
                orders.append(agreement(comparison, condition, expected))
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
    scored: dict[str, str],
    comparison: Comparison,
    condition: Condition,
    options: argparse.Namespace,
) -> dict[str, float]:
    """By row of the comparison: doctor's weight of contradicted labels, mean over the seeds.

    Over those seeds where doctor has one: with few wrong labels it says nothing.
    """
    pairs, store = PairShards(scored["pairs"]), Store(scored["store"])
    records = scored_records(pairs, store, scored["refs"].split(","), scored["refs_config"])
    table = load_score_table(pairs, store, records, split="train")
    prompts = [pair.prompt for pair in pairs_at(pairs, table.places)]
    weights: dict[str, list[float]] = {}
    for seed in comparison.seeds:  # --vary-subset: it draws the pairs and the labels too
        used = [n for n, p in enumerate(prompts) if in_fraction(p, condition.fraction, seed)]
        turned = [label_turned(prompts[n], condition.label_noise, seed) for n in used]
        trained_on = exchanged(table.pair_scores().of_rows(np.array(used)), np.array(turned))
        rows = forecast(
            trained_on,
            table.aliases,
            methods=options.methods.split(","),
            betas=[float(beta) for beta in options.betas.split(",")],
        ).rows
        for row in rows:
            name = f"{row.method} beta={row.beta:g}"
            weights.setdefault(name, []).append(row.relative_weight.value)
    known = {name: [q for q in values if np.isfinite(q)] for name, values in weights.items()}
    return {name: float(np.mean(values)) for name, values in known.items() if values}


def exchanged(scores: ReferenceLogps, turned: np.ndarray) -> ReferenceLogps:
    """The scores with chosen and rejected exchanged in the rows [N] that are turned round."""
    values = {}
    for of_chosen in ("ref_chosen_logps", "ref_chosen_tokens", "chosen_bytes"):
        of_rejected = of_chosen.replace("chosen", "rejected")
        chosen, rejected = getattr(scores, of_chosen), getattr(scores, of_rejected)
        rows = turned.reshape(-1, *[1] * (chosen.ndim - 1))
        values[of_chosen] = np.where(rows, rejected, chosen)
        values[of_rejected] = np.where(rows, chosen, rejected)
    return replace(scores, **values)


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
