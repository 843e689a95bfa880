"""One thing damaged in a file by its kind: bytes, lines, or a value anywhere in its content."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from mrpo.data.ids import digest_of, identity_of

DEEP = "@deep@"  # stands for brackets in brackets, which json.dumps can't write
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 0.5, -0.5, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400),
    *(1e308, 5e-324, float("nan"), float("inf"), float("-inf")),
    *("", " ", "x", "0", "nan", "1e999", "null", "\0", "\ud800", "\u202e", "é" * 3000, "a" * 300),
    *("{{", "{% for x in y %}", "{{ 1 / 0 }}", "../..", "no/such/file", "pairs", "rows/chat.jsonl"),
    *([], {}, [[]], [None], {"": None}, {"role": "user"}, [1, "a"], DEEP),
]
YAML = ["&a [*a]", "!!python/name:os.system", "2024-13-45", "2024-01-01", "!!int x", "!!binary x"]
YAML += ["{[1]: 2}", "!!set {a}", "{<<: 1}", "12:30:45", "0x", "? a", "*b", "%", "\t", "[" * 3000]


def tree_value(rng: random.Random) -> Any:
    return deepcopy(rng.choice(VALUES))


def damaged_tree(rng: random.Random, tree: Any) -> Any:
    """A copy of a JSON value with one thing changed anywhere in it."""
    root = {"": deepcopy(tree)}
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(root)
    node, key = rng.choice(places)
    value = node[key]
    change = rng.choice(["delete", "value", "value", "value", "rename", "wrap", "double", "swap"])
    if change == "delete" and node is not root:
        del node[key]
    elif change == "rename" and isinstance(node, dict) and node is not root:
        node[str(rng.choice(["x", "", f"{key} ", "é", str(key).upper()]))] = node.pop(key)
    elif change == "wrap":
        node[key] = [value] if rng.random() < 0.5 else {"value": value}
    elif change == "double" and isinstance(node, list):
        node.insert(key, deepcopy(value))
    elif change == "swap":
        other, name = rng.choice(places)
        node[key], other[name] = deepcopy(other[name]), deepcopy(value)
    elif isinstance(value, str) and rng.random() < 0.3:
        cut = rng.randint(0, len(value))
        node[key] = (
            value[:cut] + rng.choice(["\0", "\ud800", "\n", "{{", "é", ""]) + value[cut:][1:]
        )
    elif isinstance(value, int | float) and rng.random() < 0.4:
        node[key] = rng.choice([-value, value + 1, value * 2, float(value), str(value), 0])
    else:
        node[key] = tree_value(rng)
    return root[""]


def tree_text(tree: Any, indent: int | None = None) -> str:
    depth = 20_000
    return json.dumps(tree, indent=indent).replace(f'"{DEEP}"', "[" * depth + "]" * depth)


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    at, until = sorted(rng.randint(0, len(data)) for _ in range(2))
    changes: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: data[:at],
        lambda: data[at:],
        lambda: data[:at] + data[until:],
        lambda: data[:at] + data[at:until] * 2 + data[until:],
        lambda: data[:at] + rng.randbytes(8) + data[at:],
        lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
        lambda: data + b"\n{",
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data.decode("utf-8", "replace").encode("utf-16"),
        lambda: data.decode("utf-8", "replace").encode("latin-1", "replace"),
        lambda: data.replace(b"\n", b"\r\n"),
        lambda: data.replace(b"\n", b"\r"),
        lambda: data.replace(b"\n", b"\n\n"),
        lambda: data.replace(b'"', b"'"),
        lambda: b"\0" * len(data),
        lambda: gzip.compress(data),
        lambda: rng.randbytes(rng.randint(1, 2000)),
    ]
    return rng.choice(changes)()


def damaged_lines(rng: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True) or [""]
    number = rng.randrange(len(lines))
    change = rng.randrange(5)
    if change == 0:
        del lines[number]
    elif change == 1:
        lines.insert(number, lines[number])
    elif change == 2:
        lines[number] = lines[number].replace(" ", rng.choice(["", "  ", "\t"]), 1)
    elif change == 3:
        rng.shuffle(lines)
    else:
        lines[number] = lines[number].rstrip("\n") + rng.choice([",", '"', "}", "#", "\0"]) + "\n"
    return "".join(lines)


def damaged_parquet(rng: random.Random, path: Path) -> None:
    table = pq.read_table(path)
    names = table.column_names
    name = rng.choice(names)
    at = names.index(name)
    column = table[name].combine_chunks()
    types = [pa.string(), pa.large_string(), pa.int8(), pa.int64(), pa.float32(), pa.float64()]
    types += [pa.bool_(), pa.binary(), pa.list_(pa.string()), pa.timestamp("s"), pa.null()]
    change = rng.randrange(9)
    try:
        if change == 0:
            table = table.drop_columns([name])
        elif change == 1:
            table = table.rename_columns([n + "x" if n == name else n for n in names])
        elif change == 2:
            table = table.append_column(rng.choice(names), column)
        elif change == 3:
            table = table.set_column(at, name, column.cast(rng.choice(types), safe=False))
        elif change == 4:
            table = table.set_column(at, name, pa.nulls(len(table), column.type))
        elif change == 5:
            table = table.slice(0, rng.choice([0, 1, len(table) - 1]))
        elif change == 6:
            table = table.take(pa.array([*range(len(table)), 0]))
        elif change == 7:
            table = table.set_column(at, name, column.dictionary_encode())
        else:
            values = column.to_pylist()
            row = rng.randrange(len(values))
            values[row] = damaged_tree(rng, values[row])
            with contextlib.suppress(pa.ArrowException, TypeError, OverflowError):
                table = table.set_column(at, name, pa.array(values, column.type))
                pq.write_table(table, path)
                return
            table = table.set_column(at, name, pa.array(values))
    except (pa.ArrowException, TypeError, OverflowError, UnicodeEncodeError):
        table = table.set_column(at, name, pa.nulls(len(table), rng.choice(types[:6])))
    pq.write_table(table, path)


def damaged_tensors(rng: random.Random, data: bytes) -> bytes:
    """The header of safetensors with one thing changed, or the numbers."""
    (size,) = struct.unpack("<Q", data[:8])
    body = bytearray(data[8 + size :])
    if rng.random() < 0.3:
        value = struct.pack("<f", rng.choice([float("nan"), float("inf"), 3e38, -1e30]))
        for _ in range(rng.randint(1, 50)):
            at = rng.randrange(len(body) // 4) * 4
            body[at : at + 4] = value
        return data[: 8 + size] + bytes(body)
    header = tree_text(damaged_tree(rng, json.loads(data[8 : 8 + size]))).encode()
    return struct.pack("<Q", len(header)) + header + bytes(body)


def damage(rng: random.Random, path: Path) -> str:
    """Damage one file by its kind; returns what was done."""
    if rng.random() < 0.12:
        return _replaced(rng, path)
    kind = path.suffix
    if rng.random() < 0.2 or not path.stat().st_size:
        kind = ""
    if kind in (".json", ".jsonl"):
        text = path.read_text()
        try:
            trees = (
                [json.loads(text)] if kind == ".json" else list(map(json.loads, text.splitlines()))
            )
        except ValueError:
            return "unchanged"
        number = rng.randrange(len(trees))
        for _ in range(rng.choice([1, 1, 1, 3])):
            trees[number] = damaged_tree(rng, trees[number])
        path.write_text("\n".join(map(tree_text, trees)) + "\n")
        return "a value"
    if kind in (".yaml", ".yml"):
        return _damaged_yaml(rng, path)
    if kind == ".parquet":
        damaged_parquet(rng, path)
        return "a table"
    if kind == ".safetensors":
        path.write_bytes(damaged_tensors(rng, path.read_bytes()))
        return "tensors"
    if kind in (".csv", ".jinja", ".txt", ".md"):
        text = path.read_text()
        cut = rng.randint(0, len(text))
        pieces = [",", '"', "\n", "\0", "nan", "1e999", "{{ x.y.z }}", "{% endfor %}", "{{ 1/0 }}"]
        pieces += ["{% for i in range(10**9) %}{% endfor %}", "{{ raise_exception(1) }}", "{#"]
        change = rng.choice([lambda: text[:cut] + rng.choice(pieces) + text[cut:],
                             lambda: damaged_lines(rng, text)])  # fmt: skip
        path.write_text(change())
        return "text"
    path.write_bytes(damaged_bytes(rng, path.read_bytes()))
    return "bytes"


def _replaced(rng: random.Random, path: Path) -> str:
    """The file gone, or something else in its place."""
    data = path.read_bytes()
    path.unlink()
    change = rng.choice(["nothing", "a folder", "a full folder", "a dead link", "itself", "locked"])
    if change in ("a folder", "a full folder"):
        path.mkdir()
        if change == "a full folder":
            (path / path.name).write_bytes(data)
    elif change == "a dead link":
        path.symlink_to("nowhere")
    elif change == "itself":
        path.symlink_to(path.name)
    elif change == "locked":
        path.write_bytes(data)
        path.chmod(0)
    return f"{change} in its place"


def without_folder(rng: random.Random, folder: Path, path: Path) -> str:
    """A folder above the file gone, empty, or a file."""
    above = rng.choice(
        [part for part in path.parents if part.is_relative_to(folder)][:-1] or [path]
    )
    shutil.rmtree(above) if above.is_dir() else above.unlink()
    change = rng.choice(["gone", "empty", "a file"])
    if change == "empty":
        above.mkdir()
    elif change == "a file":
        above.write_text("{}")
    return f"{above.relative_to(folder)} is {change}"


def _damaged_yaml(rng: random.Random, path: Path) -> str:
    text = path.read_text()
    tree = yaml.safe_load(text)
    if rng.random() < 0.6:
        damaged = damaged_tree(rng, tree)
        if rng.random() < 0.5 and DEEP not in str(damaged):
            with contextlib.suppress(Exception):
                path.write_text(yaml.safe_dump(damaged, sort_keys=False, allow_unicode=True))
                return "a value"
        path.write_text(tree_text(damaged))
        return "a value as JSON"
    if rng.random() < 0.5:
        lines = text.splitlines()
        number = rng.randrange(len(lines))
        key = lines[number].partition(":")[0]
        lines[number] = f"{key}: {rng.choice(YAML)}"
        path.write_text("\n".join(lines) + "\n")
        return "YAML"
    path.write_text(damaged_lines(rng, text))
    return "lines"


def sign(folder: Path, path: Path) -> None:
    """Make the digests fit a damaged file, so that what is in it is read."""
    parts = path.relative_to(folder).parts
    if not path.is_file():
        return
    if parts[0] == "store" and parts[-2] == "scores":
        unit = path.name.partition("-")[0]
        path.rename(path.with_name(f"{unit}-{digest_of(path.read_bytes())}.parquet"))
    elif parts[0] == "store" and path.name == "reference.json":
        with contextlib.suppress(Exception):
            content = json.loads(path.read_text())
            content.pop("digest")
            path.write_text(json.dumps(content | {"digest": identity_of(content)}))
    elif parts[0] == "pairs" and path.suffix == ".parquet":
        manifest = json.loads((path.parent / "manifest.json").read_text())
        for shard in manifest["shards"]:
            if shard["name"] == path.name:
                shard["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
                with contextlib.suppress(Exception):
                    shard["rows"] = pq.read_metadata(path).num_rows
        (path.parent / "manifest.json").write_text(json.dumps(manifest))
