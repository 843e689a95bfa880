"""References as `refs.yaml` names them: an alias, a model, and what else makes its scores.

    llama:
      model: meta-llama/Llama-3.2-3B-Instruct
      revision: main

A pure reader: nothing is loaded here, and no model is looked for. `precompute/identity.py` turns
a `ReferenceSpec` into the identity under which the store keeps its scores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError

ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class ReferenceSpec:
    """One entry of refs.yaml. Every field but `tensor_parallel_size` makes the scores."""

    alias: str
    model: str
    revision: str | None = None
    dtype: str = "auto"  # auto: what the model's config.json says
    quantization: str | None = None
    adapter: str | None = None
    chat_template: str | None = None  # the template's text, read from its file if it was a path
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tensor_parallel_size: int = 1
    folder: Path = field(default=Path(), compare=False)  # of refs.yaml: local paths start there

    def entry(self) -> dict[str, Any]:
        """What makes the scores, as written, defaults left out: compared to find an alias again.

        Local paths stay as written, so that an alias is found when its model folder is gone.
        """
        defaults = ReferenceSpec(self.alias, self.model)
        return {
            name: _plain(getattr(self, name))
            for name in ENTRY_KEYS
            if name == "model" or getattr(self, name) != getattr(defaults, name)
        }

    @property
    def model_folder(self) -> Path | None:
        """The local folder that `model` names; None where it names a Hub model."""
        return self._local(self.model)

    @property
    def adapter_folder(self) -> Path | None:
        """The local folder that `adapter` names; None where there is none or it is on the Hub."""
        return None if self.adapter is None else self._local(self.adapter)

    def _local(self, name: str) -> Path | None:
        for base in (self.folder, Path()):
            path = base / Path(name).expanduser()
            if path.is_dir():
                return path.resolve()
        if HUB_ID.fullmatch(name):
            return None
        raise UserError(
            f"reference {self.alias}: {name!r} is neither a folder here nor a Hub id (org/name); "
            "check its path in refs.yaml"
        )


KEYS = tuple(f.name for f in fields(ReferenceSpec) if f.name not in ("alias", "folder"))
ENTRY_KEYS = tuple(key for key in KEYS if key != "tensor_parallel_size")


def load_refs(path: str | Path) -> dict[str, ReferenceSpec]:
    """Every reference of a refs.yaml, by alias, in the file's order.

    Raises `UserError` with the file and the key where the file can't be read, an alias or a key
    is not allowed, or a value has the wrong type.
    """
    path = Path(path)
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; name an existing file with --refs-config"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(entries, Mapping) or not entries:
        raise UserError(f"{path}: must map aliases to references, like 'llama: {{model: …}}'")
    return refs_from(entries, path)


def refs_from(
    entries: Mapping[str, Mapping[str, Any] | str], path: Path = Path("references")
) -> dict[str, ReferenceSpec]:
    """References from entries as in refs.yaml, by alias.

    `path` is their file in messages; local paths are relative to its folder. Raises `UserError`
    as `load_refs` does.
    """
    return {str(alias): _spec(path, str(alias), entry) for alias, entry in entries.items()}


def select_refs(specs: Mapping[str, ReferenceSpec], aliases: str) -> list[ReferenceSpec]:
    """The references that a comma-separated list names, in its order; the first is the base."""
    names = [name.strip() for name in aliases.split(",") if name.strip()]
    if not names:
        raise UserError(f"--refs {aliases!r} names no reference; known: {', '.join(specs)}")
    for name in names:
        if name not in specs:
            raise UserError(f"--refs: unknown reference {name!r}; known: {', '.join(specs)}")
        if names.count(name) > 1:
            raise UserError(f"--refs: {name!r} stands there twice; name each reference once")
    return [specs[name] for name in names]


def check_alias(alias: str, where: str = "--refs") -> str:
    """The alias itself, or `UserError`: it becomes part of file names and method names."""
    if not ALIAS.fullmatch(alias):
        raise UserError(
            f"{where}: alias {alias!r} is not allowed; use up to 64 letters, digits, '.', '_' "
            "or '-', beginning with a letter or digit"
        )
    return alias


def _spec(path: Path, alias: str, entry: Any) -> ReferenceSpec:
    check_alias(alias, str(path))
    where = f"{path}: {alias}"
    if isinstance(entry, str):
        entry = {"model": entry}
    if not isinstance(entry, Mapping) or "model" not in entry:
        raise UserError(f"{where}: needs a 'model': a Hub id or a folder")
    if unknown := [str(key) for key in entry if key not in KEYS]:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(KEYS)}")
    values = {key: value for key, value in entry.items() if value is not None}
    for key, value in values.items():
        _check_value(f"{where}.{key}", key, value)
    if "chat_template" in values:
        values["chat_template"] = _template(f"{where}.chat_template", path, values["chat_template"])
    return ReferenceSpec(alias=alias, folder=path.resolve().parent, **values)


def _check_value(where: str, key: str, value: Any) -> None:
    if key == "tensor_parallel_size":
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where} is {value!r}; it must be a whole number from 1")
    elif key == "chat_template_kwargs":
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise UserError(f"{where} is {value!r}; it must map names to values")
    elif not isinstance(value, str) or not value.strip():
        raise UserError(f"{where} is {value!r}; it must be text (quote it in YAML)")
    if key in ("model", "adapter") and "://" in value:
        # A URL could carry a token, and would end up in the store's manifests.
        raise UserError(f"{where} is a URL; name a Hub id (org/name) or a folder")
    if key == "dtype" and value not in DTYPES:
        raise UserError(f"{where} is {value!r}; it must be one of {', '.join(DTYPES)}")


def _template(where: str, path: Path, value: str) -> str:
    """The template's text: a value that ends in .jinja is a file relative to the refs.yaml."""
    if "\n" in value or "{" in value or not value.endswith(".jinja"):
        return value
    try:
        return (path.parent / Path(value).expanduser()).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"{where}: {value!r} can't be read as text; its path is relative to {path.parent}"
        ) from None


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
