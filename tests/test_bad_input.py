"""A user's mistake, whichever it is: one line with value, rule and way out, and exit code 2.

Every case goes through the command line. Nothing may be left behind but what was there before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer

GOOD = {"prompt": "What is 2 + 2?", "chosen": "It is 4.", "rejected": "It is 5."}
Run = Callable[..., Any]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


def pairs_like(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"What is {n} + 2?", "chosen": f"It is {n + 2}.", "rejected": f"It is {n + 3}."}
        for n in range(count)
    ]


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def refused(ran: Any, *words: str) -> None:
    """One line, exit code 2, and every word is in it."""
    assert ran.code == 2, ran.err
    lines = [line for line in ran.err.splitlines() if line]
    assert lines[-1].startswith("error: "), ran.err
    assert "Traceback" not in ran.err
    for word in words:
        assert word in lines[-1]


BAD_DATA = {
    "a missing column": (["{}", GOOD], [], ["data.jsonl", "line 1", "chosen"]),
    "an unknown role": (
        [
            {
                "prompt": [{"role": "narrator", "content": "Hi"}],
                "chosen": [{"role": "assistant", "content": "a"}],
                "rejected": [{"role": "assistant", "content": "b"}],
            }
        ],
        [],
        ["line 1", "prompt", "narrator"],
    ),
    "broken JSON": ([GOOD, GOOD, '{"prompt": '], [], ["data.jsonl", "3", "JSON"]),
    "more than 5 % unusable": (
        [*pairs_like(10), GOOD | {"rejected": GOOD["chosen"]}],
        [],
        ["9.1%", "--allow-dropped"],
    ),
    "one unusable under --strict": (
        [*pairs_like(40), GOOD | {"chosen": ""}],
        ["--strict"],
        ["line 41"],
    ),
    "nothing left": (
        [GOOD | {"rejected": GOOD["chosen"]}],
        ["--allow-dropped"],
        ["no pair"],
    ),
    "no such file": (None, [], ["data.jsonl"]),
}


@pytest.mark.parametrize("case", BAD_DATA, ids=str)
def test_prepare_refuses_bad_data_and_writes_nothing(mrpo: Run, tmp_path: Path, case: str) -> None:
    rows, flags, words = BAD_DATA[case]
    source = tmp_path / "data.jsonl"
    if rows is not None:
        write(source, rows)
    before = files_below(tmp_path)
    refused(mrpo("prepare", source, "--out", tmp_path / "pairs", *flags), *words)
    assert files_below(tmp_path) == before


def test_an_output_path_below_a_file_is_refused(mrpo: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "data.jsonl", pairs_like(3))
    refused(mrpo("prepare", source, "--out", source / "pairs"), "data.jsonl")
    assert files_below(tmp_path) == {"data.jsonl"}


def test_the_few_bad_rows_of_real_sets_are_no_error(mrpo: Run, tmp_path: Path) -> None:
    odd = [
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: c"},
        {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    ]
    fine = [
        {
            "chosen": f"\n\nHuman: question {n}\n\nAssistant: yes",
            "rejected": f"\n\nHuman: question {n}\n\nAssistant: no",
        }
        for n in range(60)
    ]
    source = write(tmp_path / "data.jsonl", [*fine, *odd])
    ran = mrpo("prepare", source, "--out", tmp_path / "pairs")
    assert ran.code == 0, ran.err
    dropped = (tmp_path / "pairs" / "dropped.jsonl").read_text().splitlines()
    assert len(dropped) == 2


@pytest.fixture
def prepared(mrpo: Run, tmp_path: Path, tiny_references: dict[str, Path]) -> Path:
    """A folder with pairs and a refs.yaml of tiny references."""
    chat = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in pairs_like(12)
    ]
    source = write(tmp_path / "data.jsonl", chat)
    assert mrpo("prepare", source, "--out", tmp_path / "pairs").code == 0
    lines = [f"{alias}: {{model: {path}}}" for alias, path in tiny_references.items()]
    write(tmp_path / "refs.yaml", lines)
    return tmp_path


def precompute(mrpo: Run, folder: Path, refs: str) -> Any:
    return mrpo(
        *("precompute", "--pairs", folder / "pairs", "--refs", refs),
        *("--refs-config", folder / "refs.yaml", "--store", folder / "store"),
    )


def train(mrpo: Run, folder: Path, refs: str, output: Path) -> Any:
    return mrpo(
        *("train", "--pairs", folder / "pairs", "--refs", refs, "--method", "dpo"),
        *("--refs-config", folder / "refs.yaml", "--store", folder / "store"),
        *("--output-dir", output),
    )


def test_an_alias_that_refs_yaml_lacks_is_refused(mrpo: Run, prepared: Path) -> None:
    refused(precompute(mrpo, prepared, "llama,lama"), "'lama'", "llama, mistral, qwen")
    assert not (prepared / "store").exists()


def copy_model(source: Path, target: Path, *without: str) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*without))


def test_a_model_folder_without_tokenizer_is_refused(
    mrpo: Run, prepared: Path, tiny_references: dict[str, Path]
) -> None:
    copy_model(tiny_references["llama"], prepared / "bare", "tokenizer*", "chat_template*")
    write(prepared / "refs.yaml", ["bare: bare"])
    refused(precompute(mrpo, prepared, "bare"), "bare", "no tokenizer")
    assert not (prepared / "store").exists()


def test_a_tokenizer_without_offsets_is_refused(
    mrpo: Run, prepared: Path, tiny_references: dict[str, Path]
) -> None:
    copy_model(tiny_references["llama"], prepared / "slow", "tokenizer*")
    ByT5Tokenizer().save_pretrained(prepared / "slow")
    write(prepared / "refs.yaml", ["slow: slow"])
    refused(precompute(mrpo, prepared, "slow"), "slow", "offsets")
    assert not (prepared / "store").exists()


def test_pairs_not_yet_scored_come_with_the_line_to_run(mrpo: Run, prepared: Path) -> None:
    ran = train(mrpo, prepared, "llama", prepared / "run")
    line = f"run: mrpo precompute --pairs {prepared / 'pairs'} --refs llama --refs-config "
    refused(ran, line, f"--store {prepared / 'store'}")
    assert not (prepared / "run" / "model").exists()


def test_a_run_below_a_file_is_refused(mrpo: Run, prepared: Path) -> None:
    assert precompute(mrpo, prepared, "llama").code == 0
    refused(train(mrpo, prepared, "llama", prepared / "data.jsonl" / "run"), "data.jsonl")


def test_a_non_finite_score_is_refused_and_not_stored(
    mrpo: Run, prepared: Path, tiny_references: dict[str, Path]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    copy_model(tiny_references["llama"], prepared / "broken", "*.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tiny_references["llama"])
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    model.save_pretrained(prepared / "broken")
    write(prepared / "refs.yaml", ["broken: broken"])
    refused(precompute(mrpo, prepared, "broken"), "broken", "not finite")
    assert not list((prepared / "store").rglob("*.parquet"))


def test_flags_of_trl_work_or_say_what_takes_their_place(mrpo: Run, tmp_path: Path) -> None:
    known = ("--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "no.jsonl")
    folders = ("--output_dir", tmp_path / "run", "--pairs", tmp_path / "pairs", "--refs", "llama")
    refused(mrpo("train", *folders, *known), "no.jsonl")
    batch = mrpo("train", *folders, "--per_device_train_batch_size", 4)
    refused(batch, "--per-device-train-batch-size", "--batch-pairs` is the pairs of an optimizer")
    assert files_below(tmp_path) == set()
