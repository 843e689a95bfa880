"""The page holds everything it shows, runs nothing, and draws the figures that are in the JSON."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrpo.evaluation.audit.audit import audit
from mrpo.evaluation.compare.outcome import METRIC_WORDS
from mrpo.evaluation.compare.results import (
    Comparison,
    RunResult,
    ScoringCost,
    conditions_of,
    read_comparison,
)
from mrpo.evaluation.compare.verdict import judge, resample
from mrpo.evaluation.config import CompareConfig
from mrpo.evaluation.doctor.forecast import default_methods
from mrpo.evaluation.intervals import Interval
from mrpo.evaluation.report.charts import (
    Curve,
    Heatmap,
    Lines,
    Range,
    Ranges,
    Section,
    Table,
    legend,
    ticks,
    to_svg,
)
from mrpo.evaluation.report.report import report, to_html
from mrpo.evaluation.report.runs_section import thinned
from mrpo.files import write_json
from mrpo.settings import write_resolved
from mrpo.tests.evaluation.scored_pairs import Scored, add_scores, chat, prepared

Run = Callable[..., Any]
EVIL = '<script>document.title = "ran"</script><img src=x onerror="document.title=\'ran\'">&amp;"\''
METHODS = {"dpo:llama": ["llama"], "dpo:qwen": ["qwen"], "mrpo": ["llama", "qwen"]}
FRACTIONS, NOISES = [0.2, 1.0], [0.0, 0.15, 0.3]


class Page(HTMLParser):
    """Every element with its attributes, and the text a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._inside:
            while self._inside.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "style" not in self._inside:
            self.text += data

    def assert_harmless(self) -> None:
        tags = {tag for tag, _ in self.elements}
        assert not tags & {"script", "img", "iframe", "object", "embed", "link", "form", "base"}
        for tag, attributes in self.elements:
            for name, value in attributes.items():
                assert not name.startswith("on"), (tag, name)
                assert name not in {"src", "href", "srcset", "style", "xlink:href"}, (tag, name)
                assert not (value or "").strip().lower().startswith("javascript:")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """Pairs whose prompts, responses and sources are markup; references that know a little."""
    made = [chat(f"{EVIL} {n}", f"{EVIL} yes {n}", f"no {n} {EVIL}", EVIL) for n in range(120)]
    scored = prepared(tmp_path_factory.mktemp("report"), made, validation_fraction=0.4)
    rng = np.random.default_rng(0)
    logps = {
        alias: -scored.lengths * rng.uniform(0.5, 1.5, (120, 1)) + rng.normal([1, -1], 3, (120, 2))
        for alias in ("llama", "qwen")
    }
    add_scores(scored, logps)
    return scored


@pytest.fixture(scope="module")
def folder(scored: Scored) -> Path:
    """A comparison as `mrpo compare` leaves it, with numbers of our own and a name of markup."""
    root = scored.folder / "runs" / "<b>compare"
    comparison = a_comparison(root)
    for run in comparison.runs:
        Path(run.folder).mkdir(parents=True)
        lines = [
            {"step": s, "loss": 0.7 / s, "rewards/accuracies": 0.5, "refs/weight/llama": 1.0}
            for s in range(1, 201)
        ]
        log = "".join(json.dumps(line) + "\n" for line in lines)
        (Path(run.folder) / "log.jsonl").write_text(log)
    write_json(root / "compare.json", comparison)
    settings = CompareConfig(
        output_dir=str(root),
        methods=",".join(METHODS),
        pairs=str(scored.folder / "pairs"),
        refs="llama,qwen",
        refs_config=str(scored.folder / "refs.yaml"),
        store=scored.store.root,
    )
    write_resolved(settings, root / "compare.yaml")
    return root


def a_comparison(root: Path) -> Comparison:
    rng = np.random.default_rng(1)
    right = (rng.uniform(size=(50, 3, 6, 2)) < 0.6).astype(float)
    draws = resample(right, np.arange(50), 200)
    results = [
        result
        for metric in METRIC_WORDS
        for result in judge(draws, METHODS, conditions_of(FRACTIONS, NOISES), metric)
    ]
    runs = [
        RunResult(
            method=method,
            fraction=fraction,
            label_noise=noise,
            seed=seed,
            folder=str(root / "cells" / method / f"{fraction}-{noise}" / f"seed-{seed}"),
            identity="0" * 32,
            accuracy=dict.fromkeys(METRIC_WORDS, 0.5),
            pairs=70.0,
            seconds=3.5,
            pairs_per_second=20.0,
        )
        for method in METHODS
        for fraction in FRACTIONS
        for noise in NOISES
        for seed in (42, 43)
    ]
    return Comparison(
        base="llama",
        pairs=50,
        prompts=50,
        metric="reward",
        metrics=dict(METRIC_WORDS),
        methods=list(METHODS),
        references=METHODS,
        fractions=FRACTIONS,
        label_noises=NOISES,
        seeds=[42, 43],
        base_accuracy=dict.fromkeys(("sum", "token", "byte"), Interval(0.5, 0.4, 0.6)),
        results=results,
        growth={},
        runs=runs,
        missing=[],
        scoring=[ScoringCost(alias="llama", responses=240, tokens=4000, seconds=math.nan)],
        verdict=[f"One reference is enough here: {EVIL}"],
    )


@pytest.fixture(scope="module")
def written(folder: Path, scored: Scored, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page on all of it, the audit's figures included; both beside the stem `all`."""
    out = tmp_path_factory.mktemp("page")
    where = {
        "pairs": str(scored.folder / "pairs"),
        "refs_config": str(scored.folder / "refs.yaml"),
        "store": scored.store.root,
    }
    table = audit(refs=["llama", "qwen"], out=out / "all.csv", **where)
    assert table == out / "all.csv"
    return report(folders=[folder], audit=table, out=out / "all.html")


def test_markup_in_pairs_sources_and_names_does_nothing(written: Path) -> None:
    html = written.read_text(encoding="utf-8")
    page = Page(html)
    page.assert_harmless()
    assert EVIL in page.text  # as text, in the table by source and in the sentence
    assert "<b>compare" in page.text
    assert "default-src 'none'" in html


def test_nothing_is_asked_for_from_outside(written: Path) -> None:
    html = written.read_text(encoding="utf-8")
    for word in ("http://", "https://", "//cdn", "@import", "url(", "<script", "fetch("):
        assert word not in html.replace("http://www.w3.org/2000/svg", "")


def test_the_page_has_every_section_and_the_json_the_same_figures(written: Path) -> None:
    content = json.loads(Path(f"{written}.json").read_text(encoding="utf-8"))
    titles = [section["title"] for section in content["sections"]]
    assert titles == ["Comparison", "Training", "References", "Labels to look at"]
    page = Page(written.read_text(encoding="utf-8"))
    charts = [chart for section in content["sections"] for chart in section["charts"]]
    drawings = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert [chart["title"] for chart in charts] == [drawing["aria-label"] for drawing in drawings]
    shown = " ".join(chart["title"] for chart in charts)
    for word in ("Gain", "Learning curves", "Loss", "agree", "Margins", "weights", "CTRO"):
        assert word in shown or word in page.text
    loss = next(chart for chart in charts if chart["title"] == "Loss")
    assert len(loss["curves"]) == 3
    assert len(loss["curves"][0]["x"]) <= 60


def test_the_page_forecasts_what_each_method_can_do(written: Path) -> None:
    content = json.loads(Path(f"{written}.json").read_text(encoding="utf-8"))
    (references,) = [part for part in content["sections"] if part["title"] == "References"]
    (table,) = [t for t in references["tables"] if t["title"].startswith("Forecast")]
    assert [row[0] for row in table["rows"]] == ["method", *default_methods(["llama", "qwen"])]
    page = Page(written.read_text(encoding="utf-8"))
    for row in table["rows"]:
        assert all(cell in page.text for cell in row)
    assert any(line.startswith("Recommended: ") for line in references["words"])


def test_accuracy_is_drawn_against_noise_and_against_data_size(written: Path, folder: Path) -> None:
    """A chart of each for each level of the other; every point is a result of compare.json."""
    content = json.loads(Path(f"{written}.json").read_text(encoding="utf-8"))
    charts = {chart["title"]: chart for chart in content["sections"][0]["charts"]}
    comparison = read_comparison(folder / "compare.json")
    values = {
        (result.method, result.fraction, result.label_noise): result.accuracy.value
        for result in comparison.results
        if result.metric == "reward"
    }
    against_noise = [
        chart for title, chart in charts.items() if title.startswith("Accuracy against")
    ]
    assert len(against_noise) == len(FRACTIONS)
    for fraction, chart in zip(reversed(FRACTIONS), against_noise):
        assert [curve["name"] for curve in chart["curves"]] == list(METHODS)
        for curve in chart["curves"]:
            assert curve["x"] == NOISES
            assert curve["y"] == [values[curve["name"], fraction, noise] for noise in NOISES]
    against_size = [chart for title, chart in charts.items() if title.startswith("Learning curves")]
    assert len(against_size) == len(NOISES)
    for noise, chart in zip(NOISES, against_size):
        for curve in chart["curves"]:
            assert curve["y"] == [values[curve["name"], fraction, noise] for fraction in FRACTIONS]
    gain = next(
        chart
        for title, chart in charts.items()
        if "against label noise" in title and "Gain" in title
    )
    assert [curve["name"] for curve in gain["curves"]] == ["mrpo"]
    tables = [table["title"] for table in content["sections"][0]["tables"]]
    assert sum(title.startswith("Accuracy in %, trained on") for title in tables) == 6
    assert "Accuracy in % against label noise, trained on 20 % of the pairs" in tables


def test_outputs_of_one_stem_do_not_overwrite_each_other(written: Path) -> None:
    names = ["all.csv", "all.csv.json", "all.csv.yaml", "all.html", "all.html.json"]
    assert sorted(path.name for path in written.parent.iterdir()) == [*names, "all.html.yaml"]
    assert "sources" in json.loads((written.parent / "all.csv.json").read_text())


def test_folders_that_moved_are_still_found(mrpo: Run, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "moved")
    shutil.move(tmp_path / "moved", tmp_path / "again")
    ran = mrpo("report", tmp_path / "again", "--out", tmp_path / "page.html")
    assert ran.code == 0, ran.err
    assert ran.out.rstrip().endswith(str(tmp_path / "page.html"))


def test_references_that_are_gone_leave_the_runs_part(
    mrpo: Run, folder: Path, tmp_path: Path
) -> None:
    ran = mrpo("report", folder, "--pairs", tmp_path / "none", "--out", tmp_path / "page.html")
    assert ran.code == 0, ran.err
    assert "WARNING: the page leaves out the references" in ran.out
    assert "left out" in Page((tmp_path / "page.html").read_text(encoding="utf-8")).text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["nothing to report on"]),
        (["{tmp}"], ["neither a comparison", "mrpo train"]),
        (["--refs", "llama", "--out", "page.pdf"], ["page.pdf", "HTML"]),
        (["--refs", "llama", "--pairs", "{tmp}/none"], ["mrpo prepare"]),
    ],
)
def test_mistakes_are_one_line(
    mrpo: Run, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    ran = mrpo("report", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert ran.code == 2
    for word in words:
        assert word in ran.err


# Drawings


def test_a_drawing_leaves_gaps_where_nothing_is_known_and_escapes_names() -> None:
    chart = Lines(
        title=EVIL,
        x_label=EVIL,
        y_label="y",
        curves=[Curve(name=EVIL, x=[1, 2, 3], y=[1.0, math.nan, 3.0])],
    )
    svg = to_svg(chart)
    assert svg.count("<circle") == 2
    assert "nan" not in svg
    assert "<script" not in svg
    Page(svg).assert_harmless()


@pytest.mark.parametrize(
    "chart",
    [
        Lines(title="t", x_label="x", y_label="y", curves=[]),
        Lines(title="t", x_label="x", y_label="y", curves=[Curve(name="a", x=[5], y=[0.0])]),
        Ranges(title="t", x_label="x", rows=[]),
        Ranges(title="t", x_label="x", rows=[Range(name="a", value=Interval(1, math.nan, 1))]),
        Heatmap(title="t", rows=[], columns=[], values=[]),
        Heatmap(title="t", rows=["a" * 50], columns=["b"], values=[[math.nan]]),
    ],
    ids=lambda chart: type(chart).__name__,
)
def test_charts_of_little_or_nothing_are_drawn(chart: Any) -> None:
    svg = to_svg(chart)
    assert "nan" not in svg
    assert "inf" not in svg
    section = Section(title="s", tables=[Table(title="t", rows=[("a",)])], charts=[chart])
    Page(to_html("title", [], [section])).assert_harmless()


def test_more_curves_than_colors_are_told_apart() -> None:
    curves = [Curve(name=f"method {number}", x=[0, 1], y=[0, number]) for number in range(11)]
    chart = Lines(title="t", x_label="x", y_label="y", curves=curves)
    assert len({look for look, _ in legend(chart)}) == 11
    assert 'class="curve c2 dashed"' in to_svg(chart)


def test_places_in_a_drawing_by_hand() -> None:
    """From (0, 0) to (10, 1) with 5 % of room above and below: x over 338 units, y over 198."""
    svg = to_svg(
        Lines(title="t", x_label="x", y_label="y", curves=[Curve(name="a", x=[0, 10], y=[0, 1])])
    )
    assert 'cx="50.0" cy="199.0"' in svg
    assert 'cx="388.0" cy="19.0"' in svg


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-3.0, 12.0) == [0.0, 5.0, 10.0]
    assert ticks(0.61, 0.64) == [0.61, 0.62, 0.63, 0.64]


def test_a_long_curve_is_thinned_to_means() -> None:
    assert thinned([1, 2, 3, 4, 5], [1.0, 3.0, 5.0, 7.0, 9.0], 3) == ([2, 4, 5], [2, 6, 9])
