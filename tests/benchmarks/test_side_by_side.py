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
from mrpo.benchmarks.workload import long_pairs, real_pairs, write_pairs

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
