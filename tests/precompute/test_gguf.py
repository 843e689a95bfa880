"""A GGUF file as a reference: the scores of its model's folder, and clear refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from mrpo.data.references import ReferenceSpec, load_refs
from mrpo.data.rendering.renderer import load_tokenizer
from mrpo.model.load import load_model
from mrpo.precompute import reference_run
from mrpo.precompute.identity import resolve_reference
from mrpo.precompute.run import precompute
from mrpo.tests.gguf_files import write_gguf
from mrpo.tests.precompute.workspace import Workspace, rows


@pytest.fixture(scope="module")
def file(tiny_references: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_references["llama"], tmp_path_factory.mktemp("gguf") / "llama.gguf")


def test_scores_are_those_of_the_folder(
    file: Path, tiny_references: dict[str, Path], tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path, {"folder": tiny_references["llama"], "file": file})
    workspace.prepare(rows(10))
    assert precompute(workspace.config()).exit_code == 0
    columns = ["response_id", "logp", "tokens", "prompt_tokens"]
    from_folder, from_file = (workspace.by_id(name, columns) for name in ("folder", "file"))
    assert len(from_file) == 20
    assert from_file.keys() == from_folder.keys()
    for response_id, row in from_folder.items():
        assert np.isfinite(row["logp"])
        assert from_file[response_id] == row


def test_the_tokenizer_is_that_of_the_folder(file: Path, tiny_references: dict[str, Path]) -> None:
    theirs, ours = load_tokenizer(str(tiny_references["llama"])), load_tokenizer(str(file))
    assert ours.chat_template == theirs.chat_template
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    # transformers adds "<|endoftext|>", an id for which the model has no embedding
    for text in ("A naïve café; 東京 🙂\n 12345", "eggs <|endoftext|> Paris", "<|eot_id|>"):
        assert ours(text).input_ids == theirs(text).input_ids
    assert len(ours) == len(theirs)


def test_the_identity_is_the_content_of_the_file(file: Path, tmp_path: Path) -> None:
    def identity(path: Path, **changes: Any) -> str:
        return resolve_reference(ReferenceSpec("file", str(path), **changes)).identity

    copied = shutil.copy(file, tmp_path / "renamed.gguf")
    assert identity(copied) == identity(file) == identity(file, dtype="float32")
    assert identity(file, dtype="bfloat16") != identity(file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    copied.write_bytes(content)
    assert identity(copied) != identity(file)


def test_a_model_from_a_file_is_saved_and_adapted_like_any_other(
    file: Path, tmp_path: Path
) -> None:
    model: Any = load_model(file)
    model.save_pretrained(tmp_path / "saved")
    ids = torch.arange(12)[None]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.allclose(saved(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    assert adapted.peft_config["default"].base_model_name_or_path == str(file)


def test_an_adapter_is_trained_from_a_file_and_evaluated(
    file: Path, tmp_path: Path, mrpo: Callable[..., Any]
) -> None:
    workspace = Workspace(tmp_path, {"file": file})
    pairs, run = workspace.prepare(rows(8)), tmp_path / "run"
    assert precompute(workspace.config()).exit_code == 0
    settings = ["--method", "dpo:file", "--lora-rank", 2, "--max-steps", 1, "--output-dir", run]
    ran = mrpo("train", *_arguments(workspace), *settings)
    assert ran.code == 0, ran.err
    written = json.loads((run / "model" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(file)
    out = run / "evaluation.json"
    ran = mrpo("evaluate", "--runs", run, "--split", "all", "--out", out)
    assert ran.code == 0, ran.err
    [policy] = json.loads(out.read_text())["policies"]
    assert policy["overall"]["pairs"] == pairs.num_pairs


def _truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncated, "not a GGUF file that transformers reads"),
        (lambda content: content[:300], "not a GGUF file that transformers reads"),
        (lambda content: b"", "not a GGUF file that transformers reads"),
        (lambda content: b"PK" + content[2:], "magic"),
        (lambda content: content.replace(b"llama", b"xlama"), "architecture xlama"),
    ],
    ids=["half", "header", "empty", "no GGUF", "unknown architecture"],
)
def test_what_cannot_be_read_is_one_line(
    file: Path,
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    message: str,
    mrpo: Callable[..., Any],
) -> None:
    (tmp_path / "bad.gguf").write_bytes(damage(file.read_bytes()))
    workspace = Workspace(tmp_path, {"bad": tmp_path / "bad.gguf"})
    workspace.prepare(rows(2))
    ran = mrpo("precompute", *_arguments(workspace))
    assert ran.code == 2, ran.err
    (line,) = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "bad.gguf" in line
    assert "Traceback" not in ran.err


def test_engine_vllm_refuses_a_file_in_one_line(
    file: Path, tmp_path: Path, mrpo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_run, "find_spec", lambda name: True)
    workspace = Workspace(tmp_path, {"file": file})
    workspace.prepare(rows(2))
    ran = mrpo("precompute", *_arguments(workspace), "--engine", "vllm")
    assert ran.code == 2
    assert "reference file: vLLM reads no GGUF file; use --engine hf" in ran.err
    assert not Path(workspace.store.root).exists()


def test_without_the_package_the_line_says_what_to_install(
    file: Path, tmp_path: Path, mrpo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mrpo.data.references.find_spec", lambda name: None)
    workspace = Workspace(tmp_path, {"file": file})
    workspace.prepare(rows(2))
    ran = mrpo("precompute", *_arguments(workspace))
    assert ran.code == 2
    assert "pip install 'mrpo[gguf]'" in ran.err


def test_a_file_that_is_not_there_is_no_hub_model(tmp_path: Path, mrpo: Callable[..., Any]) -> None:
    workspace = Workspace(tmp_path, {"file": Path("models/absent.gguf")})
    workspace.prepare(rows(2))
    ran = mrpo("precompute", *_arguments(workspace))
    assert ran.code == 2
    assert "'models/absent.gguf' is neither a folder or GGUF file here nor a Hub id" in ran.err


def test_refs_lists_size_and_context_of_a_file(
    file: Path, tmp_path: Path, mrpo: Callable[..., Any]
) -> None:
    workspace = Workspace(tmp_path, {"file": file})
    ran = mrpo("refs", "--refs-config", workspace.refs_config, "--store", workspace.store.root)
    assert ran.code == 0, ran.err
    (line,) = [line for line in ran.out.splitlines() if line.startswith("file")]
    assert "1,024" in line
    assert "MB" in line or "KB" in line or "kB" in line


def _arguments(workspace: Workspace) -> list[object]:
    where = {"pairs": workspace.folder / "pairs", "refs-config": workspace.refs_config}
    where |= {"store": workspace.store.root, "refs": ",".join(load_refs(workspace.refs_config))}
    return [part for name, value in where.items() for part in (f"--{name}", value)]
