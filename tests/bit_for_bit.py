"""Whether a change leaves every number as it was: an earlier commit against the working tree.

    python tests/bit_for_bit.py --before COMMIT [--steps 20] [--full]

The code at COMMIT makes a demo (with --full the whole one, else `--quick`) and trains a few steps
with several methods. Then the working tree must find all of the store's scores again (0 to score),
give the same score files in a store of its own (files are named by a digest of their bytes, folders
by the identity), and train to the same weights, byte for byte. Exit code 1 where anything differs.
Not a test that pytest collects: it takes minutes, and two checkouts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("mrpo", "dpo:qwen", "multi-dpo", "geometric+arwc", "mrpo+vdw", "geometric+fitted")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", required=True, help="the commit to compare with")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each method")
    parser.add_argument("--full", action="store_true", help="the whole demo, not --quick")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkout = folder / "checkout"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
        subprocess.run(["git", "-C", str(checkout), "checkout", "-q", options.before], check=True)
        before, after = (_package(folder / name, tree) for name, tree in _trees(checkout))
        quick = [] if options.full else ["--quick"]
        demo = folder / "demo"
        _mrpo(before, "demo", "--out", demo, *quick)
        common = ["--pairs", demo / "pairs", "--refs", "llama,mistral,qwen"]
        common += ["--refs-config", demo / "refs.yaml"]
        stored = _files(demo / "store")
        _mrpo(after, "precompute", *common, "--store", demo / "store", "--engine", "hf")
        same = _report("scores found again", stored == _files(demo / "store"))
        _mrpo(after, "precompute", *common, "--store", folder / "store", "--engine", "hf")
        same &= _report("scores made anew", stored == _files(folder / "store"))
        for method in METHODS:
            flags = ["--method", method, "--batch-pairs", 16, "--learning-rate", "5e-4"]
            flags += ["--max-steps", options.steps, "--store", demo / "store"]
            models = []
            for name, package in (("before", before), ("after", after)):
                run = folder / name / method
                _mrpo(package, "train", *common, *flags, "--output-dir", run)
                models.append(load_file(run / "model" / "model.safetensors"))
            same &= _report(f"weights of {method}", *_difference(*models))
    return int(not same)


def _trees(checkout: Path) -> list[tuple[str, Path]]:
    return [("path-before", checkout), ("path-after", ROOT)]


def _package(path: Path, tree: Path) -> Path:
    """A folder for PYTHONPATH in which `mrpo` is the tree."""
    path.mkdir()
    (path / "mrpo").symlink_to(tree)
    return path


def _mrpo(package: Path, *arguments: object) -> None:
    environment = {**os.environ, "PYTHONPATH": str(package)}
    command = [sys.executable, "-P", "-m", "mrpo.cli", *map(str, arguments)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)}\n{ran.stdout}{ran.stderr}")


def _files(store: Path) -> set[str]:
    """Identities and the names of their score files, which are digests of their bytes."""
    return {path.relative_to(store).as_posix() for path in store.glob("*/scores/*.parquet")}


def _difference(before: dict[str, Tensor], after: dict[str, Tensor]) -> tuple[bool, str]:
    """Whether all tensors are equal to the bit, and the largest difference relative to a norm."""
    off = {name: float((after[name] - old).norm() / old.norm()) for name, old in before.items()}
    same = all(torch.equal(after[name], old) for name, old in before.items())
    return same, f"relative difference of a tensor up to {max(off.values()):.1e}"


def _report(what: str, same: bool, how: str = "") -> bool:
    print(f"same     {what}" if same else f"DIFFERS  {what}; {how}".rstrip("; "), flush=True)
    return same


if __name__ == "__main__":
    sys.exit(main())
