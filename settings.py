"""One typed dataclass per command: its flags, its YAML keys and its defaults in one place.

A command's settings live in the `config.py` of the folder that does the work:

    @dataclass(kw_only=True, slots=True)
    class PrepareConfig:
        '''Help of the command, with an example.'''
        source: Annotated[str, Arg("a positional argument")]
        out: Annotated[str, "a required option, --out"]
        shard_pairs: Annotated[int, "an option, --shard-pairs"] = 8192
        policy: Annotated[str, "an option of two names", Also("model_name_or_path")]

`cli.py` makes the flags from it; this module merges a YAML file with flags and writes the
result beside a command's output. Standard library and PyYAML only, so that help stays fast.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from .errors import UserError

Config = TypeVar("Config")
Given = ParamSpec("Given")
Takes = TypeVar("Takes", contravariant=True)
Result = TypeVar("Result")
Returns = TypeVar("Returns", covariant=True)


class Command(Protocol[Given, Takes, Returns]):
    """A command as a function: of its settings, or of one object that holds them."""

    @typing.overload
    def __call__(self, config: Takes, /) -> Returns: ...
    @typing.overload
    def __call__(self, *args: Given.args, **settings: Given.kwargs) -> Returns: ...


def command(
    config: Callable[Given, Config],
) -> Callable[[Callable[[Config], Result]], Command[Given, Config, Result]]:
    """Make a function of a settings object one of the settings themselves, typed alike.

        @command(PrepareConfig)
        def prepare(config: PrepareConfig) -> PairShards: ...

        prepare(source="pairs.jsonl", out="pairs")  # checked as the command line checks them
        prepare(PrepareConfig(source="pairs.jsonl", out="pairs"))

    Lists may stand for comma-separated text, and paths for text.
    """

    def decorate(work: Callable[[Config], Result]) -> Command[Given, Config, Result]:
        @functools.wraps(work)
        def call(*args: Any, **settings: Any) -> Result:
            return work(*args) if args else work(build(typing.cast(type, config), settings))

        signature = inspect.signature(config)
        call.__signature__ = signature.replace(  # type: ignore[attr-defined]
            return_annotation=work.__annotations__.get("return")
        )
        return typing.cast(Command[Given, Config, Result], call)

    return decorate


def comma_separated(text: str | None, flag: str | None = None) -> list[str]:
    """The parts of a comma-separated list without the white space around them; none are empty.

    With `flag`, the name that a message has for the list, raises `UserError` where a part stands
    there twice.
    """
    parts = [part.strip() for part in (text or "").split(",")]
    parts = [part for part in parts if part]
    if flag is not None:
        for part in parts:
            if parts.count(part) > 1:
                raise UserError(f"{flag}: {part!r} is given twice; name each once")
    return parts


@dataclasses.dataclass(frozen=True, slots=True)
class Arg:
    """Marks a field as a positional argument."""

    help: str


@dataclasses.dataclass(frozen=True, slots=True)
class Also:
    """A second name of a field, which users of another tool know it by; as a flag and in YAML."""

    name: str


# Names of TRL that nothing here equals, and what takes their place.
_BATCH = "`mrpo train --batch-pairs` is the pairs of an optimizer step, over all devices"
ELSEWHERE = {
    "per_device_train_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "ref_model": "references are --refs, scored beforehand by `mrpo precompute`",
    "precompute_ref_log_probs": "references are always scored beforehand, by `mrpo precompute`",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One field of a settings class, as flags and YAML see it."""

    name: str
    type: Any
    help: str
    default: Any
    positional: bool
    also: str | None = None

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING


def settings_of(config: type) -> list[Setting]:
    """The fields of a settings class in order, annotations resolved.

    A field that `__init__` does not take is none: so a class can extend another one's settings
    and leave out those that it sets itself.
    """
    hints = typing.get_type_hints(config, include_extras=True)
    fields = []
    for field in _given(config):
        kind, note, *more = typing.get_args(hints[field.name])
        positional = isinstance(note, Arg)
        text = note.help if positional else note
        also = more[0].name if more else None
        fields.append(Setting(field.name, kind, text, field.default, positional, also))
    return fields


def build(config: type[Config], flags: Mapping[str, Any], file: str | None = None) -> Config:
    """The settings from given flags over a YAML file over defaults.

    Raises `UserError` for a key that the command does not have or that is there under two names,
    a value of the wrong type and a required setting that is missing.
    """
    known = {setting.name: setting for setting in settings_of(config)}
    also = {setting.also: setting.name for setting in known.values() if setting.also}
    values: dict[str, Any] = {}
    if file is not None:
        keys: dict[str, str] = {}
        for key, value in _read_yaml(file).items():
            name = str(key).replace("-", "_")
            name = also.get(name, name)
            if name not in known:
                way_out = ELSEWHERE.get(name, f"this command knows {', '.join(known)}")
                raise UserError(f"{file}: unknown key {key!r}; {way_out}")
            if name in keys:
                raise UserError(f"{file}: {keys[name]!r} and {key!r} are one setting; keep one")
            keys[name] = str(key)
            values[name] = _checked(known[name], value, file)
    for name, value in flags.items():
        if name not in known:
            raise UserError(f"unknown setting {name!r}; known: {', '.join(known)}")
        values[name] = _checked(known[name], value, "command line")
    for setting in known.values():
        if setting.required and setting.name not in values:
            flag = setting.name if setting.positional else f"--{setting.name.replace('_', '-')}"
            raise UserError(f"{flag} is missing; give it on the command line or in --config")
    return config(**values)


def write_resolved(config: Any, path: Path) -> None:
    """Write every setting in force as YAML, which `--config` reads back."""
    import yaml

    path.parent.mkdir(parents=True, exist_ok=True)
    values = {field.name: getattr(config, field.name) for field in _given(config)}
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _given(config: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(config) if field.init]


def _read_yaml(file: str) -> Mapping[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text()) or {}
    except OSError as error:
        raise UserError(f"--config {file}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {file}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, Mapping):
        raise UserError(f"--config {file}: must be a mapping of settings, not {type(values)}")
    return values


def _checked(setting: Setting, value: Any, origin: str) -> Any:
    """The value as the field's type; a list is taken as comma-separated text.

    YAML reads 1e-5 as text and 1 as an integer, and the command line gives a union as text, so a
    value is first matched as it is and then as what its text says.
    """
    admitted = options(setting.type)
    if isinstance(value, list | tuple):
        value = ",".join(str(item) for item in value)
    if isinstance(value, Path):
        value = str(value)
    if value is None and type(None) in admitted:
        return None
    if value in [option for option in admitted if not isinstance(option, type)]:
        return value
    if type(value) in admitted:
        return value
    for kind in (int, float, str):
        exact = not isinstance(value, bool) and (kind is not int or isinstance(value, str))
        if kind in admitted and exact:
            try:
                return kind(value)
            except (TypeError, ValueError):
                continue
    names = [option.__name__ if isinstance(option, type) else str(option) for option in admitted]
    names = [name for name in names if name != "NoneType"]
    raise UserError(f"{origin}: {setting.name} is {value!r}; it must be {' or '.join(names)}")


def options(kind: Any) -> tuple[Any, ...]:
    """The plain types and literal values that an annotation admits, unions and literals opened."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return tuple(option for part in typing.get_args(kind) for option in options(part))
    if origin is typing.Literal:
        return typing.get_args(kind)
    return (kind,)
