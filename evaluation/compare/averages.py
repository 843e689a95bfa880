"""Soups and merges: cells whose model is a mean of weights, not trained (`model/average.py`).

    soup    of the policies of its parts, the cells `dpo:ALIAS` of the same seed, fraction, subset,
            label noise and beta
    merge   of the references themselves, as they were scored

`<cell>/average.json` says what a model is the mean of, with identities and weights, and how its
pairs are rendered. Made again from the same parts, a model has the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

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
from ...data.store import ReferenceRecord, Store
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


def mark_outdated(runs: Sequence[Cell], store: Store) -> None:
    """Make finished cells that have to run again unfinished.

    These are cells whose policy's scores `mrpo store gc` took, soups of which a part has to run or
    is another policy now, and parts whose model is gone but needed for a soup.
    """
    todo = {
        cell for cell in runs if cell.identity is None or not store.policies.names_of(cell.identity)
    }
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
        if not (part.finished and part.run.finished):
            raise UserError(f"{cell}: its part {part} is not finished; run the comparison again")
    weights = _weights(cell, mean, config.normalize)
    names = [part.method for part in cell.parts]
    identities = [str(part.identity) for part in cell.parts]
    source = recorded_source(checkpoints(cell.parts[0].run.checkpoints)[-1])
    parts = [Part(*values) for values in zip(names, identities, weights)]
    if recorded_parts(cell) == parts and cell.run.finished:
        return
    cell.run.average.unlink(missing_ok=True)  # the model that is there is another one
    write_resolved(config, cell.run.settings)
    with new_folder(cell.run.model) as folder:
        average([part.run.model for part in cell.parts], weights, folder)
        write_text(folder / "README.md", _card(cell, parts, "policies", source.name))
    rendering = {
        "chat_template_kwargs": source.chat_template_kwargs,
        "system_role": source.system_role,
    }
    _record(cell, parts, rendering)


def make_merge(
    cell: Cell,
    mean: Average,
    config: TrainConfig,
    specs: Mapping[str, ReferenceSpec],
    records: Sequence[ReferenceRecord],
) -> None:
    """Write the mean of references' weights into the cell's folder, unless it is there.

    `records` are those of `mean.references`. Raises `UserError` as `merge_folders` does.
    """
    parts = [
        Part(alias, record.identity, 1 / len(records))
        for alias, record in zip(mean.references, records)
    ]
    if recorded_parts(cell) == parts and cell.run.finished:
        return
    first, folders = specs[records[0].alias], merge_folders(cell.method, specs, records)
    cell.run.average.unlink(missing_ok=True)
    write_resolved(config, cell.run.settings)
    with new_folder(cell.run.model) as folder:
        average(folders, [1.0] * len(folders), folder)
        commit = _commit(records[0], "model")
        model = str(first.model_path or first.model)
        tokenizer: Any = load_tokenizer(model, commit)
        tokenizer.chat_template = first.chat_template or tokenizer.chat_template
        tokenizer.save_pretrained(folder)
        if (folder / ADAPTER_CONFIG).is_file():
            adapter = read_json(folder / ADAPTER_CONFIG, {}, "")
            adapter |= {"base_model_name_or_path": model, "revision": commit}
            content = json.dumps(adapter, indent=2, sort_keys=True)
            write_text(folder / ADAPTER_CONFIG, content)
        write_text(folder / "README.md", _card(cell, parts, "references", None))
    rendering = {
        "chat_template_kwargs": first.chat_template_kwargs,
        "system_role": first.system_role,
    }
    _record(cell, parts, rendering)


def merge_folders(
    text: str, specs: Mapping[str, ReferenceSpec], records: Sequence[ReferenceRecord]
) -> list[Path]:
    """Where the weights of references are that can be merged; downloads what is on the Hub.

    Raises `UserError` where they are not what was scored, or have no mean: for quantized weights,
    adapters of several models, and other architectures, tokenizers or shapes than the first's. The
    chat templates may differ; the first's is taken.
    """
    where = f"method {text!r}: "
    way_out = "leave the method out, or name references of one architecture and tokenizer"
    for record in records:
        spec = specs.get(record.alias)
        if spec is None:
            raise UserError(f"{where}the scores of {record.alias} were imported, and a mean needs "
                            "its weights; leave it out")  # fmt: skip
        if spec.quantization or Path(spec.model).suffix == GGUF:
            raise UserError(f"{where}{record.alias} is quantized or a GGUF file, and a mean needs "
                            "the weights that it was made of; leave it out")  # fmt: skip
        if changed := record.changed(inputs_here(spec)):
            raise UserError(
                f"{where}the {changed[0]} of {record.alias} is not what was scored; restore it, or "
                f"run `mrpo precompute --refs {record.alias}`"
            )
    chosen = [specs[record.alias] for record in records]
    first, base = chosen[0], records[0]
    for spec, record in zip(chosen[1:], records[1:]):
        pair = f"{first.alias} and {spec.alias}"
        if (first.adapter is None) != (spec.adapter is None):
            adapted, plain = (first, spec) if first.adapter else (spec, first)
            raise UserError(
                f"{where}{adapted.alias} has an adapter, {plain.alias} has not; merge the adapter "
                "into a model folder first (peft's merge_and_unload)"
            )
        if first.adapter and base.inputs.get("model") != record.inputs.get("model"):
            raise UserError(
                f"{where}{pair} have adapters of different models; merge each into a model folder "
                "first (peft's merge_and_unload)"
            )
        configs = [_config(s, _commit(r, "model")) for s, r in ((first, base), (spec, record))]
        if names := [k for k in configs[0] | configs[1] if configs[0].get(k) != configs[1].get(k)]:
            names.sort(key=lambda name: name != "model_type")
            values = ", ".join(str(config.get(names[0])) for config in configs)
            more = f" and {len(names) - 1} more of config.json" if names[1:] else ""
            raise UserError(f"{where}{pair} differ in {names[0]} ({values}){more}; {way_out}")
        tokens = [_tokens(s, _commit(r, "model")) for s, r in ((first, base), (spec, record))]
        if parts := [name for name in TOKENIZER_PARTS if tokens[0][name] != tokens[1][name]]:
            raise UserError(
                f"{where}{pair} have different tokenizers ({', '.join(parts)}); {way_out}"
            )
    folders = {spec.alias: _downloaded(spec, record) for spec, record in zip(chosen, records)}
    for alias, folder in folders.items() if first.adapter else ():
        refuse_special_adapter(f"{where}{alias}", folder)
    try:
        refuse_other_shapes(folders)
    except UserError as error:
        raise UserError(f"{where}{error}") from None
    return list(folders.values())


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


def _record(cell: Cell, parts: Sequence[Part], rendering: Mapping[str, Any]) -> None:
    content = {"method": cell.method, PARTS: parts, RENDERING: rendering}
    write_json(cell.run.average, content)


def _card(cell: Cell, parts: Sequence[Part], kind: str, source: str | None) -> str:
    """README.md of the model's folder, with the front matter that the Hub reads."""
    head = {"pipeline_tag": "text-generation", "tags": ["mrpo", "merge"]}
    started = f" All were fine-tuned from {source}." if source else ""
    rows = [f"| {part.name} | {part.weight:.4f} | {part.identity} |" for part in parts]
    return (
        "\n\n".join(
            [
                f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
                f"# {cell}",
                f"The mean of the weights of {len(parts)} {kind}, made by `mrpo compare`.{started}",
                "\n".join(["| part | weight | identity of its scores |", "|---|---:|---|", *rows]),
            ]
        )
        + "\n"
    )


def _commit(record: ReferenceRecord, part: str) -> str | None:
    """Of what is on the Hub, the commit that was scored."""
    commit: str | None = (record.inputs.get(part) or {}).get("commit")
    return commit


def _config(spec: ReferenceSpec, commit: str | None) -> dict[str, Any]:
    config = from_pretrained(AutoConfig, str(spec.model_path or spec.model), commit)
    return {key: value for key, value in config.to_dict().items() if key not in NOTES}


def _tokens(spec: ReferenceSpec, commit: str | None) -> dict[str, Any]:
    """What turns text into token ids."""
    tokenizer = load_tokenizer(str(spec.model_path or spec.model), commit)
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return state


def _downloaded(spec: ReferenceSpec, record: ReferenceRecord) -> Path:
    """The folder of a reference's adapter where it has one, else of its model."""
    from huggingface_hub import snapshot_download

    part = "adapter" if spec.adapter else "model"
    folder = spec.adapter_folder if spec.adapter else spec.model_path
    if folder is not None:
        return folder
    name, files = spec.adapter or spec.model, [*WEIGHTS, "*.json", *TOKENIZER_FILES]
    with files_of(name, "can't be downloaded", "check the network and HF_TOKEN"):
        commit = _commit(record, part)
        return Path(snapshot_download(name, revision=commit, allow_patterns=files))
