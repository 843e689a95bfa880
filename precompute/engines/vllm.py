"""Engine vllm: prompt log-probs from a vLLM engine of its own, the prompt computed once per pair.

There are two routes, chosen when the engine is up. The V2 model runner scores given token ids on
the rows of the responses alone (`prompt_logprob_token_ids`); the V1 runner, which CPUs and some
models still need, returns every row of the prompt (`prompt_logprobs`). Each output is checked for
what it found in the prefix cache: rows that were needed and not computed are requested again
without the cache. `requests.py` explains why that is rare.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig

from ...data.references import ADAPTER_CONFIG
from ...errors import UserError
from .protocol import EngineSettings, Logps, PairTokenLogps, Progress, adapter_folder
from .requests import Request, plan_requests, scored_pair

if TYPE_CHECKING:
    from ...data.rendering import RenderedPair

LOGITS_BYTES = 4 * 2**30  # for the V1 runner's logits of one step, which vLLM does not plan for
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class VllmEngine:
    """A reference in a vLLM engine in this process (and its workers)."""

    def __init__(self, settings: EngineSettings) -> None:
        on_gpu = torch.cuda.device_count() > 0
        _prepare_process(on_gpu)
        import vllm
        from vllm.lora.request import LoRARequest

        self._settings = settings
        self._lora, arguments = None, _arguments(settings, on_gpu)
        if settings.adapter is not None:
            folder = adapter_folder(settings)
            arguments |= _lora_arguments(settings.alias, folder)
            self._lora = LoRARequest(settings.alias, 1, str(folder))
        self._llm = vllm.LLM(**arguments)
        self._engine: Any = self._llm.llm_engine
        config = self._engine.vllm_config
        self._by_token_ids = bool(config.use_v2_model_runner)
        self._block = int(config.cache_config.block_size)
        self._max_tokens = int(config.scheduler_config.max_num_batched_tokens)
        self._requests = 0
        self.cached_tokens = self.asked_again = 0  # of the last `score`, for tests and benchmarks
        # One token less than vLLM takes: it wants room for an answer.
        self.limit: int | None = int(config.model_config.max_model_len) - 1

    @property
    def facts(self) -> dict[str, Any]:
        import vllm
        from vllm.platforms import current_platform

        return {
            "engine": "vllm",
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "device": str(current_platform.get_device_name()),
            "route": "prompt_logprob_token_ids" if self._by_token_ids else "prompt_logprobs",
            "max_tokens": self._max_tokens,
            "tensor_parallel_size": self._settings.tensor_parallel_size,
            "pipeline_parallel_size": self._settings.pipeline_parallel_size,
        }

    def score(
        self, pairs: Sequence[RenderedPair], progress: Progress = lambda pairs: None
    ) -> list[PairTokenLogps]:
        self.cached_tokens = self.asked_again = 0
        requests = plan_requests(pairs, self._block)
        unfinished = Counter(request.pair for request in requests)
        parts: list[dict[int, Logps]] = [{} for _ in pairs]
        waiting: dict[str, Request] = {}
        for request in requests:
            self._send(request, waiting)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                request = waiting.pop(output.request_id)
                self.cached_tokens += output.num_cached_tokens or 0
                logps = self._read(request, output)
                if logps is None:
                    self.asked_again += 1
                    self._send(replace(request, read_cache=False), waiting)
                    continue
                parts[request.pair][request.branch] = logps
                unfinished[request.pair] -= 1
                if not unfinished[request.pair]:
                    progress(1)
        return [scored_pair(pair, branches) for pair, branches in zip(pairs, parts)]

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def _send(self, request: Request, waiting: dict[str, Request]) -> None:
        from vllm.inputs import tokens_input

        name = str(self._requests)
        self._requests += 1
        waiting[name] = request
        prompt = tokens_input(request.token_ids)
        self._engine.add_request(name, prompt, self._params(request), lora_request=self._lora)

    def _params(self, request: Request) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        route: dict[str, Any] = {"prompt_logprobs": 0, "flat_logprobs": True}
        if self._by_token_ids:
            targets = np.asarray(request.token_ids[request.first :], dtype=np.int32)
            route = {
                "prompt_logprob_token_ids": targets[:, None],
                "prompt_logprob_start": request.first - 1,
            }
        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            skip_reading_prefix_cache=not request.read_cache,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **route,
        )

    def _read(self, request: Request, output: Any) -> Logps | None:
        """The log-probs asked for; None where a row of them was not computed."""
        if self._by_token_ids:
            scores = output.prompt_token_id_logprobs
            if scores is None:
                assert request.read_cache, "vLLM left out rows that no cache held"
                return None
            assert scores.shape == (request.num_logps, 1), scores.shape
            return np.asarray(scores[:, 0], dtype=np.float32)
        # A preempted request may have found its own later blocks when it came back.
        if request.read_cache and (
            output.num_cached_tokens >= request.first or output.metrics.num_preemptions
        ):
            return None
        flat = output.prompt_logprobs  # entry i - 1 is token i: the first token has none
        assert flat.token_ids[request.first - 1 :] == request.token_ids[request.first :]
        return np.asarray(flat.logprobs[request.first - 1 :], dtype=np.float32)


def _prepare_process(on_gpu: bool) -> None:
    """Set what vLLM reads from the environment, where the user has not."""
    # For the token that `max_model_len` has beyond the longest sequence, room for an unused answer.
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not on_gpu:
        # One process loads in half the time; compiling its one kernel takes 25 s and gains nothing.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        import torch._dynamo.config

        torch._dynamo.config.disable = True


def _arguments(settings: EngineSettings, on_gpu: bool) -> dict[str, Any]:
    """The arguments of `vllm.LLM`."""
    config = AutoConfig.from_pretrained(settings.model, revision=settings.revision)
    vocabulary = config.get_text_config().vocab_size
    # bfloat16 logits, their float32 and its log-softmax: 10 bytes a logit on the V1 runner.
    room = LOGITS_BYTES // (10 * vocabulary)
    max_tokens = settings.max_tokens or min(max(room, 2048), 8192)
    arguments: dict[str, Any] = {
        "model": settings.model,
        "revision": settings.revision,
        "dtype": settings.dtype,
        "quantization": settings.quantization,
        "skip_tokenizer_init": True,  # token ids in, none out
        "generation_config": "vllm",
        "max_model_len": min(settings.longest + 1, _exact_length(config)),
        "max_num_batched_tokens": max_tokens,
        "max_num_seqs": min(256, max_tokens),
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "disable_log_stats": False,  # they tell which requests were preempted
    }
    if not settings.share_prompts:
        arguments["enable_prefix_caching"] = False
    if on_gpu:
        # Graphs are for decoding, and there is none.
        arguments["compilation_config"] = {"cudagraph_mode": "NONE"}
    else:
        arguments |= {"enforce_eager": True, "block_size": 32}
    return arguments


def _exact_length(config: Any) -> float:
    """Tokens up to which vLLM computes the same as the model's own code.

    With LongRoPE it uses the long factors for every sequence as soon as one may be long, where the
    model uses them for long sequences only; longer sequences are for engine hf.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return float("inf")
    own = getattr(text, "original_max_position_embeddings", None)
    return int(rope.get("original_max_position_embeddings") or own or text.max_position_embeddings)


def _lora_arguments(alias: str, folder: Path) -> dict[str, Any]:
    """Room for the adapter, in the modules that it has.

    By default vLLM wraps every module, the head too, and a wrapped head expects one row per
    request: prompt log-probs then fail on a CPU.
    """
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    rank = max([config["r"], *config.get("rank_pattern", {}).values()])
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        names = {name.partition(".lora_")[0].rpartition(".")[2] for name in weights.keys()}  # noqa: SIM118
    if rank > LORA_RANKS[-1] or names & {"lm_head", "embed_tokens"}:
        raise UserError(
            f"reference {alias}: vLLM takes no adapter on head or embeddings, and no rank above "
            f"{LORA_RANKS[-1]}; use --engine hf"
        )
    return {
        "enable_lora": True,
        "max_lora_rank": next(allowed for allowed in LORA_RANKS if allowed >= rank),
        "lora_target_modules": sorted(names),
    }
