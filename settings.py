"""Settings: one typed dataclass per command holds its flags, its YAML keys and its defaults.

A command's class stands in the `config.py` of the folder that does the work:

    @dataclass(kw_only=True, slots=True)
    class PrepareConfig:
        '''Help of the command, with an example.'''
        source: Annotated[str, Arg("A positional argument.")]
        out: Annotated[str, "A required option, --out."]
        shard_pairs: Annotated[int, "An option, --shard-pairs."] = 8192
        policy: Annotated[str, "An option with two names.", Also("model_name_or_path")]

`cli.py` makes the flags from it. This module has the fields that several classes share and the
checks that they call in `__post_init__`, merges a YAML file with flags, and writes the result
beside a command's output. Standard library and PyYAML only, so that `mrpo --help` stays fast.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ParamSpec, Protocol, TypeVar

from .errors import UserError
from .files import read_yaml, write_text

Config = TypeVar("Config")
Given = ParamSpec("Given")
Takes = TypeVar("Takes", contravariant=True)
Result = TypeVar("Result")
Returns = TypeVar("Returns", covariant=True)


keyword = functools.partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)


class Command(Protocol[Given, Takes, Returns]):
    """A command as a function: of its settings as keywords, or of one object that holds them."""

    config: type  # the class of its settings

    @typing.overload
    def __call__(self, config: Takes, /) -> Returns: ...
    @typing.overload
    def __call__(self, *args: Given.args, **settings: Given.kwargs) -> Returns: ...


def command(
    config: Callable[Given, Config],
) -> Callable[[Callable[[Config], Result]], Command[Given, Config, Result]]:
    """Make a function of a settings object also one of the settings as keywords, typed alike.

        @command(PrepareConfig)
        def prepare(config: PrepareConfig) -> PairShards: ...

        prepare(source="pairs.jsonl", out="pairs")  # checked as the command line checks them
        prepare(PrepareConfig(source="pairs.jsonl", out="pairs"))

    A list may be given for comma-separated text, and a path for text. `help()` shows the signature
    and what each setting is.
    """
    kind = typing.cast(type, config)

    def decorate(work: Callable[[Config], Result]) -> Command[Given, Config, Result]:
        @functools.wraps(work)
        def call(*args: Any, **settings: Any) -> Result:
            return work(*args) if args else work(build(kind, settings))

        parameters = [
            keyword(setting.name, default=setting.default, annotation=setting.type)
            for setting in settings_of(kind)
        ]
        returns = work.__annotations__.get("return")
        signature = inspect.Signature(parameters, return_annotation=returns)
        call.__doc__ = f"{inspect.getdoc(work) or ''}\n\n{_described(kind)}"
        vars(call).update(config=kind, __signature__=signature)
        return typing.cast(Command[Given, Config, Result], call)

    return decorate


def _described(config: type) -> str:
    """The settings of a class, with type, default and meaning, as the "Args" of a docstring."""
    lines = ["Args:"]
    for setting in settings_of(config):
        admitted = options(setting.type)
        kinds = (kind.__name__ if isinstance(kind, type) else repr(kind) for kind in admitted)
        kind = " | ".join(kinds).replace("NoneType", "None")
        default = "" if setting.required else f" = {setting.default!r}"
        lines += [f"    {setting.name}: {kind}{default}"]
        lines += textwrap.wrap(setting.help, 96, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


class CallablePackage(types.ModuleType):
    """A package that has the name of its command and is called as the command: `mrpo.train(…)`.

    An import of any module in it binds the name to the package, so the package itself has to be
    callable for the name to mean the same whatever was imported before.
    """

    _function: str  # as `imported` takes it

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return imported(self._function)(*args, **settings)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(imported(self._function))

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return inspect.getdoc(imported(self._function))


def make_callable(package: str, function: str) -> None:
    """Make a package callable as a command, given as `imported` takes it."""
    module = sys.modules[package]
    module.__class__ = CallablePackage
    vars(module).update(_function=function)


def imported(path: str) -> Any:
    """`folder.module:name` inside mrpo."""
    module, name = path.split(":")
    return getattr(import_module(f"mrpo.{module}"), name)


# Fields that several commands share. Where one needs other words, it builds them on these.
PAIRS = "Folder of pairs as `mrpo prepare` writes it."
REFS_CONFIG = "The file that says which model an alias is."
STORE = "The score store: a folder, s3://… or gs://…."
References = Annotated[str, "Aliases of references, comma-separated; the first is the base."]
LAST_SEED = 2**32 - 1
StoreRoot = Annotated[str | None, f"{STORE} By default $MRPO_STORE, else `store`."]


@dataclasses.dataclass(kw_only=True, slots=True)
class StoreSettings:
    """What every command on the score store takes."""

    store: StoreRoot = None


@dataclasses.dataclass(kw_only=True, slots=True)
class PairSettings:
    """What every command on pairs and references takes."""

    pairs: Annotated[str, PAIRS] = "pairs"
    refs_config: Annotated[str, REFS_CONFIG] = "configs/refs.yaml"


@dataclasses.dataclass(kw_only=True, slots=True)
class ScoredPairSettings(PairSettings):
    """What every command on pairs and their stored scores takes."""

    store: StoreRoot = None


def above_zero(config: Any, *names: str) -> None:
    """Raise `UserError` where one of these settings is a number, but not above 0."""
    _check(config, names, lambda value: value > 0, "above 0")


def at_least_zero(config: Any, *names: str) -> None:
    """Raise `UserError` where one of these settings is a number, but not 0 or more."""
    _check(config, names, lambda value: value >= 0, "0 or more")


def share(config: Any, *names: str) -> None:
    """Raise `UserError` where one of these settings is a number, but not in [0, 1]."""
    _check(config, names, lambda value: 0 <= value <= 1, "in [0, 1]")


def no_effect(config: Any, why: str, *names: str) -> None:
    """Raise `UserError` where one of these settings is not its default: `why` it has no effect."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        value = getattr(config, name)
        if value != defaults[name]:
            raise UserError(f"{_flag(name)} is {value}, which has no effect {why}; leave it out")


def seed(config: Any, *names: str) -> None:
    """Raise `UserError` where one of these settings is no seed: random generators share 32 bits."""
    _check(config, names, lambda value: 0 <= value <= LAST_SEED, f"a seed from 0 to {LAST_SEED}")


def file_type(out: str | None, suffix: str, content: str) -> None:
    """Raise `UserError` where the file that --out names does not end in `suffix`."""
    if out is not None and not out.endswith(suffix):
        raise UserError(f"--out is {out}; {content}, so name a file like NAME{suffix}")


def _check(config: Any, names: Iterable[str], rule: Callable[[float], bool], words: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, int | float) and not (abs(value) < math.inf and rule(value)):
            raise UserError(f"{_flag(name)} is {value}; it must be {words}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def comma_separated(text: str | None, flag: str | None = None) -> list[str]:
    """The parts of a comma-separated list without the white space around them; none are empty.

    With `flag`, what messages call the list, raises `UserError` for a part that is given twice.
    """
    parts = [part for part in map(str.strip, (text or "").split(",")) if part]
    for part in parts if flag else ():
        if parts.count(part) > 1:
            raise UserError(f"{flag}: {part!r} is given twice; name each once")
    return parts


Several = tuple[str, ...]  # the type of a flag that can be given several times


class Arg(str):
    """The help of a field that is a positional argument."""


class Also(str):
    """A second name of a field, which users of another tool know it by; as a flag and in YAML."""


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
    default: Any  # `inspect.Parameter.empty` where it is required
    positional: bool
    also: str | None = None

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def flag(self) -> str:
        """The name on the command line; without hyphens in front where it is positional."""
        return self.name if self.positional else _flag(self.name)


def settings_of(config: type) -> list[Setting]:
    """The settings of a class with their annotations resolved, the required ones first.

    A field that `__init__` does not take is left out, so that a class can extend another's
    settings and set some of them itself.
    """
    hints = typing.get_type_hints(config, include_extras=True)
    fields = []
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        kind, note, *more = typing.get_args(hints[field.name])
        missing = field.default is dataclasses.MISSING
        default = inspect.Parameter.empty if missing else field.default
        also = more[0] if more else None
        fields.append(Setting(field.name, kind, note, default, isinstance(note, Arg), also))
    return sorted(fields, key=lambda setting: not setting.required)


def build(config: type[Config], flags: Mapping[str, Any], file: str | None = None) -> Config:
    """The settings from given flags over a YAML file over defaults.

    A value of None (null in YAML) means "not given" where the setting does not admit it. Raises
    `UserError` for a key that the command does not have or that is there under two names, a value
    of the wrong type and a required setting that is missing.
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
            if value is not None or type(None) in options(known[name].type):
                values[name] = _checked(known[name], value, f"{file}: ")
    for name, value in flags.items():
        if name not in known:
            raise UserError(f"unknown setting {name!r}; known: {', '.join(known)}")
        values[name] = _checked(known[name], value)
    for setting in known.values():
        if setting.required and setting.name not in values:
            raise UserError(
                f"{setting.flag} is missing; give it on the command line or in --config"
            )
    return config(**values)


def write_resolved(config: Any, path: Path) -> None:
    """Write every setting in force as YAML, which `--config` reads back."""
    import yaml

    values = {setting.name: getattr(config, setting.name) for setting in settings_of(type(config))}
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _read_yaml(file: str) -> Mapping[str, Any]:
    try:
        values = read_yaml(Path(file)) or {}
    except OSError as error:
        raise UserError(f"--config {file}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--config {file}: {error}") from None
    if not isinstance(values, Mapping):
        raise UserError(f"--config {file}: must be a mapping of settings, not {type(values)}")
    return values


def _checked(setting: Setting, value: Any, origin: str = "") -> Any:
    """The value as the field's type; a list is taken as comma-separated text.

    YAML reads 1e-5 as text and 1 as an integer, and the command line gives a union as text, so a
    value is first matched as it is and then as what its text says.
    """
    admitted = options(setting.type)
    if admitted == (Several,):
        texts = [value] if isinstance(value, str) else value
        if isinstance(value, Mapping):  # in YAML `name: text`, as a flag `name=text`
            texts = [f"{k}={v}" if isinstance(v, str) else v for k, v in value.items()]
        if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
            raise UserError(
                f"{origin}{setting.name} is {value!r}; it must be text, or a list or mapping of "
                "texts; quote a text that has braces"
            )
        return tuple(texts)
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and (value == "~" or value.startswith("~/")):
        value = os.path.expanduser(value)  # the shell does not in --out=~/pairs, nor YAML
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{origin}{setting.name} holds a NUL character; remove it")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{origin}{setting.name} is a number beyond 64 bits; give a smaller one")
    literals = [option for option in admitted if not isinstance(option, type)]
    if type(value) in admitted or value in literals:
        return value
    for kind in (int, float, str):
        exact = not isinstance(value, bool | Mapping) and (
            kind is not int or isinstance(value, str)
        )
        if kind in admitted and exact:
            try:
                return _checked(setting, kind(value), origin) if kind is int else kind(value)
            except UserError:
                raise
            except (TypeError, ValueError):
                continue
    names = [option.__name__ if isinstance(option, type) else str(option) for option in admitted]
    names = [name for name in names if name != "NoneType"]
    raise UserError(f"{origin}{setting.name} is {value!r}; it must be {' or '.join(names)}")


def options(kind: Any) -> tuple[Any, ...]:
    """The plain types and literal values that an annotation admits, unions and literals opened."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return tuple(option for part in typing.get_args(kind) for option in options(part))
    if origin is typing.Literal:
        return typing.get_args(kind)
    return (kind,)
