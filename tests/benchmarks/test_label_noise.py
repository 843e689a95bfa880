"""The trial of wrong labels: what it turns round, and what its table says."""

from __future__ import annotations

import pytest
import torch

from mrpo.benchmarks import label_noise
from mrpo.data.pairs import Pair
from mrpo.method.losses import sigmoid_loss


def test_a_share_of_the_labels_is_turned_and_more_noise_turns_the_same_and_more() -> None:
    pairs = [Pair(f"prompt {n}", "yes", "no") for n in range(2000)]
    turned = {noise: {n for n, p in enumerate(pairs) if label_noise.turned(p, noise)}
              for noise in (0.0, 0.15, 0.3)}  # fmt: skip
    assert not turned[0.0]
    assert len(turned[0.3]) / 2000 == pytest.approx(0.3, abs=0.03)
    assert turned[0.15] < turned[0.3]
    assert label_noise.line_of(pairs[0], True)["chosen"] == "no"


def test_weighting_never_reads_a_pair_as_its_opposite() -> None:
    margin, wrong = torch.tensor([1.0, -2.0]), torch.tensor([0.25, 1.0], dtype=torch.float64)
    loss = label_noise.weighted_loss(margin, 0.5, "sigmoid", wrong)
    torch.testing.assert_close(loss, sigmoid_loss(margin, 0.5) * torch.tensor([0.75, 0.0]))


def test_gains_are_paired_with_the_best_single_reference(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Gains of 1 and 3 points on two subsets: 2, ± 12.7 (t of one degree) times 1."""
    best, lines = [70.0, 80.0], []
    for subset in range(2):
        values = dict.fromkeys(label_noise.SINGLE, best[subset] - 5)
        values["dpo:qwen"] = best[subset]
        values["geometric"] = best[subset] + 1 + 2 * subset
        for method, value in values.items():
            cell = {"noise": 0.3, "pairs": 9, "beta": 1, "subset": subset, "seed": 0}
            lines.append({"cell": cell | {"method": method}, "accuracies": {"all": value}})
    label_noise.table(lines, [*label_noise.SINGLE, "geometric"])
    (line,) = [row for row in capsys.readouterr().out.splitlines() if row.startswith("geometric")]
    assert "best single +2.0 (-10.7 to +14.7)" in line
