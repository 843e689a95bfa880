"""The model and the pairs of the side-by-side benchmarks: real text, random weights.

The small model is a Llama of 7.1 million parameters with a vocabulary of 16,384 learned from the
pairs' own dialogues; the large one has the shape of Llama 3.2 1B and is for a GPU. Speed and
memory depend on shapes and lengths alone, and random weights show as well whether two programs
agree. The pairs are HH-RLHF's, as they are and, for long rows, several joined.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from mrpo.benchmarks.real_pairs import gsm8k_questions
from mrpo.data.config import PrepareConfig
from mrpo.data.pairs import Message, Pair, Turns
from mrpo.data.prepare import prepare
from mrpo.data.shards import PairShards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from mrpo.data.rendering import RenderedPrompt, Renderer
    from mrpo.precompute.scoring import ShardWork

HH = "hh_harmless_test.jsonl.gz"
RANKED_DATA = "gsm8k_model_solutions.jsonl.gz"
TOKENIZER_SIZE = 16_384


@dataclass(frozen=True, slots=True)
class Size:
    """A Llama with tied embeddings."""

    vocabulary: int
    width: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    dtype: str  # of the weights on disk


SMALL = Size(TOKENIZER_SIZE, 256, 688, 4, 4, 2, "float32")
TINY = Size(TOKENIZER_SIZE, 64, 128, 2, 2, 1, "float32")  # to try a benchmark out
LARGE = Size(128_256, 2048, 8192, 16, 32, 8, "bfloat16")
SIZES = {"small": SMALL, "tiny": TINY, "large": LARGE}


def real_pairs(data: Path, folder: Path) -> list[Pair]:
    """The usable pairs of HH-RLHF's harmless test set, in its order."""
    source = data / HH
    if not source.is_file():
        sys.exit(
            f"error: {source}: no such file; the benchmarks take real pairs: download "
            "harmless-base/test.jsonl.gz of anthropics/hh-rlhf, name it so, and give --data FOLDER"
        )
    shards = prepare(PrepareConfig(source=str(source), out=str(folder / "all")))
    return [pair for shard in range(len(shards.names)) for pair in shards.pairs(shard)]


def long_pairs(pairs: Sequence[Pair], prompt: int = 1400, response: int = 900) -> Iterator[Pair]:
    """Endless pairs of at least so many characters: several dialogues one after another, then a
    response of several responses' texts."""
    source = cycle(map(_turns, pairs))
    while True:
        turns: list[Message] = []
        while _length(turns) < prompt:
            question, answer, _ = next(source)
            turns += [*question, *answer]
        question, chosen, rejected = next(source)
        while min(_length(chosen), _length(rejected)) < response:
            _, more_chosen, more_rejected = next(source)
            chosen, rejected = [*chosen, *more_chosen], [*rejected, *more_rejected]
        yield Pair([*turns, *question], [_joined(chosen)], [_joined(rejected)])


def ranked_pairs(data: Path) -> Iterator[Pair]:
    """All pairings of the different solutions that four models gave to each question of GSM8K, the
    right ones chosen over the wrong ones, else in the file's order."""
    source = data / RANKED_DATA
    if not source.is_file():
        sys.exit(f"error: {source}: no such file; {RANKED_DATA} of openai/grade-school-math")
    with gzip.open(source, "rt", encoding="utf-8") as file:
        for question, right, wrong in gsm8k_questions(file):
            solutions = list(dict.fromkeys(text for text in [*right, *wrong] if text.strip()))
            turns = [[{"role": "assistant", "content": text}] for text in solutions]
            prompt: Turns = [{"role": "user", "content": question}]
            for chosen, rejected in combinations(turns, 2):
                yield Pair(prompt, chosen, rejected)


def messages(pairs: Iterable[Pair]) -> list[dict[str, Any]]:
    """The pairs as rows in the format that TRL and `mrpo prepare` take."""
    return [dict(zip(("prompt", "chosen", "rejected"), _turns(pair))) for pair in pairs]


def write_pairs(folder: Path, pairs: Iterable[Pair], count: int) -> PairShards:
    """The first `count` pairs as `mrpo prepare` writes them."""
    source = folder.with_suffix(".jsonl")
    with source.open("w", encoding="utf-8") as file:
        for row in messages(islice(pairs, count)):
            file.write(json.dumps(row) + "\n")
    return prepare(PrepareConfig(source=str(source), out=str(folder)))


def write_model(folder: Path, size: Size, pairs: Sequence[Pair]) -> None:
    """A model folder with a tokenizer trained on the pairs."""
    write_random_model(
        folder,
        "llama",
        learned_tokenizer(pairs, TOKENIZER_SIZE),
        size.dtype,
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
    )


def learned_tokenizer(pairs: Iterable[Pair], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with Llama's template, learned from the pairs' texts."""
    from mrpo.demo.models import build_tokenizer

    texts = (turn["content"] for pair in pairs for turns in _turns(pair) for turn in turns)
    return build_tokenizer("llama", texts, vocabulary)


def write_random_model(
    folder: Path, architecture: str, tokenizer: PreTrainedTokenizerFast, dtype: str, **shape: Any
) -> None:
    """A model folder with random weights, always the same, tied embeddings and 8,192 tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        architecture,
        **shape,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rendered(renderer: Renderer, pairs: Sequence[Pair]) -> list[RenderedPrompt]:
    """The pairs as token ids; none of them is refused."""
    from mrpo.data.rendering import RenderedPrompt

    shown = renderer.render_many(pairs)
    assert all(isinstance(pair, RenderedPrompt) for pair in shown)
    return shown  # type: ignore[return-value]


def pair_work(pairs: PairShards, rendered: Sequence[RenderedPrompt]) -> ShardWork:
    """The first pairs of the first shard as the worker of `mrpo precompute` scores them."""
    from mrpo.precompute.scoring import ShardWork

    ids = pairs.response_ids(0).take(np.arange(len(rendered)))
    both = np.stack([ids.chosen, ids.rejected], axis=1).reshape(-1)
    return ShardWork(both, ids.prompts.repeat(2), list(rendered), [], both[:0])


def tokens_twice(pairs: Sequence[RenderedPrompt]) -> int:
    """Tokens of all sequences, each prompt counted for both responses."""
    return sum(len(response.token_ids) for pair in pairs for response in pair.responses)


def described(model: Path, pairs: Sequence[RenderedPrompt], forwards: int = 1) -> dict[str, int]:
    """The numbers of pairs and tokens, and the operations of so many forwards over them."""
    return {
        "pairs": len(pairs),
        "tokens": tokens_twice(pairs),
        "prompt_tokens": sum(pair.responses[0].start for pair in pairs),
        "flops": forwards * useful_flops(model, pairs),
    }


def useful_flops(model: Path, pairs: Sequence[RenderedPrompt]) -> int:
    """Floating-point operations of one forward over the pairs, each prompt once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from mrpo.benchmarks.flops import forward_flops
    from mrpo.model.logps import SequenceLogps

    with torch.device("meta"):
        logps = SequenceLogps(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)))
    return sum(forward_flops(logps, logps.collate([pair], "cpu")) for pair in pairs)


def write_scores(folder: Path, pairs: PairShards, references: int) -> np.ndarray:
    """Write a store with the model's own scores as `ref0`, and further references whose scores are
    these with noise; returns the sums [N, 2] of `ref0`, chosen and rejected."""
    from mrpo.data.references import load_refs
    from mrpo.data.rendering import Renderer
    from mrpo.data.store import ReferenceRecord, Store
    from mrpo.precompute.engines import load_engine
    from mrpo.precompute.engines.protocol import EngineSettings
    from mrpo.precompute.scoring import score_rows

    model, store, random = str(folder / "model"), Store(folder / "store"), np.random.default_rng(0)
    entries = {f"ref{k}": {"model": model, "dtype": "float32"} for k in range(references)}
    (folder / "refs.yaml").write_text(json.dumps(entries))
    engine = load_engine("hf", EngineSettings(alias="ref0", model=model))
    work = pair_work(pairs, rendered(Renderer.load(model), pairs.pairs(0)))
    scored = score_rows(work, engine, keep_token_logps=False, progress=lambda count: None).table
    exact = scored["logp"].to_numpy()
    for alias, spec in load_refs(folder / "refs.yaml").items():
        inputs = {"weights": alias, "dtype": "float32"}
        record = store.record(ReferenceRecord(alias=alias, entry=spec.entry(), inputs=inputs))
        noise = 1 + 0.02 * random.standard_normal(exact.shape) * (alias != "ref0")
        place = scored.schema.get_field_index("logp")
        noisy = scored.set_column(place, scored.schema.field("logp"), pa.array(exact * noise))
        store.scores(record.identity).add(noisy)
    return exact.reshape(-1, 2)


def _turns(pair: Pair) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt, chosen and rejected, which are messages here."""
    assert isinstance(pair.prompt, list)
    assert isinstance(pair.chosen, list)
    assert isinstance(pair.rejected, list)
    return pair.prompt, pair.chosen, pair.rejected


def _length(turns: Sequence[Message]) -> int:
    return sum(len(turn["content"]) for turn in turns)


def _joined(turns: Sequence[Message]) -> Message:
    return {"role": "assistant", "content": " ".join(turn["content"] for turn in turns)}
