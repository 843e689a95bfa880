"""Engine vllm: prompt log-probs from a vLLM engine of its own, the prompt computed once per pair.

There are two routes, chosen when the engine is up. The V2 model runner scores given token ids on
the rows of the responses alone (`prompt_logprob_token_ids`); the V1 runner, which CPUs and some
models still need, returns every row of the prompt (`prompt_logprobs`). A trial compares the route
with plain prompt log-probs, which take over where they differ. Each output is checked for what it
found in the prefix cache: rows that were needed and not computed are requested again without the
cache. `requests.py` explains why that is rare.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from ...data.references import ADAPTER_CONFIG, from_pretrained
from ...errors import UserError
from ...files import write_json
from .protocol import EngineSettings, Logps, PairTokenLogps, Progress, adapter_folder
from .requests import Request, disagreement, plan_requests, scored_pair, trial_pair

if TYPE_CHECKING:
    from ...data.rendering import RenderedPair

LOGITS_BYTES = 4 * 2**30  # for the V1 runner's logits of one step, which vLLM does not plan for
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
LORA_WEIGHT = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HEADS = {"lm_head", "embed_tokens"}
# The keys of adapter_config.json that plain LoRA has, or that do not matter once it is trained. Any
# other that is set (DoRA, modules_to_save, trainable_token_indices, biases, …) changes the numbers.
PLAIN_LORA = frozenset(
    {
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
        *("exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "task_type"),
        *("peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("auto_mapping", "megatron_core", "qalora_group_size", "eva_config", "fan_in_fan_out"),
        *("init_lora_weights", "runtime_config", "ensure_weight_tying"),
    }
)
# Other values of init_lora_weights make PEFT change the model's own weights when it loads them.
PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class VllmEngine:
    """A reference in a vLLM engine in this process (and its workers)."""

    def __init__(self, settings: EngineSettings) -> None:
        on_gpu = torch.cuda.device_count() > 0
        prepare_process(on_gpu)
        import vllm
        from vllm.lora.request import LoRARequest

        self._settings = settings
        self._lora, arguments = None, _arguments(settings, on_gpu)
        self._target_form = target_form(vllm.SamplingParams)
        if self._target_form == "ids":  # those of a whole response
            arguments["max_logprobs"] = -1
        self._copies = tempfile.TemporaryDirectory(prefix="mrpo-adapter-")
        if settings.adapter is not None:
            given = adapter_folder(settings)
            folder = plain_adapter(settings.alias, given, Path(self._copies.name))
            arguments |= lora_arguments(settings.alias, folder)
            self._lora = LoRARequest(settings.alias, 1, str(folder))
        try:
            self._llm = vllm.LLM(**arguments)
        except ValueError as error:  # of vLLM's checks, for an architecture that it does not have
            reason = " ".join(str(error).split())
            raise UserError(
                f"reference {settings.alias}: vLLM does not take {settings.model} ({reason}); use "
                "--engine hf"
            ) from error
        self._engine: Any = self._llm.llm_engine
        config = self._engine.vllm_config
        self._by_token_ids = bool(config.use_v2_model_runner) and self._target_form is not None
        self._share = True
        self._block = int(config.cache_config.block_size)
        self._max_tokens = int(config.scheduler_config.max_num_batched_tokens)
        self._requests = 0
        self.cached_tokens = self.asked_again = 0  # of the last `score`, for tests and benchmarks
        # One token less than vLLM takes: it wants room for an answer.
        self.limit: int | None = int(config.model_config.max_model_len) - 1
        self._try_route()

    @property
    def facts(self) -> dict[str, Any]:
        import vllm

        return {
            "engine": "vllm",
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "device": vllm_device(),
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
        if not self._share:
            requests = [replace(request, read_cache=False) for request in requests]
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
        self._copies.cleanup()

    def _try_route(self) -> None:
        """Score a short pair by the route and by plain prompt log-probs, which win."""
        pair, route = trial_pair(self.limit), self.facts["route"]
        chosen, self._by_token_ids, self._share = self._by_token_ids, False, False
        (plain,) = self.score([pair])
        self._by_token_ids, self._share = chosen, True
        try:
            (tried,) = self.score([pair])
            tried_logps, plain_logps = (
                np.concatenate([scored.chosen, scored.rejected]) for scored in (tried, plain)
            )
            problem = disagreement(tried_logps, plain_logps, self._settings.dtype)
        except (TypeError, ValueError) as error:  # another vLLM than this was written for
            problem = " ".join(str(error).split())
        if problem is not None:
            self._by_token_ids = self._share = False
            print(
                f"{self._settings.alias}: {route} with a shared prompt is not used: {problem}; "
                "plain prompt_logprobs take its place",
                file=sys.stderr,
            )

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
            targets = request.token_ids[request.first :]
            rows = np.asarray(targets, dtype=np.int32)[:, None]
            route = {
                "prompt_logprob_token_ids": rows if self._target_form == "rows" else _once(targets),
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
            targets = request.token_ids[request.first :]
            places = {token: place for place, token in enumerate(_once(targets))}
            if self._target_form == "rows":
                places = dict.fromkeys(places, 0)
            scores = np.asarray(scores, dtype=np.float32)
            assert scores.shape == (len(targets), 1 + max(places.values())), scores.shape
            return scores[np.arange(len(targets)), [places[token] for token in targets]]
        # A preempted request may have found its own later blocks when it came back.
        if request.read_cache and (
            output.num_cached_tokens >= request.first or output.metrics.num_preemptions
        ):
            return None
        flat = output.prompt_logprobs  # entry i - 1 is token i: the first token has none
        assert flat.token_ids[request.first - 1 :] == request.token_ids[request.first :]
        return np.asarray(flat.logprobs[request.first - 1 :], dtype=np.float32)


def prepare_process(on_gpu: bool) -> None:
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


def vllm_device() -> str:
    """The name of the device that vLLM found for itself."""
    from vllm.platforms import current_platform

    return str(current_platform.get_device_name())


def _arguments(settings: EngineSettings, on_gpu: bool) -> dict[str, Any]:
    """The arguments of `vllm.LLM`."""
    config = from_pretrained(AutoConfig, settings.model, settings.revision)
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


def target_form(sampling_params: Any) -> Literal["rows", "ids"] | None:
    """How a vLLM takes the ids to score: an id for each row, or all for every row; None: not."""
    taken = sampling_params.__annotations__.get("prompt_logprob_token_ids")
    if taken is None:
        return None
    return "rows" if re.search(r"ndarray|list\[list", str(taken)) else "ids"


def _once(token_ids: Sequence[int]) -> list[int]:
    return list(dict.fromkeys(token_ids))


def plain_adapter(alias: str, folder: Path, copies: Path) -> Path:
    """A folder with an adapter that vLLM computes as PEFT does: the given one, or a plain copy.

    In the copy, scales of single modules are part of the matrices, all ranks are equal, and the
    weights are safetensors. Raises `UserError` for an adapter that is more than LoRA of layers.
    """
    from peft.utils.other import get_pattern_key

    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    weights = _adapter_weights(alias, folder)
    extras = [key for key, value in config.items() if value and key not in PLAIN_LORA]
    if config.get("bias") == "none":
        extras.remove("bias")
    if config.get("peft_type") != "LORA":
        extras.append("peft_type")
    if config.get("init_lora_weights") not in PLAIN_BEGINNINGS:
        extras.append("init_lora_weights")
    matches = {name: LORA_WEIGHT.fullmatch(name) for name in weights}
    for name, match in matches.items():
        if match is None or match[1].rpartition(".")[2] in HEADS:
            extras.append(name)
    if extras:
        raise UserError(
            f"reference {alias}: vLLM takes adapters of plain LoRA, and none on head or "
            f"embeddings; {folder} has {', '.join(extras)}; use --engine hf"
        )
    ranks: dict[str, int] = config.get("rank_pattern") or {}
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    if not ranks and not alphas and (folder / ADAPTER_WEIGHTS).is_file():
        return folder
    rank, plain = max([config["r"], *ranks.values()]), {}
    for name, match in matches.items():
        assert match is not None
        matrix, (module, side) = weights[name].float(), match.groups()
        own = ranks.get(get_pattern_key(list(ranks), module), int(config["r"]))
        alpha = alphas.get(get_pattern_key(list(alphas), module), float(config["lora_alpha"]))
        if side == "A":
            matrix = torch.nn.functional.pad(matrix, (0, 0, 0, rank - own))
        else:
            scale = alpha / (math.sqrt(own) if config.get("use_rslora") else own)
            matrix = torch.nn.functional.pad(scale * matrix, (0, rank - own))
        plain[name] = matrix.contiguous()
    save_file(plain, copies / ADAPTER_WEIGHTS)
    kept = {key: config.get(key) for key in ("target_modules", "task_type", "peft_type")}
    write_json(copies / ADAPTER_CONFIG, {**kept, "r": rank, "lora_alpha": rank})
    return copies


def _adapter_weights(alias: str, folder: Path) -> dict[str, torch.Tensor]:
    """An adapter's weights by name, from the file that PEFT takes."""
    safe, pickled = folder / ADAPTER_WEIGHTS, folder / "adapter_model.bin"
    if safe.is_file():
        return load_file(safe)
    if pickled.is_file():
        content: dict[str, torch.Tensor] = torch.load(
            pickled, map_location="cpu", weights_only=True
        )
        return content
    raise UserError(f"reference {alias}: {folder} has no {safe.name}; restore the adapter")


def lora_arguments(alias: str, folder: Path) -> dict[str, Any]:
    """Room for a plain adapter, in the modules that it has.

    By default vLLM wraps every module, the head too, and a wrapped head expects one row per
    request: prompt log-probs then fail on a CPU.
    """
    rank = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["r"]
    if rank > LORA_RANKS[-1]:
        raise UserError(
            f"reference {alias}: vLLM takes no rank above {LORA_RANKS[-1]}, and the adapter's is "
            f"{rank}; use --engine hf"
        )
    names = {
        name.partition(".lora_")[0].rpartition(".")[2]
        for name in load_file(folder / ADAPTER_WEIGHTS)
    }
    return {
        "enable_lora": True,
        "max_lora_rank": next(allowed for allowed in LORA_RANKS if allowed >= rank),
        "lora_target_modules": sorted(names),
    }
