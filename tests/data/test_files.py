"""Files of every kind: JSON arrays, compressed files, folders and globs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mrpo.errors import UserError
from mrpo.tests.data.raw_rows import all_pairs, formats, run, turns, write


def zstd(path: Path, data: bytes) -> Path:
    with pa.CompressedOutputStream(str(path), "zstd") as out:
        out.write(data)
    return path


ROWS = [{"prompt": f"q{i}", "chosen": "a", "rejected": "ä\n" * i + "b"} for i in range(40)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1 << 20, 7])
def test_a_json_array_is_read_object_by_object(
    tmp_path: Path, indent: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mrpo.data.sources.CHUNK", chunk)
    text = json.dumps(ROWS, indent=indent, ensure_ascii=False).encode()
    plain = tmp_path / "rows.json"
    plain.write_bytes(b"\xef\xbb\xbf" + text)
    packed = tmp_path / "packed.json.gz"
    packed.write_bytes(gzip.compress(text))
    lines = tmp_path / "lines.json"
    write(lines, ROWS)
    expected = turns(run(lines, tmp_path / "pairs"))
    for path in (plain, packed, zstd(tmp_path / "rows.json.zst", text)):
        assert turns(run(path, tmp_path / "pairs")) == expected


@pytest.mark.parametrize("chunk", [1 << 20, 7])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[\n{"prompt": "q"\n, "chosen": "a", "rejected": }]',
            "line 3 is not JSON: Expecting value",
        ),
        ('[\n{"prompt": "q", "chosen": "a", "rejected": "b"}', "line 2 is not JSON: there must be"),
        ('[{"prompt": "q", "chosen": "a", "rejected": "b"} {}]', "line 1 is not JSON: there must"),
        ('[{"prompt": "q", "chosen": "a", "rejected": "b"}]\n{}', "line 2 .* behind the array's"),
        ('[\n\n{"prompt": "q", "chosen": "a"}]', "line 3, field 'rejected' is missing"),
        ("[\n\n1]", "line 3 must be one JSON object, not int"),
        ('[{"prompt": "q', "line 1 is not JSON: Unterminated string"),
        ('{\n"prompt": "q"}', "line 1 is not JSON: .*each line must be one object"),
        ("[" * 100_000, "line 1 is not JSON: it is too deep"),
    ],
)
def test_a_broken_array_is_one_line(
    tmp_path: Path, text: str, message: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mrpo.data.sources.CHUNK", chunk)
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        run(path, tmp_path / "pairs")
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_zstd_files(tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    expected = turns(run(write(tmp_path / "plain.jsonl", ROWS), tmp_path / "pairs"))
    half = zstd(tmp_path / "half.zst", text).read_bytes()
    for name in ("rows.jsonl.zst", "rows.jsonl.zstd"):
        path = zstd(tmp_path / name, text)
        shards = run(path, tmp_path / "pairs")
        assert turns(shards) == expected
        assert all_pairs(shards)[0].source == "rows"
    (tmp_path / "cut.jsonl.zst").write_bytes(half[:-30])
    with pytest.raises(UserError, match=r"cut.jsonl.zst cannot be read after line \d+: Truncated"):
        run(tmp_path / "cut.jsonl.zst", tmp_path / "pairs")
    (tmp_path / "no.jsonl.zst").write_bytes(text)
    with pytest.raises(UserError, match=r"no.jsonl.zst cannot be read after line 0: ZSTD"):
        run(tmp_path / "no.jsonl.zst", tmp_path / "pairs")


def test_folders_and_globs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set" / "deep"
    folder.mkdir(parents=True)
    write(tmp_path / "set" / "b.jsonl", ROWS[:2])
    write(folder / "a.jsonl", ROWS[2:3])
    pq.write_table(pa.Table.from_pylist(ROWS[3:5]), folder / "c.parquet")
    (tmp_path / "set" / "README.md").write_text("about")
    (tmp_path / "set" / ".hidden.jsonl").write_text("oops")
    shards = run(tmp_path / "set", tmp_path / "pairs")
    assert [pair.prompt for pair in all_pairs(shards)] == ["q0", "q1", "q2", "q3", "q4"]
    assert {pair.source for pair in all_pairs(shards)} == {"set"}
    assert shards.manifest["unread_files"] == [str(tmp_path / "set" / "README.md")]
    assert "README.md" in capsys.readouterr().out
    shards = run(f"{tmp_path}/set/**/*.jsonl", tmp_path / "pairs")
    assert [pair.prompt for pair in all_pairs(shards)] == ["q0", "q1", "q2"]
    assert [pair.source for pair in all_pairs(shards)] == ["b", "b", "a"]
    with pytest.raises(UserError, match=r"set/\*: unknown kind|README.md: unknown kind of file"):
        run(f"{tmp_path}/set/*", tmp_path / "pairs")


def test_columns_differ_between_the_files_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    write(tmp_path / "b.jsonl", [{"question": "r", "chosen": "a", "rejected": "b"}])
    shards = run(tmp_path / "?.jsonl", tmp_path / "pairs", chat=True)
    assert formats(shards) == [
        "preference pairs (chosen, rejected)",
        "question pairs (chosen, rejected)",
    ]
