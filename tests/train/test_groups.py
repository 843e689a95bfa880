"""Pairs of one prompt computed together, against one response at a time."""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, AutoModelForCausalLM

from mrpo.data.config import PrepareConfig
from mrpo.data.pairs import Pair, prompt_number
from mrpo.data.prepare import prepare
from mrpo.data.rendering import RenderedPrompt, RenderedSequence, Renderer
from mrpo.model.logps import SequenceLogps
from mrpo.model.packing import packed_tokens
from mrpo.tests.data.families import message
from mrpo.tests.train.conftest import SMALL
from mrpo.train import forward
from mrpo.train.config import TrainConfig
from mrpo.train.distributed import Ranks
from mrpo.train.forward import PairForward
from mrpo.train.groups import PromptGroup, grouped, rows_of
from mrpo.train.run import train
from mrpo.train.stream import side_by_side, window

TOKEN = st.integers(0, 60)
CPU = torch.device("cpu")


@st.composite
def batches(draw: st.DrawFn) -> list[RenderedPrompt]:
    """Pairs of up to three prompts and of up to four responses of each, in any order and repeated.

    Some responses begin with a token that joins the prompt's last one.
    """
    pairs = []
    for number in range(draw(st.integers(1, 3))):
        prompt = [number, *draw(st.lists(TOKEN, min_size=1, max_size=12))]
        responses = []
        for _ in range(draw(st.integers(2, 4))):
            merged = draw(st.integers(0, 5)) == 0
            ids = [*prompt[: len(prompt) - merged], *draw(st.lists(TOKEN, min_size=1, max_size=9))]
            responses.append(RenderedSequence(ids, len(prompt) - merged, len(ids), merged))
        both = st.permutations(range(len(responses))).map(lambda order: order[:2])
        for chosen, rejected in draw(st.lists(both, min_size=1, max_size=7)):
            pairs.append(RenderedPrompt.of([responses[chosen], responses[rejected]]))
    return draw(st.permutations(pairs))


def check_groups(groups: Sequence[PromptGroup], pairs: Sequence[RenderedPrompt]) -> None:
    """Every pair once, with its own responses; in a group no response twice or unused."""
    assert sorted(rows_of(groups)) == list(range(len(pairs)))
    for group in groups:
        responses, shared = group.prompt.responses, group.prompt.shared
        for row, numbers in zip(group.rows, group.numbers, strict=True):
            assert [responses[number] for number in numbers] == [*pairs[row].responses]
            assert pairs[row].shared == shared
        assert len({(one.start, *one.token_ids) for one in responses}) == len(responses)
        assert {number for both in group.numbers for number in both} == {*range(len(responses))}
        assert len({tuple(one.token_ids[:shared]) for one in responses}) == 1
        assert sum(group.copies) == 2 * len(group.rows)
        assert all(count > 0 for count in group.copies)


@given(batches())
@settings(max_examples=200, deadline=None)
def test_a_batch_has_each_prompt_and_each_of_its_responses_once(
    pairs: list[RenderedPrompt],
) -> None:
    groups = grouped(pairs)
    check_groups(groups, pairs)
    prompts = {tuple(pair.responses[0].token_ids[: pair.shared]) for pair in pairs}
    assert len(groups) == len(prompts)


@given(batches(), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_parts_are_within_the_budget_or_single_pairs(
    pairs: list[RenderedPrompt], max_tokens: int
) -> None:
    parts = [part for g in grouped(pairs) for part in g.parts(max_tokens, packed_tokens)]
    check_groups(parts, pairs)
    for part in parts:
        assert packed_tokens(part.prompt) <= max_tokens or len(part.rows) == 1


def test_a_prompt_beyond_the_budget_is_divided_where_few_responses_are_repeated() -> None:
    """All pairings of six responses of one token: four fit, which are six pairs."""
    responses = [RenderedSequence([7, 7, number], 2, 3, False) for number in range(6)]
    pairs = [RenderedPrompt.of([*both]) for both in combinations(responses, 2)]
    (group,) = grouped(pairs[::-1])
    parts = group.parts(6, packed_tokens)
    assert len(parts) == 4
    assert len(parts[0].rows) == 6
    assert max(packed_tokens(part.prompt) for part in parts) == 6


@cache
def tiny(model_type: str) -> nn.Module:
    """A small model in float64, whose rounding hides little."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, vocab_size=61, **SMALL)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float64)


def pair_losses(chosen: Tensor, rejected: Tensor, rows: list[int]) -> Tensor:
    """Of the pairs in `rows`, each against a margin of its own."""
    margins = torch.tensor([0.7 * row - 2 for row in rows])
    return -logsigmoid(0.3 * (chosen - rejected - margins))


def one_at_a_time(model: nn.Module, pairs: Sequence[RenderedPrompt]) -> Tensor:
    """The batch's loss through transformers' own forward, each response of each pair alone."""

    def logp(sequence: RenderedSequence) -> Tensor:
        ids = torch.tensor([sequence.token_ids])
        logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        return logps[:-1].gather(1, ids[0, 1:, None])[sequence.start - 1 :].sum()

    chosen, rejected = (
        torch.stack([logp(pair.responses[number]) for pair in pairs]) for number in (0, 1)
    )
    return pair_losses(chosen, rejected, list(range(len(pairs)))).sum()


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "single"])
@given(batches(), st.sampled_from([1, 40, 4096]), st.sampled_from([1, 2, 3]))
@settings(max_examples=15, deadline=None)
def test_loss_and_gradient_are_those_of_one_response_at_a_time(
    packs: bool, pairs: list[RenderedPrompt], max_tokens: int, world: int
) -> None:
    """However the batch is divided into micro-batches, on however many processes."""
    model = tiny("llama")
    model.zero_grad(set_to_none=True)
    expected = one_at_a_time(model, pairs)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    policy = SequenceLogps(model)
    policy.packs = packs
    total, rows, rounds = 0.0, [], set()
    for rank in range(world):
        through = PairForward(policy, Ranks(rank, world, CPU), autocast=False)
        shares = through.shares(pairs, max_tokens)
        rounds.add(len(shares))
        for groups, weight in shares:
            logps = through(groups)
            loss = weight * pair_losses(logps.chosen, logps.rejected, rows_of(groups)).sum()
            loss.backward()
            total += loss.item()
            rows += rows_of(groups) if weight else []
    assert len(rounds) == 1  # of the same number on every process
    assert sorted(rows) == list(range(len(pairs)))
    assert total == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        difference = (parameter.grad - gradients[name]).norm()
        assert difference <= 1e-5 * gradients[name].norm() + 1e-12, name


def test_a_mixture_counts_a_response_once_for_each_of_its_pairs() -> None:
    """Three responses of a prompt, of which the first stands in two pairs."""
    first, *others = (RenderedSequence([3, 4, 5, 6, *[n] * n], 4, 4 + n, False) for n in (7, 8, 9))
    pairs = [RenderedPrompt.of([first, other]) for other in others]
    policy = SequenceLogps(tiny("mixtral").float()).train()
    through = PairForward(policy, Ranks(0, 1, CPU), autocast=False)
    alone = [replace(grouped([pair])[0], rows=[row]) for row, pair in enumerate(pairs)]
    routed = []
    for groups in (grouped(pairs), alone):
        through(groups)
        assert policy.routing is not None
        routed.append(policy.routing)
    assert routed[0].tokens.item() == routed[1].tokens.item() == 2 * (11 + 12 + 11 + 13)
    assert torch.equal(routed[0].assigned, routed[1].assigned)
    assert torch.allclose(routed[0].probability, routed[1].probability)


@pytest.fixture(scope="module")
def ranked(
    inputs: Any, scored: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., TrainConfig]:
    """Settings of runs over eight questions with four answers each, in all pairings."""
    root = tmp_path_factory.mktemp("ranked")
    lines = [
        {
            "prompt": [{"role": "user", "content": f"{number} eggs, or {number % 3}?"}],
            "chosen": [{"role": "assistant", "content": " ".join(["yes", *["she sells"] * best])}],
            "rejected": [{"role": "assistant", "content": " ".join(["no", *["two"] * worse])}],
        }
        for number in range(8)
        for best, worse in combinations(range(4), 2)
    ]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source, out = str(root / "pairs.jsonl"), str(root / "pairs")
    pairs = prepare(PrepareConfig(source=source, out=out, shard_pairs=30, validation_fraction=0))
    scored(root, pairs, ["llama", "qwen"])
    given = {"pairs": out, "store": str(root / "store"), "refs": "llama,qwen", "batch_pairs": 12}
    return lambda folder, **changes: inputs.config(folder, **given | changes)


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("max_tokens", [4096, 90])
def test_a_run_is_that_of_its_pairs_one_by_one_and_computes_fewer_tokens(
    ranked: Callable[..., TrainConfig],
    mixture: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    experts: bool,
    max_tokens: int,
) -> None:
    """A mixture's balancing loss counts a response as often as pairs have it."""
    changes: dict[str, Any] = {"shuffle": "prompts", "max_tokens": max_tokens}
    changes |= {"policy": mixture, "warmup_ratio": 0.0} if experts else {}
    train(ranked(tmp_path / "together", **changes))
    monkeypatch.setattr(
        forward,
        "grouped",
        lambda pairs: [replace(grouped([pair])[0], rows=[row]) for row, pair in enumerate(pairs)],
    )
    train(ranked(tmp_path / "pairs", **changes))
    together, pairs = log_of(tmp_path / "together"), log_of(tmp_path / "pairs")
    names = ["loss", "grad_norm", "rewards/margins", "logps/chosen"]
    for name in [*names, "aux_loss"] if experts else names:
        expected = [line[name] for line in pairs]
        assert [line[name] for line in together] == pytest.approx(expected, rel=2e-4, abs=1e-6)
    fewer = pairs[-1]["num_tokens"] / together[-1]["num_tokens"]
    assert fewer > (1.8 if max_tokens == 4096 else 1.2)


@pytest.fixture(scope="module")
def solutions(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[RenderedPrompt], np.ndarray]:
    """All pairings of the solutions of four models to 400 questions, and numbers of the prompts."""
    folder = tmp_path_factory.mktemp("tokenizer")
    with tarfile.open(shared_data / "tokenizers" / "llama-bpe.tar.gz") as files:
        files.extractall(folder, filter="data")
    template = shared_data / "templates" / "meta-llama-Llama-3.1-8B-Instruct.jinja"
    renderer = Renderer.load(folder / "llama-bpe", chat_template=template.read_text())
    models = [f"{size}_{way}" for size in ("6b", "175b") for way in ("finetuning", "verification")]
    pairs = []
    with gzip.open(shared_data / "gsm8k_model_solutions.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in islice(file, 400):
            row = json.loads(line)
            question = [message("user", row["question"])]
            different = dict.fromkeys(row[model]["solution"] for model in models)
            answers = [[message("assistant", solution)] for solution in different]
            pairs += [Pair(question, *both) for both in combinations(answers, 2)]
    rendered = [pair for pair in renderer.render_many(pairs) if isinstance(pair, RenderedPrompt)]
    assert len(rendered) == len(pairs) == 2397
    return rendered, np.array([prompt_number(pair.prompt) for pair in pairs])


@pytest.mark.parametrize(
    ("shuffle", "batch", "times"), [("rows", 64, 1.04), ("prompts", 8, 2.39), ("prompts", 64, 3.36)]
)
def test_tokens_computed_for_ranked_solutions(
    solutions: tuple[list[RenderedPrompt], np.ndarray], shuffle: str, batch: int, times: float
) -> None:
    """How many times fewer than with each pair packed behind its own copy of the prompt."""
    pairs, prompts = solutions
    _, order = window([np.arange(len(pairs))], 42, 0, 0)
    if shuffle == "prompts":
        order = side_by_side(order, prompts, 42, 0, 0)
    alone = sum(packed_tokens(pair) for pair in pairs)
    together = sum(
        packed_tokens(group.prompt)
        for start in range(0, len(order), batch)
        for group in grouped([pairs[row] for row in order[start : start + batch]])
    )
    assert alone == 715_331
    assert alone / together == pytest.approx(times, abs=0.005)
