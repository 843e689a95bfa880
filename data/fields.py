"""Values of a row: a column, a template of columns, an instruction with its input and history.

`layouts.py` decides which fields make the pairs of a row. A field knows the columns it is made of,
so that columns which nothing uses can be named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from ..errors import UserError
from ..files import JSON, KeyTwiceError
from .formats import Broken
from .sources import missing_column

Row = Mapping[str, Any]
Template = list[tuple[str, str | None]]  # text, and the column behind it
BRACES = "write a brace that is text twice, {{ or }}"


@dataclass(frozen=True, slots=True)
class RowField:
    """A value of a row: what messages call it, the columns it is made of, and how."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], Any]


Fields = dict[str, RowField]


def column_field(name: str) -> RowField:
    return RowField(name, (name,), lambda row: row.get(name))


def text_field(part: RowField) -> RowField:
    def read(row: Row) -> Any:
        value = part.read(row)
        if not isinstance(value, str | None):
            raise Broken(part.name, f"must be text, not {type(value).__name__}")
        return value

    return RowField(part.name, part.columns, read)


def joined_field(parts: Sequence[RowField]) -> RowField:
    """Texts one below the other, without those that are empty."""

    def read(row: Row) -> str:
        texts = [as_text(part.name, part.read(row)) for part in parts]
        return "\n".join(text for text in texts if text.strip())

    return RowField(parts[0].name, tuple(name for part in parts for name in part.columns), read)


def with_history(prompt: RowField, fields: Fields) -> tuple[RowField, bool, str]:
    """The prompt behind the turns of a history column, where there is one."""
    history = fields.get("history")
    if history is None or history is prompt:
        return prompt, False, "preference"

    def read(row: Row) -> Any:
        turns, value = _history(decoded("history", history.read(row))), prompt.read(row)
        if not turns:
            return value
        if isinstance(value, str):
            return [*turns, {"role": "user", "content": value}]
        return [*turns, *(value if isinstance(value, list) else [value])]

    return RowField(prompt.name, (*prompt.columns, *history.columns), read), True, "preference"


def _history(value: Any) -> list[Any]:
    """Alpaca's list of [question, answer], or a list of messages, as messages."""
    if not value:
        return []
    turns: list[Any] = []
    for index, item in enumerate(value if isinstance(value, list) else [None]):
        if isinstance(item, dict):
            turns.append(item)
        elif isinstance(item, list) and len(item) == 2:
            roles = ("user", "assistant")
            turns += [{"role": role, "content": text} for role, text in zip(roles, item)]
        else:
            place = f"history[{index}]" if isinstance(value, list) else "history"
            raise Broken(
                place,
                "must be a message or [question, answer]; build text with --map prompt=…",
            )
    return turns


def parse_template(text: str) -> Template:
    """The parts of a template such as `{instruction}\\n{input}`; \\n and \\t are white space."""
    plain = text.replace("\\n", "\n").replace("\\t", "\t")
    try:
        parts = [(before, _name_in_braces(*rest)) for before, *rest in Formatter().parse(plain)]
    except ValueError as error:
        raise UserError(f"--map: {text!r} is no template: {error}; {BRACES}") from None
    if any("{" in (name or "") for _, name in parts):
        raise UserError(f"--map: {text!r} has a brace inside braces; {BRACES}")
    if not any(name for _, name in parts) or any(name == "" for _, name in parts):
        raise UserError(f"--map: {text!r} must name columns, as in {{instruction}}; {BRACES}")
    return parts


def _name_in_braces(name: str | None, form: str | None, conversion: str | None) -> str | None:
    """All that braces hold is a column's name; Python would take `!…` and `:…` for something."""
    if name is None:
        return None
    return name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")


def value_inside(name: str, value: Any, path: Sequence[str]) -> Any:
    """The value at `answer.text` or `answers.0` in a column's value."""
    for part in path:
        value = decoded(name, value)
        if isinstance(value, list) and part.isdigit():
            value = value[int(part)] if int(part) < len(value) else None
        elif isinstance(value, dict):
            value = value.get(part)
        elif value is not None:
            raise Broken(name, f"has nothing called {part!r} in it")
    return value


def as_text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise Broken(name, f"must be text, not {type(value).__name__}")


def decoded(name: str, value: Any) -> Any:
    """The value; text that opens a JSON list or object, as CSV holds it, is decoded."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return JSON.decode(value)
    except KeyTwiceError as error:
        raise Broken(name, f"holds JSON in which {error}") from None
    except (ValueError, RecursionError):
        return value


def as_number(name: str, value: Any) -> float | None:
    """A score, a rank or a label as a number; None where it is empty or not a number."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "n/a", "nan")):
        return None
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return float(value.strip().lower() == "true")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise Broken(
            name, f"is {str(value)[:40]!r}; it must be a number, or true or false"
        ) from None
    return None if math.isnan(number) else number


def mapped_field(name: str, template: Template, place: str, existing: Sequence[str]) -> RowField:
    """The field that a template builds. A template of one column alone gives its value."""
    paths: list[tuple[str, list[str]]] = []
    for path in [path for _, path in template if path is not None]:
        column = path if path in existing else path.split(".")[0]
        if column not in existing:
            raise missing_column(place, column, existing, f"--map {name} needs it")
        paths.append((column, path[len(column) + 1 :].split(".") if path != column else []))

    def read(row: Row) -> Any:
        values = [value_inside(name, row.get(column), path) for column, path in paths]
        if len(template) == 1 and not template[0][0]:
            return values[0]
        texts = [as_text(name, value) for value in values]
        parts = iter(texts)
        text = "".join(before + ("" if path is None else next(parts)) for before, path in template)
        return text if all(texts) else text.strip()  # an empty column leaves no line break behind

    return RowField(name, tuple(column for column, _ in paths), read)


SPLITS = {
    "train": re.compile(r"train", re.IGNORECASE),
    "validation": re.compile(r"valid|val$|val_|dev|eval|test|held", re.IGNORECASE),
}


def split_of(value: Any) -> str | None:
    """Train or validation for a value of a split column, None where it is empty; a test set is
    held out. Raises `Broken`."""
    if value is None or value == "":
        return None
    for split, names in SPLITS.items():
        if isinstance(value, str) and names.match(value.strip()):
            return split
    raise Broken(
        "split",
        f"is {str(value)[:40]!r}; it must be train, validation or test; "
        "--ignore-columns split leaves it out",
    )
