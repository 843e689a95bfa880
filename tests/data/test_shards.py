"""Shards give back what was written, bit for bit where nothing changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrpo.data.pairs import Pair, response_bytes
from mrpo.data.shards import PairShards, ShardWriter
from mrpo.data.tables import RESPONSE_IDS, pair_schema
from mrpo.errors import UserError

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
FIELDS = st.dictionaries(
    st.sampled_from(["name", "tool_calls", "reasoning_content"]),
    TEXT | st.lists(st.dictionaries(TEXT, st.integers() | TEXT, max_size=2), min_size=1),
    max_size=2,
)
MESSAGE = st.builds(
    lambda role, content, extra: {"role": role} | content | extra,
    st.sampled_from(["system", "user", "assistant", "tool"]),
    st.one_of(st.just({}), TEXT.map(lambda text: {"content": text})),
    FIELDS,
)
MESSAGES = st.lists(MESSAGE, min_size=1, max_size=3)
TOOLS = st.none() | st.lists(FIELDS, min_size=1, max_size=2)
KWARGS = st.none() | st.dictionaries(TEXT, st.booleans(), min_size=1, max_size=2)
SPLIT = st.sampled_from(["train", "validation"])


def chat_pairs(turns: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Pair]]:
    pair = st.builds(Pair, turns, turns, turns, TOOLS, KWARGS, TEXT, SPLIT)
    return st.lists(pair, min_size=1, max_size=9)


def number_pairs(count: int) -> list[Pair]:
    return [Pair(f"{i} or {i + 1}?", f" {i}", f" {i + 1}", source="s") for i in range(count)]


def write(folder: Path, pairs: list[Pair], shard_pairs: int, **facts: Any) -> PairShards:
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, shard_pairs)
    for pair in pairs:
        writer.add(pair, pair.id)
    writer.finish(facts)
    return PairShards(folder)


@settings(max_examples=60, deadline=None)
@given(chat_pairs(MESSAGES) | chat_pairs(TEXT), st.integers(1, 10))
def test_pairs_come_back_as_they_were(pairs: list[Pair], shard_pairs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shards = write(Path(folder), pairs, shard_pairs)
        numbers = range(len(shards.names))
        assert [pair for number in numbers for pair in shards.pairs(number)] == pairs
        ids = [bytes(pair_id) for number in numbers for pair_id in shards.pair_ids(number)]
        assert ids == [pair.id for pair in pairs]
        assert shards.num_pairs == len(pairs)
        assert shards.kind == ("messages" if pairs[0].is_chat else "text")
        table = pa.concat_tables(shards.table(number) for number in numbers)
        assert table.column("chosen_bytes").to_pylist() == [
            response_bytes(pair.chosen) for pair in pairs
        ]


def test_shards_are_filled_in_order_and_the_last_holds_the_rest(tmp_path: Path) -> None:
    shards = write(tmp_path / "pairs", number_pairs(23), 10, rows=23)
    assert shards.names == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert shards.rows == [10, 10, 3]
    assert shards.manifest["rows"] == 23
    for shard in shards.manifest["shards"]:
        content = (shards.path / shard["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]


def test_rows_are_taken_in_the_order_asked(tmp_path: Path) -> None:
    pairs = number_pairs(20)
    shards = write(tmp_path / "pairs", pairs, 10)
    assert shards.pairs(1, [7, 0, 7]) == [pairs[17], pairs[10], pairs[17]]
    assert shards.pairs(1, []) == []


def test_more_pairs_leave_full_shards_as_they_are(tmp_path: Path) -> None:
    few = write(tmp_path / "few", number_pairs(25), 10)
    more = write(tmp_path / "more", number_pairs(42), 10)
    assert few.manifest["shards"][:2] == more.manifest["shards"][:2]
    assert few.manifest["shards"][2] != more.manifest["shards"][2]


def test_the_pairs_of_a_prompt_stay_in_one_shard_and_earlier_shards_as_they_are(
    tmp_path: Path,
) -> None:
    """Six pairs a prompt and four a shard: a full shard waits for the end of its last prompt."""
    ranked = [Pair(f"Count to {n}.", f"{n}", f"{n} {k}") for n in range(4) for k in range(6)]
    some = write(tmp_path / "some", ranked[:15], 4)
    every = write(tmp_path / "every", ranked, 4)
    assert (some.rows, every.rows) == ([6, 6, 3], [6, 6, 6, 6])
    for shard in (0, 1):
        assert every.manifest["shards"][shard] == some.manifest["shards"][shard]
    returning = write(tmp_path / "returning", [*ranked[:12], *ranked[:1], *ranked[12:15]], 4)
    assert returning.rows == [6, 6, 4]  # a prompt that comes again goes where the writer is
    long = [Pair("One.", "1", f"{k}") for k in range(30)]
    assert write(tmp_path / "long", long, 4).rows == [8, 8, 8, 6]


@given(st.one_of(chat_pairs(MESSAGES), chat_pairs(TEXT)))
@settings(max_examples=40, deadline=None)
def test_folders_of_earlier_versions_have_their_response_ids_computed(pairs: list[Pair]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pairs"
        new = write(folder, pairs, 4)
        expected = [new.response_ids(shard) for shard in range(len(new.names))]
        for entry in new.manifest["shards"]:
            path = folder / entry["name"]
            table = pq.read_table(path).drop_columns(list(RESPONSE_IDS))
            pq.write_table(table, path)
            entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(new.manifest | {"schema_version": 1}))
        old = PairShards(folder)
        assert [pair for n in range(len(old.names)) for pair in old.pairs(n)] == pairs
        for shard, ids in enumerate(expected):
            for computed, column in zip(old.response_ids(shard), ids):
                assert computed.tolist() == column.tolist()
            assert not set(RESPONSE_IDS) & set(old.table(shard).column_names)


def test_an_id_is_that_of_a_response_under_its_prompt() -> None:
    pair = Pair("q", " a", " b", tools=[{"name": "f"}], chat_template_kwargs={"x": None, "y": 1})
    prompt, chosen, rejected = pair.response_ids
    text = '{"chat_template_kwargs":{"y":1},"prompt":"q","tools":[{"name":"f"}]}'
    assert prompt == hashlib.sha256(text.encode()).digest()[:16]
    text = f'{{"prompt":"{prompt.hex()}","response":" a"}}'
    assert chosen == hashlib.sha256(text.encode()).digest()[:16]
    flipped = Pair("q", " b", " a", pair.tools, pair.chat_template_kwargs, "elsewhere", "train")
    assert flipped.response_ids == (prompt, rejected, chosen)
    assert flipped.id != pair.id
    other = Pair("Q", " a", " b", pair.tools, pair.chat_template_kwargs)
    assert not {*other.response_ids} & {*pair.response_ids}


def test_the_columns_are_plain_parquet(tmp_path: Path) -> None:
    message = {"role": "assistant", "content": "Zürich", "name": "n"}
    pair = Pair([{"role": "user", "content": "q"}], [message], [{"role": "assistant"}])
    shards = write(tmp_path / "pairs", [pair], 10)
    table = pq.read_table(shards.path / "part-00000.parquet")
    assert table.schema.equals(pair_schema("messages"))
    assert table.column("chosen").to_pylist() == [
        [{"role": "assistant", "content": "Zürich", "extra": '{"name":"n"}'}]
    ]
    assert table.column("pair_id").type == pa.binary(16)
    assert pc.sum(table.column("chosen_bytes")).as_py() == 7


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    shards = write(tmp_path / "pairs", number_pairs(3), 10)
    assert shards.table(0, ["split", "chosen_bytes"]).column_names == ["split", "chosen_bytes"]


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (tmp_path, tmp_path / "missing", file):
        with pytest.raises(UserError, match=r"no prepared pairs .* run `mrpo prepare SOURCE"):
            PairShards(path)


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", '{"kind": "text"}', "\udcff", '{"kind": "text", "shards": 3}'),
        '{"kind": "tables", "shards": []}',
        '{"kind": "text", "shards": [{"name": "part-0.parquet", "rows": 1}]}',
        '{"kind": "text", "shards": [{"name": "part-/../x.parquet", "rows": 1, "sha256": "0"}]}',
        '{"kind": "text", "shards": [{"name": "part-0.parquet", "rows": "1", "sha256": "0"}]}',
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match="damaged"):
        PairShards(tmp_path)


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    shards = write(tmp_path / "pairs", number_pairs(3), 10)
    manifest = shards.manifest | {"schema_version": 99}
    (shards.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="schema version 99, this mrpo reads 1"):
        PairShards(shards.path)


def test_a_shard_that_is_not_what_the_manifest_says_is_refused(tmp_path: Path) -> None:
    shards = write(tmp_path / "pairs", number_pairs(25), 10)
    first, last = (shards.path / name for name in (shards.names[0], shards.names[2]))
    shutil.copy(last, first)
    with pytest.raises(UserError, match="has not the digest that it was written with"):
        shards.pair_ids(0)
    last.unlink()
    with pytest.raises(UserError, match="is missing"):
        shards.table(2)
    shards.manifest["shards"][1]["rows"] = 9
    (shards.path / "manifest.json").write_text(json.dumps(shards.manifest))
    with pytest.raises(UserError, match="has another number of rows"):
        PairShards(shards.path).table(1)


def test_a_shard_of_other_pairs_is_never_read(tmp_path: Path) -> None:
    """Also where its rows are as many, and where the shard has been read before."""
    shards = write(tmp_path / "pairs", number_pairs(20), 10)
    shards.pairs(0)
    (shards.path / shards.names[1]).replace(shards.path / shards.names[0])
    for columns in (None, ["pair_id"], ["split"]):
        with pytest.raises(UserError, match=r"part-00000\.parquet has not the digest"):
            shards.table(0, columns)


def test_pairs_prepared_again_are_not_taken_for_those_that_were_opened(tmp_path: Path) -> None:
    shards = write(tmp_path / "pairs", number_pairs(20), 10)
    shards.pairs(0)
    write(tmp_path / "pairs", number_pairs(40)[20:], 10)
    with pytest.raises(UserError, match="was prepared again meanwhile and holds other pairs now"):
        shards.pairs(0)
    assert write(tmp_path / "pairs", number_pairs(20), 10).digest == shards.digest
    assert shards.pairs(1) == number_pairs(20)[10:]


def test_links_keep_the_pairs_whatever_the_folder_holds_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write(tmp_path / "pairs", number_pairs(20), 10)
    links = shards.linked(tmp_path / "links")
    assert (links.path / links.names[0]).samefile(shards.path / shards.names[0])

    def refuse(*paths: Any) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    copies = shards.linked(tmp_path / "copies")
    for name in shards.names:
        (shards.path / name).unlink()
    write(tmp_path / "pairs", number_pairs(7), 10)
    for kept in (links, copies):
        assert [pair for n in (0, 1) for pair in kept.pairs(n)] == number_pairs(20)
        assert kept.digest == shards.digest
