"""Engine hf: transformers on a GPU or a CPU, a prompt computed once for its responses in a row.

Rows are filled up to a token budget; the head runs on response positions only, in chunks
(`model/`); a prompt with more responses than a row takes is repeated. Architectures that can't
share a row run one response per row. When a GPU runs out of memory the budget is halved.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from ...data.rendering import RenderedPrompt
from ...errors import UserError
from ...model.load import load_model
from ...model.logps import SequenceLogps, split_by_sequence
from ...model.packing import Batch
from .protocol import EngineSettings, Logps, Progress, adapter_folder

# Tokens of a row. A CPU is as fast with 1,000 as with 8,000; a GPU is faster with more.
ROW_TOKENS = {"cpu": 1536, "cuda": 16384}


class _Part(NamedTuple):
    """Responses of a prompt that go into one row."""

    prompt: int  # index into the prompts that are scored together
    numbers: list[int]  # of its responses
    rendered: RenderedPrompt  # with these alone


class HfEngine:
    """A reference as a transformers model in this process."""

    limit: int | None = None

    def __init__(self, settings: EngineSettings) -> None:
        if settings.quantization is not None:
            raise UserError(
                f"reference {settings.alias}: quantization {settings.quantization!r} needs vLLM; "
                "use --engine vllm or server, or a model that is stored quantized"
            )
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._autocast = settings.autocast
        self.max_tokens = settings.max_tokens or ROW_TOKENS[self._device]
        model = load_model(
            settings.model,
            revision=settings.revision,
            dtype=settings.dtype,
            device=self._device,
            adapter=None if settings.adapter is None else adapter_folder(settings),
        )
        self._scorer = SequenceLogps(model).eval()

    @property
    def facts(self) -> dict[str, Any]:
        cuda = self._device == "cuda"
        return {
            "engine": "hf",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "route": "packed" if self._scorer.packs else "one response a row",
            "max_tokens": self.max_tokens,
        }

    def score(
        self, prompts: Sequence[RenderedPrompt], progress: Progress = lambda responses: None
    ) -> list[tuple[Logps, ...]]:
        scored: list[dict[int, Logps]] = [{} for _ in prompts]  # by number of the response
        rows = self._plan(prompts, scored)
        # The next row is packed while the GPU computes this one; only `_collect` waits for it.
        in_flight: tuple[list[_Part], Batch, Tensor] | None = None
        while rows or in_flight:
            launched = None
            if rows:
                with contextlib.suppress(torch.OutOfMemoryError):
                    launched = (rows[0], *self._launch([part.rendered for part in rows[0]]))
                    del rows[0]
            if in_flight is not None:
                progress(_collect(*in_flight, scored))
            elif launched is None:
                # No other row holds memory now, so this one is too long.
                self._halve(rows[0])
                rows = self._plan(prompts, scored)
            in_flight = launched
        return [tuple(logps for _, logps in sorted(by_number.items())) for by_number in scored]

    def close(self) -> None:
        del self._scorer
        if self._device == "cuda":
            _free_memory()

    def _plan(
        self, prompts: Sequence[RenderedPrompt], scored: Sequence[Collection[int]]
    ) -> list[list[_Part]]:
        """The rows of all responses that are not scored yet."""
        parts = []
        for index, (prompt, done) in enumerate(zip(prompts, scored)):
            left = [number for number in range(len(prompt.responses)) if number not in done]
            if left:
                for some in self._scorer.parts(prompt.only(left), self.max_tokens):
                    numbers = left[some.start : some.stop]
                    parts.append(_Part(index, numbers, prompt.only(numbers)))
        rows = self._scorer.plan([part.rendered for part in parts], self.max_tokens)
        return [[parts[place] for place in row] for row in rows]

    @torch.inference_mode()
    def _launch(self, prompts: Sequence[RenderedPrompt]) -> tuple[Batch, Tensor]:
        batch = self._scorer.collate(prompts, self._device)
        with torch.autocast(self._device, torch.bfloat16, enabled=self._autocast):
            return batch, self._scorer(batch)

    def _halve(self, row: list[_Part]) -> None:
        """Halve the budget; raises `UserError` where the row is a single response already."""
        if sum(len(part.numbers) for part in row) == 1:
            raise UserError(
                f"one response does not fit into the memory of {self.facts['device']}; use a "
                "larger device, --engine vllm, or leave long pairs out with --max-model-len"
            )
        self.max_tokens //= 2
        _free_memory()
        print(f"out of memory: rows of {self.max_tokens} tokens from now on", file=sys.stderr)


def _collect(row: list[_Part], batch: Batch, logps: Tensor, scored: list[dict[int, Logps]]) -> int:
    """Put a row's log-probs to those `scored`; how many responses. Waits for the device."""
    places = [(part.prompt, number) for part in row for number in part.numbers]
    for (prompt, number), values in zip(places, split_by_sequence(logps.cpu(), batch), strict=True):
        scored[prompt][number] = values.numpy()
    return len(places)


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()
