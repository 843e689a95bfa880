"""The rules of the code base, kept by reading the sources: who imports whom, what stays light,
how large files are, and that nothing is defined or done twice."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from mrpo import cli

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "method": {"method"},
    "data": {"data"},
    "model": {"data", "model"},
    "precompute": {"data", "model", "precompute"},
    "train": {"method", "data", "model", "train"},
    "evaluation": {"method", "data", "model", "precompute", "train", "evaluation"},
    "demo": {"method", "data", "model", "precompute", "train", "evaluation", "demo"},
}
FOR_ALL = {"errors", "settings", "files", "terminal"}  # modules of the root
SOURCES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]
PRODUCTION = sorted([*SOURCES, *ROOT.glob("*.py")])
FILES = [path for path in PRODUCTION if path.name != "__init__.py"]

# Names that several modules define on purpose.
DEFINED_OFTEN = {
    "main": "the entry of a script: the command line, the worker, the demo's pretraining",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["mrpo", *(part for part in parts if part != "__init__")])


MODULES = {module_of(path): path for path in PRODUCTION}


def imports(path: Path) -> Iterator[tuple[str, bool, bool]]:
    """Every import as (dotted name, inside a function, for types only), made absolute.

    `from x import y` gives x.y where that is a module of ours, else x.
    """
    package = ["mrpo", *path.relative_to(ROOT).with_suffix("").parts[:-1]]
    tree = ast.parse(path.read_text())
    lazy, types = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lazy |= {id(child) for child in ast.walk(node)}
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            types |= {id(child) for child in ast.walk(node)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            parts = [f"{name}.{alias.name}" for alias in node.names]
            names = sorted({part if part in MODULES else name for part in parts})
        for name in names:
            yield name, id(node) in lazy, id(node) in types


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    for name, lazy, types in imports(path):
        top, *rest = name.split(".")
        if top == "mrpo" and rest:
            for_all = {"errors"} if folder == "method" else FOR_ALL
            assert rest[0] in MAY_IMPORT[folder] | for_all, f"{folder} imports {name}"
        if top in {"vllm", "ray"}:
            assert folder == "precompute", f"{folder} imports {name}"
        if folder == "data":
            assert top != "torch", f"data imports {name}"
            if top == "transformers":
                assert path.parent.name == "rendering", f"{path.name} imports {name}"
                assert lazy or types, "data imports transformers only inside functions"


def test_no_module_imports_itself_in_a_circle() -> None:
    """Counted with the imports inside functions: Tarjan's strongly connected components."""
    graph = {
        module: {name for name, _, types in imports(path) if name in MODULES and not types}
        for module, path in MODULES.items()
    }
    assert [sorted(circle) for circle in circles(graph)] == []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = []
            while (top := stack.pop()) != node:
                component.append(top)
            if component:
                components.append([node, *component])

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return components


def test_a_circle_would_be_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"d"}}
    assert [sorted(circle) for circle in circles(graph)] == [["a", "b", "c"]]


def test_no_public_name_is_defined_in_two_modules() -> None:
    defined = defaultdict(list)
    for path in PRODUCTION:
        for node in ast.parse(path.read_text()).body:
            public = isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_"
            if public and node.name not in DEFINED_OFTEN:  # type: ignore[union-attr]
                defined[node.name].append(name_of(path))  # type: ignore[union-attr]
    assert {name: files for name, files in defined.items() if len(files) > 1} == {}


def test_files_are_few_and_neither_tiny_nor_long() -> None:
    lines = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert len(lines) <= 120
    assert {name: count for name, count in lines.items() if count > 450} == {}
    assert 150 <= statistics.median(lines.values()) <= 300


def test_no_folder_has_more_than_16_files_of_its_own() -> None:
    counts = defaultdict(int)
    for path in FILES:
        counts[name_of(path.parent)] += 1
    assert {folder: count for folder, count in counts.items() if count > 16} == {}


def test_contributing_shows_the_whole_tree() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().split("```")[1]
    shown, parents = set(), [""]
    for line in text.strip("\n").splitlines():
        entry = line.split()[0]
        parents[(len(line) - len(line.lstrip())) // 2 + 1 :] = [entry]
        shown.add("".join(parents))
    assert {path for path in shown if not (ROOT / path).exists()} == set(), "gone"
    folders = {f"{name_of(path.parent)}/" for path in SOURCES}
    assert {*map(name_of, FILES), *folders} - shown == set(), "not shown"


COMMANDS = {**cli.COMMANDS, **{f"store {name}": row for name, row in cli.STORE_COMMANDS.items()}}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_a_function_of_its_settings_class(name: str) -> None:
    config, function = map(cli.imported, COMMANDS[name])
    assert is_dataclass(config)
    assert function.config is config, f"{COMMANDS[name][1]} lacks @command({config.__name__})"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_module_reaches_another_through_the_command_line(path: Path) -> None:
    """Not by a command's words, nor by a refs.yaml written for the purpose, nor by its stdout."""
    text = path.read_text()
    strings = {
        node.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert "mrpo.cli" not in strings, "it starts the command line as a process"
    assert "redirect_stdout" not in text
    # The demo's refs.yaml stays, for its user to go on with.
    if path != ROOT / "demo" / "run.py":
        assert "refs.yaml" not in strings, "it writes a refs.yaml of its own"


def test_command_line_with_all_its_help_loads_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "pyarrow", "datasets", "vllm", "numpy", "scipy", "peft"]
    code = (
        "import sys, mrpo.cli as cli\n"
        "cli.application()\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_a_users_mistake_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mrpo.cli", "prepare", str(tmp_path / "missing.jsonl")]
    result = subprocess.run(
        [*command, "--out", str(tmp_path / "pairs")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
