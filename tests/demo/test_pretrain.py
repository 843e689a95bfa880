"""Pretraining makes references that know what they read, and that anything can load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mrpo.data.pairs import Pair
from mrpo.data.rendering import Renderer
from mrpo.demo.data import DOMAINS, write_data
from mrpo.demo.models import FAMILIES, Family
from mrpo.demo.pretrain import IGNORED, pad, pretrain
from mrpo.demo.run import CHATS
from mrpo.precompute.engines import load_engine
from mrpo.precompute.engines.protocol import EngineSettings


def summed_logps(model: Path, pairs: list[Pair]) -> np.ndarray:
    """[N, 2] of chosen and rejected, from engine hf."""
    engine = load_engine("hf", EngineSettings(alias="reference", model=str(model)))
    scored = engine.score(Renderer.load(model).render_many(pairs))  # type: ignore[arg-type]
    return np.array([[chosen.sum(), rejected.sum()] for chosen, rejected in scored])


def test_padding_is_not_learned() -> None:
    token_ids, labels = pad([[5, 6, 7], [8]])
    assert token_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert labels.tolist() == [[5, 6, 7], [8, IGNORED, IGNORED]]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_corpus_of_chats_trains_a_reference_that_renders_pairs(
    family: Family, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "Is it 1 + 1?"}, {"role": "assistant", "content": "Yes."}]
    (tmp_path / "corpus.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 3)
    pretrain(family, tmp_path / "corpus.jsonl", tmp_path / family)
    pair = Pair(prompt=chat[:1], chosen=chat[1:], rejected=[chat[1] | {"content": "No."}])
    renderer = Renderer.load(tmp_path / family)
    text = renderer.tokenizer.decode(renderer.render(pair).responses[0].token_ids)  # type: ignore[union-attr]
    assert text == renderer.tokenizer.apply_chat_template(chat, tokenize=False).removesuffix("\n")
    assert np.isfinite(summed_logps(tmp_path / family, [pair])).all()


def test_a_reference_is_strong_in_the_domain_that_it_read_most_of(tmp_path: Path) -> None:
    files = write_data(tmp_path, pairs=180, chats=CHATS, seed=0)
    line = pretrain("qwen", files.corpora["qwen"], tmp_path / "qwen")
    assert f"{CHATS:,} chats" in line
    pairs = [Pair(**json.loads(row)) for row in files.pairs.read_text().splitlines()]
    logps = summed_logps(tmp_path / "qwen", pairs)
    accuracy = {
        domain: (logps[rows, 0] > logps[rows, 1]).mean()
        for domain in DOMAINS
        if (rows := [i for i, pair in enumerate(pairs) if pair.source == domain])
    }
    assert accuracy["tone"] > 0.9
    assert accuracy["safety"] < 0.75
    assert accuracy["units"] < 0.75
