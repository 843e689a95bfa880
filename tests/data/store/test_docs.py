"""docs/store.md: its three queries run as they stand, and its columns are the store's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import duckdb
import pandas
import pytest

from mrpo.data.store import SCORE_SCHEMA, TOKEN_COLUMNS, Store

PAGE = (Path(__file__).parents[3] / "docs" / "store.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def identity(tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store of one reference, with token log-probs in one file, a doubled and a missing row."""
    monkeypatch.chdir(tmp_path)
    store = Store("store")
    record = store.record(make.record())
    scores, ids = store.scores(record.identity), make.ids(10)
    with_tokens = make.scores(ids[:5], rejected_logp=[-9.0] * 5)
    for name in TOKEN_COLUMNS:
        with_tokens = with_tokens.append_column(name, [[[-0.5]] * 5])
    scores.add(with_tokens)
    scores.add(make.scores(ids[5:8], rejected_logp=[-0.1] * 3))
    scores.add(make.missing(ids[8:], "beyond_context"))
    return record.identity


def test_the_duckdb_query_counts_what_the_reference_prefers(identity: str) -> None:
    (query,) = blocks("sql")
    assert duckdb.sql(query).fetchall() == [(identity, 8, 5 / 8)]


def test_the_polars_query_takes_each_pair_once(identity: str, make: Any) -> None:
    Store("store").scores(identity).add(make.scores(make.ids(2), first=-50.0))
    kept = Store("store").scores(identity).read(["chosen_logp", "chosen_tokens"])
    names: dict[str, Any] = {}
    exec(blocks("python")[0], names)
    (row,) = names["scores"].rows(named=True)
    expected = sum(filter(None, kept["chosen_logp"].to_pylist())) / (7 * 8)
    assert (row["identity"], row["pairs"]) == (identity, 8)
    assert row["logp_per_token"] == pytest.approx(expected, rel=1e-12)


def test_the_pandas_query_lists_what_could_not_be_scored(identity: str) -> None:
    names: dict[str, Any] = {}
    exec(blocks("python")[1], names)
    unscored: pandas.DataFrame = names["unscored"]
    assert unscored.reason.tolist() == ["beyond_context"] * 2


def test_the_page_describes_every_column() -> None:
    described = set(re.findall(r"`(\w+)`", PAGE.split("## Columns")[1].split("##")[0]))
    assert {*SCORE_SCHEMA.names, *TOKEN_COLUMNS} <= described
