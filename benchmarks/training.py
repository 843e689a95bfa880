"""Training side by side: ours, and TRL 1.16 with scores precomputed and with its reference loaded.

    python benchmarks/training.py             # a CPU: 16 steps of 8 HH-RLHF pairs, 7.1 M parameters
    python benchmarks/training.py --gpu       # a GPU: 1.2 B parameters, pairs as they are and long
    python benchmarks/training.py --publish   # writes the results to benchmarks/results and docs

DPO on the same pairs in the same order from the same scores and weights, each program in a process
of its own, in turns, several rounds. Whole optimizer steps are measured, with data loading and
logs, without imports, loading, checkpoints and evaluations, and without TRL's own pass for the
scores, which `scoring.py` measures. On the CPU all is float32, and the losses of the steps and the
final weights are compared; on the GPU it is bfloat16 autocast over float32 weights.

The second table is our MRPO with 1, 2, 4 and 8 references, whose scores are the base's with noise:
the cost of a step does not depend on their values.
"""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mrpo.benchmarks.common import (
    LONG,
    MATRIX,
    OPTIONS,
    Child,
    Figures,
    machine,
    machine_line,
    main,
    measure,
    median,
    peak_memory,
    publish,
    rounds_of,
    spread,
    table,
)
from mrpo.benchmarks.trainers import RATE, SEED, order_file, scores_file, train_here, train_in_trl
from mrpo.benchmarks.workload import (
    SIZES,
    described,
    long_pairs,
    real_pairs,
    rendered,
    write_model,
    write_pairs,
    write_scores,
)
from mrpo.data.shards import PairShards
from mrpo.train.stream import window

SCORES, OURS, MANY = "scores", "mrpo", "mrpo, K = "
TRL, IN_LOOP = "TRL 1.16, scores precomputed", "TRL 1.16, reference in the loop"
CHECKPOINTED = f"{TRL}, checkpointing"  # as TRL has it by default
K = (1, 2, 4, 8)
MORE_ROUNDS = 2  # for the small differences between numbers of references


@dataclass(frozen=True, slots=True)
class Options:
    """What parent and children agree on."""

    size: str = "small"
    batch_pairs: int = 8
    trl_batch: int = 8  # pairs of TRL's micro-batch
    max_tokens: int | str = "auto"  # of ours; on a GPU `auto` would fill the card
    steps: int = 16
    warm_up: int = 0  # steps before the clock starts
    long_pairs: bool = False
    gpu: bool = False


GPU = Options(
    size="large",
    batch_pairs=64,
    trl_batch=16,
    max_tokens=8192,
    steps=12,
    warm_up=4,
    long_pairs=True,
    gpu=True,
)


def run_child(child: Child) -> None:
    if child.variant == SCORES:
        for folder in (child.folder / "real", child.folder / "long"):
            if folder.is_dir():
                np.save(scores_file(folder), write_scores(child.folder, PairShards(folder), max(K)))
    elif child.variant.startswith(MANY):
        train_here(child, "mrpo", int(child.variant.removeprefix(MANY)))
    elif child.variant.startswith(OURS):
        train_here(child, "dpo:ref0", 1)
    else:
        train_in_trl(child, IN_LOOP not in child.variant, CHECKPOINTED in child.variant)


def make_workload(folder: Path, data: Path, options: Options) -> dict[str, Figures]:
    """Write the model, the sets of pairs and their scores; returns the facts of each set."""
    from mrpo.data.rendering import Renderer

    pairs = real_pairs(data, folder)
    write_model(folder / "model", SIZES[options.size], pairs)
    (folder / OPTIONS).write_text(json.dumps(asdict(options)))
    renderer, workload = Renderer.load(folder / "model"), {}
    sets = {"real": iter(pairs), "long": long_pairs(pairs)}
    before = options.batch_pairs * options.warm_up
    for name in sets if options.long_pairs else ["real"]:
        count = before + options.batch_pairs * options.steps
        shards = write_pairs(folder / name, sets[name], count)
        [(_, rows)], order = window([np.arange(count)], SEED, epoch=0, number=0)
        np.save(order_file(folder / name), rows[order])
        shown = rendered(renderer, [shards.pairs(0)[row] for row in rows[order][before:]])
        workload[name] = described(folder / "model", shown, forwards=3)
    measure(__file__, SCORES, folder)
    return workload


def side_by_side(arguments: Namespace, folder: Path) -> None:
    """Measure all variants, and print the tables."""
    options = GPU if arguments.gpu else Options()
    if arguments.small:
        options = replace(options, size="tiny", batch_pairs=8, trl_batch=4, steps=3)
    workload = make_workload(folder, arguments.data, options)
    variants = [MATRIX, IN_LOOP, CHECKPOINTED, TRL, OURS]
    if options.long_pairs:
        variants += [name + LONG for name in variants[1:]]
    runs = rounds_of(__file__, variants, folder, arguments.rounds, arguments.only)
    rounds = arguments.rounds + MORE_ROUNDS
    runs |= rounds_of(__file__, [f"{MANY}{k}" for k in K], folder, rounds, arguments.only)
    results = {
        "machine": machine(),
        "options": asdict(options),
        "learning_rate": RATE,
        "workload": workload,
        "agreement": {} if options.gpu else agreement(runs, folder),
        "runs": runs,
    }
    markdown = report(results, options)
    print(markdown)
    if arguments.publish:
        publish("training-gpu" if arguments.gpu else "training-cpu", results, markdown)


def agreement(runs: dict[str, list[Figures]], folder: Path) -> dict[str, Figures]:
    """How far losses and final weights are from those of TRL with the same scores."""
    if TRL not in runs:
        return {}
    start = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).state_dict()
    losses, distances = np.array(runs[TRL][-1]["losses"]), {}
    theirs = torch.load(folder / f"{TRL}.pt")
    moved = flat(theirs, start)
    for variant in (IN_LOOP, CHECKPOINTED, OURS):
        if variant in runs:
            apart = flat(torch.load(folder / f"{variant}.pt"), theirs)
            distances[variant] = {
                "loss": float(np.abs(np.array(runs[variant][-1]["losses"]) / losses - 1).max()),
                "weights": float(apart.norm() / moved.norm()),
                "weight": float(apart.abs().max()),
                "moved": float(moved.abs().max()),
            }
    return distances


def flat(minuend: dict[str, Tensor], subtrahend: dict[str, Tensor]) -> Tensor:
    """The difference of two sets of weights, in float64, as one vector."""
    differences = [minuend[name].double() - weight.double() for name, weight in subtrahend.items()]
    return torch.cat([difference.flatten() for difference in differences])


def report(results: dict[str, Any], options: Options) -> str:
    """The tables in Markdown: side by side, agreement, numbers of references."""
    parts, runs = [machine_line(results["machine"]) + "."], results["runs"]
    rate = median(runs[MATRIX], "bfloat16" if options.gpu else "float32")
    for name, facts in results["workload"].items():
        tokens, prompt = (facts[key] / facts["pairs"] for key in ("tokens", "prompt_tokens"))
        parts.append(
            f"{options.steps} steps of {options.batch_pairs} pairs, of {tokens:.0f} tokens on "
            f"average with their prompts of {prompt:.0f} counted twice; medians of "
            f"{len(runs[MATRIX])} rounds:"
        )
        ending = LONG if name == "long" else ""
        names = [variant + ending for variant in (IN_LOOP, CHECKPOINTED, TRL, OURS)]
        measured = [variant for variant in names if variant in runs]
        parts.append(speeds(measured, runs, facts, rate))
    if results["agreement"]:
        parts.append(
            f"Losses and final weights beside those of {TRL}, learning rate "
            f"{results['learning_rate']:g}:"
        )
        parts.append(agreements(results["agreement"]))
    compiled = [
        f"{run['compiled_graphs']} and {run['recompiled_graphs']}"
        for name in (OURS, OURS + LONG)
        for run in runs.get(name, [])
        if run.get("compiled_graphs")
    ]
    if compiled:
        parts.append(
            "Graphs that ours compiled in the warm-up and after it, in each of its rounds: "
            f"{', '.join(compiled)}."
        )
    many = {k: runs[f"{MANY}{k}"] for k in K if f"{MANY}{k}" in runs}
    if many:
        parts.append(f"MRPO from K references, medians of {len(next(iter(many.values())))} rounds:")
        parts.append(references(many, options))
    return "\n\n".join(parts)


def speeds(names: list[str], runs: dict[str, list[Figures]], facts: Figures, rate: float) -> str:
    head = ["", "pairs/s", "TRL's", "of matrix rate", "memory, MB", "TRL's", "spread"]
    peers = next((runs[name] for name in names if name.startswith(TRL) and "check" not in name), [])
    rows = []
    for name in names:
        seconds, memory = median(runs[name], "seconds"), peak_memory(runs[name])
        rows.append(
            [
                name.removesuffix(LONG),
                f"{facts['pairs'] / seconds:.2f}",
                f"{median(peers, 'seconds') / seconds:.2f} ×" if peers else "–",
                f"{facts['flops'] / seconds / rate:.0%}",
                f"{memory:,.0f}",
                f"{memory / peak_memory(peers):.2f} ×" if peers else "–",
                f"{spread(runs[name], 'seconds'):.0%}",
            ]
        )
    return table(head, rows)


def agreements(distances: dict[str, Figures]) -> str:
    head = ["", "losses, relative", "weights, relative to their change in training"]
    head += ["one weight, at most", "its change in training, at most"]
    rows = [
        [name, *(f"{distance[key]:.1e}" for key in ("loss", "weights", "weight", "moved"))]
        for name, distance in distances.items()
    ]
    return table(head, rows)


def references(many: dict[int, list[Figures]], options: Options) -> str:
    first = many[K[0]]
    rows = [
        [
            str(k),
            f"{1000 * median(runs, 'seconds') / options.steps:.0f}",
            f"{median(runs, 'seconds') / median(first, 'seconds') - 1:+.1%}",
            f"{spread(runs, 'seconds'):.1%}",
            f"{peak_memory(runs) - peak_memory(first):+.1f}",
        ]
        for k, runs in many.items()
    ]
    return table(["K", "ms a step", "to K = 1", "spread", "memory to K = 1, MB"], rows)


if __name__ == "__main__":
    main(__doc__.split("\n")[0], side_by_side, run_child)
