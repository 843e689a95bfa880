"""`SequenceLogps` is the unit that FSDP2 shards: two processes, one of them without prompts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_sharded_gradients_are_those_of_one_process() -> None:
    worker = Path(__file__).with_name("sharded_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(worker)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
