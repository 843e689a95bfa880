"""Results as plain data, dataclasses to JSON, which a report reads back; and tables as text."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError

Rows = Sequence[Sequence[str]]


def plain(value: Any) -> Any:
    """The value as JSON has it: dataclasses as objects, arrays as lists, NaN as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write `plain(value)`; the file appears complete."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(
        json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )
    partial.rename(path)


def free_path(out: str, flag: str = "--out") -> Path:
    """A file's path with its folder made, or `UserError` where there can be none."""
    path = Path(out).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {out}: {error.strerror}; name another file") from None
    if path.suffix != ".json" or path.is_dir():
        raise UserError(f"{flag} {out}: results are JSON; name a file like {path.stem}.json")
    return path


def columns(rows: Rows) -> Iterator[str]:
    """Rows as lines of even columns; the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        yield "  ".join(cells).rstrip()
