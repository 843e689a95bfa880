"""`mrpo precompute` as a user runs it: real worker processes, failures, resume, and mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from mrpo.errors import UserError
from mrpo.precompute import preflight, process
from mrpo.precompute.run import precompute
from mrpo.tests.precompute.workspace import Workspace, rows

FORBIDDEN = (sys.executable, "-c", "raise SystemExit('no worker was to be started')")


def test_three_references_then_nothing(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.prepare(rows(20))
    assert precompute(workspace.config()) == 0
    printed = capsys.readouterr().out
    for alias in ("llama", "mistral", "qwen"):
        assert f"{alias}: 20 pairs scored (" in printed
        assert len(workspace.by_id(alias)) == 20
        assert workspace.scores(alias).num_rows() == 20
        (record,) = [record for record in workspace.store.references() if record.alias == alias]
        assert record.runs[0]["engine"] == "hf"
        assert record.runs[0]["tokens_per_second"] > 0
    assert "0 pairs in the store; 20 to score (" in printed
    assert printed.splitlines()[-1] == f"scores in {workspace.store.root}"
    (logs,) = Path(workspace.store.root, "logs").iterdir()
    assert yaml.safe_load((logs / "precompute.yaml").read_text())["refs"] == "llama,mistral,qwen"

    monkeypatch.setattr(process, "COMMAND", FORBIDDEN)
    assert precompute(workspace.config()) == 0
    assert "llama: 0 pairs scored; 20 from the store" in capsys.readouterr().out


def test_a_dry_run_counts_everything_and_writes_nothing(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "COMMAND", FORBIDDEN)
    data = rows(10)
    data[0]["chosen"][0]["content"] = "word " * 1200  # the context is 1,024 tokens
    data[1]["chosen"][0]["content"] = "word " * 120
    workspace.prepare(data)
    assert precompute(workspace.config(refs="llama", dry_run=True, max_model_len=120)) == 0
    printed = capsys.readouterr().out
    assert "0 pairs in the store; 8 to score (" in printed
    assert "1 that can't be (beyond_context 1); 1 left out by --max-model-len" in printed
    assert not Path(workspace.store.root).exists()


def test_preflight_counts_the_same_on_many_cores(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.prepare(rows(10), shard_pairs=4)
    config = workspace.config(refs="llama,qwen", dry_run=True)
    precompute(config)
    alone = capsys.readouterr().out.partition("engine hf")[2]
    monkeypatch.setattr(preflight, "POOL_PAIRS", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    precompute(config)
    assert capsys.readouterr().out.partition("engine hf")[2] == alone


def test_a_reference_that_fails_costs_the_others_nothing(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One whose weights do not load, one with weights that are not numbers, one that is fine."""
    references = yaml.safe_load(workspace.refs_config.read_text())
    torn, broken = tmp_path / "torn", tmp_path / "broken"
    for folder, alias in ((torn, "llama"), (broken, "mistral")):
        shutil.copytree(references[alias]["model"], folder)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    model = AutoModelForCausalLM.from_pretrained(broken, dtype=torch.float32)
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    model.save_pretrained(broken)

    (tmp_path / "run").mkdir()
    qwen = Path(references["qwen"]["model"])
    run = Workspace(tmp_path / "run", {"torn": torn, "broken": broken, "fine": qwen})
    run.prepare(rows(5))
    assert precompute(run.config()) == 1
    told = capsys.readouterr()
    assert "torn: 0 pairs scored; 0 from the store; 5 NOT SCORED" in told.out
    assert "fine: 5 pairs scored (" in told.out
    assert "reference torn failed: exit code 1; the end of " in told.err
    assert "SafetensorError" in told.err
    assert "error: reference broken: pair " in told.err
    assert len(run.by_id("fine")) == 5
    assert len(run.by_id("torn")) == len(run.by_id("broken")) == 0


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
        "sys.exit(precompute(PrecomputeConfig(**json.loads(sys.argv[1]))))"
    )
    settings = {name: getattr(config, name) for name in config.__slots__}
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

    assert precompute(workspace.config(refs="llama", data_parallel_size=2)) == 0
    assert f"{120 - 2 * len(kept)} pairs scored (" in capsys.readouterr().out
    names = workspace.scores("llama").names()
    assert set(kept) < set(names)
    assert len(names) == 60
    assert workspace.scores("llama").num_rows() == pairs.num_pairs
    assert len(workspace.by_id("llama")) == 120
    logs = {path.name for path in Path(workspace.store.root).glob("logs/*/*.log")}
    assert logs == {"llama.log", "llama-0.log", "llama-1.log"}


IDLE = """
import subprocess, threading, time
from mrpo.precompute.worker import _end_with_parent
engine = subprocess.Popen(["sleep", "300"])
threading.Thread(target=_end_with_parent, daemon=True).start()
print(engine.pid, flush=True)
time.sleep(300)
"""


def test_a_worker_that_is_busy_ends_with_its_parent_and_takes_its_engines_along() -> None:
    """It tells nothing meanwhile, so only the end of its stdin can say that the parent is gone."""
    worker = subprocess.Popen(
        [sys.executable, "-c", IDLE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    engine = int(worker.stdout.readline())
    assert not gone(engine)
    worker.stdin.close()
    assert worker.wait(10) == -signal.SIGKILL
    wait_for(lambda: gone(engine), seconds=10)


RECORDING = """
import json, pathlib, sys
job = json.loads(sys.stdin.readline())
with open({path!r}, "a") as jobs: print(json.dumps(job), file=jobs)
def tell(**event): print(json.dumps(event), flush=True)
"""


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Jobs]:
    """Puts a worker of a few lines in place of the real one; gives the jobs it was given."""
    path = tmp_path / "jobs.jsonl"

    def install(code: str) -> Jobs:
        script = RECORDING.format(path=str(path)) + code
        monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", script))
        return Jobs(path)

    return install


class Jobs:
    """The jobs that workers were given so far."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(json.loads, self.path.read_text().splitlines())


def test_a_damaged_file_is_set_aside_and_its_pairs_are_missing_again(
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
    assert precompute(workspace.config(refs="llama")) == 1
    printed = capsys.readouterr().out
    assert f"damaged, set aside, its pairs are scored again: {name}" in printed
    assert "6 pairs in the store; 6 to score (" in printed
    assert "llama: 0 pairs scored; 6 from the store; 6 NOT SCORED" in printed
    assert path.with_name(f"{name}.bad").exists()
    workspace.score("llama", pairs)
    assert len(workspace.by_id("llama")) == 12


def test_a_worker_out_of_memory_is_replaced_by_one_with_half_the_batch(
    workspace: Workspace, worker: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.prepare(rows(4))
    jobs = worker(
        "tell(event='ready', facts={'max_tokens': job['settings']['max_tokens']})\n"
        "print('torch.OutOfMemoryError: CUDA out of memory', file=sys.stderr)\n"
        "sys.exit(1)\n"
    )
    assert precompute(workspace.config(refs="llama", max_tokens=1200)) == 1
    assert [job["settings"]["max_tokens"] for job in jobs] == [1200, 600, 300]
    told = capsys.readouterr().err
    assert "llama: out of memory; going on with 600 tokens at once" in told
    assert "reference llama failed: exit code 1; the end of " in told


def test_a_workers_mistake_is_one_line_and_names_what_is_left(
    workspace: Workspace, worker: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.prepare(rows(4))
    worker("tell(event='error', text=job['settings']['alias'] + ' is broken'); sys.exit(2)")
    with pytest.raises(UserError, match=r"^llama is broken; qwen is broken$"):
        precompute(workspace.config(refs="llama,qwen"))
    assert "llama: 0 pairs scored; 0 from the store; 4 NOT SCORED" in capsys.readouterr().out


def test_a_worker_killed_by_the_system_is_said_to_be(
    workspace: Workspace, worker: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.prepare(rows(4))
    worker("import os; os.kill(os.getpid(), 9)")
    assert precompute(workspace.config(refs="qwen")) == 1
    assert "reference qwen failed: killed by SIGKILL" in capsys.readouterr().err


def test_bfloat16_scores_have_an_identity_of_their_own(workspace: Workspace, worker: Any) -> None:
    workspace.prepare(rows(3))
    jobs = worker("")
    precompute(workspace.config(refs="llama"))
    precompute(workspace.config(refs="llama", bf16=True))
    exact, fast = jobs
    assert (exact["settings"]["autocast"], fast["settings"]["autocast"]) == (False, True)
    assert exact["identity"] != fast["identity"]
    newest = workspace.store.references()[-1]
    assert (newest.identity, newest.inputs["autocast"]) == (fast["identity"], "bfloat16")


def test_groups_of_gpus_go_to_workers(
    workspace: Workspace, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four GPUs: two workers of two each; a third worker has none left."""
    workspace.prepare(rows(4))
    seen = workspace.folder / "devices"
    worker(f"import os; print(os.environ['CUDA_VISIBLE_DEVICES'], file=open({str(seen)!r}, 'a'))")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(preflight, "_matrix_rate", lambda: 1e12)
    options = {"refs": "llama", "engine": "vllm", "tensor_parallel_size": 2}
    precompute(workspace.config(**options, data_parallel_size=2))
    assert sorted(seen.read_text().split()) == ["0,1", "2,3"]
    with pytest.raises(UserError, match="3 workers of 2 GPUs need 6, there are 4"):
        precompute(workspace.config(**options, data_parallel_size=3))


def test_data_is_prepared_first(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    source = workspace.folder / "raw.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows(3)))
    config = workspace.config(data=str(source), dry_run=True)
    assert precompute(config) == 0
    assert (workspace.folder / "pairs" / "manifest.json").exists()


def test_text_pairs_for_a_model_with_a_chat_template_are_warned_of(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.prepare([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}])
    precompute(workspace.config(refs="llama", dry_run=True))
    assert "this model has a chat template" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refs": "llama,gemma"}, "unknown reference 'gemma'; known: llama, mistral, qwen"),
        ({"pairs": "nowhere"}, "nowhere holds no prepared pairs"),
        ({"engine": "server"}, "has no URL for llama"),
        ({"engine": "server", "server": "http://a:1"}, "a server serves one model"),
        ({"engine": "server", "server": "llama=a:1", "refs": "llama"}, "has no URL for llama"),
        ({"engine": "server", "server": "http://me:key@a:1", "refs": "llama"}, "VLLM_API_KEY"),
        ({"engine": "vllm", "bf16": True}, "--bf16 is of engine hf"),
        ({"max_tokens": 0}, "--max-tokens 0: must be 1 or more"),
        ({"gpu_memory_utilization": 90}, "--gpu-memory-utilization 90: must be above 0"),
    ],
)
def test_a_users_mistake_stops_before_any_work(
    workspace: Workspace, options: dict[str, Any], message: str
) -> None:
    workspace.prepare(rows(2))
    with pytest.raises(UserError, match=message):
        precompute(workspace.config(**options))
    assert not Path(workspace.store.root).exists()


def test_vllm_that_is_not_there_is_a_users_mistake(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mrpo.precompute.placement.find_spec", lambda name: None)
    with pytest.raises(UserError, match="vLLM is not installed"):
        precompute(workspace.config(engine="vllm"))


def test_a_model_folder_without_tokenizer_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    source = Path(yaml.safe_load(workspace.refs_config.read_text())["llama"]["model"])
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, bare)
    (tmp_path / "run").mkdir()
    run = Workspace(tmp_path / "run", {"bare": bare})
    run.prepare(rows(2))
    with pytest.raises(UserError, match="tokenizer"):
        precompute(run.config())
