"""The mathematics stands alone: it imports nothing of the package but its own files and errors."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

METHOD = Path(__file__).resolve().parents[2] / "method"
OUTSIDE = {"numpy", "scipy", "torch"}


def test_the_mathematics_imports_nothing_of_the_package_but_errors() -> None:
    files = sorted(METHOD.glob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                allowed = node.level == 1 or (node.level, node.module) == (2, "errors")
                assert allowed, f"{file.name}, line {node.lineno}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    [node.module]
                    if isinstance(node, ast.ImportFrom)
                    else [a.name for a in node.names]
                )
                for name in names:
                    top = str(name).partition(".")[0]
                    known = top in OUTSIDE or top in sys.stdlib_module_names
                    assert known, f"{file.name} imports {name}"
