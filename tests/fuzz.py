"""Bad input of every kind for every command: success, or one line and exit code 2.

    python tests/fuzz.py --cases 500 --seed 0      every case, or one again with --only N

A case copies a small world of valid inputs (`make_world`: rows, pairs, tiny models, an adapter,
chat templates, a score store, a run, a comparison), damages one thing in it (`damage`: a file's
bytes, a value anywhere in its JSON, YAML or table, the file itself) or the flags, and runs one
command in this process. What is drawn depends on the seed and the case's number alone. A case
fails where the command ends otherwise than with success or one `error: ` line and exit code 2,
where it takes too long, or where it changed or left anything that it should not have.

Worker processes are replaced by calls in this process; what `mrpo demo` trains is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from mrpo import cli
from mrpo.data.ids import digest_of, identity_of
from mrpo.data.shards import USERS
from mrpo.demo.models import write_reference
from mrpo.settings import Setting, Several, options, settings_of

FINDS = ("doctor", "store verify", "store push", "store pull")  # exit code 1: something is wrong
SECONDS = 120  # a case may take
MEMORY = 16 << 30  # bytes of address space that a run of its own may take

# ---------------------------------------------------------------------------------------------
# The world


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """A command line that works in the world, what it reads, and what it may write."""

    name: str
    words: str
    reads: str  # globs of files that a case may damage
    writes: str  # paths that it may make or change, when it succeeds
    partly: str = ""  # of these, what may be there after a refusal: finished parts of the work
    weight: int = 4

    @property
    def config(self) -> type:
        table = cli.STORE_COMMANDS if self.name.startswith("store ") else cli.COMMANDS
        return cli.imported(table[self.name.removeprefix("store ")][0])


SCORED = "--pairs pairs --refs llama,qwen --refs-config refs.yaml --store store"
MODELS = "refs.yaml template.jinja adapter/* models/*/*"
STORED = "store/*/reference.json store/*/scores/*"
SCORING = "--engine hf"
STEPS = "--max-steps 1 --batch-pairs 4 --device cpu --logging-steps 1"
NEW_RUN = f"{SCORED} {STEPS} --output-dir new"
COMMANDS = [
    Command("prepare", "rows/chat.jsonl --out new", "rows/chat.jsonl", "new", weight=8),
    Command("prepare", "rows/real.jsonl --out new", "rows/real.jsonl", "new"),
    Command("prepare", "rows/table.csv --out new --chat", "rows/table.csv", "new"),
    Command("prepare", "rows/array.json --out new", "rows/array.json", "new"),
    Command("prepare", "rows/chat.parquet --out new", "rows/chat.parquet", "new", weight=6),
    Command("prepare", "rows/scored.jsonl --out new", "rows/scored.jsonl", "new"),
    Command("prepare", "rows/labelled.jsonl --out new", "rows/labelled.jsonl", "new"),
    Command("prepare", "rows/zipped.jsonl.gz --out new", "rows/zipped.jsonl.gz", "new"),
    Command("prepare", "rows --out pairs", "pairs/* rows/*", "pairs", weight=2),
    Command(
        "prepare",
        "rows/chat.jsonl --out new --exclude audit.csv --flip flip.csv",
        "audit.csv flip.csv",
        "new",
    ),
    Command("inspect", "--pairs pairs --refs-config refs.yaml --ref llama,qwen --tokens",
            f"{MODELS} pairs/*", "", weight=10),
    Command("inspect", "--templates templates --tokenizer models/llama",
            "templates/* models/llama/token*", ""),
    Command("refs", "--refs-config refs.yaml --pairs pairs --store store",
            f"{MODELS} pairs/* {STORED}", "", weight=6),
    Command("precompute", f"{SCORED} {SCORING} --dry-run", f"{MODELS} pairs/* {STORED}",
            "store", "store", weight=8),
    Command("precompute", f"{SCORED.replace('store', 'new')} {SCORING}", f"{MODELS} pairs/*",
            "new", "new", weight=14),
    Command("precompute", f"{SCORED} {SCORING} --data rows/chat.jsonl", f"rows/chat.jsonl {STORED}",
            "store pairs", "store pairs"),
    Command("train", NEW_RUN, f"{MODELS} pairs/* {STORED}", "new", "new", weight=14),
    Command("train", f"{NEW_RUN} --policy models/qwen --lora-rank 2 --resume",
            "models/qwen/*", "new", "new", weight=6),
    Command("train", "--config stopped/train.yaml --resume",
            "stopped/* stopped/*/* stopped/*/*/*", "stopped", "stopped", weight=12),
    Command("evaluate", "--runs run --out new.json", "run/* run/*/* pairs/*", "new store",
            "store", weight=8),
    Command("evaluate", f"{SCORED.replace('--refs llama,qwen', '--base llama')} "
            "--policies models/llama,adapter --engine hf --out new.json", f"{MODELS} {STORED}",
            "new store", "store", weight=6),
    Command("doctor", f"{SCORED} --out new.json", f"{STORED} pairs/*", "new", weight=6),
    Command("doctor", f"{SCORED} --probe 2 --out new.json", MODELS, "new", weight=6),
    Command("compare", f"{SCORED} {STEPS} --methods dpo:llama --seeds 1 --output-dir new",
            f"{MODELS} pairs/* {STORED}", "new store", "new store"),
    Command("compare", f"{SCORED} {STEPS} --methods dpo:llama,mrpo --seeds 1 --output-dir compare",
            "compare/* compare/*/* compare/*/*/*", "compare store", "compare store", weight=8),
    Command("report", "run,compare --audit audit.csv --out new.html",
            "run/* compare/* compare/*/* compare/*/*/* audit.csv* pairs/*", "new", weight=12),
    Command("report", f"{SCORED} --out new.html", f"{STORED} pairs/* refs.yaml", "new"),
    Command("audit", f"{SCORED} --out new.csv", f"{STORED} pairs/* refs.yaml", "new", weight=8),
    Command("export", f"{SCORED} --out new", f"{STORED} pairs/* refs.yaml", "new", weight=8),
    Command("demo", "--quick --out new", "", "new", "new", weight=1),
    Command("store status", "--store store --pairs pairs", f"{STORED} pairs/*", "", weight=6),
    Command("store verify", "--store store", STORED, ""),
    Command("store verify", "--store store --rescore 2 --refs-config refs.yaml --pairs pairs",
            f"{STORED} {MODELS} pairs/*", ""),
    Command("store gc", "--store store --runs run,compare --delete",
            f"{STORED} run/* compare/*/*/*", "store"),
    Command("store push", "new --store store", STORED, "new", "new"),
    Command("store pull", "store --store new", STORED, "new", "new"),
    Command("store import", "scores.csv --store store --alias judge --model judge",
            "scores.csv", "store"),
    Command("store import", "scores.jsonl --by-id --store store --alias judge --model judge",
            "scores.jsonl", "store"),
]  # fmt: skip


def make_world(folder: Path, shared: Path) -> None:
    """Write all valid inputs into a new folder, with paths relative to it."""
    folder.mkdir(parents=True)
    chat, real = _chat_rows(), _real_rows(shared / "hh_harmless_test.jsonl.gz")
    rows = folder / "rows"
    rows.mkdir()
    _write_lines(rows / "chat.jsonl", chat)
    _write_lines(rows / "real.jsonl", real)
    (rows / "array.json").write_text(json.dumps(chat, indent=1))
    (rows / "zipped.jsonl.gz").write_bytes(gzip.compress((rows / "chat.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(chat), rows / "chat.parquet")
    text = [{name: row[name][-1]["content"] for name in row} for row in chat]
    _write_table(rows / "table.csv", text)
    _write_lines(
        rows / "scored.jsonl",
        [
            {
                "instruction": row["prompt"],
                "completions": [
                    {"response": row["chosen"], "overall_score": 8.5},
                    {"response": row["rejected"], "overall_score": 3},
                ],
            }
            for row in text
        ],
    )
    _write_lines(
        rows / "labelled.jsonl",
        [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in text
            for name in ("chosen", "rejected")
        ],
    )
    words = [message["content"] for row in chat for turns in row.values() for message in turns]
    for number, family in enumerate(("llama", "qwen")):
        write_reference(
            folder / "models" / family,
            family,
            words,
            vocab_size=300,
            hidden_size=16,
            seed=number,
        )
    _write_adapter(folder / "models" / "qwen", folder / "adapter")
    (folder / "templates").mkdir()
    for path in sorted((shared / "templates").glob("*.jinja"))[::4]:
        shutil.copy(path, folder / "templates")
    template = (folder / "models" / "llama" / "chat_template.jinja").read_text()
    (folder / "template.jinja").write_text(template)
    entries = {
        "llama": {"model": "models/llama", "chat_template": "template.jinja", "dtype": "float32"},
        "qwen": {"model": "models/qwen", "adapter": "adapter", "chat_template_kwargs": {"a": 1}},
    }
    (folder / "refs.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
    for line in (
        "prepare rows/chat.jsonl --out pairs --validation-fraction 0.3 --shard-pairs 9",
        f"precompute {SCORED} {SCORING}",
        f"train {SCORED} {STEPS} --output-dir run --policy models/llama",
        f"train {SCORED} {STEPS} --output-dir stopped --max-steps 2 --save-steps 1",
        "evaluate --runs run --base llama --out run/evaluation.json",
        f"compare {SCORED} {STEPS} --methods dpo:llama,mrpo --seeds 1 --output-dir compare",
        f"audit {SCORED} --out audit.csv",
    ):
        ran = run(folder, line.split())
        assert ran.code == 0, f"{line}: {ran.err}"
    shutil.rmtree(folder / "stopped" / "model")
    shutil.rmtree(folder / "stopped" / "checkpoints" / "step-00000002")
    pairs = pq.read_table(folder / "pairs" / "part-00000.parquet")
    ids = [value.hex() for value in pairs["pair_id"].to_pylist()]
    _write_table(folder / "flip.csv", [{"pair_id": i, "decision": "flip"} for i in ids[:2]])
    scores = [{"ref_chosen_logps": -7.5 - n, "ref_rejected_logps": -9.25} for n in range(len(ids))]
    _write_table(folder / "scores.csv", [row | score for row, score in zip(text, scores)])
    by_id = [{"pair_id": pair_id} | score for pair_id, score in zip(ids, scores)]
    _write_lines(folder / "scores.jsonl", by_id)


def _chat_rows() -> list[dict[str, Any]]:
    words = ["Paris", "is", "the", "capital", "of", "France", "zwölf", "eggs", "thanks", "🙂"]
    rng = random.Random(0)
    rows = []
    for number in range(16):
        texts = [" ".join(rng.choices(words, k=rng.randint(2, 9))) for _ in range(3)]
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows.append(
            {
                name: [{"role": role, "content": f"{text} {number}"}]
                for (name, role), text in zip(roles.items(), texts)
            }
        )
    return rows


def _real_rows(path: Path) -> list[dict[str, Any]]:
    """Short dialogues of HH-RLHF."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(400))]
    return [row for row in rows if len(row["chosen"]) + len(row["rejected"]) < 700][:20]


def _write_lines(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write_adapter(model: Path, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "models/qwen"
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


# ---------------------------------------------------------------------------------------------
# Running a command


@dataclasses.dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended; the code is None where an exception came out of it."""

    code: int | None
    out: str
    err: str


class TookTooLongError(BaseException):
    """Raised by the alarm; nothing in the program catches it."""


def run(folder: Path, words: Sequence[str]) -> Ran:
    """`mrpo WORDS…` in a folder, in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: int | None = None
    before, handlers = Path.cwd(), {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    environment = {"HOME": str(folder.parent), "MRPO_CACHE": str(folder.parent / "cache")}
    with (
        mock.patch.object(sys, "argv", ["mrpo", *words]),
        mock.patch.dict(os.environ, environment),
        _without_processes(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        os.chdir(folder)
        try:
            _with_alarm(cli.main)
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc(file=err)
        finally:
            os.chdir(before)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Ran(code, out.getvalue(), err.getvalue())


def _with_alarm(function: Callable[[], None]) -> None:
    def ring(*_: Any) -> None:
        raise TookTooLongError(f"more than {SECONDS} s")

    earlier = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        function()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


@contextlib.contextmanager
def _without_processes() -> Iterator[None]:
    """References and cells of a comparison in this process, without vLLM; no pretraining."""
    from mrpo.errors import UserError
    from mrpo.evaluation.compare import worker, workers
    from mrpo.precompute.reference_run import ReferenceRun

    def run_cells(runner: workers.CellRunner, cells: Any) -> list[workers.Failure]:
        failures = []
        for cell in cells:
            if cell.finished:
                continue
            try:
                with worker.process_state_kept():
                    worker._train_and_evaluate(cell, runner.base, runner.keep_models)
            except UserError as error:
                failures.append(workers.Failure(cell, str(error), "by hand"))
        return failures

    with (
        mock.patch.object(ReferenceRun, "run", lambda self, groups, logs: self.run_here()),
        mock.patch.object(workers.CellRunner, "run", run_cells),
        mock.patch("mrpo.precompute.reference_run.find_spec", return_value=None),
        mock.patch("mrpo.demo.run.write_data"),
        mock.patch("mrpo.demo.run.pretrain_all", return_value=1),
    ):
        yield


# ---------------------------------------------------------------------------------------------
# Damage

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
NUMBERS = ["0", "1", "-1", "2", "0.5", "1e308", "1e-320", "nan", "inf", "-inf", "1e999", "x", ""]
NUMBERS += [str(2**32), str(2**63), str(-(2**63) - 1), "1" * 5000, "1_0", " 1", "٣", "0x1", "none"]
PATHS = ["", ".", "no/such", "pairs", "rows/chat.jsonl", "refs.yaml", "a" * 300, "a\tb", "é", "-"]
PATHS += ["store", "models/llama", "rows/chat.jsonl/x", "x.json", "x.csv", "x.html", "link"]
PATHS += ["llama", "hub/none:train", "http://localhost:1", "s3:", "run", "compare", "~", "a@b"]
TEXTS = ["", ",", "x", "llama", "llama,llama", "llama,nobody", "llama@", "llama@0", "a=b", "prompt"]
TEXTS += ["chosen={rejected}", "prompt={", "prompt={0}", "x" * 3000, "none", "0.5,0.5"]
TEXTS += ["nan,1", "mrpo", "mrpo:qwen/llama", "dpo:x", "mrpo+", "dpo:llama+uniform", "[", "*", "é"]


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


def _without_folder(rng: random.Random, folder: Path, path: Path) -> str:
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


def damaged_words(rng: random.Random, command: Command) -> tuple[list[str], str]:
    """The command's words with a few flags added or changed, or with words damaged as such."""
    words, titles = command.words.split(), []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if rng.random() < 0.06:
            at = rng.randrange(len(words))
            words[at : at + 1] = rng.choice([[], [words[at]] * 2, ["--"], ["--no-such"], ["é"]])
            titles.append("a word")
            continue
        setting = rng.choice([s for s in settings_of(command.config) if not s.positional])
        value = _flag_value(rng, setting)
        titles.append(f"{setting.flag} {'' if value is None else repr(value[:40])}")
        if value is None:
            words.append(setting.flag)
        elif setting.flag in words[:-1]:
            words[words.index(setting.flag) + 1] = value
        else:
            words += [setting.flag, value]
    return words, ", ".join(titles)


def _flag_value(rng: random.Random, setting: Setting) -> str | None:
    """A value that a flag may not like; None where it takes none."""
    admitted = options(setting.type)
    if admitted == (bool,):
        return None
    literals = [value for value in admitted if isinstance(value, str)]
    if setting.name == "map":
        field = rng.choice(["prompt", "chosen", "source", "split", "scores", "x"])
        return f"{field}={rng.choice(TEXTS)}"
    if literals:
        return rng.choice([*literals, "x", ""])
    if float in admitted or int in admitted:
        return rng.choice(NUMBERS)
    return rng.choice(TEXTS if Several in admitted or rng.random() < 0.4 else PATHS)


def damaged_settings(rng: random.Random, command: Command, folder: Path) -> tuple[list[str], str]:
    """The same settings in a YAML file with something wrong in it."""
    words, values = command.words.split(), dict[str, Any]()
    positional = [s.name for s in settings_of(command.config) if s.positional]
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            values[positional[0]] = word
        elif words and not words[0].startswith("--"):
            values[word[2:]] = words.pop(0)
        else:
            values[word[2:]] = True
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(values))
    given = [values[name] for name in positional if name in values]
    return [*given, "--config", "settings.yaml"], damage(rng, path)


# ---------------------------------------------------------------------------------------------
# Cases


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One command over a damaged world, and what is wrong with how it ended (empty: nothing)."""

    number: int
    title: str
    words: list[str]
    ran: Ran
    faults: list[str]

    def __str__(self) -> str:
        text = f"case {self.number}: {self.title}\n  mrpo {' '.join(self.words)[:400]}\n"
        text += "".join(f"  {fault}\n" for fault in self.faults)
        return text + "".join(f"  | {line[:300]}\n" for line in self.ran.err.splitlines()[-14:])


def run_case(world: Path, seed: int, number: int, folder: Path) -> Case:
    """Draw, run and judge one case in a new folder."""
    rng = random.Random(f"{seed}/{number}")
    command = rng.choices(COMMANDS, [command.weight for command in COMMANDS])[0]
    shutil.copytree(world, folder)
    words, title = _drawn(rng, command, folder)
    before = snapshot(folder)
    ran = run(folder, [*command.name.split(), *words])
    faults = list(_faults_of_end(command, ran))
    given = words + _outputs_in_settings(words, folder)
    faults += _faults_of_files(command, given, ran, before, snapshot(folder))
    return Case(number, f"{command.name}: {title}", [*command.name.split(), *words], ran, faults)


def _drawn(rng: random.Random, command: Command, folder: Path) -> tuple[list[str], str]:
    files = sorted({p for glob in command.reads.split() for p in folder.glob(glob) if p.is_file()})
    share = rng.random()
    if not files or share < 0.3:
        return damaged_words(rng, command)
    if share < 0.38 and "--config" not in command.words:
        return damaged_settings(rng, command, folder)
    path = rng.choice(files)
    if share < 0.42:
        return command.words.split(), _without_folder(rng, folder, path)
    if path.suffix == ".jinja" and rng.random() < 0.5:  # a real template in its place
        template = rng.choice(sorted((folder / "templates").iterdir()))
        path.write_bytes(template.read_bytes())
    what = damage(rng, path)
    if rng.random() < 0.7:
        sign(folder, path)
    return command.words.split(), f"{path.relative_to(folder)}, {what}"


def _outputs_in_settings(words: Sequence[str], folder: Path) -> list[str]:
    """What a file of settings says of outputs, as flags."""
    values: Any = None
    if "settings.yaml" in words:
        with contextlib.suppress(Exception):
            values = yaml.safe_load((folder / "settings.yaml").read_text())
    outputs = ("out", "output-dir", "store")
    values = values if isinstance(values, dict) else {}
    return [word for name in outputs if name in values for word in (f"--{name}", str(values[name]))]


def snapshot(folder: Path) -> dict[str, str]:
    """A digest of each file below a folder; of a folder or a link what it is."""
    state = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            state[name] = "link"
        elif path.is_dir():
            state[name] = "folder"
        else:
            state[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return state


def _faults_of_end(command: Command, ran: Ran) -> Iterator[str]:
    lines = [line for line in ran.err.splitlines() if line.strip()]
    # A broken reference and a damaged file of a store are findings, which exit code 1 reports.
    finding = command.name in FINDS and ran.code == 1
    if ran.code is None:
        yield f"an exception: {lines[-1] if lines else ''}"
    elif ran.code not in (0, 2) and not finding and command.name != "demo":
        yield f"exit code {ran.code}"
    elif "Traceback" in ran.err or "Traceback" in ran.out:
        yield "a traceback"
    elif ran.code == 2:
        errors = [line for line in lines if line.startswith("error: ")]
        if len(errors) != 1 or lines[-1] != errors[0]:
            yield "the end is not one error line"


def _faults_of_files(
    command: Command,
    words: Sequence[str],
    ran: Ran,
    before: Mapping[str, str],
    after: Mapping[str, str],
) -> Iterator[str]:
    """What is there that should not be, or is no longer as it was."""
    config, flags = command.config, set(words)
    names = {s.flag for s in settings_of(config) if s.name in ("out", "output_dir", "store")}
    if "--data" in flags or "--dataset-name" in flags:
        names.add("--pairs")
    own = [words[words.index(name) + 1] for name in names & flags if name != words[-1]]
    may_write = command.writes if ran.code in (0, 1) else command.partly
    allowed = [*may_write.split(), *(own if may_write or ran.code == 0 else [])]
    for name in before.keys() | after.keys():
        if before.get(name) == after.get(name):
            continue
        if name.split("/")[-1].startswith(".tmp-") or ".partial" in name or ".preparing" in name:
            yield f"half written: {name}"
        elif name.endswith(f"/{USERS}") and name in after:
            continue  # whoever reads pairs may say so beside them
        elif not any(_below(name, path) for path in allowed):
            verb = "left" if name not in before else "removed" if name not in after else "changed"
            yield f"{verb}: {name}"


def _below(name: str, allowed: str) -> bool:
    """Whether a path is an allowed one, below it, above it, or a file beside it of its name."""
    allowed = allowed.removeprefix("./")
    if allowed.startswith(f"{name}/"):
        return True
    return (
        allowed in ("", ".") or name == allowed or name.startswith((f"{allowed}/", f"{allowed}."))
    )


def run_cases(
    world: Path, seed: int, numbers: Sequence[int], folder: Path, keep: bool = False
) -> Iterator[Case]:
    """The cases of these numbers, each in a folder of its own that is removed afterwards."""
    for number in numbers:
        here = folder / f"case-{number}" / "here"
        yield run_case(world, seed, number, here)
        if not keep:
            shutil.rmtree(here.parent)


def main() -> int:
    """Run cases and print those that fail; exit code 1 where there are any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="numbers of cases, comma-separated; their folders are kept")
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=shared, help="folder of real rows, templates")
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    numbers = (
        list(map(int, given.only.split(",")))
        if given.only
        else list(range(given.first, given.first + given.cases))
    )
    root = Path(tempfile.mkdtemp(prefix="mrpo-fuzz-"))
    failed, codes = 0, dict.fromkeys((0, 1, 2, None), 0)
    try:
        make_world(root / "world", given.data)
        for case in run_cases(root / "world", given.seed, numbers, root, bool(given.only)):
            codes[case.ran.code] = codes.get(case.ran.code, 0) + 1
            if case.faults or given.only:
                failed += bool(case.faults)
                print(case, flush=True)
    finally:
        if given.only:
            print(f"kept: {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)
    print(f"seed {given.seed}: {len(numbers)} cases, {codes[0]} succeeded, {codes[2]} refused, "
          f"{codes[1]} with findings; {failed} failed")  # fmt: skip
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
