"""Few pairs and wrong labels, in several of the demo's worlds: what each method keeps.

    python benchmarks/label_noise.py OUT [--worlds 0,1,2] [--seeds 5] [--jobs 2]

For every world, the demo's data and references of that seed, `mrpo compare` trains each method on
a twentieth and a tenth of the pairs, with right labels and with 30 % of them turned round; each
seed of training has pairs and turned labels of its own. Accuracy is by likelihood on the held-out
pairs. Printed are the means, and each method's gain over the best single reference with compare's
interval, which is over prompts and seeds and holds for all methods together. Run again, it goes on
where it was; more seeds only add runs. `OUT/world-N/compare/compare.json` has all figures.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mrpo.data.prepare import prepare
from mrpo.demo.data import write_data
from mrpo.demo.models import FAMILIES
from mrpo.demo.pretrain import pretrain_all
from mrpo.demo.run import CHATS, GRID, REFS
from mrpo.evaluation.compare.compare import compare
from mrpo.evaluation.compare.results import Comparison, points
from mrpo.precompute.run import precompute
from mrpo.terminal import print_table

METHODS = [
    *(f"dpo:{family}" for family in FAMILIES),
    "mrpo",
    "geometric",
    "geometric+arwc",
    "geometric+max-margin",
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
    parser.add_argument("--label-noise", default="0,0.3")
    parser.add_argument("--betas", default="0.5")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    comparisons = {}
    for world in map(int, options.worlds.split(",")):
        folder = options.out / f"world-{world}"
        scored = make_world(folder, world)
        grid = {
            "methods": options.methods,
            "fractions": options.fractions,
            "label_noise": options.label_noise,
            "seeds": options.seeds,
            "betas": options.betas,
        }
        comparisons[world] = compare(
            **scored, **(GRID | grid), jobs=options.jobs, keep_models=False,
            output_dir=str(folder / "compare"),
        )  # fmt: skip
    for world, comparison in comparisons.items():
        show(world, comparison)


def make_world(folder: Path, seed: int) -> dict[str, str]:
    """The demo's data, references, pairs and scores of a seed; where they are."""
    files = write_data(folder / "data", pairs=3000, chats=CHATS, seed=seed)
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


def show(world: int, comparison: Comparison) -> None:
    """Print a table for each condition, the most accurate method first."""
    for condition in reversed(comparison.conditions):
        print(f"\nworld {world}, {condition}: {len(comparison.seeds)} seeds")
        results = comparison.results_at(condition, comparison.metric)
        print_table(
            [
                ["", "accuracy, %", "gain over the best single reference"],
                *(
                    [method, result.accuracy.percent(), points(result.gain) if result.gain else ""]
                    for method, result in results.items()
                ),
            ]
        )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
