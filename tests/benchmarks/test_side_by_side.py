"""The benchmarks' own promises: real pairs, memory above the imports, documents as measured."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from mrpo.benchmarks import scoring, store, training
from mrpo.benchmarks.common import DOCUMENT, RESULTS, median, spread, table
from mrpo.benchmarks.workload import (
    long_pairs,
    pair_work,
    ranked_pairs,
    real_pairs,
    write_pairs,
)
from mrpo.data.rendering import Renderer
from mrpo.data.store import Store
from mrpo.demo.models import build_tokenizer
from mrpo.precompute.scoring import PairSelection, sort_out

SCRIPTS = {"scoring-cpu": scoring, "scoring-ranked": scoring, "training-cpu": training}
SCRIPTS |= {"scoring-gpu": scoring, "training-gpu": training}


def test_without_the_data_one_line_says_where_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: .*hh_harmless_test.*--data FOLDER$"):
        real_pairs(tmp_path / "nowhere", tmp_path)


def test_long_pairs_are_as_long_as_asked_and_are_pairs(shared_data: Path, tmp_path: Path) -> None:
    pairs = list(islice(long_pairs(real_pairs(shared_data, tmp_path), 1000, 600), 20))
    for pair in pairs:
        contents = [[turn["content"] for turn in part] for part in (pair.prompt, pair.chosen)]  # type: ignore[union-attr]
        assert sum(map(len, contents[0])) > 1000
        assert sum(map(len, contents[1])) >= 600
        assert pair.prompt[-1]["role"] == "user"  # type: ignore[index]
    shards = write_pairs(tmp_path / "long", iter(pairs), 20)
    assert shards.rows == [20]
    assert [pair.chosen for pair in shards.pairs(0)] == [pair.chosen for pair in pairs]


def test_ranked_responses_take_less_than_a_third_of_the_tokens_of_their_pairs(
    shared_data: Path, tmp_path: Path
) -> None:
    """All six pairings of GSM8K's four solutions to each of 20 questions, as the worker asks."""
    pairs = list(islice(ranked_pairs(shared_data), 120))
    shards = write_pairs(tmp_path / "ranked", pairs, 120)
    assert shards.rows == [120]
    ids = shards.response_ids(0)
    assert (len(set(ids.prompts.tolist())), len(set(ids.both.tolist()))) == (20, 80)
    texts = [str(turns[0]["content"]) for pair in pairs for turns in (pair.prompt, pair.chosen)]  # type: ignore[index]
    renderer = Renderer(build_tokenizer("llama", texts, 1000))
    selection, none = PairSelection(shards), Store(tmp_path / "none").scores("0" * 32)
    asked = selection.responses(0, selection.missing(0, none))
    rendered = renderer.render_responses(asked.asked(shards, 0))
    work = sort_out(asked, rendered, None, None)
    assert [len(prompt.responses) for prompt in work.prompts] == [4] * 20
    by_pair = pair_work(shards, renderer.render_many(pairs))
    assert 3 * work.tokens < by_pair.tokens


def test_memory_counts_from_the_end_of_the_imports_to_the_peak(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import numpy\n"
        "from mrpo.benchmarks.common import Measurement\n"
        "before = numpy.ones(25_000_000)\n"  # 200 MB that count as imports
        "measurement = Measurement(); measurement.imported()\n"
        "with measurement.timed():\n"
        "    for _ in range(3):\n"
        "        numpy.ones(10_000_000).sum()\n"  # 80 MB at a time
        "measurement.write(Path(sys.argv[1]))\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "figures.json"], check=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert 78 < figures["peak_mb"] < 95
    assert 0 < figures["cpu_seconds"] < 10 * figures["seconds"] + 1


def test_medians_spreads_and_tables() -> None:
    runs = [{"seconds": 2.0}, {"seconds": 1.0}, {"seconds": 4.0}]
    assert median(runs, "seconds") == 2.0
    assert spread(runs, "seconds") == 1.5
    assert table(["", "n"], [["a", "1"]]) == "|  | n |\n| --- | ---: |\n| a | 1 |"


def test_the_document_shows_what_was_measured() -> None:
    document = DOCUMENT.read_text()
    for name, script in SCRIPTS.items():
        path = RESULTS / f"{name}.json"
        shown = document.split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0]
        if path.exists():
            results = json.loads(path.read_text())
            assert shown == script.report(results, script.Options(**results["options"])) + "\n"
        else:
            assert "|" not in shown, f"{name}: a table without its figures"


def test_the_document_shows_what_was_measured_of_the_store() -> None:
    shown = DOCUMENT.read_text().split("<!-- store -->\n")[1].split("<!-- end of store -->")[0]
    path = RESULTS / "store.json"
    assert path.exists() or "|" not in shown, "a table without its figures"
    if path.exists():
        assert shown == store.table(**json.loads(path.read_text())) + "\n"
