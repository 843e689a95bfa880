"""Do several references help on real data? Methods × label noise × number of pairs, in one go.

    python benchmarks/study.py --out study-run            # a laptop: SmolLM2-135M and experts of it
    python benchmarks/study.py --out study-run --seeds 5  # more runs, the others are kept
    python benchmarks/study.py --pairs 400 --tokens 320   # more of them, for a GPU without the Hub
    python benchmarks/study.py --out study-run --gpu      # a GPU: three Hub models

The pairs are of three sets (`real_pairs.py` says how the latter two become pairs): HH-RLHF's
harmless test set, GSM8K's solutions by four models, right over wrong, and TruthfulQA. On a CPU the
base and the policy are SmolLM2-135M-Instruct out of a package (`real_model.py`), and three experts,
LoRA adapters of it that each read the chosen replies of one set, are further references; their
prompts are not among the pairs. With --gpu the references are Hub models of three families.

Everything goes through the package's functions: prepare, precompute, doctor (whose forecast it is
to be compared with), compare, report. A step whose files are there is not done again.

    study-run/model, experts/      the references, named in refs.yaml
    study-run/pairs, store         pairs and scores
    study-run/doctor.json          what is to be expected
    study-run/compare/             all runs, compare.json, and report.html
    study-run/study.md             the tables
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import mrpo
from mrpo.benchmarks.common import DATA, machine, machine_line
from mrpo.benchmarks.real_model import convert, download
from mrpo.benchmarks.real_references import FILES, all_pairs, is_read, write
from mrpo.benchmarks.workload import messages
from mrpo.data.pairs import Pair, canonical_json
from mrpo.evaluation.compare.results import Comparison, points

GPU_MODELS = {
    "llama": "meta-llama/Llama-3.2-3B-Instruct",
    "mistral": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen": "Qwen/Qwen2.5-7B-Instruct",
}
BASE = "smollm"
RANK, EXPERT_RATE, EXPERT_BATCH = 16, 1e-3, 8
TOKENS = 160  # about, of a pair with its prompt; HH-RLHF has pairs of thousands


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("study-run"))
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the three sets")
    parser.add_argument("--gpu", action="store_true", help="Hub models, through vLLM")
    parser.add_argument("--pairs", type=int, help="of each set; a half of them is held out")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a pair, about; not --gpu")
    parser.add_argument("--expert-replies", type=int, default=160, help="read by each expert")
    parser.add_argument("--fractions", default="0.5,1")
    parser.add_argument("--label-noise", default="0,0.3")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, help="runs at once; by default one for each GPU")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-pairs", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--methods", help="by default DPO with each reference and three of several")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "0" if options.gpu else "1")
    options.out.mkdir(parents=True, exist_ok=True)
    options.pairs = options.pairs or (1_000 if options.gpu else 64)
    refs = hub_references(options) if options.gpu else experts(options)
    comparison = study(options, refs)
    report = "\n".join(tables(options, comparison))
    (options.out / "study.md").write_text(report + "\n")
    print(report)


def study(options: argparse.Namespace, refs: Sequence[str]) -> Comparison:
    """Prepare, score, forecast, and train the grid."""
    out = options.out
    if not (out / "pairs").exists():
        write(out / "pairs.jsonl", study_pairs(options))
        mrpo.prepare(
            source=str(out / "pairs.jsonl"), out=str(out / "pairs"), validation_fraction=0.5
        )
    scored = {
        "pairs": str(out / "pairs"),
        "refs": ",".join(refs),
        "refs_config": str(out / "refs.yaml"),
        "store": str(out / "store"),
    }
    mrpo.precompute(**scored, engine="vllm" if options.gpu else "hf")
    mrpo.doctor(**scored, out=str(out / "doctor.json"))
    several = ["mrpo", "geometric", "geometric+reliable"]
    methods = options.methods or ",".join([*(f"dpo:{alias}" for alias in refs), *several])
    comparison: Comparison = mrpo.compare(
        **scored,
        methods=methods,
        fractions=options.fractions,
        label_noise=options.label_noise,
        seeds=options.seeds,
        vary_subset=True,
        metric="sum",
        beta=options.beta,
        lora_rank=RANK,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        batch_pairs=options.batch_pairs,
        keep_models=False,
        jobs=options.jobs,
        output_dir=str(out / "compare"),
    )
    mrpo.report(folders=str(out / "compare"), out=str(out / "report.html"))
    return comparison


def study_pairs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """As many pairs of each set, of prompts that no expert has read, in random order."""
    kept = [pair for pair in short_pairs(options) if not is_read(pair)]
    chosen = []
    for name in FILES:
        of_set = [pair for pair in kept if pair.source == name]
        random.Random(f"pairs/{name}").shuffle(of_set)
        chosen += of_set[: options.pairs]
    random.Random("pairs").shuffle(chosen)
    for pair in chosen:
        yield {**messages([pair])[0], "source": pair.source}


def short_pairs(options: argparse.Namespace) -> list[Pair]:
    """The pairs of the three sets; for SmolLM2 only those of at most about `--tokens` tokens."""
    pairs = all_pairs(options.data)
    if options.gpu:
        return pairs
    return [
        pair
        for pair in pairs
        if len(canonical_json([pair.prompt, pair.chosen, pair.rejected])) <= 4 * options.tokens
    ]


def hub_references(options: argparse.Namespace) -> list[str]:
    """Hub models of three families; the first is the policy."""
    lines = [f"{alias}: {{model: {model}}}\n" for alias, model in GPU_MODELS.items()]
    (options.out / "refs.yaml").write_text("".join(lines))
    return list(GPU_MODELS)


def experts(options: argparse.Namespace) -> list[str]:
    """SmolLM2 as the base, and an adapter of it for each set."""
    out, model = options.out, options.out / "model"
    if not model.exists():
        convert(download(out), model)
    lines = [f"{BASE}: {{model: model, dtype: float32}}\n"]
    pairs: list[Pair] = []
    for name in FILES:
        folder = out / "experts" / name
        if not folder.exists():
            pairs = pairs or [pair for pair in short_pairs(options) if is_read(pair)]
            read = [pair for pair in pairs if pair.source == name]
            random.Random(f"expert/{name}").shuffle(read)
            train_expert(model, read[: options.expert_replies], folder)
        lines.append(f"{name}: {{model: model, adapter: experts/{name}, dtype: float32}}\n")
    (out / "refs.yaml").write_text("".join(lines))
    return [BASE, *FILES]


def train_expert(model_folder: Path, pairs: Sequence[Pair], folder: Path) -> None:
    """One pass of next-token training on the chosen replies, as a LoRA adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # which is masked below
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    torch.manual_seed(0)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    model = get_peft_model(base, lora).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], EXPERT_RATE)
    chats = [row["prompt"] + row["chosen"] for row in messages(pairs)]
    losses = []
    for start in range(0, len(chats), EXPERT_BATCH):
        batch = tokenizer.apply_chat_template(
            chats[start : start + EXPERT_BATCH], return_tensors="pt", return_dict=True,
            padding=True,
        ).to(device)  # fmt: skip
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{folder.name}: {len(chats)} replies, loss {losses[0]:.2f} to {losses[-1]:.2f}")
    partial = folder.with_suffix(".partial")
    model.save_pretrained(partial)
    partial.rename(folder)


def tables(options: argparse.Namespace, comparison: Comparison) -> Iterator[str]:
    """Markdown: each condition's accuracies and gains, and the sentences."""
    counts = f"{len(comparison.seeds)} seeds, {comparison.pairs} held-out pairs"
    yield f"{counts}; {machine_line(machine())}"
    for condition in reversed(comparison.conditions):
        yield f"\nTrained on {condition}:\n"
        yield "| | accuracy by likelihood, % | over the best single reference |"
        yield "|---|---:|---:|"
        base = comparison.base_accuracy["sum"].percent()
        yield f"| {comparison.base}, untrained | {base} | |"
        for method, result in comparison.results_at(condition, comparison.metric).items():
            gain = points(result.gain) if result.gain else ""
            yield f"| `{method}` | {result.accuracy.percent()} | {gain} |"
    yield ""
    yield from (f"- {sentence}" for sentence in comparison.verdict)


if __name__ == "__main__":
    main()
