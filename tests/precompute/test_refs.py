"""`mrpo refs` lists references and says which models are missing, without opening weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from mrpo.errors import UserError
from mrpo.precompute.config import RefsConfig
from mrpo.precompute.refs import refs


@pytest.fixture
def refs_yaml(tmp_path: Path, tiny_references: dict[str, Path]) -> Path:
    file = tmp_path / "refs.yaml"
    file.write_text(
        f"llama: {tiny_references['llama']}\n"
        f"qwen: {{model: {tiny_references['qwen']}, dtype: float32}}\n"
        "gone: nowhere/at/all\n"
    )
    return file


def test_one_line_each_and_a_missing_model_stops_nothing(
    refs_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refs(RefsConfig(refs_config=str(refs_yaml), store=str(tmp_path / "store")))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["alias", "llama", "qwen", "gone"]
    assert "1,024" in lines[1]
    assert "nothing" in lines[1]
    assert "?" in lines[3]
    assert lines[4].startswith("gone: ")
    assert not (tmp_path / "store").exists()


def test_the_license_is_that_of_the_model_card(
    tmp_path: Path, tiny_references: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "licensed"
    folder.mkdir()
    for path in tiny_references["llama"].iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (tmp_path / "refs.yaml").write_text("mine: licensed\n")
    refs(RefsConfig(refs_config=str(tmp_path / "refs.yaml"), store=str(tmp_path / "store")))
    assert "apache-2.0" in capsys.readouterr().out


def test_an_unknown_alias_is_named_with_the_known_ones(refs_yaml: Path) -> None:
    with pytest.raises(UserError, match="unknown reference 'lama'; known: llama, qwen, gone"):
        refs(RefsConfig(refs="lama", refs_config=str(refs_yaml)))


def test_what_is_special_about_a_references_rendering_has_a_line(
    tmp_path: Path, tiny_references: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "opens.jinja").write_text(
        "{%- for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '</s>' }}{%- endfor %}"
        "{{ 'assistant: <think>' if add_generation_prompt }}"
    )
    (tmp_path / "refs.yaml").write_text(
        f"llama: {{model: {tiny_references['llama']}, system_role: fold}}\n"
        f"opens: {{model: {tiny_references['llama']}, chat_template: opens.jinja}}\n"
    )
    refs(RefsConfig(refs_config=str(tmp_path / "refs.yaml"), store=str(tmp_path / "store")))
    out = capsys.readouterr().out
    assert "llama: system messages go in front of the first user turn" in out
    assert "opens: the response begins where a sentinel in its place does" in out
    assert "llama: the response" not in out
