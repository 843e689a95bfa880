"""Files on a local disk, written whole or not at all: the one atomic write, and the one lock.

What is written is there completely and survives a power cut once a function here has returned:
a temporary file beside it, fsync, rename, fsync of the folder. JSON and YAML that may be damaged
are read here, and checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import secrets
import shutil
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError

TEMPORARY = ".tmp-"  # begins the name of a file that is still being written


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file durably, making its folder; on any error nothing of it remains."""
    make_folder(path.parent)
    temporary = path.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `to_json(value)`, indented."""
    content = json.dumps(to_json(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, content + "\n")


def to_json(value: Any) -> Any:
    """The value as JSON has it: dataclasses as objects, arrays and tuples as lists, NaN as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: to_json(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if hasattr(value, "tolist"):  # an array or a number of numpy's
        return to_json(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_text(path: Path) -> str:
    """A file's text. Raises `UserError` where it is not UTF-8, `OSError` without a file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start + 1}; save it as that") from None


def read_json(path: Path, shape: Any, way_out: str) -> Any:
    """What a JSON file holds, which must have a shape: see `fits`.

    Raises `UserError` that ends in the way out where it has not, `OSError` where there is no file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # fails for halves of characters
    except (ValueError, RecursionError):
        raise UserError(f"{path}: damaged, it is not JSON; {way_out}") from None
    if not fits(value, shape):
        raise UserError(f"{path}: damaged, something is missing or of a wrong type; {way_out}")
    return value


class KeyTwiceError(ValueError):
    """An object of JSON or a mapping of YAML has a key twice; parsers would keep the last."""

    def __init__(self, key: object) -> None:
        super().__init__(f"key {key!r} is there twice; keep one")


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(items)
    if len(value) < len(items):
        names = [name for name, _ in items]
        raise KeyTwiceError(next(name for name in names if names.count(name) > 1))
    return value


JSON = json.JSONDecoder(object_pairs_hook=_object)  # for data of others; raises `KeyTwiceError`


def fits(value: Any, shape: Any) -> bool:
    """Whether a value of JSON has a shape: a type, [the shape of all items] or {key: its shape}.

    A type may also be one of `typing`'s, or a dataclass, whose fields are looked at. A float may
    be a whole number, and a whole number has 64 bits.

    >>> fits({"rows": 3, "names": ["a"], "more": None}, {"rows": int, "names": list[str]})
    True
    """
    kind, parts = typing.get_origin(shape), typing.get_args(shape)
    if isinstance(shape, Mapping):
        return isinstance(value, dict) and all(
            key in value and fits(value[key], part) for key, part in shape.items()
        )
    if isinstance(shape, list) or kind is list:
        part = parts[0] if parts else shape[0]
        return isinstance(value, list) and all(fits(item, part) for item in value)
    if shape is Any:
        return True
    if kind in (dict, Mapping):
        items = value.items() if isinstance(value, dict) else [(value, value)]
        return all(fits(key, parts[0]) and fits(item, parts[1]) for key, item in items)
    if kind is typing.Literal:
        return value in parts
    if parts:  # a union
        return any(fits(value, part) for part in parts)
    if shape in (int, float) and isinstance(value, int):
        return -(2**63) <= value < 2**63
    if dataclasses.is_dataclass(shape) and isinstance(value, typing.cast(type, shape)):
        hints = typing.get_type_hints(shape)
        return all(
            fits(getattr(value, field.name), hints[field.name])
            for field in dataclasses.fields(shape)
        )
    return isinstance(value, shape)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises `ValueError` for other text, `OSError` without a file."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            # Before it is flattened: what `<<` merges may be written again.
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise KeyTwiceError(twice)
            return super().construct_mapping(node, deep)

    text = path.read_text(encoding="utf-8")
    try:
        value = yaml.load(text, Loader)
        # Fails where an anchor holds itself, and for halves of characters.
        json.dumps(value, default=str, ensure_ascii=False).encode()
    except KeyTwiceError:
        raise
    except Exception as error:  # PyYAML raises nearly any error for tags that do not fit
        raise ValueError(f"not YAML ({' '.join(str(error).split())})") from None
    return value


def output_file(out: str | Path) -> Path:
    """The path of a result that a command will write, its folder made; `UserError` if it can't."""
    path = Path(out).expanduser()
    if path.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file")
    try:
        make_folder(path.parent)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; name another file") from None
    return path


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder that takes the place of `path` when the block ends without an error."""
    path = path.absolute()  # pyarrow takes a relative name with a colon for a URL
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for entry in [*partial.rglob("*"), partial]:
            sync(entry)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a lock file if nobody does: yields whether it is ours. It goes with its process."""
    from filelock import FileLock, Timeout

    make_folder(path.parent)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FileLock(path, timeout=0))
        except Timeout:
            yield False
        else:
            yield True


def make_folder(folder: Path) -> None:
    """The folder and its parents, durably."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Bring a file's bytes, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
