"""Scoring side by side: ours (hf, vllm), vLLM without sharing, and TRL 1.16's precompute pass.

    python benchmarks/scoring.py               # a CPU: 256 HH-RLHF pairs, 7.1 M parameters
    python benchmarks/scoring.py --gpu         # a GPU: 1.2 B parameters, pairs as they are and long
    python benchmarks/scoring.py --ranked      # a CPU: all pairings of ranked responses
    python benchmarks/scoring.py --publish     # keeps the results: benchmarks/results, docs

All variants score the same pairs with the same weights, each in a process of its own, in turns,
for several rounds. Only the pass itself is timed: from token ids to stored sums (ours in the score
store, TRL's in its cache), after a warm-up on other pairs, without imports, loading and
tokenizing. Token counts have each prompt twice, once per response, whatever a program computes.
The share of the matrix rate has it once: useful operations per second divided by those of a plain
matrix product of the same precision, measured in the same run.

Ranked data (`--ranked`) has a table of its own: all six pairings of the four solutions to each of
some questions of GSM8K. There the tokens are those that each program computes, without padding: TRL
every response with its prompt in every pair, our own pass pair by pair every response but the
prompt once a pair, and the worker of `mrpo precompute` the prompt and each response once.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mrpo.benchmarks.common import (
    LONG,
    MATRIX,
    OPTIONS,
    RANKED,
    Child,
    Figures,
    machine,
    machine_line,
    main,
    median,
    peak_memory,
    publish,
    rounds_of,
    spread,
    table,
)
from mrpo.benchmarks.workload import (
    SIZES,
    described,
    long_pairs,
    messages,
    pair_work,
    ranked_pairs,
    real_pairs,
    rendered,
    write_model,
    write_pairs,
)
from mrpo.data.ids import IdIndex, ids_to_numpy
from mrpo.data.pairs import Pair
from mrpo.data.shards import PairShards

TRL, HF, VLLM = "TRL 1.16", "mrpo hf", "mrpo vllm"
UNSHARED, BFLOAT16 = ", prompts not shared", ", bfloat16"
PAIRWISE = ", pair by pair"
ON_RANKED = [TRL + RANKED, HF + PAIRWISE + RANKED, HF + RANKED]
ON_CPU = [MATRIX, TRL, TRL + BFLOAT16, HF, HF + BFLOAT16, VLLM + UNSHARED, VLLM]
ON_GPU = [TRL, HF, VLLM + UNSHARED, VLLM]  # all in bfloat16, and each on long pairs too


@dataclass(frozen=True, slots=True)
class Options:
    """Settings that the parent hands to its children."""

    size: str = "small"
    pairs: int = 256  # as they are
    long_pairs: int = 0
    ranked: int = 0  # pairs of ranked responses, six a question
    warm_up: int = 16  # further pairs, scored before the clock starts
    trl_batch: int = 8  # pairs; by default TRL takes the training batch's size
    gpu: bool = False

    def precision(self, variant: str) -> str:
        return "bfloat16" if self.gpu or BFLOAT16 in variant else "float32"


ON_RANKED_DATA = Options(pairs=0, ranked=120)
GPU = Options(size="large", pairs=2048, long_pairs=512, warm_up=128, trl_batch=32, gpu=True)


def run_child(child: Child) -> None:
    if child.variant.startswith(TRL):
        score_in_trl(child)
    elif child.variant.startswith(VLLM):
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, ample for this model
        score_here(child, "vllm", share_prompts=UNSHARED not in child.variant)
    else:
        score_here(child, "hf", autocast=BFLOAT16 in child.variant)


def keep(child: Child, chosen: Any, rejected: Any) -> None:
    """Save the sums of log-probs, to compare the variants."""
    sums = np.stack([np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)], 1)
    np.save(child.folder / f"{child.variant}.npy", sums)


def score_here(child: Child, engine: Any, **settings: Any) -> None:
    """Engine hf or vllm, as the worker of `mrpo precompute` runs it."""
    from mrpo.data.rendering import Renderer
    from mrpo.data.store import Store
    from mrpo.model.packing import padded_tokens
    from mrpo.precompute.engines import load_engine
    from mrpo.precompute.engines.protocol import EngineSettings
    from mrpo.precompute.scoring import PairSelection, score_rows, sort_out

    if engine == "vllm":
        import vllm  # noqa: F401
    else:
        import mrpo.precompute.engines.hf  # noqa: F401
    measurement, options = child.measurement, Options(**child.options)
    measurement.imported()
    shards, renderer = PairShards(child.pairs), Renderer.load(child.model)
    with measurement.timed("tokenizing_seconds"):
        pairs = rendered(renderer, shards.pairs(0))
    count = len(pairs) - options.warm_up
    work = pair_work(shards, pairs[:count])
    if RANKED in child.variant and PAIRWISE not in child.variant:
        selection, none = PairSelection(shards), Store(child.folder / "none").scores("0" * 32)
        missing = selection.responses(0, selection.missing(0, none)[:count])
        shown = renderer.render_responses(missing.asked(shards, 0))
        work = sort_out(missing, shown, None, None)
    settings |= {"dtype": SIZES[options.size].dtype, "longest": max(map(padded_tokens, pairs))}
    loaded = load_engine(engine, EngineSettings(alias="model", model=child.model, **settings))
    loaded.score(pairs[-options.warm_up :])
    with TemporaryDirectory() as store, measurement.timed():
        scored = score_rows(work, loaded, keep_token_logps=False, progress=lambda count: None)
        index = IdIndex(ids_to_numpy(scored.table["response_id"]))
        Store(store).scores("0" * 32).add(scored.table.take(index.firsts()))
    ids, logps = shards.response_ids(0).take(np.arange(count)), scored.table["logp"].to_numpy()
    keep(child, *(logps[index.find(part)] for part in (ids.chosen, ids.rejected)))
    measurement.figures |= {"tokens": work.tokens, "facts": loaded.facts}
    for name in ("cached_tokens", "asked_again"):
        measurement.figures[name] = getattr(loaded, name, None)


def score_in_trl(child: Child) -> None:
    """`_precompute_ref_logps` of a DPOTrainer, which calls it as soon as it is made."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    measurement, options = child.measurement, Options(**child.options)
    measurement.imported()
    rows = messages(PairShards(child.pairs).pairs(0))
    count = len(rows) - options.warm_up

    class Timed(DPOTrainer):
        def _prepare_dataset(self, *arguments: Any) -> Any:
            with measurement.timed("tokenizing_seconds"):
                return super()._prepare_dataset(*arguments)

        def _precompute_ref_logps(self, dataset: Any, *arguments: Any) -> Any:
            warm_up = dataset.select(range(count, len(dataset)))
            super()._precompute_ref_logps(warm_up, *arguments)
            dataset = dataset.select(range(count))
            with measurement.timed():
                return super()._precompute_ref_logps(dataset, *arguments)

    trainer = Timed(
        model=child.model,
        args=DPOConfig(
            output_dir=str(child.folder / "trl"),
            precompute_ref_log_probs=True,
            max_length=None,
            per_device_train_batch_size=options.trl_batch,
            bf16=options.precision(child.variant) == "bfloat16",
            gradient_checkpointing=False,
            use_cpu=not options.gpu,
            report_to="none",
            model_init_kwargs={"dtype": SIZES[options.size].dtype},
        ),
        train_dataset=Dataset.from_list(rows),
    )
    scored: Any = trainer.train_dataset
    keep(child, scored["ref_chosen_logps"][:], scored["ref_rejected_logps"][:])
    parts = {"prompt_ids": 2, "chosen_ids": 1, "rejected_ids": 1}
    measurement.figures["tokens"] = sum(
        times * sum(map(len, scored[name][:])) for name, times in parts.items()
    )


def make_workload(folder: Path, data: Path, options: Options) -> dict[str, Figures]:
    """Write the model and the sets of pairs; returns the facts of each set."""
    from mrpo.data.rendering import Renderer

    pairs = real_pairs(data, folder)
    write_model(folder / "model", SIZES[options.size], pairs)
    (folder / OPTIONS).write_text(json.dumps(asdict(options)))
    renderer, workload = Renderer.load(folder / "model"), {}
    sets: dict[str, tuple[Iterable[Pair], int]] = {
        "real": (pairs, options.pairs),
        "long": (long_pairs(pairs), options.long_pairs),
        "ranked": (ranked_pairs(data) if options.ranked else (), options.ranked),
    }
    for name, (source, count) in sets.items():
        if count:
            shards = write_pairs(folder / name, source, count + options.warm_up)
            shown = rendered(renderer, shards.pairs(0)[:count])
            workload[name] = described(folder / "model", shown)
            ids = shards.response_ids(0).take(np.arange(count))
            different = {"prompts": ids.prompts, "responses": ids.both}
            workload[name] |= {of: len(set(part.tolist())) for of, part in different.items()}
    return workload


def side_by_side(arguments: Namespace, folder: Path) -> None:
    """Measure, and print the results."""
    options = GPU if arguments.gpu else ON_RANKED_DATA if arguments.ranked else Options()
    if arguments.small:
        few = {name: min(getattr(options, name), 24) for name in ("pairs", "long_pairs", "ranked")}
        options = replace(options, size="tiny", warm_up=8, **few)
    workload = make_workload(folder, arguments.data, options)
    variants = [MATRIX, *ON_RANKED] if arguments.ranked else ON_CPU
    if arguments.gpu:
        variants = [MATRIX, *ON_GPU, *(name + LONG for name in ON_GPU)]
    runs = rounds_of(__file__, variants, folder, arguments.rounds, arguments.only)
    results = {
        "machine": machine(),
        "options": asdict(options),
        "workload": workload,
        "differences": differences(list(runs), folder),
        "runs": runs,
    }
    markdown = report(results, options)
    print(markdown)
    if arguments.publish:
        kind = "gpu" if arguments.gpu else "ranked" if arguments.ranked else "cpu"
        publish(f"scoring-{kind}", results, markdown)


def differences(variants: list[str], folder: Path) -> dict[str, float]:
    """The largest difference of a sum from hf's in the weights' own precision, in nats."""
    largest = {}
    for variant in variants:
        ending = next((ending for ending in (LONG, RANKED) if ending in variant), "")
        exact = folder / f"{HF}{ending}.npy"
        if variant != MATRIX and exact.exists():
            largest[variant] = float(
                np.abs(np.load(folder / f"{variant}.npy") - np.load(exact)).max()
            )
    return largest


def report(results: dict[str, Any], options: Options) -> str:
    """A table in Markdown for each set of pairs."""
    parts = [machine_line(results["machine"]) + "."]
    runs = results["runs"]
    head = ["", "tokens/s", "TRL's", "pairs/s", "of matrix rate", "memory, MB"]
    for of, facts in results["workload"].items():
        if of == "ranked":
            parts += ranked_report(results, facts)
            continue
        rows, ending = [], LONG if of == "long" else ""
        for variant in (name for name in runs if name != MATRIX and (LONG in name) == bool(ending)):
            seconds = median(runs[variant], "seconds")
            peers = median(runs[TRL + ending], "seconds") if TRL + ending in runs else float("nan")
            rate = median(runs[MATRIX], options.precision(variant))
            memory = f"{peak_memory(runs[variant]):,.0f}"
            rows.append(
                [
                    variant.removesuffix(ending),
                    f"{facts['tokens'] / seconds:,.0f}",
                    f"{peers / seconds:.2f} ×",
                    f"{facts['pairs'] / seconds:.1f}",
                    f"{facts['flops'] / seconds / rate:.0%}",
                    # vLLM takes its share of a GPU whatever it needs, in a process of its own.
                    "–" if options.gpu and variant.startswith(VLLM) else memory,
                    f"{results['differences'].get(variant, float('nan')):.1e}",
                    f"{spread(runs[variant], 'seconds'):.0%}",
                ]
            )
        tokens, prompt = (facts[name] / facts["pairs"] for name in ("tokens", "prompt_tokens"))
        parts.append(
            f"{facts['pairs']} pairs of {tokens:.0f} tokens on average, their prompts of "
            f"{prompt:.0f} counted twice; medians of {len(runs[MATRIX])} rounds:"
        )
        parts.append(table([*head, "difference, nats", "spread"], rows))
    return "\n\n".join(parts)


def ranked_report(results: dict[str, Any], facts: Figures) -> list[str]:
    """A sentence and a table on ranked data."""
    runs, rows = results["runs"], []
    variants = [name for name in ON_RANKED if name in runs]
    if not variants:
        return []
    pairwise = runs.get(HF + PAIRWISE + RANKED, runs[variants[-1]])
    for variant in variants:
        seconds, tokens = (median(runs[variant], name) for name in ("seconds", "tokens"))
        peers = median(runs[TRL + RANKED], "seconds") if TRL + RANKED in runs else float("nan")
        rows.append(
            [
                variant.removesuffix(RANKED),
                f"{tokens:,.0f}",
                f"{median(pairwise, 'tokens') / tokens:.2f} ×",
                f"{seconds:.2f}",
                f"{median(pairwise, 'seconds') / seconds:.2f} ×",
                f"{peers / seconds:.2f} ×",
                f"{results['differences'].get(variant, float('nan')):.1e}",
                f"{spread(runs[variant], 'seconds'):.0%}",
            ]
        )
    head = ["", "tokens computed", "fewer", "seconds", "than pair by pair", "TRL's"]
    return [
        f"{facts['pairs']} pairs, which are all pairings of {facts['responses']} solutions to "
        f"{facts['prompts']} questions of GSM8K:",
        table([*head, "difference, nats", "spread"], rows),
    ]


if __name__ == "__main__":
    main(__doc__.split("\n")[0], side_by_side, run_child, ranked=True)
