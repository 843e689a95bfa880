"""Bad input of every kind for every command: success, or one line and exit code 2.

    python tests/fuzz/cases.py --cases 500 --seed 0      every case, or one again with --only N

A case copies a small world of valid inputs (`world.py`: rows, pairs, tiny models, an adapter,
chat templates, a score store, a run, a comparison), damages one thing in it (`damage.py`: a file's
bytes, a value anywhere in its JSON, YAML or table, the file itself) or the flags (`flags.py`), and
runs one command in this process (`in_process.py`). What is drawn depends on the seed and the case's
number alone. A case fails where the command ends otherwise than with success or one `error: ` line
and exit code 2, where it takes too long, or where it changed or left what it should not have.

Worker processes are replaced by calls in this process; what `mrpo demo` trains is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import os
import random
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import yaml

from mrpo.data.shards import USERS
from mrpo.settings import settings_of
from mrpo.tests.fuzz.damage import damage, sign, without_folder
from mrpo.tests.fuzz.flags import damaged_settings, damaged_words
from mrpo.tests.fuzz.in_process import Ran, run
from mrpo.tests.fuzz.world import COMMANDS, Command, make_world

FINDS = ("doctor", "store verify", "store push", "store pull")  # exit code 1: something is wrong
MEMORY = 16 << 30  # bytes of address space that a run of its own may take


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
        return command.words.split(), without_folder(rng, folder, path)
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
    shared = Path(__file__).resolve().parents[3] / "shared" / "data"
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
