"""Fixtures of the scoring tests: prompts of corner cases, and a vLLM engine that tests share."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mrpo.data.rendering import RenderedPrompt, RenderedSequence
from mrpo.demo.models import write_reference
from mrpo.precompute.engines.protocol import EngineSettings, Logps
from mrpo.tests.precompute.workspace import Workspace

TEXTS = ["The quick brown fox jumps over the lazy dog, 12 times out of 345."] * 4
VOCABULARY = 300  # smaller than that of any reference here


def rendered(prompt: Sequence[int], *responses: Sequence[int]) -> RenderedPrompt:
    """A prompt of given token ids; the last token of each response is its end of turn."""
    sequences = [
        RenderedSequence(
            [*prompt, *response], len(prompt), len(prompt) + len(response) - 1, boundary=False
        )
        for response in responses
    ]
    return RenderedPrompt(tuple(sequences), shared=len(prompt))


def random_pair(
    prompt: int, common: int, chosen: int, rejected: int, generator: random.Random
) -> RenderedPrompt:
    """Random ids: `common` first tokens of both responses, then the given numbers of their own."""
    both = random_ids(common, generator)
    own = [
        [first, *random_ids(count, generator)][:count]
        for first, count in ((11, chosen), (12, rejected))
    ]
    return rendered(random_ids(prompt, generator), both + own[0], both + own[1])


def random_prompt(prompt: int, common: int, generator: random.Random) -> RenderedPrompt:
    """Six responses of which some part from others after `common` tokens, or twice as many; one is
    another's beginning and one is another's equal."""
    first, second, *ends = (random_ids(count, generator) for count in (common, common, 9, 5, 7, 3))
    responses = [
        [*first, *second, 11, *ends[0]],
        [*first, *second, 12, *ends[1]],
        [*first, 13, *ends[2]],
        [*first, *second, 11],
        [14, *ends[3]],
        [*first, *second, 12, *ends[1]],
    ]
    return rendered(random_ids(prompt, generator), *responses)


def random_ids(count: int, generator: random.Random) -> list[int]:
    return [generator.randrange(20, VOCABULARY) for _ in range(count)]


@pytest.fixture(name="make_pair")
def _make_pair() -> Callable[..., RenderedPrompt]:
    """`random_pair` with a generator of the test's own."""
    generator = random.Random(3)
    return lambda *lengths: random_pair(*lengths, generator)


@pytest.fixture(name="make_prompt")
def _make_prompt() -> Callable[..., RenderedPrompt]:
    """A prompt of so many tokens with responses of so many, which have nothing in common."""
    generator = random.Random(4)
    return lambda prompt, counts: rendered(
        random_ids(prompt, generator), *(random_ids(count, generator) for count in counts)
    )


@pytest.fixture(scope="session")
def corner_prompts() -> list[RenderedPrompt]:
    """Prompt lengths 1 to 300, responses that share 0 to 40 first tokens, one-token responses.

    Wherever the responses part at a multiple of a block size, both with and without a common
    beginning; also a response that is the beginning of the other, and prompts that occur twice.
    Most are pairs, which the others make up of six responses and of a single one.
    """
    generator = random.Random(7)
    pairs = []
    for prompt in range(1, 301):
        common = {0, prompt * 7 % 41} if prompt % 16 == 0 else {prompt * 7 % 41}
        common |= {-prompt % 32} if prompt % 5 == 0 else set()
        for shared in sorted(common):
            own = [generator.choice([1, 1, 2, 7, 25]) for _ in range(2)]
            pairs.append(random_pair(prompt, shared, *own, generator))
    for prompt, common in ((31, 5), (32, 32), (64, 0), (40, 24)):
        whole = random_pair(prompt, common, 9, 9, generator)
        ids = whole.responses[0].token_ids
        pairs.append(rendered(ids[:prompt], ids[prompt:], ids[prompt : prompt + common + 1]))
        pairs.append(rendered(ids[:prompt], ids[prompt : prompt + common + 1], ids[prompt:]))
        pairs.append(rendered(ids[:prompt], [14, 15], ids[prompt:]))
    several = [
        random_prompt(prompt, common, generator)
        for prompt in (1, 15, 16, 31, 32, 64, 127, 128, 200)
        for common in (0, 1, 8, 16)
    ]
    single = [random_prompt(prompt, 2, generator).only([0]) for prompt in (1, 16, 31, 64)]
    return [*pairs, *several, *single]


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Llama with heads of 32, which vLLM's CPU attention takes."""
    folder = tmp_path_factory.mktemp("reference") / "llama"
    return write_reference(folder, "llama", TEXTS, hidden_size=128)


@pytest.fixture(scope="session")
def adapter_folder(reference_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter for the reference, of random weights large enough to be seen in the scores."""
    return write_adapter(reference_folder, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def uneven_adapter(reference_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with ranks and scales of single modules, its weights pickled."""
    folder = tmp_path_factory.mktemp("uneven")
    ranks, alphas = {"q_proj": 2, "layers.1.mlp.down_proj": 6}, {"down_proj": 24}
    write_adapter(reference_folder, folder, rank_pattern=ranks, alpha_pattern=alphas)
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    return folder


def write_adapter(reference: Path, folder: Path, **options: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    targets = options.pop("target_modules", ["q_proj", "down_proj"])
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(reference), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_B", "lora_embedding_B", "tokens_delta")):
            parameter.data.normal_(0, 0.3, generator=generator)
        if "modules_to_save" in name or "magnitude" in name:
            parameter.data.mul_(1.5)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def expected(
    reference_folder: Path, corner_prompts: list[RenderedPrompt]
) -> list[tuple[Logps, ...]]:
    """The corner prompts' log-probs by transformers' own forward, one response at a time."""
    return one_by_one(reference_folder, corner_prompts)


@pytest.fixture(scope="session", name="one_by_one")
def _one_by_one() -> Callable[..., list[tuple[Logps, ...]]]:
    return one_by_one


@pytest.fixture(scope="session", name="differ")
def _differ() -> Callable[..., float]:
    return largest_difference


def one_by_one(
    folder: Path, prompts: Sequence[RenderedPrompt], **options: Any
) -> list[tuple[Logps, ...]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    return model_logps(model, prompts)


@torch.inference_mode()
def model_logps(model: Any, prompts: Sequence[RenderedPrompt]) -> list[tuple[Logps, ...]]:
    def logps(sequence: RenderedSequence) -> np.ndarray:
        ids = torch.tensor([sequence.token_ids])
        table = model(ids).logits[0, sequence.start - 1 : -1].log_softmax(-1)
        return table.gather(-1, ids[0, sequence.start :, None])[:, 0].numpy()

    return [tuple(map(logps, prompt.responses)) for prompt in prompts]


def largest_difference(
    scored: Sequence[tuple[Logps, ...]], expected: Sequence[tuple[Logps, ...]]
) -> float:
    """Of the log-probs of a response, in nats, over all of them; every shape must agree."""
    worst = 0.0
    assert len(scored) == len(expected)
    for a, b in zip(scored, expected):
        for x, y in zip(a, b, strict=True):
            assert x.shape == y.shape
            assert np.isfinite(x).all()
            worst = max(worst, abs(float(x.astype(np.float64).sum() - y.astype(np.float64).sum())))
    return worst


class EngineProcess:
    """An engine in another process, reached through pickles; see engine_process.py."""

    def __init__(self, name: str, settings: EngineSettings) -> None:
        script = Path(__file__).with_name("engine_process.py")
        # vLLM binds a busy thread to every core, which slows down the tests of other processes.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        self._process = subprocess.Popen(
            [sys.executable, script, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._send(settings)
        self.facts, self.limit = self._receive()
        self.counters: dict[str, int] = {}

    def score(self, prompts: Sequence[RenderedPrompt]) -> list[tuple[Logps, ...]]:
        self._send(list(prompts))
        scored, self.counters = self._receive()
        self._receive()
        return scored

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)

    def _send(self, value: Any) -> None:
        pickle.dump(value, self._process.stdin)
        self._process.stdin.flush()

    def _receive(self) -> Any:
        return pickle.load(self._process.stdout)


@pytest.fixture
def workspace(tmp_path: Path, tiny_references: dict[str, Path]) -> Workspace:
    """A folder whose refs.yaml names the three tiny references."""
    return Workspace(tmp_path, tiny_references)


@pytest.fixture(scope="session")
def vllm_engine(reference_folder: Path) -> Iterator[EngineProcess]:
    """A real vLLM engine. 192 tokens at once, so that long requests are computed in chunks."""
    settings = EngineSettings(
        alias="llama", model=str(reference_folder), longest=1024, max_tokens=192
    )
    engine = EngineProcess("vllm", settings)
    yield engine
    engine.close()
