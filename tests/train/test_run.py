"""A run from its settings to the model's folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrpo.data.config import PrepareConfig
from mrpo.data.prepare import prepare
from mrpo.data.shards import PairShards
from mrpo.data.store import Store
from mrpo.train.checkpoint import best, checkpoints
from mrpo.train.run import train
from mrpo.train.run_folder import read_evaluation


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    result = train(inputs.config(folder, max_steps=3, warmup_ratio=0.0))
    assert (result.status, result.exit_code, result.folder.path) == ("finished", 0, folder)
    return folder


def test_model_folder_loads_and_generates(inputs: Any, run: Path) -> None:
    model, loading = AutoModelForCausalLM.from_pretrained(run / "model", output_loading_info=True)
    assert not any(loading.values())
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    original = AutoTokenizer.from_pretrained(inputs.references["llama"])
    assert tokenizer.chat_template == original.chat_template
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "two eggs"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**prompt, max_new_tokens=3).shape[1] > prompt["input_ids"].shape[1]
    before = AutoModelForCausalLM.from_pretrained(inputs.references["llama"]).state_dict()
    changed = [
        name for name, weight in model.state_dict().items() if not weight.equal(before[name])
    ]
    assert len(changed) == len(before)


def test_the_log_has_the_names_that_the_page_lists(run: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`([a-z_/]+(?:/ALIAS)?)`", page.split("## The log")[1].split("##")[0]))
    named = [{re.sub("llama|mistral|qwen", "ALIAS", name) for name in line} for line in log_of(run)]
    for names in named:
        of_evaluation = {name.removeprefix("eval_") for name in names if name.startswith("eval_")}
        assert names - {f"eval_{name}" for name in of_evaluation} - {"step"} <= listed
        assert of_evaluation - {"pairs"} <= listed
    assert set().union(*named) >= listed - {"eval_", "aux_loss"}  # a mixture of experts' alone


def test_card_has_recipe_data_references_and_held_out_figures(inputs: Any, run: Path) -> None:
    card = (run / "model" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    for record in Store(inputs.root / "store").references():
        assert record.identity in card
    figures = read_evaluation(run / "evaluation.json")["training"]["figures"]
    state = json.loads((run / "checkpoints/step-00000003/state.json").read_text())
    assert state["settings"]["pairs digest"] in card
    assert f"| eval_loss | {figures['eval_loss']:.4g} |" in card
    assert "| beta | 0.1 |" in card
    assert "weighting `arwc`" in card


def test_held_out_figures_are_those_of_the_last_evaluation(run: Path) -> None:
    training = read_evaluation(run / "evaluation.json")["training"]
    last = [line for line in log_of(run) if "eval_loss" in line][-1]
    assert last.pop("step") == training["step"] == 3
    assert training["method"] == "mrpo:llama/mistral/qwen+arwc"
    assert training["figures"] == last


def test_settings_in_force_are_written(inputs: Any, run: Path) -> None:
    settings = yaml.safe_load((run / "train.yaml").read_text())
    assert settings["max_steps"] == 3
    assert settings["store"] == str(inputs.root / "store")


def test_another_beta_scores_nothing_and_opens_no_reference(
    inputs: Any, run: Path, tmp_path: Path
) -> None:
    policy = shutil.copytree(inputs.references["llama"], tmp_path / "policy")
    store = {path: path.stat().st_mtime_ns for path in (inputs.root / "store").rglob("*")}
    away = tmp_path / "away"
    away.mkdir()
    for alias, folder in inputs.references.items():
        shutil.move(folder, away / alias)
    try:
        settings = {"max_steps": 3, "warmup_ratio": 0.0, "policy": str(policy)}
        for name, beta in (("same", 0.1), ("other", 0.5)):
            train(inputs.config(tmp_path / name, **settings, beta=beta))
    finally:
        for alias, folder in inputs.references.items():
            shutil.move(away / alias, folder)
    assert {path: path.stat().st_mtime_ns for path in (inputs.root / "store").rglob("*")} == store
    same, other = (
        load_file(tmp_path / name / "model/model.safetensors") for name in ("same", "other")
    )
    for name, tensor in load_file(run / "model/model.safetensors").items():
        assert tensor.equal(same[name])
    assert any(not tensor.equal(other[name]) for name, tensor in same.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "multi-dpo+vdw"},
        {"method": "geometric+fitted"},
        {"method": "dpo:qwen"},
        {"weights": "1,2,1", "epsilon": "none"},
        {"loss_type": "ipo", "normalize": "token", "sft_weight": 0.1},
        {"loss_type": "sigmoid,bco_pair,sft", "loss_weights": "0.8,0.2,1"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_methods_train(inputs: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    assert train(inputs.config(tmp_path / "run", max_steps=1, **changes)).exit_code == 0
    (line, _) = log_of(tmp_path / "run")
    weights = [value for name, value in line.items() if name.startswith("refs/weight/")]
    assert sum(weights) == pytest.approx(1)
    assert len(weights) == (1 if "dpo:qwen" in changes.values() else 3)


@pytest.mark.parametrize("kind", ["plain", "use_rslora", "use_dora"])
def test_lora_trains_an_adapter_that_peft_loads(inputs: Any, tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {} if kind == "plain" else {kind: True}
    train(inputs.config(tmp_path / "run", lora_rank=4, load_best_model_at_end=True, **options))
    adapter = tmp_path / "run" / "model"
    assert {path.name for path in adapter.iterdir()} >= {"adapter_config.json", "README.md"}
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert [name for name in ("use_rslora", "use_dora") if written[name]] == list(options)
    base = AutoModelForCausalLM.from_pretrained(inputs.references["llama"])
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, adapter)(ids).logits
    assert not torch.equal(before, after)
    trained = load_file(adapter / "adapter_model.safetensors")
    assert all("lora_" in name for name in trained)
    # An adapter is a policy to start from: merged into the model that it is of.
    config = inputs.config(tmp_path / "again", policy=str(adapter), max_steps=1, learning_rate=1e-9)
    train(config)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "model")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, after, rtol=1e-4, atol=1e-4)


def test_adapter_config_is_the_same_in_every_process(inputs: Any, tmp_path: Path) -> None:
    """PEFT writes the adapted layers in the order of a set, which is another in each process."""
    written = []
    for seed in ("1", "2"):
        settings = inputs.settings(tmp_path / seed, lora_rank=2, max_steps=1)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
        subprocess.run(
            [sys.executable, "-m", "mrpo", "train", "--config", str(tmp_path / "run.yaml")],
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        written.append((tmp_path / seed / "model" / "adapter_config.json").read_bytes())
    assert written[0] == written[1]
    modules = json.loads(written[0])["target_modules"]
    assert modules == sorted(modules)


def test_best_checkpoint_is_what_is_written_on_request(inputs: Any, tmp_path: Path) -> None:
    # A rate that ruins the policy: the first checkpoints are better than the last.
    changes = {"learning_rate": 0.3, "warmup_ratio": 0.0, "save_steps": 1, "max_steps": 4}
    train(inputs.config(tmp_path / "run", load_best_model_at_end=True, seed=1, **changes))
    top = best(checkpoints(tmp_path / "run" / "checkpoints"))
    assert top is not None
    training = read_evaluation(tmp_path / "run" / "evaluation.json")["training"]
    assert training["step"] == top.state.step
    assert training["figures"]["eval_rewards/accuracies"] == pytest.approx(top.accuracy)


@pytest.mark.parametrize("slow", [None, "bfloat16 is slow"])
def test_bf16_warns_where_the_processor_has_none(
    inputs: Any, tmp_path: Path, slow: str | None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("mrpo.train.run.slow_precision", lambda dtype: slow)
    train(inputs.config(tmp_path / "run", bf16=True, max_steps=1))
    assert ("WARNING: bfloat16 is slow; leave out --bf16" in capsys.readouterr().out) == bool(slow)


def test_bfloat16_autocast_stays_near_float32(inputs: Any, run: Path, tmp_path: Path) -> None:
    train(inputs.config(tmp_path / "run", max_steps=3, warmup_ratio=0.0, bf16=True))
    losses = [
        [line["loss"] for line in log_of(folder) if "loss" in line]
        for folder in (tmp_path / "run", run)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]
    assert (
        load_file(tmp_path / "run/model/model.safetensors")["lm_head.weight"].dtype == torch.float32
    )


def test_model_keeps_the_dtype_it_came_in(inputs: Any, tmp_path: Path) -> None:
    policy = shutil.copytree(inputs.references["qwen"], tmp_path / "policy")
    AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16).save_pretrained(policy)
    train(inputs.config(tmp_path / "run", policy=str(policy), max_steps=1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_layers_are_compiled_on_request(
    inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: compiled.append((type(self).__name__, how))
    )
    train(inputs.config(tmp_path / "run", max_steps=1, torch_compile=True))
    assert compiled == [("LlamaDecoderLayer", {"dynamic": True})] * 2


def test_architecture_that_is_not_packed_trains_and_says_so(
    inputs: Any, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("mrpo.model.load.PACKABLE", frozenset())
    train(inputs.config(tmp_path / "run", max_steps=3, warmup_ratio=0.0))
    assert (
        "rows        one response each: packing is not tested for llama" in capsys.readouterr().out
    )
    packed, single = (
        [line["loss"] for line in log_of(folder) if "loss" in line]
        for folder in (run, tmp_path / "run")
    )
    assert single == pytest.approx(packed, rel=1e-3)


def test_text_pairs_without_held_out_ones(inputs: Any, tmp_path: Path, scored: Any) -> None:
    rows = [
        {"prompt": f"{n} eggs are", "chosen": f" {n} eggs", "rejected": " she sells"}
        for n in range(9)
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare(PrepareConfig(source=str(tmp_path / "text.jsonl"), out=str(tmp_path / "pairs")))
    scored(tmp_path, PairShards(tmp_path / "pairs"), ["llama"])
    changes = {"pairs": str(tmp_path / "pairs"), "store": str(tmp_path / "store"), "refs": "llama"}
    train(inputs.config(tmp_path / "run", **changes, max_steps=None, method="dpo"))
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2, 3]
    assert read_evaluation(tmp_path / "run" / "evaluation.json") == {
        "training": {"step": 3, "method": "dpo:llama", "figures": {}}
    }
    assert "None were held out." in (tmp_path / "run/model/README.md").read_text()


def test_data_is_prepared_first(
    inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = inputs.config(
        Path("run"), pairs=None, data=str(inputs.root / "pairs.jsonl"), max_steps=1
    )
    train(config)
    pairs = PairShards(tmp_path / "pairs")
    assert pairs.num_pairs == 48
    assert pairs.manifest["options"]["validation_fraction"] == 0.05
    assert pairs.manifest["splits"]["validation"] == 1


def test_trackers_get_what_the_log_gets(inputs: Any, run: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = inputs.config(tmp_path / "run", max_steps=3, warmup_ratio=0.0, report_to="tensorboard")
    train(config)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert losses == pytest.approx([line["loss"] for line in log_of(run) if "loss" in line])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "cosine rate up to 1e-06, the default (TRL's for full fine-tuning)"),
        ({"lora_rank": 2}, "cosine rate up to 1e-05, the default (MRPO authors' for LoRA)"),
        ({"learning_rate": 3e-4}, "cosine rate up to 0.0003\n"),
    ],
    ids=["all weights", "lora", "given"],
)
def test_the_rate_is_said_and_why_and_written(
    inputs: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    said: str,
) -> None:
    config = inputs.config(tmp_path / "run", **{"learning_rate": None, "max_steps": 1} | changes)
    train(config)
    assert said in capsys.readouterr().out
    settings = yaml.safe_load((tmp_path / "run" / "train.yaml").read_text())
    assert settings["learning_rate"] == config.peak_rate
    assert (
        f"| learning_rate | {config.peak_rate:.4g} |"
        in (tmp_path / "run" / "model" / "README.md").read_text()
    )


def test_the_largest_seed_trains(inputs: Any, tmp_path: Path) -> None:
    train(inputs.config(tmp_path / "run", seed=2**32 - 1, max_steps=1, lora_rank=2))


@pytest.mark.parametrize("epsilon", [1.0, 2.5])
def test_clipping_without_an_upper_bound_is_said(
    inputs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], epsilon: float
) -> None:
    train(inputs.config(tmp_path / "run", epsilon=epsilon, max_steps=1))
    assert f"WARNING: --epsilon {epsilon:g} leaves clipping (CTRO) without an upper bound" in (
        capsys.readouterr().out
    )
