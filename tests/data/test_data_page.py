"""docs/data.md: every example is run as it stands there, and gives the pairs that it shows."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mrpo.data.config import FIELDS
from mrpo.data.layouts import LEFT_OUT, RESPONSES, SCORES
from mrpo.data.shards import PairShards
from mrpo.tests.data.raw_rows import all_pairs

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
EXAMPLE = re.compile(
    r"### (?P<title>[^\n]+)\n(?:(?!###).)*?```jsonl\n(?P<rows>.+?)```\n"
    r"```bash\n(?P<command>mrpo .+?)\n```\n```json\n(?P<pairs>.+?)```",
    re.DOTALL,
)
EXAMPLES = [match.groupdict() for match in EXAMPLE.finditer(PAGE)]


def test_every_format_has_an_example() -> None:
    assert len(EXAMPLES) == PAGE.count("\n### ") == PAGE.count("```jsonl\n") == 8


@pytest.mark.parametrize("example", EXAMPLES, ids=[example["title"] for example in EXAMPLES])
def test_an_example_gives_the_pairs_that_it_shows(
    example: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mrpo: Callable[..., Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(example["rows"])
    ran = mrpo(*shlex.split(example["command"])[1:])
    assert (ran.code, ran.err) == (0, "")
    assert [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        for pair in all_pairs(PairShards("pairs"))
    ] == [json.loads(line) for line in example["pairs"].splitlines()]


def test_the_page_names_what_there_is() -> None:
    for name in (*FIELDS, *RESPONSES, *SCORES, *LEFT_OUT.keys() - {"single_response"}):
        assert f"`{name}`" in PAGE, name
