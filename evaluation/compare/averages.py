"""Soups and merges: cells whose model is a mean of weights, not trained (`model/average.py`).

    soup    of the policies of its parts, the cells `dpo:ALIAS` of the same seed, fraction, subset,
            label noise and beta
    merge   of the references themselves, as they were scored

`<cell>/average.json` says what a model is the mean of, with identities and weights, and how its
pairs are rendered. Made again from the same parts, a model has the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, PreTrainedTokenizerFast

from ...data.references import (
    ADAPTER_CONFIG,
    CONFIG_NOTES,
    GGUF,
    TOKENIZER_FILES,
    ReferenceSpec,
    files_of,
    from_pretrained,
    inputs_here,
)
from ...data.rendering.renderer import load_tokenizer
from ...data.store import ReferenceRecord
from ...errors import UserError
from ...files import fits, new_folder, read_json, write_json, write_text
from ...method.grammar import Average
from ...model.average import average, refuse_other_shapes, refuse_special_adapter
from ...settings import write_resolved
from ...train.checkpoint import checkpoints
from ...train.config import TrainConfig
from ...train.run_folder import read_evaluation
from ...train.start import recorded_source
from ..evaluate import UNITS
from ..policies import RENDERING
from .cells import Cell
from .results import Part

PARTS = "parts"  # key of an average.json
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# Of config.json: what neither the weights nor the log-probs depend on.
NOTES = (
    *CONFIG_NOTES,
    *("dtype", "torch_dtype", "use_cache", "architectures"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
TOKENIZER_PARTS = ("model", "added_tokens", "normalizer", "pre_tokenizer")


def recorded_parts(cell: Cell) -> list[Part]:
    """What the cell's model is the mean of; empty where it is not made."""
    if not cell.run.average.is_file():
        return []
    shape = {PARTS: [{"name": str, "identity": str, "weight": float}]}
    content = read_json(cell.run.average, shape, f"remove {cell.folder} to make it again")
    return [Part(p["name"], p["identity"], p["weight"]) for p in content[PARTS]]


def mark_outdated(runs: Sequence[Cell], evaluated: Callable[[str], bool]) -> None:
    """Make finished cells that have to run again unfinished.

    These are cells whose policy is not `evaluated` (`mrpo store gc` took its scores, or a task is
    new), soups of which a part has to run or is another policy now, and parts whose model is gone
    but needed for a soup.
    """
    todo = {cell for cell in runs if cell.identity is None or not evaluated(cell.identity)}
    soups = [cell for cell in runs if cell.parts]
    size = -1
    while size != len(todo):
        size = len(todo)
        for soup in soups:
            made = [part.identity for part in recorded_parts(soup)]
            other = made != [part.identity for part in soup.parts]
            if other or any(part in todo for part in soup.parts):
                todo.add(soup)
            if soup in todo and (other or not soup.run.finished):
                todo |= {part for part in soup.parts if not part.run.finished}
    for cell in todo:
        cell.result.unlink(missing_ok=True)


def make_soup(cell: Cell, mean: Average, config: TrainConfig) -> None:
    """Write the mean of the parts' policies into the cell's folder, unless it is there.

    Raises `UserError` where a part is not finished.
    """
    for part in cell.parts:
        if not part.finished:
            raise UserError(f"{cell}: its part {part} is not finished; run the comparison again")
    weights = _weights(cell, mean, config.normalize)
    parts = [
        Part(part.method, str(part.identity), weight) for part, weight in zip(cell.parts, weights)
    ]
    if recorded_parts(cell) == parts and cell.run.finished:
        return
    source = recorded_source(checkpoints(cell.parts[0].run.checkpoints)[-1])
    cell.run.average.unlink(missing_ok=True)  # the model that is there is another one
    write_resolved(config, cell.run.settings)
    with new_folder(cell.run.model) as folder:
        average([part.run.model for part in cell.parts], weights, folder)
        what = f"The mean of the weights of policies, each fine-tuned from {source.name}"
        write_text(folder / "README.md", _card(cell, parts, what))
    _record(cell, parts, source.chat_template_kwargs, source.system_role)


@dataclass(frozen=True, slots=True)
class MergeSource:
    """A reference whose own weights are asked for, as they were scored."""

    spec: ReferenceSpec
    record: ReferenceRecord

    @property
    def alias(self) -> str:
        return self.record.alias

    @property
    def model(self) -> str:
        """A folder or a Hub id; the adapter's model where there is one."""
        return str(self.spec.model_path or self.spec.model)

    def commit(self, part: str = "model") -> str | None:
        """Of what is on the Hub, the commit that was scored."""
        commit: str | None = (self.record.inputs.get(part) or {}).get("commit")
        return commit

    def config(self) -> dict[str, Any]:
        config = from_pretrained(AutoConfig, self.model, self.commit())
        return {key: value for key, value in config.to_dict().items() if key not in NOTES}

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return load_tokenizer(self.model, self.commit())

    def folder(self) -> Path:
        """The folder of the adapter where there is one, else of the model; from the Hub's cache."""
        from huggingface_hub import snapshot_download

        part = "adapter" if self.spec.adapter else "model"
        local = self.spec.adapter_folder if self.spec.adapter else self.spec.model_path
        if local is not None:
            return local
        name, files = self.spec.adapter or self.spec.model, [*WEIGHTS, "*.json", *TOKENIZER_FILES]
        with files_of(name, "can't be downloaded", "check the network and HF_TOKEN"):
            commit = self.commit(part)
            return Path(snapshot_download(name, revision=commit, allow_patterns=files))


def merge_sources(
    mean: Average, records: Mapping[str, ReferenceRecord], specs: Mapping[str, ReferenceSpec]
) -> list[MergeSource]:
    """The references of a merge; `records` by alias as the method names them.

    Raises `UserError` where the scores of one were imported.
    """
    sources = []
    for alias in mean.references:
        record = records[alias]
        if record.alias not in specs:
            raise UserError(
                f"method '{mean}': the scores of {alias} were imported, and a mean needs its "
                "weights; leave it out"
            )
        sources.append(MergeSource(specs[record.alias], record))
    return sources


def make_merge(
    cell: Cell, mean: Average, config: TrainConfig, sources: Sequence[MergeSource]
) -> None:
    """Write the mean of references' weights into the cell's folder, unless it is there.

    `sources` are those of `mean.references`. Raises `UserError` as `merge_folders` does.
    """
    parts = [
        Part(alias, one.record.identity, 1 / len(sources))
        for alias, one in zip(mean.references, sources)
    ]
    if recorded_parts(cell) == parts and cell.run.finished:
        return
    first, folders = sources[0], merge_folders(cell.method, sources)
    cell.run.average.unlink(missing_ok=True)
    write_resolved(config, cell.run.settings)
    with new_folder(cell.run.model) as folder:
        average(folders, [1.0] * len(folders), folder)
        tokenizer: Any = first.tokenizer()
        tokenizer.chat_template = first.spec.chat_template or tokenizer.chat_template
        tokenizer.save_pretrained(folder)
        if first.spec.adapter:
            adapter = read_json(folder / ADAPTER_CONFIG, {}, "")
            adapter |= {"base_model_name_or_path": first.model, "revision": first.commit()}
            content = json.dumps(adapter, indent=2, sort_keys=True)
            write_text(folder / ADAPTER_CONFIG, content)
        write_text(folder / "README.md", _card(cell, parts, "The mean of references' weights"))
    _record(cell, parts, first.spec.chat_template_kwargs, first.spec.system_role)


def merge_folders(text: str, sources: Sequence[MergeSource]) -> list[Path]:
    """Where the weights of references are that can be merged; downloads what is on the Hub.

    Raises `UserError`, which begins with the method's `text`, where they are not what was scored or
    have no mean: for quantized weights, adapters of several models, and other architectures,
    tokenizers or shapes than the first's. The chat templates may differ; the first's is taken.
    """
    try:
        for one in sources:
            _refuse_without_weights(one)
        for other in sources[1:]:
            _refuse_other_model(sources[0], other)
        folders = {one.alias: one.folder() for one in sources}
        for alias, folder in folders.items() if sources[0].spec.adapter else ():
            refuse_special_adapter(alias, folder)
        refuse_other_shapes(folders)
    except UserError as error:
        raise UserError(f"method {text!r}: {error}") from None
    return list(folders.values())


def _refuse_without_weights(one: MergeSource) -> None:
    if one.spec.quantization or Path(one.spec.model).suffix == GGUF:
        raise UserError(
            f"{one.alias} is quantized or a GGUF file, and a mean needs the weights that it was "
            "made of; leave it out"
        )
    if changed := one.record.changed(inputs_here(one.spec)):
        raise UserError(
            f"the {changed[0]} of {one.alias} is not what was scored; restore it, or run "
            f"`mrpo precompute --refs {one.alias}`"
        )


def _refuse_other_model(first: MergeSource, other: MergeSource) -> None:
    """Raise `UserError` unless all that is not weights is the same."""
    pair = f"{first.alias} and {other.alias}"
    merge_first = "into a model folder first (peft's merge_and_unload)"
    if (first.spec.adapter is None) != (other.spec.adapter is None):
        adapted, plain = (first, other) if first.spec.adapter else (other, first)
        raise UserError(
            f"{adapted.alias} has an adapter, {plain.alias} has not; merge the adapter "
            f"{merge_first}"
        )
    if first.spec.adapter and first.record.inputs["model"] != other.record.inputs["model"]:
        raise UserError(f"{pair} have adapters of different models; merge each {merge_first}")
    way_out = "leave the method out, or name references of one architecture and tokenizer"
    ours, theirs = first.config(), other.config()
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    names.sort(key=lambda name: name != "model_type")
    if names:
        more = f" and {len(names) - 1} more of config.json" if names[1:] else ""
        values = f"{ours.get(names[0])}, {theirs.get(names[0])}"
        raise UserError(f"{pair} differ in {names[0]} ({values}){more}; {way_out}")
    ours, theirs = (json.loads(o.tokenizer().backend_tokenizer.to_str()) for o in (first, other))
    if parts := [name for name in TOKENIZER_PARTS if ours[name] != theirs[name]]:
        raise UserError(f"{pair} have different tokenizers ({', '.join(parts)}); {way_out}")


def _weights(cell: Cell, mean: Average, normalize: str) -> list[float]:
    """The weights of a soup's parts, which sum to 1.

    vaw: by each part's accuracy on the held-out pairs by likelihood, normalized as in training;
    uniform where all are 0.
    """
    count = len(cell.parts)
    if mean.weighting == "uniform":
        return [1 / count] * count
    metric = next(name for name, unit in UNITS.items() if unit == normalize)
    shape = {"identity": str, "overall": {"accuracy": {metric: {"value": float | int}}}}
    accuracies = []
    for part in cell.parts:
        path = part.run.evaluation
        found = read_evaluation(path).get("policies", [])
        policies = [p for p in found if p.get("identity") == part.identity]
        if not policies or not fits(policies[0], shape):
            raise UserError(f"{path}: the accuracy of {part} is missing; remove {part.result}")
        accuracies.append(float(policies[0]["overall"]["accuracy"][metric]["value"]))
    total = sum(accuracies)
    return [accuracy / total if total else 1 / count for accuracy in accuracies]


def _record(
    cell: Cell, parts: Sequence[Part], kwargs: Mapping[str, Any], system_role: str | None
) -> None:
    rendering = {"chat_template_kwargs": kwargs, "system_role": system_role}
    write_json(cell.run.average, {"method": cell.method, PARTS: parts, RENDERING: rendering})


def _card(cell: Cell, parts: Sequence[Part], what: str) -> str:
    """README.md of the model's folder, with the front matter that the Hub reads."""
    head = {"pipeline_tag": "text-generation", "tags": ["mrpo", "merge"]}
    rows = [f"| {part.name} | {part.weight:.4f} | {part.identity} |" for part in parts]
    paragraphs = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {cell}",
        f"{what}, made by `mrpo compare`.",
        "\n".join(["| part | weight | identity of its scores |", "|---|---:|---|", *rows]),
    ]
    return "\n\n".join(paragraphs) + "\n"
