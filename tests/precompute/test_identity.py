"""What makes a reference's identity, and what does not; commits of Hub models, kept and moved."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mrpo.data import references as file_digests
from mrpo.data.references import ReferenceSpec
from mrpo.errors import UserError
from mrpo.precompute import identity as hub
from mrpo.precompute.identity import resolve_reference


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MRPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tiny_references: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_references["llama"], tmp_path / "model")


def spec_of(folder: Path, **changes: object) -> ReferenceSpec:
    return ReferenceSpec("llama", str(folder), **changes)  # type: ignore[arg-type]


def identity(spec: ReferenceSpec) -> str:
    return resolve_reference(spec).identity


def test_a_copied_folder_under_another_alias_is_the_same_reference(folder: Path) -> None:
    there = shutil.copytree(folder, folder.parent / "elsewhere")
    other = ReferenceSpec("other", str(there), tensor_parallel_size=4)
    assert identity(other) == identity(spec_of(folder))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"quantization": "fp8"},
        {"chat_template": "{{ messages }}"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"enable_thinking": None}},
        {"system_role": "fold"},
    ],
)
def test_what_refs_yaml_says_of_the_scores_is_part_of_it(folder: Path, change: dict) -> None:
    assert identity(spec_of(folder, **change)) != identity(spec_of(folder))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"]
)
def test_one_changed_byte_is_another_reference(folder: Path, name: str) -> None:
    before = identity(spec_of(folder))
    data = bytearray((folder / name).read_bytes())
    if name == "config.json":
        data = bytearray(data.replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 1e-05'))
    else:
        data[-9] ^= 1
    (folder / name).write_bytes(data)
    assert identity(spec_of(folder)) != before


def test_files_that_make_no_score_are_no_part_of_it(folder: Path) -> None:
    before = identity(spec_of(folder))
    (folder / "generation_config.json").write_text('{"temperature": 0.1}')
    (folder / "README.md").write_text("# A model")
    (folder / "optimizer.bin").write_bytes(b"state")
    config = json.loads((folder / "config.json").read_text())
    config |= {"transformers_version": "99.0", "_name_or_path": "/somewhere/else"}
    (folder / "config.json").write_text(json.dumps(config, indent=8))
    assert identity(spec_of(folder)) == before


def test_dtype_auto_is_what_the_configuration_says(folder: Path) -> None:
    assert resolve_reference(spec_of(folder)).dtype == "float32"
    assert identity(spec_of(folder, dtype="float32")) == identity(spec_of(folder))


def test_an_adapter_is_part_of_it_and_its_base_path_is_not(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (adapter / "adapter_config.json").write_text('{"r": 8, "base_model_name_or_path": "/a"}')
    spec = spec_of(folder, adapter=str(adapter))
    first = identity(spec)
    assert first != identity(spec_of(folder))
    (adapter / "adapter_config.json").write_text('{"r": 8, "base_model_name_or_path": "/b"}')
    assert identity(spec) == first
    (adapter / "adapter_model.safetensors").write_bytes(b"Weights")
    assert identity(spec) != first


def test_an_incomplete_folder_is_refused_with_what_it_lacks(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    with pytest.raises(UserError, match=r"lacks b\.safetensors"):
        identity(spec_of(folder))
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        identity(spec_of(folder))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(UserError, match="no tokenizer"):
        identity(spec_of(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        identity(spec_of(folder))


def test_a_digest_is_kept_beside_the_stat_and_redone_when_that_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 1000)
    monkeypatch.setattr(file_digests, "SETTLED", 0)
    first = file_digests.file_digest(path)
    assert len(list((cache / "digests").iterdir())) == 1
    monkeypatch.setattr(file_digests, "_hash", lambda *_: pytest.fail("hashed again"))
    assert file_digests.file_digest(path) == first
    monkeypatch.undo()
    monkeypatch.setenv("MRPO_CACHE", str(cache))
    stat = path.stat()
    path.write_bytes(b"b" + b"a" * 999)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same mtime
    assert file_digests.file_digest(path) != first


def test_a_file_written_just_now_is_not_trusted_to_keep_its_stat(
    tmp_path: Path, cache: Path
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a")
    file_digests.file_digest(path)
    assert not (cache / "digests").exists()


def test_a_file_of_many_blocks_notices_a_byte_in_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_digests, "BLOCK", 100)
    path = tmp_path / "weights"
    data = bytearray(950)
    path.write_bytes(data)
    seen = {file_digests.file_digest(path)}
    for at in (0, 99, 100, 500, 949):
        changed = bytearray(data)
        changed[at] = 1
        path.write_bytes(changed)
        seen.add(file_digests.file_digest(path))
    assert len(seen) == 6


def test_a_damaged_or_unwritable_cache_costs_a_hash_and_no_more(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a")
    monkeypatch.setattr(file_digests, "SETTLED", 0)
    digest = file_digests.file_digest(path)
    for note in (cache / "digests").iterdir():
        note.write_text("{")
    assert file_digests.file_digest(path) == digest
    monkeypatch.setenv("MRPO_CACHE", str(path / "below-a-file"))
    assert file_digests.file_digest(path) == digest


A, B = "a" * 40, "b" * 40


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with one model at commit A, as `huggingface_hub` lays it out."""
    import huggingface_hub.constants
    import huggingface_hub.file_download

    root = tmp_path / "hub"
    for constants in (huggingface_hub.constants, huggingface_hub.file_download.constants):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    put_commit(root, A)
    return root


def put_commit(root: Path, commit: str, branch: str = "main") -> None:
    model = root / "models--org--name"
    snapshot = model / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot / "config.json").write_text('{"dtype": "bfloat16"}')
    (model / "refs").mkdir(exist_ok=True)
    (model / "refs" / branch).write_text(commit)


def test_a_hub_model_is_its_commit_and_offline_the_cache_knows_it(hub_cache: Path) -> None:
    reference = resolve_reference(ReferenceSpec("x", "org/name"))
    assert (reference.model, reference.revision, reference.dtype) == ("org/name", A, "bfloat16")
    pinned = resolve_reference(ReferenceSpec("y", "org/name", revision=A))
    assert pinned.identity == reference.identity


def test_the_first_commit_is_kept_until_it_is_updated(hub_cache: Path) -> None:
    spec = ReferenceSpec("x", "org/name")
    put_commit(hub_cache, B)
    kept = resolve_reference(spec, {"model": A})
    assert (kept.revision, kept.moved) == (A, {"model": B})
    updated = resolve_reference(spec, {"model": A}, update=True)
    assert (updated.revision, updated.moved) == (B, {})
    assert updated.identity != kept.identity


def test_a_kept_commit_needs_no_hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> str:
        raise UserError("the Hub can't be reached")

    monkeypatch.setattr("mrpo.precompute.identity.hub_commit", unreachable)
    kept = resolve_reference(ReferenceSpec("x", "org/name"), {"model": A})
    assert (kept.revision, kept.moved) == (A, {})


def test_a_model_that_is_nowhere_says_so_in_one_line(hub_cache: Path) -> None:
    with pytest.raises(UserError, match="not in the Hub's cache") as caught:
        resolve_reference(ReferenceSpec("x", "org/other"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="nor a Hub id"):
        resolve_reference(ReferenceSpec("x", "./not/here"))


def test_nothing_in_an_identity_names_a_path_or_a_token(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    inputs = json.dumps(resolve_reference(spec_of(folder)).inputs)
    assert str(folder.parent) not in inputs
    assert "hf_secret" not in inputs


def test_the_loader_is_told_the_folder_and_the_commit(folder: Path, hub_cache: Path) -> None:
    local = resolve_reference(
        replace(spec_of(folder.relative_to(folder.parent)), folder=folder.parent)
    )
    assert (local.model, local.revision) == (str(folder.resolve()), None)
    assert hub.hub_config("org/name", A) == {"dtype": "bfloat16"}


OPENS = (
    "{%- for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '</s>' }}{%- endfor %}"
    "{{ 'assistant: ' ~ ('<think>' if think is not defined) if add_generation_prompt }}"
)


def test_the_way_to_find_a_response_is_part_of_it_only_where_it_is_by_sentinels(
    folder: Path,
) -> None:
    inputs = resolve_reference(spec_of(folder)).inputs
    assert not {"response_place", "system_role"} & set(inputs)  # earlier scores are found again
    opens = spec_of(folder, chat_template=OPENS)
    assert resolve_reference(opens).inputs["response_place"] == "sentinel"
    off = replace(opens, chat_template_kwargs={"think": False})
    assert "response_place" not in resolve_reference(off).inputs
    folds = spec_of(folder, system_role="fold")
    assert resolve_reference(folds).inputs["system_role"] == "fold"
    assert folds.entry()["system_role"] == "fold"
    assert "system_role" not in spec_of(folder).entry()
