"""The audit finds labels that were flipped, and a reviewed table enters the next run."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrpo.data.shards import PairShards
from mrpo.evaluation.audit.suspicion import suspicion, usual_size
from mrpo.tests.evaluation.scored_pairs import Scored, add_scores, chat, prepared

Run = Callable[..., Any]
PAIRS, FLIPPED = 400, range(20)


def text(seed: object, words: int) -> str:
    rng = random.Random(str(seed))
    return " ".join("".join(rng.choices("abcdefghij", k=5)) for _ in range(words))


def rows() -> list[dict[str, Any]]:
    """400 questions of two sources; the last 2 repeat the first 2 with the labels turned."""
    made = [
        chat(text((n, "q"), 12), text((n, "a"), 9), text((n, "b"), 9), "web" if n % 4 else "=books")
        for n in range(PAIRS - 2)
    ]
    for n in range(2):
        first = made[100 + n]
        made.append(first | {"chosen": first["rejected"], "rejected": first["chosen"]})
    return made


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """Two references that know what is right, one that knows nothing; 20 labels are wrong."""
    scored = prepared(tmp_path_factory.mktemp("audit"), rows())
    rng = np.random.default_rng(0)
    truth = rng.normal(8, 3, PAIRS)
    truth[list(FLIPPED)] *= -1
    margins = {
        "llama": truth + rng.normal(0, 3, PAIRS),
        "qwen": truth / 2 + rng.normal(0, 2, PAIRS),
        "noise": rng.normal(0, 50, PAIRS),
    }
    logps = {name: np.stack([m / 2 - 90, -m / 2 - 90], 1) for name, m in margins.items()}
    logps["llama"][30] = np.nan  # beyond its context
    add_scores(scored, logps)
    return scored


def audit(mrpo: Run, scored: Scored, out: Path, *flags: object) -> list[dict[str, str]]:
    ran = mrpo("audit", "--refs", "llama,qwen,noise", *scored.flags, "--out", out, *flags)
    assert ran.code == 0, ran.err
    assert ran.out.rstrip().endswith(str(out))
    with out.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_flipped_labels_come_first_and_noise_has_no_say(
    mrpo: Run, audited: Scored, tmp_path: Path
) -> None:
    table = audit(mrpo, audited, tmp_path / "audit.csv", "--top", 20)
    against = [line for line in table if "references against label" in line["reasons"]]
    right = sum(int(line["row"]) in FLIPPED for line in against)
    assert right >= 18, f"{right} of {len(against)}"
    figures = json.loads((tmp_path / "audit.csv.json").read_text())
    assert figures["reference_weights"]["noise"] < 0.2 * figures["reference_weights"]["llama"]
    assert figures["sources"]["web"]["pairs"] + figures["sources"]["=books"]["pairs"] == PAIRS
    line = next(line for line in against if int(line["row"]) in FLIPPED)
    assert "references prefer the rejected response" in line["evidence"]
    assert float(line["label probability"]) < 0.1
    assert float(line["margin llama"]) < 0


def test_near_duplicates_with_opposite_labels_name_each_other(
    mrpo: Run, audited: Scored, tmp_path: Path
) -> None:
    table = audit(mrpo, audited, tmp_path / "audit.csv", "--top", 1)
    pair = [line for line in table if "near duplicate" in line["reasons"]]
    assert {line["row"] for line in pair} == {"100", "398"}
    assert pair[0]["near duplicate of"] == pair[1]["pair_id"]
    assert pair[1]["near duplicate of"] == pair[0]["pair_id"]


def test_no_cell_is_a_formula(mrpo: Run, audited: Scored, tmp_path: Path) -> None:
    table = audit(mrpo, audited, tmp_path / "audit.csv")
    sources = {line["source"] for line in table}
    assert sources == {"web", "'=books"}


def test_a_reviewed_table_enters_the_next_run(mrpo: Run, audited: Scored, tmp_path: Path) -> None:
    ran = mrpo(
        *("audit", "--refs", "llama,qwen,noise", *audited.flags),
        *("--out", tmp_path / "audit.csv", "--top", 5),
    )
    suggested = ran.out.partition("then run: mrpo ")[2].splitlines()[0].split()
    with (tmp_path / "audit.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    for line, decision in zip(table, ["flip", "exclude", "keep"]):
        line["decision"] = decision
    with (tmp_path / "audit.csv").open("w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, list(table[0]))
        lines.writeheader()
        lines.writerows(table)
    before = PairShards(audited.folder / "pairs").digest
    ran = mrpo(*suggested)
    assert ran.code == 0, ran.err
    assert "review  1 excluded, 1 flipped" in ran.out
    assert PairShards(audited.folder / "pairs").digest == before  # and what was scored stays
    after = PairShards(audited.folder / "pairs-reviewed")
    ids = {bytes(pair_id).hex() for pair_id in after.pair_ids(0)}
    gone = [line["pair_id"] in ids for line in table]
    assert gone == [False, False] + [True] * (len(table) - 2)
    refused = mrpo("audit", "--refs", "llama", *audited.flags, "--out", tmp_path / "audit.csv")
    assert refused.code == 2
    assert "holds 3 decisions" in refused.err


def test_pairs_not_yet_scored_come_with_the_line_to_run(mrpo: Run, tmp_path: Path) -> None:
    scored = prepared(tmp_path, rows()[:6])
    add_scores(scored, {"llama": np.full((6, 2), -5.0)})
    larger = prepared(tmp_path, rows()[:9])
    ran = mrpo("audit", "--refs", "llama", *larger.flags, "--out", tmp_path / "audit.csv")
    assert ran.code == 2
    assert f"run: mrpo precompute --pairs {tmp_path / 'pairs'} --refs llama" in ran.err
    assert not (tmp_path / "audit.csv").exists()


# The questions, with numbers alone


def labelled(pairs: int = 2000, seed: int = 0) -> tuple[np.random.Generator, np.ndarray]:
    return np.random.default_rng(seed), np.arange(pairs)


def test_length_alone_is_told_from_what_the_references_know() -> None:
    """Half the labels follow length alone, and the references are against those."""
    rng, prompts = labelled()
    by_length = prompts % 2 == 0
    lengths = np.where(by_length[:, None], [300.0, 100.0], rng.uniform(100, 300, (2000, 2)))
    quality = np.where(by_length, -1.0, 1.0)[:, None] + rng.normal(0, 0.5, (2000, 2))
    doubts = suspicion(quality, lengths, prompts)
    assert doubts.length_weight > 0
    suspects = np.argsort(-np.nan_to_num(doubts.length))[:500]
    assert by_length[suspects].mean() > 0.95


def test_length_that_predicts_nothing_explains_nothing() -> None:
    rng, prompts = labelled()
    doubts = suspicion(rng.normal(1, 1, (2000, 2)), rng.uniform(10, 300, (2000, 2)), prompts)
    assert doubts.length_weight == 0
    assert np.isnan(doubts.length).all()


def test_a_divided_pair_by_hand() -> None:
    """Usual sizes are 1 and 10: rows 0 and 2 divide the references by 3 and by 2 units."""
    margins = np.array([[3.0, -40.0], [1.0, 10.0], [-2.0, 20.0], [1.0, 10.0], [1.0, -10.0]])
    assert usual_size(margins).tolist() == [1.0, 10.0]
    doubts = suspicion(margins, np.ones((5, 2)), np.arange(5))
    np.testing.assert_array_equal(doubts.divided, [3.0, np.nan, 2.0, np.nan, np.nan])


def test_references_that_predict_nothing_are_said_to() -> None:
    rng, prompts = labelled()
    margins = -np.abs(rng.normal(5, 1, (2000, 2)))  # always for the rejected one
    doubts = suspicion(margins, np.ones((2000, 2)), prompts)
    assert not doubts.informed
    assert (doubts.against > 0).all()


def test_missing_scores_leave_the_others_their_say() -> None:
    rng, prompts = labelled()
    margins = rng.normal(1, 1, (2000, 2))
    margins[7], margins[9, 0] = np.nan, np.nan
    margins[9, 1] = -20.0
    doubts = suspicion(margins, np.ones((2000, 2)), prompts)
    assert np.isnan(doubts.label_probability[7])
    assert np.isnan(doubts.against[7])
    assert np.nanargmax(doubts.against) == 9
