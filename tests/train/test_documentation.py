"""docs/mathematics.md says what the code does: names, plots, figures."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mrpo import ctro_clip, multi_dpo_loss, preference_loss, virtual_reference
from mrpo.method.arrays import NORMALIZATIONS
from mrpo.method.grammar import METHODS
from mrpo.method.loss_functions import LOSS_TYPES
from mrpo.method.losses import DIVERGENCES
from mrpo.method.virtual_reference import KINDS
from mrpo.method.weightings import WEIGHTINGS

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "mathematics.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def plots() -> ModuleType:
    spec = spec_from_file_location("plots", DOCS / "plots.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name", [*METHODS, *KINDS, *WEIGHTINGS, *LOSS_TYPES, *DIVERGENCES, *NORMALIZATIONS], ids=str
)
def test_every_choice_is_explained(name: str) -> None:
    assert f"`{name}`" in TEXT


def test_every_plot_is_shown_and_every_image_is_a_plot(plots: ModuleType) -> None:
    shown = set(re.findall(r"!\[.*?\]\(images/(.*?)\.svg\)", TEXT))
    there = {path.stem for path in (DOCS / "images").glob("*.svg")}
    assert shown == there == set(plots.PLOTS)


def test_a_weight_of_one_percent_moves_harmonic_nine_tenths_of_40_nats() -> None:
    virtual = virtual_reference(np.array([[0.0, -40.0]]), np.array([0.99, 0.01]))
    assert virtual[0] / -40 == pytest.approx(0.9, abs=0.02)


def test_saturated_on_both_responses_no_other_reference_is_left() -> None:
    """Means proportional to the base's log-probs: exactly (1 + eps) D_1, whatever the weights."""
    chosen, rejected = np.array([[-80.0, -160.0, -240.0]]), np.array([[-100.0, -200.0, -300.0]])
    for weights in ([0.0, 0.5, 0.5], [0.0, 0.9, 0.1]):
        virtual = [
            virtual_reference(r, np.array(weights)) for r in ctro_clip(chosen, rejected, 0.1)
        ]
        eps_w, eps_l = 0.1 * 80 / 180, 0.1 * 100 / 180
        assert virtual[0][0] == pytest.approx(-80 * (1 + eps_w))
        assert virtual[1][0] == pytest.approx(-100 * (1 + eps_l))
        assert virtual[0][0] - virtual[1][0] == pytest.approx(1.1 * 20)


def test_weights_cancel_where_one_reference_is_lowest_on_both_responses() -> None:
    chosen, rejected = np.array([[-80.0, -160.0]]), np.array([[-100.0, -150.0]])
    for alpha in (0.1, 0.9):
        weights = np.array([1 - alpha, alpha])
        margin = virtual_reference(chosen, weights) - virtual_reference(rejected, weights)
        assert margin[0] == pytest.approx(-10)


def test_multi_dpo_is_never_below_the_loss_of_the_geometric_kind() -> None:
    rng = np.random.default_rng(0)
    policy, refs = -rng.uniform(1, 50, (2, 200)), -rng.uniform(1, 50, (2, 200, 4))
    weights = rng.dirichlet(np.ones(4), 200)
    virtual = [virtual_reference(r, weights, "geometric") for r in refs]
    geometric = preference_loss(*policy, *virtual, beta=0.3)
    assert (multi_dpo_loss(*policy, *refs, weights, beta=0.3) >= geometric - 1e-12).all()
