"""The commands as Python functions: typed, documented, and with the command line's numbers."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import mrpo
from mrpo import cli
from mrpo.data.store import Store
from mrpo.settings import imported, settings_of

COMMANDS = ("prepare", "precompute", "train", "evaluate", "compare", "doctor", "audit", "report",
            "export")  # fmt: skip


def declared_for_type_checkers() -> dict[str, str]:
    """The module of each public name, as the TYPE_CHECKING block has it."""
    tree = ast.parse(Path(mrpo.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.asname or "": node.module or ""
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_type_checkers_see_every_public_name_where_it_is() -> None:
    declared = declared_for_type_checkers()
    assert sorted(declared) == sorted(mrpo.__all__)
    for name, module in declared.items():
        if name not in mrpo._PACKAGES:
            assert mrpo._HOME[name] == module
    assert set(mrpo.__all__) <= set(dir(mrpo))


def test_importing_the_package_loads_none_of_it() -> None:
    code = "import sys, mrpo; print([name for name in sys.modules if name.startswith('mrpo.')])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_setting_with_its_type_default_and_meaning(name: str) -> None:
    config = imported(cli.COMMANDS[name][0])
    function = getattr(mrpo, name)
    parameters = inspect.signature(function).parameters
    text = " ".join((inspect.getdoc(function) or "").split())
    for setting in settings_of(config):
        parameter = parameters[setting.name]
        assert parameter.annotation == setting.type
        assert (parameter.default is inspect.Parameter.empty) == setting.required
        if not setting.required:
            assert parameter.default == setting.default
        assert f"{setting.name}: " in text
        assert " ".join(setting.help.split()) in text


CALLED = """
import mrpo
from mrpo import PrecomputeConfig, TrainConfig, precompute, train
import mrpo.train.config, mrpo.precompute.config
assert mrpo.train is train and mrpo.precompute is precompute
for call in (lambda: train(output_dir="run", batch_pairs=0), lambda: precompute(refs=[], bf16=3)):
    try:
        call()
    except mrpo.UserError as error:
        print(error)
"""


def test_a_command_named_as_its_package_is_one_whatever_was_imported_before() -> None:
    ran = subprocess.run([sys.executable, "-c", CALLED], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == [
        "--batch-pairs is 0; it must be above 0",
        "bf16 is 3; it must be bool",
    ]


def test_a_mistake_is_an_error_that_python_can_catch(tmp_path: Path) -> None:
    with pytest.raises(mrpo.UserError, match="unknown setting 'sauce'; known: source, out"):
        mrpo.prepare(sauce="pairs.jsonl")
    with pytest.raises(mrpo.UserError, match="--out is missing"):
        mrpo.prepare(source="pairs.jsonl")
    with pytest.raises(mrpo.UserError, match=r"missing\.jsonl: no such file"):
        mrpo.prepare(source=str(tmp_path / "missing.jsonl"), out=str(tmp_path / "pairs"))
    assert not list(tmp_path.iterdir())


def numbers(folder: Path) -> dict[str, Any]:
    """What a job left behind: the pairs, the scores, the trained weights and their figures."""
    pairs = json.loads((folder / "pairs" / "manifest.json").read_text())
    store = Store(folder / "store")
    scores = {
        record.alias: (record.identity, store.scores(record.identity).read().to_pylist())
        for record in store.references()
    }
    evaluation = json.loads((folder / "evaluation.json").read_text())
    return {
        "shards": pairs["shards"],
        "scores": scores,
        "weights": (folder / "run" / "model" / "model.safetensors").read_bytes(),
        "training": json.loads((folder / "run" / "evaluation.json").read_text()),
        "policies": [
            {key: value for key, value in policy.items() if key in ("overall", "by_source")}
            for policy in evaluation["policies"]
        ],
    }


@pytest.fixture
def references(tiny_references: dict[str, Path], tmp_path: Path) -> dict[str, dict[str, str]]:
    """Two entries as refs.yaml has them, written to one, and pairs to prepare beside it."""
    entries = {
        alias: {"model": str(tiny_references[alias]), "dtype": "float32"}
        for alias in ("llama", "qwen")
    }
    (tmp_path / "refs.yaml").write_text(yaml.safe_dump(entries))
    rows = [
        {"prompt": f"What is {n} + 2?", "chosen": f"It is {n + 2}.", "rejected": f"Or {n + 3}?"}
        for n in range(24)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return entries


def test_python_and_the_command_line_come_to_the_same_numbers(
    references: dict[str, dict[str, str]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    command_line = request.getfixturevalue("mrpo")
    by_python, by_command = tmp_path / "python", tmp_path / "command"
    training: dict[str, Any] = {"method": "mrpo", "batch_pairs": 4, "max_steps": 3, "seed": 7}
    refs_config = tmp_path / "refs.yaml"

    pairs = mrpo.prepare(
        source=str(tmp_path / "data.jsonl"),
        out=str(by_python / "pairs"),
        validation_fraction=0.25,
        chat=True,
    )
    capfd.readouterr()
    scored = mrpo.score(references, pairs, by_python / "store", engine="hf")
    assert capfd.readouterr().out == ""
    assert [record.alias for record in scored.records] == ["llama", "qwen"]
    assert scored.scored == {"llama": 48, "qwen": 48}
    assert scored.unscored == {"llama": 0, "qwen": 0}
    assert scored.exit_code == 0
    trained = mrpo.train(
        pairs=by_python / "pairs",
        refs=["llama", "qwen"],
        refs_config=refs_config,
        store=by_python / "store",
        output_dir=by_python / "run",
        **training,
    )
    assert trained.status == "finished"
    assert trained.folder.path == by_python / "run"
    mrpo.evaluate(runs=by_python / "run", out=by_python / "evaluation.json")

    def ran(command: str, *arguments: object, **settings: object) -> None:
        flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
        ended = command_line(command, *arguments, *flags)
        assert ended.code == 0, ended.err

    scored_with = {
        "pairs": by_command / "pairs",
        "refs": "llama,qwen",
        "refs-config": refs_config,
        "store": by_command / "store",
    }
    prepared = {"out": by_command / "pairs", "validation-fraction": 0.25}
    ran("prepare", tmp_path / "data.jsonl", "--chat", **prepared)
    ran("precompute", engine="hf", **scored_with)
    ran("train", output_dir=by_command / "run", **scored_with, **training)
    ran("evaluate", runs=by_command / "run", out=by_command / "evaluation.json")
    assert numbers(by_python) == numbers(by_command)
