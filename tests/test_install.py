"""The wheel and the sdist hold all that is needed, and `mrpo` works outside any checkout.

Both are built without a network from a copy of the checkout; the wheel is installed into a folder,
and what is tested runs in an empty folder with that on its path, never with the checkout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mrpo

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = {"store", "runs", "pairs", "build", "dist", "shared", "tests"}  # of the root
FILES = ("mrpo/py.typed", "mrpo/__main__.py", "mrpo/configs/refs.yaml", "mrpo/configs/train.yaml",
         "mrpo/evaluation/report/page.html")  # fmt: skip
PYCACHE = shutil.ignore_patterns("__pycache__")
SDIST = "import sys, setuptools.build_meta as meta; meta.build_sdist(sys.argv[1])"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def run(*command: object, folder: Path, check: bool = True, **environment: str) -> str:
    """A command's stdout; what it wrote on stderr is in the error of one that fails."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [str(part) for part in command],
        cwd=folder, env=kept | environment, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert not check or ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr if not check else ran.stdout


def build_wheel(source: Path, out: Path) -> Path:
    run(*PIP, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", out, source, folder=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    (folder / "source").mkdir()
    for path in ROOT.iterdir():
        if path.name.startswith(".") or path.name in NOT_COPIED or path.suffix == ".egg-info":
            continue
        if path.is_dir():
            shutil.copytree(path, folder / "source" / path.name, ignore=PYCACHE)
        else:
            shutil.copy(path, folder / "source")
    run(sys.executable, "-c", SDIST, folder, folder=folder / "source")
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the same copy of the checkout as the sdist."""
    return build_wheel(sdist.parent / "source", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run(*PIP, "install", "--no-deps", "--target", target, wheel, folder=target)
    return target


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module_and_every_other_file(wheel: Path) -> None:
    folders = ("method", "data", "model", "precompute", "train", "evaluation", "demo")
    modules = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    modules += ROOT.glob("*.py")
    expected = {f"mrpo/{path.relative_to(ROOT).as_posix()}" for path in modules} | {*FILES}
    held = {name for name in names(wheel) if ".dist-info/" not in name}
    assert held == expected
    assert any(name.endswith("/licenses/LICENSE") for name in names(wheel))


def test_a_wheel_of_the_sdist_is_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(path for path in tmp_path.iterdir() if path.is_dir())
    assert (source / "LICENSE").is_file()
    (tmp_path / "out").mkdir()
    assert names(build_wheel(source, tmp_path / "out")) == names(wheel)


def test_commands_and_names_work_outside_any_checkout(installed: Path, tmp_path: Path) -> None:
    path = {"PYTHONPATH": str(installed)}
    where = run(sys.executable, "-c", "import mrpo; print(mrpo.__file__)", folder=tmp_path, **path)
    assert Path(where.strip()) == installed / "mrpo" / "__init__.py"

    script = run(installed / "bin" / "mrpo", "--help", folder=tmp_path, **path)
    module = run(sys.executable, "-m", "mrpo", "--help", folder=tmp_path, **path)
    assert script == module
    assert "precompute" in module

    code = f"import mrpo; print([getattr(mrpo, name) for name in {mrpo.__all__}])"
    run(sys.executable, "-c", code, folder=tmp_path, **path)
    assert not list(tmp_path.iterdir())


def test_refs_lists_the_packaged_references(installed: Path, tmp_path: Path) -> None:
    listed = run(sys.executable, "-m", "mrpo", "refs", folder=tmp_path, PYTHONPATH=str(installed))
    for alias in ("llama", "mistral", "qwen"):
        assert alias in listed


def test_no_folder_of_the_users_is_imported_in_place_of_ours(
    installed: Path, tmp_path: Path
) -> None:
    for name in ("data", "model", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not ours')")
    path = {"PYTHONPATH": str(installed)}
    where = "import mrpo.precompute.worker as worker; print(worker.__file__)"
    started = run(sys.executable, "-P", "-c", where, folder=tmp_path, **path)
    assert Path(started.strip()) == installed / "mrpo" / "precompute" / "worker.py"
    # Without a job on its stdin it ends at once, but not by a folder of the user's.
    command = (sys.executable, "-P", "-m", "mrpo.precompute.worker")
    assert "not ours" not in run(*command, folder=tmp_path, check=False, **path)
    for_contrast = run(sys.executable, "-c", "import data", folder=tmp_path, check=False, **path)
    assert "not ours" in for_contrast
