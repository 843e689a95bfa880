"""The rules of the house, kept by reading the sources: who imports whom, and what stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "data": {"data"},
    "model": {"data", "model"},
    "precompute": {"data", "model", "precompute"},
    "train": {"data", "model", "train"},
    "evaluation": {"data", "model", "precompute", "train", "evaluation"},
    "demo": {"data", "model", "precompute", "train", "evaluation", "demo"},
}
SOURCES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, inside a function or a TYPE_CHECKING block) of every import, made absolute."""
    package = ["mrpo", *path.relative_to(ROOT).with_suffix("").parts[:-1]]
    tree = ast.parse(path.read_text())
    lazy = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in lazy
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield name, id(node) in lazy
            if name == "mrpo":  # from .. import x
                for alias in node.names:
                    yield f"mrpo.{alias.name}", id(node) in lazy


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    for name, lazy in imports(path):
        top, *rest = name.split(".")
        if top == "mrpo" and rest and (ROOT / rest[0]).is_dir():
            assert rest[0] in MAY_IMPORT[folder], f"{folder} imports {name}"
        if top in {"vllm", "ray"}:
            assert folder == "precompute", f"{folder} imports {name}"
        if folder == "data":
            assert top != "torch", f"data imports {name}"
            if top == "transformers":
                assert lazy, "transformers is imported only inside data's functions"
                assert path.name.startswith("rendering"), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "train" / "mathematics").glob("*.py")))
def test_the_mathematics_stands_alone(path: Path) -> None:
    for name, _ in imports(path):
        if name.startswith("mrpo."):
            assert name == "mrpo.errors" or name.startswith("mrpo.train.mathematics"), name


def test_command_line_with_all_its_help_loads_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "pyarrow", "datasets", "vllm", "numpy", "peft"]
    code = (
        "import sys, mrpo.cli as cli\n"
        "cli.application()\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_no_module_prints_a_traceback_for_a_users_mistake(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mrpo.cli", "prepare", str(tmp_path / "missing.jsonl")]
    result = subprocess.run(
        [*command, "--out", str(tmp_path / "pairs")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
