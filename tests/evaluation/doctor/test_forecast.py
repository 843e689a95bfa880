"""The forecast: what it measures, against truth that is known; and what it may say of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from mrpo.errors import UserError
from mrpo.evaluation.config import DoctorConfig
from mrpo.evaluation.doctor.doctor import doctor
from mrpo.evaluation.doctor.forecast import (
    GRID_BETAS,
    GRID_EPSILONS,
    Forecast,
    default_methods,
    forecast,
)
from mrpo.evaluation.doctor.forecast_words import conclusions, forecast_rows
from mrpo.method.grammar import parse_method
from mrpo.method.objective import ReferenceLogps
from mrpo.tests.evaluation.doctor import faulty
from mrpo.tests.evaluation.scored_pairs import add_scores, chat, prepared
from mrpo.tests.evaluation.trained import Clinic

ALIASES = ["llama", "mistral", "qwen"]


def scores_of(margins: np.ndarray, seed: int = 0) -> ReferenceLogps:
    """Scores with these margins [N, K]; two pairs of each prompt."""
    n, k = margins.shape
    rng = np.random.default_rng(seed)
    rejected = -rng.uniform(20, 60, (n, 1)) - rng.uniform(0, 2, (n, k)) - np.maximum(margins, 0)
    return ReferenceLogps(
        ref_chosen_logps=rejected + margins,
        ref_rejected_logps=rejected,
        ref_chosen_tokens=np.full((n, k), 12),
        ref_rejected_tokens=np.full((n, k), 15),
        chosen_bytes=np.full(n, 60),
        rejected_bytes=np.full(n, 60),
        prompts=np.arange(n) // 2,
    )


def experts(
    seed: int, noise: float, pairs: int = 1500, skills: tuple[float, ...] = (5.0, 4.0, 4.0)
) -> tuple[ReferenceLogps, np.ndarray]:
    """Each reference knows one kind of pair, by `skills` nats; a share of labels is turned.

    Returns the scores as labels write the pairs, and [N] which labels were turned round.
    """
    rng = np.random.default_rng(seed)
    kind = rng.integers(len(skills), size=pairs)
    margins = rng.normal(0, 1.5, (pairs, len(skills)))
    for k, skill in enumerate(skills):
        margins[kind == k, k] += rng.uniform(0.5, 1.5, (kind == k).sum()) * skill
    turned = rng.random(pairs) < noise
    return scores_of(np.where(turned[:, None], -margins, margins), seed), turned


def values(of: Forecast) -> np.ndarray:
    return np.array([row.relative_weight.value for row in [*of.rows, *of.grid]])


@pytest.mark.parametrize("noise", [0.15, 0.3])
def test_methods_come_in_the_order_of_the_truth(noise: float) -> None:
    """Known wrong labels give the same number, and the same order, as the references' word."""
    for seed in range(3):
        scores, turned = experts(seed, noise)
        told, truth = forecast(scores, ALIASES), forecast(scores, ALIASES, contradicted=turned)
        assert told.informed
        assert told.wrong == pytest.approx(truth.wrong, abs=0.05)
        assert spearmanr(values(told), values(truth)).statistic > 0.97
        assert np.abs(values(told) - values(truth)).max() < 0.12
        assert [(r.method, r.beta) for r in told.rows] == [(r.method, r.beta) for r in truth.rows]


def test_with_known_wrong_labels_it_is_a_ratio_of_means() -> None:
    scores, turned = experts(1, 0.3, pairs=300)
    scores.ref_chosen_logps[7, 1] = np.nan  # such a pair is left out
    found = forecast(scores, ALIASES, methods=["geometric+arwc", "dpo:qwen"], contradicted=turned)
    assert found.pairs == 299
    for row in found.rows:
        method = parse_method(row.method, ALIASES, beta=row.beta)
        weights = method.initial_weights(scores)
        known = ~np.isnan(scores.ref_chosen_logps).any(1)
        wrong, right = weights[turned & known].mean(), weights[~turned & known].mean()
        assert row.relative_weight.value == pytest.approx(wrong / right)
        assert row.relative_weight.low < wrong / right < row.relative_weight.high


@pytest.mark.parametrize("copies", [1, 3])
def test_with_one_reference_nothing_is_told_apart(copies: int) -> None:
    """Nor with copies of one: whatever the method, it is DPO with the base."""
    scores, _ = experts(0, 0.3, skills=(5.0,))
    names = ("ref_chosen_logps", "ref_rejected_logps", "ref_chosen_tokens", "ref_rejected_tokens")
    copied = {name: np.repeat(getattr(scores, name), copies, axis=1) for name in names}
    found = forecast(replace(scores, **copied), ALIASES[:copies])
    plain = [row for row in found.rows + found.grid if "+reliable" not in row.method]
    assert len(plain) >= 2 * copies
    for row in plain:
        q = row.relative_weight
        assert (q.value, q.low, q.high) == pytest.approx((1, 1, 1), rel=1e-9)
        assert row.moved == pytest.approx(0, abs=1e-9)
        assert row.effect in ("same", "open")
    judged = [row for row in found.rows if "+reliable" in row.method]
    assert all(row.relative_weight.value < 1 for row in judged)


def test_references_that_know_nothing_of_the_labels_are_said_to() -> None:
    """Their margins are sure and large; over 15 draws of labels no forecast claims anything."""
    for seed in range(15):
        rng = np.random.default_rng(seed)
        scores = scores_of(rng.normal(0, 6, (200, 2)))
        found = forecast(scores, ALIASES[:2], methods=["dpo:mistral", "geometric+reliable"])
        assert not found.informed
        assert {row.effect for row in found.rows + found.grid} == {"open"}
        text = "\n".join(conclusions(found, "llama"))
        assert "do not predict these labels beyond chance" in text
        assert "recommended: dpo:llama, for nothing here speaks for several references" in text
        assert "count" not in text


def test_labels_that_no_reference_contradicts_leave_nothing_to_tell() -> None:
    margins = abs(np.random.default_rng(0).logistic(0, 8, (400, 3)))
    found = forecast(scores_of(margins), ALIASES)
    assert found.informed
    assert np.isnan(values(found)).all()
    lines = conclusions(found, "llama")
    assert "recommended: dpo:llama, for the references contradict hardly any label" in lines[-1]
    assert forecast_rows(found)[1][1] == "–"


def test_a_few_pairs_do_not_speak() -> None:
    scores, turned = experts(0, 0.3, pairs=24)
    found = forecast(scores, ALIASES)
    assert {row.effect for row in found.rows} == {"open"}
    few = forecast(scores.of_rows(np.arange(19)), ALIASES, contradicted=turned[:19])
    assert few.rows == []
    (line,) = conclusions(few, "llama")
    assert line.startswith("none: 19 pairs that every reference has scored, 20 are the fewest")


def test_clipping_silences_the_others_as_epsilon_says() -> None:
    scores, _ = experts(2, 0.3)
    by_epsilon = {
        epsilon: forecast(scores, ALIASES, methods=["mrpo"], betas=[0.5], epsilon=epsilon).rows[0]
        for epsilon in (0.0, 0.1, 0.5, 50.0)
    }
    nothing = by_epsilon[0.0]
    assert (nothing.clipped, nothing.references) == (1, 1)
    assert max(nothing.left, nothing.moved) < 1e-12
    assert by_epsilon[50.0].left == pytest.approx(1)
    lefts = [row.left for row in by_epsilon.values()]
    heard = [row.references for row in by_epsilon.values()]
    assert lefts == sorted(lefts)
    assert heard == sorted(heard)
    unclipped = forecast(scores, ALIASES, methods=["harmonic+arwc"], betas=[0.5]).rows[0]
    assert unclipped.relative_weight == by_epsilon[50.0].relative_weight
    assert np.isnan(unclipped.left)


def test_the_effective_number_of_references() -> None:
    scores, _ = experts(2, 0.3)
    rows = forecast(scores, ALIASES, betas=[0.5]).rows
    heard = {row.method: row.references for row in rows}
    assert heard["dpo:qwen"] == heard["dpo:llama+reliable"] == 1
    assert heard["geometric"] == heard["multi-dpo"] == pytest.approx(3)
    method = parse_method("geometric+max-margin", ALIASES)
    shares = method.targets(scores).weights.numpy().mean(0)  # one-hot: who decides how often
    assert heard["geometric+max-margin"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_the_grid_names_the_least_that_lets_mrpo_act() -> None:
    scores, turned = experts(3, 0.3)
    found = forecast(scores, ALIASES, contradicted=turned)
    grid = {(row.beta, row.epsilon): row for row in found.grid}
    assert list(grid) == [(beta, epsilon) for epsilon in GRID_EPSILONS for beta in GRID_BETAS]
    (line,) = [line for line in conclusions(found, "llama") if "lets mrpo do so" in line]
    for beta in GRID_BETAS:
        able = [e for e in GRID_EPSILONS if grid[beta, e].effect == "less"]
        words = f"beta {beta:g} and epsilon"
        if able:
            least = "none" if able[0] is None else f"{able[0]:g}"
            assert f"{words} {least} (" in line
        else:
            assert words not in line
    assert grid[0.1, 0.1].effect == "same"
    assert grid[0.5, 0.9].effect == "less"
    nowhere = replace(found, grid=[replace(row, effect="same") for row in found.grid])
    assert any("lets mrpo do so: none;" in line for line in conclusions(nowhere, "llama"))


def test_what_is_recommended_is_better_beyond_doubt_or_simpler() -> None:
    scores, _ = experts(0, 0.3)
    found = forecast(scores, ALIASES)
    assert found.best is not None
    assert found.best.method.endswith("+reliable")
    assert found.gain is not None
    assert found.gain.low > 0
    (line,) = [line for line in conclusions(found, "llama") if line.startswith("recommended")]
    assert f"recommended: {found.best.method} with beta" in line
    unsure = replace(found, gain=replace(found.gain, low=-0.1))
    assert found.single is not None
    assert f"recommended: {found.single.method} with" in "".join(conclusions(unsure, "llama"))
    scores, _ = experts(0, 0.3, skills=(0.5, 0.5, 8.0))  # llama knows next to nothing
    alone = forecast(scores, ALIASES, methods=["dpo:llama", "dpo:qwen"])
    assert alone.best == alone.single
    assert "recommended: dpo:qwen with beta 0.5, no use of several" in "".join(
        conclusions(alone, "llama")
    )


def test_a_unit_of_length_brings_its_own_betas() -> None:
    scores, turned = experts(0, 0.3)
    found = forecast(scores, ALIASES, normalize="byte", contradicted=turned)
    assert {row.beta for row in found.rows} == {2.5, 12.5}
    assert {row.beta for row in found.grid} == {25 * beta for beta in GRID_BETAS}
    rows = {row.method: row for row in found.rows}
    assert rows["geometric+arwc"].effect == "less"
    assert rows["dpo:llama"].effect == "same"


def test_what_needs_training_is_left_out_by_name() -> None:
    scores, _ = experts(0, 0.3, pairs=200)
    methods = ["geometric+swcw", "geometric+vaw", "mrpo+thompson"]
    found = forecast(scores, ALIASES, methods=methods)
    assert {row.method for row in found.rows} == {"geometric+vaw"}
    expected = "no forecast for geometric+swcw, mrpo+thompson: weights learned while training"
    assert conclusions(found, "llama")[-1] == expected
    with pytest.raises(UserError, match="'gemma' is not among llama, mistral, qwen"):
        forecast(scores, ALIASES, methods=["dpo:gemma"])


def test_doctor_writes_rows_that_a_comparison_can_be_held_against(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, _ = experts(0, 0.3, pairs=240)
    rows = [chat(f"Is {n} even?", f"yes {n}" + "!" * (n % 7), f"no {n}") for n in range(240)]
    world = prepared(tmp_path, rows)
    columns = scores.ref_chosen_logps, scores.ref_rejected_logps
    add_scores(world, {a: np.stack([c[:, k] for c in columns], 1) for k, a in enumerate(ALIASES)})
    config = DoctorConfig(
        refs=",".join(ALIASES),
        pairs=str(tmp_path / "pairs"),
        refs_config=str(tmp_path / "refs.yaml"),
        store=world.store.root,
        methods="mrpo,geometric+arwc,dpo:qwen",
        beta="0.2,0.5",
        epsilon=0.5,
        out=str(tmp_path / "doctor.json"),
    )
    diagnosis = doctor(config)
    printed = capsys.readouterr().out
    content = json.loads(Path(config.out).read_text(encoding="utf-8"))
    keys = [(row["method"], row["beta"], row["epsilon"]) for row in content["forecast"]["rows"]]
    assert keys == [
        *(("mrpo", 0.2, 0.5), ("mrpo", 0.5, 0.5)),
        *(("geometric+arwc", 0.2, None), ("geometric+arwc", 0.5, None)),
        *(("dpo:qwen", 0.2, None), ("dpo:qwen", 0.5, None)),
    ]
    assert diagnosis.forecast is not None
    value = diagnosis.forecast.rows[3].relative_weight
    assert content["forecast"]["rows"][3]["relative_weight"] == {
        "value": value.value, "low": value.low, "high": value.high,
    }  # fmt: skip
    assert f"{value.value:.2f} ({value.low:.2f} to {value.high:.2f})" in printed
    for line in content["conclusions"]:
        assert f"forecast    {line}" in printed
    for beta, message in (("0", "--beta 0: must be numbers above 0"), ("x", "--beta x: must be")):
        with pytest.raises(UserError, match=message):
            doctor(replace(config, beta=beta))


def test_real_references_that_learned_little_are_not_praised(
    clinic: Clinic, tmp_path: Path
) -> None:
    """Tiny models that read real pairs: what they say of labels is within chance, or it is shown.

    A broken one stops the forecast.
    """
    diagnosis = clinic.diagnose(clinic.store(tmp_path / "store"))
    found = diagnosis.forecast
    assert found is not None
    assert [row.method for row in found.rows[::2]] == default_methods(ALIASES)
    claimed = [row for row in found.rows if row.effect in ("less", "more")]
    assert found.informed or not claimed
    assert found.informed == (found.label_gain.low > 0)
    broken = clinic.store(tmp_path / "broken", qwen=faulty.swapped(clinic.scores["qwen"]))
    diagnosis = clinic.diagnose(broken)
    assert diagnosis.forecast is None
    expected = "none while qwen is broken: mend it, or leave it out of --refs"
    assert diagnosis.conclusions == [expected]
