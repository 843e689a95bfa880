"""Engine hf: transformers on a GPU or a CPU, the prompt of a pair computed once in a packed row.

Rows are filled up to a token budget; the head runs on response positions only, in chunks
(`model/`). Architectures that can't share a row run one response per row. When a GPU runs out of
memory the budget is halved.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from ...data.rendering import RenderedPair
from ...errors import UserError
from ...model.load import load_model
from ...model.logps import SequenceLogps, split_by_sequence
from ...model.packing import Batch
from .protocol import EngineSettings, PairTokenLogps, Progress, adapter_folder

# Tokens of a row. A CPU is as fast with 1,000 as with 8,000; a GPU is faster with more.
ROW_TOKENS = {"cpu": 1536, "cuda": 16384}


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
        self, pairs: Sequence[RenderedPair], progress: Progress = lambda pairs: None
    ) -> list[PairTokenLogps]:
        scored: dict[int, PairTokenLogps] = {}
        rows = self._plan(pairs, range(len(pairs)))
        # The next row is packed while the GPU computes this one; only `_collect` waits for it.
        in_flight: tuple[list[int], Batch, Tensor] | None = None
        while rows or in_flight:
            launched = None
            if rows:
                with contextlib.suppress(torch.OutOfMemoryError):
                    launched = (rows[0], *self._launch([pairs[i] for i in rows[0]]))
                    del rows[0]
            if in_flight is not None:
                scored |= _collect(*in_flight)
                progress(len(in_flight[0]))
            elif launched is None:
                # No other row holds memory now, so this one is too long.
                self._halve(rows[0])
                rows = self._plan(pairs, [i for i in range(len(pairs)) if i not in scored])
            in_flight = launched
        return [scored[index] for index in range(len(pairs))]

    def close(self) -> None:
        del self._scorer
        if self._device == "cuda":
            _free_memory()

    def _plan(self, pairs: Sequence[RenderedPair], indices: Sequence[int]) -> list[list[int]]:
        rows = self._scorer.plan([pairs[i] for i in indices], self.max_tokens)
        return [[indices[place] for place in row] for row in rows]

    @torch.inference_mode()
    def _launch(self, pairs: Sequence[RenderedPair]) -> tuple[Batch, Tensor]:
        batch = self._scorer.collate(pairs, self._device)
        with torch.autocast(self._device, torch.bfloat16, enabled=self._autocast):
            return batch, self._scorer(batch)

    def _halve(self, row: list[int]) -> None:
        """Halve the budget; raises `UserError` where the row is a single pair already."""
        if len(row) == 1:
            raise UserError(
                f"one pair does not fit into the memory of {self.facts['device']}; use a larger "
                "device, --engine vllm, or leave long pairs out with --max-model-len"
            )
        self.max_tokens //= 2
        _free_memory()
        print(f"out of memory: rows of {self.max_tokens} tokens from now on", file=sys.stderr)


def _collect(row: list[int], batch: Batch, logps: Tensor) -> dict[int, PairTokenLogps]:
    """A row's log-probs by index of the pair; waits for the device."""
    parts = [part.numpy() for part in split_by_sequence(logps.cpu(), batch)]
    return {index: PairTokenLogps(*parts[2 * i : 2 * i + 2]) for i, index in enumerate(row)}


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()
