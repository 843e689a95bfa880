"""The main job on real pairs: three trained references, `make precompute`, `make train` twice.

The references' folders are moved away before training: the stages meet in the store alone.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mrpo.benchmarks.real_pairs import write_pairs
from mrpo.data.shards import PairShards
from mrpo.demo.models import FAMILIES
from mrpo.demo.pretrain import pretrain

ROOT = Path(__file__).resolve().parents[1]
NUM_PAIRS = 72
MOST_CHARACTERS = 1500  # of a line: the tiny references have a context of 1,024 tokens


@dataclass(frozen=True, slots=True)
class Job:
    """A folder with everything of one data set."""

    folder: Path

    def make(self, target: str, **variables: object) -> subprocess.CompletedProcess[str]:
        """`make TARGET` as a user runs it, in the environment that the tests run in."""
        fixed = {
            "MRPO": f"{sys.executable} -m mrpo.cli",
            "REFS_CONFIG": self.folder / "refs.yaml",
            "PAIRS": self.folder / "pairs",
            "STORE": self.folder / "store",
            "VALIDATION": 0.2,
        }
        command = ["make", "--old-file=setup", target]
        command += [f"{name}={value}" for name, value in (fixed | variables).items()]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    def files(self, below: str) -> dict[str, tuple[int, int]]:
        paths = (path for path in (self.folder / below).rglob("*") if path.is_file())
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def real_rows(kind: str, data: Path, folder: Path) -> list[str]:
    """The lines of a real data set, as a user would give it to `mrpo prepare`."""
    if kind == "hh":
        with gzip.open(data / "hh_harmless_test.jsonl.gz", "rt", encoding="utf-8") as file:
            return file.read().splitlines()
    write_pairs("gsm8k", data / "gsm8k_model_solutions.jsonl.gz", folder / "all.jsonl")
    return (folder / "all.jsonl").read_text(encoding="utf-8").splitlines()


def chats_of(pairs: PairShards) -> list[dict[str, object]]:
    """The chosen dialogues, as the references read them."""
    return [{"messages": [*pair.prompt, *pair.chosen]} for pair in pairs.pairs(0)]


@pytest.fixture(params=["hh", "gsm8k"])
def job(request: pytest.FixtureRequest, tmp_path: Path, shared_data: Path) -> Job:
    """Real pairs in one file, and three references that have read them for a moment."""
    lines = real_rows(request.param, shared_data, tmp_path)
    short = [line for line in lines if len(line) < MOST_CHARACTERS]
    (tmp_path / "data.jsonl").write_text("\n".join(short[:NUM_PAIRS]))
    command = [sys.executable, "-m", "mrpo.cli", "prepare", tmp_path / "data.jsonl"]
    subprocess.run([*command, "--out", tmp_path / "read"], check=True, capture_output=True)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(map(json.dumps, chats_of(PairShards(tmp_path / "read")))))
    for seed, family in enumerate(FAMILIES):
        pretrain(family, corpus, tmp_path / "references" / family, seed)
    pretrain("llama", corpus, tmp_path / "policy", seed=9)
    refs = [f"{family}: {{model: references/{family}, dtype: float32}}" for family in FAMILIES]
    (tmp_path / "refs.yaml").write_text("\n".join(refs))
    return Job(tmp_path)


def test_scores_are_computed_once_and_serve_every_training_run(job: Job) -> None:
    scored = job.make("precompute", REFS="llama,mistral,qwen", DATA=job.folder / "data.jsonl")
    assert scored.returncode == 0, scored.stderr
    store = job.files("store")

    again = job.make("precompute", REFS="llama,mistral,qwen", DATA=job.folder / "data.jsonl")
    assert again.returncode == 0, again.stderr
    for family in FAMILIES:
        assert f"{family}: 0 responses scored" in again.stdout
    scores = {name: stat for name, stat in store.items() if name.endswith(".parquet")}
    assert scores

    (job.folder / "references").rename(job.folder / "moved away")
    evaluations = []
    for beta in (0.1, 0.3):
        output = job.folder / f"run-{beta}"
        policy = job.folder / "policy"
        ran = job.make("train", POLICY=policy, BETA=beta, ARGS=f"--output-dir {output}")
        assert ran.returncode == 0, ran.stderr
        evaluations.append(json.loads((output / "evaluation.json").read_text())["training"])
        generates(output / "model")
    assert scores.items() <= job.files("store").items(), "training touches no score"
    assert evaluations[0]["method"] == "mrpo:llama/mistral/qwen+arwc"
    assert evaluations[0]["figures"] != evaluations[1]["figures"]


def generates(folder: Path) -> None:
    """The final folder is an ordinary model: transformers loads it and it writes a reply."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2 + 2?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    reply = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert reply.shape[1] == prompt["input_ids"].shape[1] + 4
