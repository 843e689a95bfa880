"""docs/store.md: its three queries run as they stand, and its columns are the store's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas
import pytest

from mrpo.data.config import PrepareConfig
from mrpo.data.prepare import prepare
from mrpo.data.store import SCORE_SCHEMA, TOKEN_COLUMN, Store

PAGE = (Path(__file__).parents[3] / "docs" / "store.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def identity(tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Ten pairs, and a store of one reference, with token log-probs in one file: it prefers the
    chosen response of the first five, the rejected one of the next three, and lacks the others."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": f"{-n - 1}"} for n in range(10)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = prepare(PrepareConfig(source="data.jsonl", out="pairs")).response_ids(0)
    store = Store("store")
    record = store.record(make.record())
    scores, part = store.scores(record.identity), np.arange(10)
    with_tokens = make.pair_scores(ids.take(part < 5))
    scores.add(with_tokens.append_column(TOKEN_COLUMN, [[[-0.5]] * len(with_tokens)]))
    preferred = {"chosen_logp": [-9.0] * 3, "rejected_logp": [-0.1] * 3}
    scores.add(make.pair_scores(ids.take((part >= 5) & (part < 8)), **preferred))
    scores.add(make.missing(ids.take(part >= 8).both, "beyond_context"))
    return record.identity


def test_the_duckdb_query_counts_what_the_reference_prefers(identity: str) -> None:
    (query,) = blocks("sql")
    assert duckdb.sql(query).fetchall() == [(identity, 8, 5 / 8)]


def test_the_polars_query_takes_each_response_once(identity: str, make: Any) -> None:
    scores = Store("store").scores(identity)
    scores.add(make.scores(scores.response_ids()[:2], first=-50.0))
    kept = scores.read(["logp", "tokens"])
    names: dict[str, Any] = {}
    exec(blocks("python")[0], names)
    (row,) = names["scores"].rows(named=True)
    expected = sum(filter(None, kept["logp"].to_pylist())) / (7 * 16)
    assert (row["identity"], row["responses"]) == (identity, 16)
    assert row["logp_per_token"] == pytest.approx(expected, rel=1e-12)


def test_the_pandas_query_lists_what_could_not_be_scored(identity: str) -> None:
    names: dict[str, Any] = {}
    exec(blocks("python")[1], names)
    unscored: pandas.DataFrame = names["unscored"]
    assert unscored.reason.tolist() == ["beyond_context"] * 4


def test_the_page_describes_every_column() -> None:
    described = set(re.findall(r"`(\w+)`", PAGE.split("## Columns")[1].split("##")[0]))
    assert {*SCORE_SCHEMA.names, TOKEN_COLUMN} <= described
