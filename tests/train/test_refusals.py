"""What `mrpo train` refuses or warns of: scores, policies and settings that do not fit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mrpo.data.config import PrepareConfig
from mrpo.data.prepare import prepare
from mrpo.data.shards import PairShards
from mrpo.data.store import Store
from mrpo.errors import UserError
from mrpo.train.distributed import Ranks
from mrpo.train.run import train
from mrpo.train.start import find_start

TWO_STEPS = {"max_steps": 2, "save_steps": 1}


@pytest.fixture(scope="module")
def stopped(inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that can be resumed behind its first step."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train(inputs.config(folder, **TWO_STEPS))
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "step-00000002")
    return folder


def test_pairs_missing_for_good(inputs: Any, tmp_path: Path, scored: Any) -> None:
    """In the base: dropped. In another: the others' weights. In too many: refused."""
    pairs = PairShards(inputs.root / "pairs")
    reasons = {"llama": 2, "qwen": 3, "mistral": 0}
    scored(tmp_path, pairs, list(reasons), missing=reasons)
    changes = {"store": str(tmp_path / "store"), "max_steps": None, "batch_pairs": 48}
    with pytest.raises(
        UserError, match=r"llama has no score for 4 of 48 pairs \(4 beyond_context\)"
    ):
        train(inputs.config(tmp_path / "run", **changes))
    train(inputs.config(tmp_path / "run", **changes, max_missing=0.2))
    card = (tmp_path / "run/model/README.md").read_text()
    split = [s for shard in range(2) for s in pairs.table(shard)["split"].to_pylist()]
    lost = sum(s == "train" for s in (*split[:2], *split[30:32]))
    assert f"| pairs trained on, over all epochs | {split.count('train') - lost} |" in card


def test_pairs_that_a_limit_left_out_are_no_dead_end(
    inputs: Any, tmp_path: Path, scored: Any, mrpo: Any
) -> None:
    """They are counted under --max-missing, and the line in the message leaves them out."""
    prepare(PrepareConfig(source=str(inputs.root / "pairs.jsonl"), out=str(tmp_path / "pairs")))
    pairs = PairShards(tmp_path / "pairs")
    scored(tmp_path, pairs, ["llama", "qwen"])
    store = Store(tmp_path / "store")
    for record in store.references():  # scored again without the first pairs
        scores, left_out = store.scores(record.identity), pairs.response_ids(0).rejected[:3]
        table = scores.read()
        shutil.rmtree(tmp_path / "store" / record.identity / "scores")
        theirs = [response_id.tobytes() for response_id in left_out]
        scores.add(table.filter(~np.isin(table["response_id"].to_numpy(), theirs)))
        scores.leave_out(left_out)
    changes = {"store": store.root, "refs": "llama,qwen", "pairs": str(pairs.path)}
    with pytest.raises(
        UserError, match=r"llama has no score for 3 of 48 pairs \(3 over_lim"
    ) as raised:
        train(inputs.config(tmp_path / "run", **changes))
    message = str(raised.value)
    assert "score them with a larger --max-model-len" in message
    assert "or raise --max-missing" in message
    train(inputs.config(tmp_path / "some", **changes, max_missing=0.1))

    line = message.partition("leave those pairs out (mrpo ")[2].partition(")")[0]
    ran = mrpo(*line.split())
    assert ran.code == 0, ran.err
    assert "review  3 excluded" in ran.out
    changes["pairs"] = f"{pairs.path}-scored"
    assert PairShards(changes["pairs"]).num_pairs == 45
    train(inputs.config(tmp_path / "run", **changes))


def test_pairs_not_yet_scored_are_named_with_the_line_to_run(inputs: Any, tmp_path: Path) -> None:
    row = {"prompt": "never scored", "chosen": " a", "rejected": " b"}
    (tmp_path / "new.jsonl").write_text(json.dumps(row))
    prepare(PrepareConfig(source=str(tmp_path / "new.jsonl"), out=str(tmp_path / "pairs")))
    with pytest.raises(UserError, match=r"not yet scored.*1 for llama.*run: mrpo precompute"):
        train(inputs.config(tmp_path / "run", pairs=str(tmp_path / "pairs")))
    assert not (tmp_path / "run").exists()


def test_policy_too_large_for_memory_is_refused_before_loading(
    inputs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with a 70 B model's config and no weights: nothing tries to load them."""
    policy = shutil.copytree(inputs.references["llama"], tmp_path / "policy")
    (policy / "model.safetensors").unlink()
    config = json.loads((policy / "config.json").read_text())
    sizes = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "head_dim": 128,
    }
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8}
    (policy / "config.json").write_text(json.dumps(config | sizes | heads))
    with pytest.raises(UserError, match=r"the policy needs about 1\d{3}\.\d GiB and .* are free"):
        train(inputs.config(tmp_path / "run", policy=str(policy)))
    assert "68,459,175,936 parameters trained" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_base_that_differs_from_its_scores_is_said_loudly(
    inputs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(inputs.config(tmp_path / "same", max_steps=1))
    printed = capsys.readouterr().out
    [difference] = re.findall(r"^guard +([+-]\S+) nats per token", printed, re.MULTILINE)
    assert abs(float(difference)) < 1e-6  # float32, and other responses in a row than when scored
    [scored] = re.findall(r"^scores +(llama@[0-9a-f]{12}) \(float32\)$", printed, re.MULTILINE)
    training = PairShards(inputs.root / "pairs").manifest["splits"]["train"]
    assert training < 64
    assert f"from the base's stored scores on {training} pairs" in printed
    train(inputs.config(tmp_path / "other", max_steps=1, policy=str(inputs.references["qwen"])))
    assert "guard" not in capsys.readouterr().out
    entries = yaml.safe_load((inputs.root / "refs.yaml").read_text())
    folder = shutil.copytree(entries["llama"]["model"], tmp_path / "changed")
    weights = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.load_state_dict({name: 1.2 * tensor for name, tensor in weights.items()})
    kept = tmp_path / "kept"
    shutil.move(entries["llama"]["model"], kept)
    try:
        shutil.copytree(kept, entries["llama"]["model"])
        model.save_pretrained(entries["llama"]["model"])
        with pytest.raises(UserError, match=rf"changed since {scored} was scored.*mrpo precompute"):
            train(inputs.config(tmp_path / "changed-run", max_steps=1))
        assert not (tmp_path / "changed-run").exists()
        refs = f"{scored},mistral,qwen"  # what was scored, asked for by name
        train(inputs.config(tmp_path / "changed-run", max_steps=1, refs=refs))
    finally:
        shutil.rmtree(entries["llama"]["model"])
        shutil.move(kept, entries["llama"]["model"])
    assert "WARNING: the policy is NOT the base reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report_to": "wandbb"}, "--report-to wandbb: must be none or some of"),
        ({"refs": None}, "no references: give --refs"),
        ({"refs": "llama,gemma"}, "gemma"),
        ({"refs": "llama,llama"}, "is given twice"),
        ({"method": "mrpoo"}, "'mrpoo' is unknown"),
        ({"device": "tpu"}, "--device tpu: must be cpu or cuda"),
        ({"policy": "no/such-model"}, "policy no/such-model: no model to load"),
        ({"policy_revision": "main"}, "--policy-revision goes with --policy"),
        ({"chat_template": "none.jinja"}, "--chat-template none.jinja: can't be read"),
        ({"max_length": 3}, "no pair is left that the policy can take"),
        ({"lora_rank": 2, "lora_target_modules": "nothing"}, "--lora-target-modules nothing"),
        ({"pairs": "nowhere"}, "nowhere holds no prepared pairs"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistake_is_one_line(
    inputs: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        train(inputs.config(tmp_path / "run", **changes))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "model").exists()


def test_dora_with_several_processes_is_refused(inputs: Any, tmp_path: Path) -> None:
    config = inputs.config(tmp_path / "run", lora_rank=2, use_dora=True)
    with pytest.raises(UserError, match="--use-dora is not tested with several processes"):
        find_start(config, Ranks(0, 2, torch.device("cpu")), bf16=False)


def test_output_below_a_file_is_refused(inputs: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output-dir .*file/run: Not a directory"):
        train(inputs.config(tmp_path / "file" / "run"))


def test_damaged_scores_of_a_run_are_noticed(inputs: Any, tmp_path: Path) -> None:
    train(inputs.config(tmp_path / "run", max_steps=1))
    shutil.rmtree(tmp_path / "run" / "model")
    (part, *_) = sorted((tmp_path / "run" / "scores").glob("part-*.parquet"))
    table = pq.read_table(part)
    pq.write_table(table.slice(0, len(table) - 1), part)
    with pytest.raises(UserError, match="damaged"):
        train(inputs.config(tmp_path / "run", max_steps=1, resume=True))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "state.json"])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_damaged_checkpoint_is_refused(
    stopped: Path, inputs: Any, tmp_path: Path, name: str, keep: float
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-00000001" / name
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(
        UserError, match=r"step-00000001.*: damaged.*; delete .*checkpoint"
    ) as raised:
        train(inputs.config(tmp_path / "run", **TWO_STEPS, resume=True))
    assert "\n" not in str(raised.value)


def test_damaged_notes_on_the_rows_of_a_run_are_made_again(
    stopped: Path, inputs: Any, tmp_path: Path
) -> None:
    logs = []
    for name, flipped in (("whole", False), ("damaged", True)):
        shutil.copytree(stopped, tmp_path / name)
        file = tmp_path / name / "scores" / "uses.bin"
        data = bytearray(file.read_bytes())
        data[3] ^= flipped  # a pair that is trained on becomes one that is held out, or the reverse
        file.write_bytes(data)
        train(inputs.config(tmp_path / name, **TWO_STEPS, resume=True))
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line)["loss"] for line in lines if '"loss"' in line])
        assert file.read_bytes() == (stopped / "scores" / "uses.bin").read_bytes()
    assert logs[0] == logs[1]
