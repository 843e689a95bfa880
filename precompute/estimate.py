"""How long a reference takes to score, by its last run or by counting operations."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

from ..data.references import files_of, from_pretrained
from ..data.store import Store
from .engines.protocol import EngineSettings
from .scoring import Job

EFFICIENCY = 0.4  # of the device's matrix rate that scoring reaches


def estimated_seconds(job: Job, tokens: int, store: Store) -> float | None:
    """By the reference's last run on this engine, else by counting operations.

    None where neither is known: a server may run on any machine.
    """
    names = store.names_of(job.identity)
    for run in reversed(names[0].runs if names else ()):
        if run.get("engine") == job.engine and run.get("tokens_per_second"):
            return tokens / float(run["tokens_per_second"])
    if job.engine == "server":
        return None
    operations = 2 * num_parameters(job.settings.model, job.settings.revision) * tokens
    return operations / (EFFICIENCY * _matrix_rate(_precision(job.settings)))


@cache
def num_parameters(model_name: str, revision: str | None) -> int:
    """Counted on a model without memory, so that no weights are read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = from_pretrained(AutoConfig, model_name, revision)
    with files_of(model_name, "no causal language model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters())


def _matrix_rate(dtype: str) -> float:
    """Operations per second of a matrix product on the device: a CPU's in `dtype`, a GPU's in
    bfloat16, in a process of its own, since a CUDA context here would keep its memory."""
    import torch

    from ..model import rates

    if torch.cuda.device_count() == 0:
        return rates.matrix_rate("cpu", dtype)
    return _gpu_rate()


@cache
def _gpu_rate() -> float:
    from ..model import rates

    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(rates.matrix_rate, "cuda", "bfloat16").result()


def precision_warning(settings: EngineSettings) -> str | None:
    """A warning where the CPU that is to score has no 16 bits; with the way out."""
    import torch

    from ..model import rates

    if torch.cuda.device_count():
        return None
    slow = rates.slow_precision(_precision(settings))
    way = "leave out --bf16" if settings.autocast else "set dtype: float32 in refs.yaml"
    return slow and f"{slow}; {way}, which is another identity"


def _precision(settings: EngineSettings) -> str:
    """What is computed in; of `dtype: auto`, and of one that loading will refuse, float32."""
    if settings.autocast:
        return "bfloat16"
    return settings.dtype if settings.dtype in ("bfloat16", "float16") else "float32"
