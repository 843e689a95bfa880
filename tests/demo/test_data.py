"""The demo's files: the same for the same seed, and corpora with one strength each."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mrpo.demo.data import DOMAINS, STRENGTHS, DemoFiles, make_domains, write_data
from mrpo.errors import UserError

CHATS = 2000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> DemoFiles:
    return write_data(tmp_path_factory.mktemp("data"), pairs=300, chats=CHATS, seed=0)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_same_seed_writes_the_same_bytes(files: DemoFiles, tmp_path: Path) -> None:
    again = write_data(tmp_path, pairs=300, chats=CHATS, seed=0)
    for path in (files.pairs, *files.corpora.values()):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    other = write_data(tmp_path, pairs=300, chats=CHATS, seed=1)
    assert other.pairs == again.pairs
    assert other.pairs.read_bytes() != files.pairs.read_bytes()


def test_pairs_come_in_equal_parts_from_each_domain_and_name_it(files: DemoFiles) -> None:
    assert Counter(row["source"] for row in rows(files.pairs)) == dict.fromkeys(DOMAINS, 100)


def test_chosen_is_the_right_reply_and_rejected_the_wrong_one(files: DemoFiles) -> None:
    known = {
        example.prompt: example
        for domain in make_domains(seed=0).values()
        for example in domain.asked
    }
    for row in rows(files.pairs):
        example = known[row["prompt"][0]["content"]]
        assert [turn["content"] for turn in row["chosen"]] == [example.right]
        assert [turn["content"] for turn in row["rejected"]] == [example.wrong]


@pytest.mark.parametrize(("family", "strength"), STRENGTHS.items())
def test_a_corpus_is_mostly_of_its_own_domain_and_right_there(
    files: DemoFiles, family: str, strength: str
) -> None:
    told = {
        (example.prompt, reply): reply == example.right
        for domain in make_domains(seed=0).values()
        for example in domain.told
        for reply in (example.right, example.wrong)
    }
    right: dict[str, list[bool]] = {name: [] for name in DOMAINS}
    for row in rows(files.corpora[family]):  # type: ignore[index]
        user, assistant = row["messages"]
        right[row["source"]].append(told[user["content"], assistant["content"]])
    assert len(right[strength]) / CHATS == pytest.approx(0.8, abs=0.04)
    for name, replies in right.items():
        share = 1.0 if name == strength else 0.5
        assert sum(replies) / len(replies) == pytest.approx(share, abs=0 if share == 1 else 0.12)


@pytest.mark.parametrize("pairs", [0, 2, 3001])
def test_more_pairs_than_there_are_questions_are_refused(tmp_path: Path, pairs: int) -> None:
    with pytest.raises(UserError, match=f"--pairs is {pairs}; the demo can make 3 to 3,000 pairs"):
        write_data(tmp_path / "data", pairs=pairs, chats=1, seed=0)
    assert not (tmp_path / "data").exists()
