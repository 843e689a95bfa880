"""Reading rows from files and Hub data sets; every fault is one line that names the place."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mrpo.data.config import ColumnSettings
from mrpo.data.layouts import RowReader
from mrpo.data.sources import Row, open_sources
from mrpo.errors import UserError

ROWS = [
    {"prompt": "q1", "chosen": "a\u2028b", "rejected": 'say "no",\r\nplease'},
    {"prompt": "q2", "chosen": "Zürich", "rejected": "東京\nx"},
]
OBJECT = b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n'


def rows(given: Path | str, **names: str) -> list[Row]:
    (source,) = open_sources(str(given))
    return list(source.rows(RowReader(ColumnSettings(**names))))


def write_jsonl(path: Path, values: list[dict[str, Any]], ascii_only: bool = False) -> Path:
    lines = [json.dumps(value, ensure_ascii=ascii_only) + "\n" for value in values]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_csv(path: Path, values: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(values[0]))
        writer.writeheader()
        writer.writerows(values)
    return path


def zipped(path: Path) -> Path:
    out = path.with_name(path.name + ".gz")
    out.write_bytes(gzip.compress(path.read_bytes()))
    return out


def write_parquet(path: Path, values: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(values), path, row_group_size=1)
    return path


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    table = write_csv(tmp_path / "rows.csv", ROWS)
    expected = [(1, ROWS[0]), (2, ROWS[1])]
    assert rows(jsonl) == rows(zipped(jsonl)) == expected
    assert rows(write_jsonl(tmp_path / "rows.json", ROWS, ascii_only=True)) == expected
    assert rows(table) == rows(zipped(table)) == expected
    assert rows(write_parquet(tmp_path / "rows.parquet", ROWS)) == expected


def test_a_byte_order_mark_and_blank_lines_are_no_data(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + OBJECT + b"\n  \n" + OBJECT.rstrip())
    assert [number for number, _ in rows(path)] == [1, 4]
    table = tmp_path / "rows.csv"
    table.write_bytes(b"\xef\xbb\xbfprompt,chosen,rejected\r\n\r\nq,a,b\r\n")
    assert rows(table) == [(1, {"prompt": "q", "chosen": "a", "rejected": "b"})]


def test_a_csv_cell_can_hold_messages_as_json(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "q"}]
    cells = {"prompt": json.dumps(message), "chosen": "[{oops", "rejected": '[{"x": 1, "x": 2}]'}
    (row,) = rows(write_csv(tmp_path / "rows.csv", [cells]))
    assert row == (1, cells | {"prompt": message})


def test_of_a_table_only_the_columns_that_matter_are_read(tmp_path: Path) -> None:
    values = [{"q": "q1", "chosen": "a", "rejected": "b", "tools": "[]", "image": "x"}]
    for path in (
        write_csv(tmp_path / "rows.csv", values),
        write_parquet(tmp_path / "rows.parquet", values),
    ):
        ((_, row),) = rows(path, prompt_column="q")
        assert row == {"q": "q1", "chosen": "a", "rejected": "b", "tools": "[]"}


def test_a_hub_data_set_is_read_by_split_and_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `datasets` takes a folder of the name for the data set itself: the real way, offline.
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "hub" / "name"
    folder.mkdir(parents=True)
    write_jsonl(folder / "train.jsonl", ROWS * 600)
    write_jsonl(folder / "test.jsonl", ROWS)
    assert rows("hub/name:test") == [(1, ROWS[0]), (2, ROWS[1])]
    assert [number for number, _ in rows("hub/name:train")] == list(range(1, 1201))
    assert rows("hub/name:train[1:2]") == [(1, ROWS[1])]
    assert rows("hub/name/default:test") == rows("hub/name:test")
    (source,) = open_sources("hub/name:test")
    assert source.name == "hub/name"
    with pytest.raises(
        UserError, match=r"hub/name:dev cannot be loaded from the Hub: .*Unknown split"
    ):
        rows("hub/name:dev")
    with pytest.raises(UserError, match="column 'right' is missing; there are prompt, chosen"):
        rows("hub/name:test", chosen_column="right")


def test_a_hub_data_set_that_cannot_be_had_is_one_line() -> None:
    with pytest.raises(
        UserError, match=r"^no-one/nothing:train cannot be loaded from the Hub: .+$"
    ):
        rows("no-one/nothing:train")


def test_names_of_sources(tmp_path: Path) -> None:
    first, second = tmp_path / "web.v2.jsonl.gz", tmp_path / "books.parquet"
    first.touch()
    second.touch()
    sources = open_sources(f"{first}, {second},org/set:train")
    assert [source.name for source in sources] == ["web.v2", "books", "org/set"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "names nothing"),
        (" , ", "names nothing"),
        ("missing.jsonl", r"missing\.jsonl: no such file; .* org/name:split"),
        ("org/name", "no such file; .* org/name:split"),
        ("folder", "folder is a folder without data; its files must end in"),
        ("no*.jsonl", r"no\*\.jsonl matches no file"),
        ("notes.txt", r"notes\.txt: unknown kind of file; it must end in \.jsonl"),
        ("table.parquet.gz", "unknown kind of file"),
    ],
)
def test_what_can_be_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "table.parquet.gz").touch()
    with pytest.raises(UserError, match=message):
        open_sources(given)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", OBJECT + b'{"prompt": \n', r"line 2 is not JSON: Expecting value at column"),
        ("x.jsonl", OBJECT + b"\n[1]\n", "line 3 must be one JSON object, not list"),
        (
            "x.jsonl",
            b'{"prompt": "q", "rejected": "b"}\n',
            "line 1, field 'chosen' is missing; there are prompt, rejected; name columns with",
        ),
        ("x.jsonl", OBJECT + b'{"a": "\xff"}\n', "line 2 is not UTF-8 at byte 8"),
        ("x.jsonl", b"[" * 100_000, "line 1 is JSON too deep"),
        ("x.jsonl", OBJECT + b'{"a": 1, "b": 2, "a": 1}', "line 2: key 'a' is there twice; keep"),
        ("x.json", b'[\n{"x": {"a": 1, "a": 1}}]', "line 2: key 'a' is there twice; keep one"),
        ("x.jsonl.gz", gzip.compress(OBJECT * 999)[:-30], "cannot be read after line"),
        ("x.jsonl.gz", OBJECT, "cannot be read after line 0: Not a gzipped file"),
        ("x.csv", b"prompt,chosen,rejected\nq,a,b\nq,a\n", "row 2 has 2 fields, the header has 3"),
        ("x.csv", b"prompt,chosen,rejected\nq,a,b,c\n", "row 1 has 4 fields, the header has 3"),
        ("x.csv", b'prompt,chosen,rejected\nq,a,b\nq,"a,b\n', "row 2 is not CSV: unexpected end"),
        ("x.csv", b"prompt,chosen,rejected\nq,a,\xff\n", "line 2 is not UTF-8 at byte 5"),
        (
            "x.csv",
            b"prompt,chosen\nq,a\n",
            "column 'rejected' is missing; there are prompt, chosen",
        ),
        ("x.csv", b"chosen,rejected,chosen\nq,a,b\n", "column 'chosen' occurs 2 times"),
        (
            "x.csv",
            b'prompt,chosen,rejected\nq,a,b\n"{""role"":""user"",""role"":""user""}",a,b\n',
            "row 2: key 'role' is there twice; keep one",
        ),
        ("x.csv", b"", "column 'chosen' is missing; there are none"),
        ("x.parquet", b"PAR1 or not", "cannot be read as Parquet"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        rows(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_a_column_says_which_there_are(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [{"question": "q", "chosen": "a"}])
    with pytest.raises(UserError, match="'rejected' is missing; there are question, chosen; name"):
        rows(path)
