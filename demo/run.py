"""`mrpo demo`: the whole method in one go, by the very commands that anyone would type.

    demo-run/data/          the pairs, and what the references read
    demo-run/references/    three tiny models, named in demo-run/refs.yaml
    demo-run/pairs/         what `mrpo prepare` made of the pairs
    demo-run/store/         what `mrpo precompute` found out: every reference's scores
    demo-run/runs/          what `mrpo train` made: DPO with each reference, MRPO with all
    demo-run/accuracy.txt   the table at the end

Nothing is tuned for any of the methods: all train from the same policy with the same settings.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from ..errors import UserError
from ..settings import build, write_resolved
from .config import DemoConfig
from .models import FAMILIES

REFS = ",".join(FAMILIES)  # the first is the base: the policy starts from it
METHODS = {**{f"dpo-{family}": f"dpo:{family}" for family in FAMILIES}, "mrpo": "mrpo"}
VALIDATION_FRACTION = 0.25
# The rate that gave DPO with the base the best accuracy in one pass, in a demo of another seed.
TRAINING = {"--batch-pairs": 16, "--num-train-epochs": 1, "--learning-rate": 5e-4}
CHATS = 26_000  # read by each reference
QUICK_PAIRS, QUICK_CHATS = 300, 1_280


def demo(config: DemoConfig) -> int:
    """Make everything that `config.out` does not have yet, and print the table.

    Returns the exit code of a command that failed, else 0.
    """
    from .data import write_data
    from .pretrain import pretrain_all
    from .table import held_out_table

    out = Path(config.out)
    _claim(out, config)
    print("Making preference pairs and what the references read", flush=True)
    files = write_data(
        out / "data",
        pairs=min(config.pairs, QUICK_PAIRS) if config.quick else config.pairs,
        chats=QUICK_CHATS if config.quick else CHATS,
        seed=config.seed,
    )
    print("Training three tiny references side by side", flush=True)
    if code := pretrain_all(files.corpora, out / "references", config.seed):
        return code
    (out / "refs.yaml").write_text(
        "".join(
            f"{family}: {{model: references/{family}, dtype: float32}}\n" for family in FAMILIES
        )
    )
    for command, made in commands(out, files.pairs, config.seed):
        print(f"\n$ {shlex.join(['mrpo', *command])}", flush=True)
        if made is not None and made.exists():
            print(f"already there: {made}")
        elif code := subprocess.run([sys.executable, "-m", "mrpo.cli", *command]).returncode:
            return code
    table = held_out_table(out, METHODS)
    (out / "accuracy.txt").write_text(table)
    print(f"\n{table}\n{_whereabouts(out)}")
    return 0


def commands(out: Path, pairs: Path, seed: int) -> list[tuple[list[str], Path | None]]:
    """Each command's arguments, and what is there when it is done; None: it finds out itself."""
    scored = {
        "--pairs": out / "pairs",
        "--refs": REFS,
        "--refs-config": out / "refs.yaml",
        "--store": out / "store",
    }
    prepare = {"--out": out / "pairs", "--validation-fraction": VALIDATION_FRACTION}
    every: list[tuple[list[str], Path | None]] = [
        (["prepare", str(pairs), *_flags(prepare)], out / "pairs" / "manifest.json"),
        (["precompute", *_flags({**scored, "--engine": "hf"})], None),
    ]
    for name, method in METHODS.items():
        folder = out / "runs" / name
        own = {"--method": method, "--output-dir": folder, **TRAINING, "--seed": seed}
        every.append((["train", *_flags({**scored, **own}), "--resume"], folder / "model"))
    return every


def _flags(values: dict[str, object]) -> list[str]:
    return [str(part) for item in values.items() for part in item]


def _claim(out: Path, config: DemoConfig) -> None:
    """Keep the settings in the folder, and refuse to mix two demos in one."""
    kept = out / "demo.yaml"
    try:
        if not kept.exists():
            write_resolved(config, kept)
            return
        earlier = build(DemoConfig, {"out": config.out}, str(kept))
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; name another folder") from None
    if earlier != config:
        raise UserError(
            f"--out {out} holds a demo with --pairs {earlier.pairs} --seed {earlier.seed}"
            f"{' --quick' * earlier.quick}; run it with these, or name another --out"
        )


def _whereabouts(out: Path) -> str:
    """What was made, a line each."""
    lines = {
        "data": "the pairs, and what each reference read",
        "references": "the three references, named in refs.yaml",
        "pairs": "the pairs in shards",
        "store": "the references' scores",
        **{f"runs/{name}/model": f"the policy of {method}" for name, method in METHODS.items()},
        "accuracy.txt": "the table above",
    }
    width = max(len(str(out / path)) for path in lines)
    return "\n".join(f"{out / path!s:<{width}}  {text}" for path, text in lines.items())
