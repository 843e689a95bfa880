"""Worker processes of `mrpo precompute`: killed, out of memory, failing, and on their GPUs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from mrpo.data.references import load_refs
from mrpo.errors import UserError
from mrpo.precompute import estimate, process
from mrpo.precompute.run import precompute
from mrpo.tests.precompute.workspace import Workspace, rows


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition: Any, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


@pytest.fixture
def command_line(workspace: Workspace) -> Iterator[list[str]]:
    """A process of its own that runs `precompute`, to be killed."""
    config = workspace.config(refs="llama")
    code = (
        "import json, sys\n"
        "from mrpo.precompute.config import PrecomputeConfig\n"
        "from mrpo.precompute.run import precompute\n"
        "sys.exit(precompute(PrecomputeConfig(**json.loads(sys.argv[1]))).exit_code)"
    )
    settings = asdict(config)
    return [sys.executable, "-c", code, json.dumps(settings)]


def test_a_killed_run_takes_its_worker_along_and_two_workers_share_what_is_left(
    workspace: Workspace, command_line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed when the second file appears; what is there then is complete and stays."""
    pairs = workspace.prepare(rows(120), shard_pairs=2)
    run = subprocess.Popen(command_line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(workspace.scores("llama").names()) >= 2)
    workers = children(run.pid)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert workers
    wait_for(lambda: all(gone(worker) for worker in workers), seconds=10)
    kept = workspace.scores("llama").names()
    assert 2 <= len(kept) < 60
    assert workspace.scores("llama").damaged() == []

    assert precompute(workspace.config(refs="llama", data_parallel_size=2)).exit_code == 0
    assert f"{240 - 4 * len(kept)} responses scored (" in capsys.readouterr().out
    names = workspace.scores("llama").names()
    assert set(kept) < set(names)
    assert len(names) == 60
    assert workspace.scores("llama").num_rows() == 2 * pairs.num_pairs
    assert len(workspace.by_id("llama")) == 240
    logs = {path.name for path in Path(workspace.store.root).glob("logs/*/*.log")}
    assert logs == {"llama.log", "llama-0.log", "llama-1.log"}


IDLE = """
import subprocess, time
from mrpo.precompute.process import serve
def handle(job, report):
    report({"engine": subprocess.Popen(["sleep", "300"]).pid})
    time.sleep(300)
serve(handle)
"""


def test_a_worker_that_is_busy_ends_with_its_parent_and_takes_its_engines_along() -> None:
    """It sends no events meanwhile, so only the end of its stdin shows that the parent is gone."""
    worker = subprocess.Popen(
        [sys.executable, "-c", IDLE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(b"{}\n")
    worker.stdin.flush()
    engine = json.loads(worker.stdout.readline())["engine"]
    assert not gone(engine)
    worker.stdin.close()
    assert worker.wait(10) == -signal.SIGKILL
    wait_for(lambda: gone(engine), seconds=10)


SERVING = """
from mrpo.errors import UserError
from mrpo.precompute.process import serve
def handle(job, report):
    if job["number"] == 3:
        raise UserError("three is not allowed")
    if job["number"] == 4:
        raise RuntimeError("four is a fault")
    print("noise")
    report({"event": "square", "value": job["number"] ** 2})
serve(handle)
"""


def test_a_worker_stays_up_for_more_jobs_until_it_is_stopped_or_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A user's mistake ends the job only; any other error ends the worker and is in its log."""
    monkeypatch.setattr(process, "PYTHON", (sys.executable, "-c", SERVING))
    queue: SimpleQueue[Any] = SimpleQueue()
    worker = process.WorkerProcess("unused", {"number": 2}, queue, tmp_path / "log")
    events = []
    for number in (3, 5, 4):
        while True:
            source, event = queue.get(timeout=60)
            assert source is worker
            events.append(event)
            if event["event"] in ("finished", "error"):
                break
        worker.send({"number": number})
    assert events == [
        {"event": "square", "value": 4},
        {"event": "finished"},
        {"event": "error", "text": "three is not allowed"},
        {"event": "square", "value": 25},
        {"event": "finished"},
    ]
    assert queue.get(timeout=60) == (worker, None)
    assert worker.exit_code == 1
    assert "RuntimeError: four is a fault" in worker.why_it_failed()
    worker.send({"number": 6})  # the worker is gone: no error

    idle = process.WorkerProcess("unused", {"number": 2}, queue, tmp_path / "log")
    for name in ("square", "finished"):
        assert queue.get(timeout=60)[1]["event"] == name
    idle.stop()
    assert idle.exit_code == -signal.SIGKILL
    assert queue.get(timeout=60) == (idle, None)


def test_folders_of_the_users_are_not_imported_in_place_of_ours(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m` alone would put the working folder in front of all packages."""
    for name in ("data", "model", "mrpo", "torch"):
        (workspace.folder / name).mkdir()
        (workspace.folder / name / "__init__.py").write_text("raise RuntimeError(__file__)")
    workspace.prepare(rows(2))
    monkeypatch.chdir(workspace.folder)
    assert precompute(workspace.config(refs="llama")).exit_code == 0
    assert len(workspace.by_id("llama")) == 4


RECORDING = """
import json, pathlib, sys
job = json.loads(sys.stdin.readline())
with open({path!r}, "a") as jobs: print(json.dumps(job), file=jobs)
def send(**event): print(json.dumps(event), flush=True)
"""


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Jobs]:
    """Replaces the worker by a script of a few lines; returns the jobs that it gets."""
    path = tmp_path / "jobs.jsonl"

    def install(code: str) -> Jobs:
        script = RECORDING.format(path=str(path)) + code
        monkeypatch.setattr(process, "PYTHON", (sys.executable, "-c", script))
        return Jobs(path)

    return install


class Jobs:
    """The jobs that workers have got so far."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(json.loads, self.path.read_text().splitlines())


def test_a_damaged_file_is_set_aside_and_its_rows_are_missing_again(
    workspace: Workspace, worker: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = workspace.prepare(rows(12), shard_pairs=6)
    workspace.score("llama", pairs)
    name = workspace.scores("llama").names()[0]
    (path,) = Path(workspace.store.root).glob(f"*/scores/{name}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    worker("")
    assert precompute(workspace.config(refs="llama")).exit_code == 1
    printed = capsys.readouterr().out
    assert f"damaged, set aside, its rows are scored again: {name}" in printed
    assert "12 responses in the store; 12 to score (" in printed
    assert "llama: 0 responses scored; 12 from the store; 12 NOT SCORED" in printed
    assert path.with_name(f"{name}.bad").exists()
    workspace.score("llama", pairs)
    assert len(workspace.by_id("llama")) == 24


def test_a_worker_out_of_memory_is_replaced_by_one_with_half_the_batch(
    workspace: Workspace, worker: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.prepare(rows(4))
    jobs = worker(
        "send(event='ready', facts={'max_tokens': job['settings']['max_tokens']})\n"
        "print('torch.OutOfMemoryError: CUDA out of memory', file=sys.stderr)\n"
        "sys.exit(1)\n"
    )
    assert precompute(workspace.config(refs="llama", max_tokens=1200)).exit_code == 1
    assert [job["settings"]["max_tokens"] for job in jobs] == [1200, 600, 300]
    printed = capsys.readouterr().err
    assert "llama: out of memory; going on with 600 tokens at once" in printed
    assert "reference llama failed: exit code 1; the end of " in printed


def test_a_workers_mistake_is_one_line_and_names_what_is_left(
    workspace: Workspace, worker: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.prepare(rows(4))
    worker("send(event='error', text=job['settings']['alias'] + ' is broken'); sys.exit(2)")
    with pytest.raises(UserError, match=r"^llama is broken; qwen is broken$"):
        precompute(workspace.config(refs="llama,qwen"))
    assert "llama: 0 responses scored; 0 from the store; 8 NOT SCORED" in capsys.readouterr().out


def test_a_worker_killed_by_the_system_is_reported_as_such(
    workspace: Workspace, worker: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.prepare(rows(4))
    worker("import os; os.kill(os.getpid(), 9)")
    assert precompute(workspace.config(refs="qwen")).exit_code == 1
    assert "reference qwen failed: killed by SIGKILL" in capsys.readouterr().err


def test_bfloat16_scores_have_an_identity_of_their_own(
    workspace: Workspace,
    worker: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And the way out of them where the processor has no bfloat16."""
    slow = {"bfloat16": "bfloat16 is slow"}
    monkeypatch.setattr("mrpo.model.rates.slow_precision", slow.get)
    workspace.prepare(rows(3))
    jobs = worker("")
    precompute(workspace.config(refs="llama"))
    assert "is slow" not in capsys.readouterr().out
    precompute(workspace.config(refs="llama", bf16=True))
    warning = "  warning: bfloat16 is slow; leave out --bf16, which is another identity\n"
    assert capsys.readouterr().out.count(warning) == 1
    exact, fast = jobs
    assert (exact["settings"]["autocast"], fast["settings"]["autocast"]) == (False, True)
    assert exact["identity"] != fast["identity"]
    newest = workspace.store.references()[-1]
    assert (newest.identity, newest.inputs["autocast"]) == (fast["identity"], "bfloat16")
    specs = load_refs(workspace.refs_config)
    assert newest.folders == {"model": str(specs["llama"].model_path)}
    chosen = workspace.store.resolve("llama", specs)
    assert workspace.store.described(chosen, specs["llama"]) == (
        f"llama@{fast['identity'][:12]} (float32 --bf16); llama also has "
        f"llama@{exact['identity'][:12]} (float32)"
    )


@pytest.mark.parametrize(("remote", "dealt"), [(True, [(0, 2), (1, 2)]), (False, [(0, 1)] * 2)])
def test_shards_are_dealt_out_where_a_store_has_no_leases(
    workspace: Workspace, worker: Any, remote: bool, dealt: list[tuple[int, int]]
) -> None:
    workspace.prepare(rows(8), shard_pairs=2)
    jobs = worker("")
    store = f"memory://{workspace.folder.name}/store" if remote else workspace.store.root
    precompute(workspace.config(refs="llama", data_parallel_size=2, store=store))
    assert sorted((job["worker"], job["workers"]) for job in jobs) == dealt


@pytest.mark.parametrize(
    ("count", "visible", "names"),
    [
        (2, None, ["0", "1"]),
        (2, "3,1", ["3", "1"]),
        (2, "GPU-5c,GPU-f0,GPU-gone", ["GPU-5c", "GPU-f0"]),  # CUDA stops at what is not there
        (0, "", []),
        (0, None, []),
    ],
)
def test_gpus_are_named_as_the_user_named_them(
    monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None, names: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert process.visible_gpus() == names


def test_groups_of_gpus_go_to_workers(
    workspace: Workspace, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four GPUs: two workers of two each; a third worker has none left."""
    workspace.prepare(rows(4))
    seen = workspace.folder / "devices"
    worker(f"import os; print(os.environ['CUDA_VISIBLE_DEVICES'], file=open({str(seen)!r}, 'a'))")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(estimate, "_matrix_rate", lambda dtype: 1e12)
    monkeypatch.setattr("mrpo.precompute.reference_run.find_spec", lambda name: name)  # has vLLM
    options = {"refs": "llama", "engine": "vllm", "tensor_parallel_size": 2}
    precompute(workspace.config(**options, data_parallel_size=2))
    assert sorted(seen.read_text().split()) == ["0,1", "2,3"]
    with pytest.raises(UserError, match="3 workers of 2 GPUs need 6, there are 4"):
        precompute(workspace.config(**options, data_parallel_size=3))
