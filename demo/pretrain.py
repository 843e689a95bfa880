"""Train one tiny reference on its corpus: its own tokenizer, then one pass of next-token training.

    python -m mrpo.demo.pretrain llama demo-run/data/corpus-llama.jsonl demo-run/references/llama

A model this small gains little from a second core, so the demo trains the three side by side, each
in a process with one thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..precompute.process import PYTHON
from .models import Family, build_model, build_tokenizer, save_reference

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # the label of padding


@dataclass(frozen=True, slots=True)
class Recipe:
    """The size of a reference, and how it is trained.

    The defaults are the demo's: one layer is enough for its domains, and learns them in half the
    time of two.
    """

    vocab_size: int = 1200
    hidden_size: int = 96
    layers: int = 1
    context: int = 1024  # tokens; of a longer chat the beginning is read
    batch_chats: int = 64
    learning_rate: float = 5e-3


DEMO = Recipe()


def pretrain_all(
    corpora: Mapping[Family, Path], folder: Path, seed: int, recipe: Recipe = DEMO
) -> int:
    """Train every reference that `folder` does not have yet; returns an exit code."""
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    jobs = []
    for family, corpus in corpora.items():
        if not (folder / family).is_dir():
            settings = [family, corpus, folder / family, str(seed), json.dumps(asdict(recipe))]
            command = [*PYTHON, "mrpo.demo.pretrain", *settings]
            jobs.append(subprocess.Popen(command, env=one_thread))
    return max((job.wait() for job in jobs), key=abs, default=0)


def pretrain(
    family: Family, corpus: Path, folder: Path, seed: int = 0, recipe: Recipe = DEMO
) -> str:
    """Write a trained reference to `folder`, which appears complete; returns a line about it.

    One pass over the corpus in its order, `recipe.batch_chats` chats a step.
    """
    from torch import nn, optim
    from tqdm import tqdm
    from transformers.utils import logging

    logging.disable_progress_bar()
    chats = [json.loads(line)["messages"] for line in corpus.open(encoding="utf-8")]
    # The roles' names are in every rendered text, so the tokenizer should know them as words.
    words = [message[part] for chat in chats for message in chat for part in ("role", "content")]
    tokenizer = build_tokenizer(family, words, recipe.vocab_size)
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    encoded = tokenizer(texts, add_special_tokens=False).input_ids  # the template has its own
    sequences = [token_ids[: recipe.context] for token_ids in encoded]
    size = recipe.batch_chats
    batches = [sequences[i : i + size] for i in range(0, len(sequences), size)]

    model = build_model(
        family,
        len(tokenizer),
        hidden_size=recipe.hidden_size,
        layers=recipe.layers,
        context=recipe.context,
        seed=seed,
    ).train()
    optimizer = optim.AdamW(model.parameters(), betas=(0.9, 0.98))
    schedule = optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=len(batches), pct_start=0.1
    )
    for batch in tqdm(batches, desc=family, unit=" steps", disable=None):
        token_ids, labels = pad(batch)
        loss = model(input_ids=token_ids, labels=labels, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    save_reference(model.eval(), tokenizer, folder)
    parameters, tokens = model.num_parameters(), sum(map(len, sequences))
    return (
        f"{folder}: {parameters:,} parameters, {len(chats):,} chats, {tokens:,} tokens read, "
        f"loss {loss.item():.3f} nats a token"
    )


def pad(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and labels [B, L]. Padding is on the right, where causal attention never looks."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [torch.tensor(sequence) for sequence in sequences]
    labels = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
    return pad_sequence(rows, batch_first=True), labels


if __name__ == "__main__":
    family, corpus, folder, *rest = sys.argv[1:]
    seed, settings = int(rest[0]) if rest else 0, json.loads(rest[1]) if rest[1:] else {}
    print(pretrain(family, Path(corpus), Path(folder), seed, Recipe(**settings)))  # type: ignore[arg-type]
