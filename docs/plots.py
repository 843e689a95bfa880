"""The plots of mathematics.md, computed with the project's own functions.

    python docs/plots.py            # writes docs/images/*.svg, in a few seconds

Needs matplotlib, which is in the extra `docs`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mrpo import ctro_clip, virtual_reference
from mrpo.method.fitted import fit_weights
from mrpo.method.loss_functions import MARGIN_LOSSES, SMOOTHED_LOSSES
from mrpo.method.virtual_reference import KINDS

IMAGES = Path(__file__).parent / "images"


def kinds(axes: Any) -> None:
    """Two references of equal weight: what the virtual one is as the second moves away."""
    gap = np.linspace(-12, 12, 481)
    logps = np.stack([np.zeros_like(gap), gap], axis=1)
    for kind in KINDS:
        axes.plot(gap, virtual_reference(logps, [0.5, 0.5], kind), label=kind)
    axes.plot(gap, logps.min(axis=1), ":", color="gray", label="minimum and maximum")
    axes.plot(gap, logps.max(axis=1), ":", color="gray")
    axes.set_xlabel("second reference minus base, nats")
    axes.set_ylabel("virtual reference minus base, nats")


def weights(axes: Any) -> None:
    """How little a weight moves the harmonic virtual reference once references are apart."""
    alpha = np.linspace(0.001, 0.999, 500)
    for gap in (2, 10, 40):
        logps = np.broadcast_to([0.0, -float(gap)], (500, 2))
        virtual = virtual_reference(logps, np.stack([1 - alpha, alpha], axis=1))
        axes.plot(alpha, virtual / -gap, label=f"{gap} nats below the base")
    axes.set_xlabel("weight of the second reference")
    axes.set_ylabel("way from base to second reference")
    axes.axline((0, 0), (1, 1), linestyle=":", color="gray", label="geometric, any distance")


def saturation(axes: Any) -> None:
    """The margin that MRPO subtracts, as a second reference of the opposite opinion moves away."""
    below = np.linspace(-20, 60, 641)
    base = np.array([-80.0, -100.0])  # prefers the chosen response by 20 nats
    second = np.array([-90.0, -85.0])[:, None] - below  # the rejected one by 5
    logps = [np.stack([np.full_like(below, b), s], axis=1) for b, s in zip(base, second)]
    for name, refs in (
        ("harmonic, no clipping", logps),
        ("eps 0.1, fixed", ctro_clip(*logps, 0.1, adaptive=False)),
        ("eps 0.1, adaptive (MRPO)", ctro_clip(*logps, 0.1)),
    ):
        chosen, rejected = (virtual_reference(r, [0.5, 0.5]) for r in refs)
        axes.plot(below, chosen - rejected, label=name)
    axes.axhline(20, linestyle=":", color="gray", label="the base alone")
    axes.set_xlabel("second reference moved down by, nats")
    axes.set_ylabel("margin of the virtual reference, nats")


def losses(axes: Any) -> None:
    """The losses as functions of the margin h, all with beta 1."""
    margin = np.linspace(-3, 5, 401)
    for loss_type in ("sigmoid", "ipo", "hinge", "discopop"):
        axes.plot(margin, MARGIN_LOSSES[loss_type](margin, 1.0), label=loss_type)
    for loss_type in ("sigmoid", "robust"):
        curve = SMOOTHED_LOSSES[loss_type](margin, 1.0, 0.2)
        axes.plot(margin, curve, "--", label=f"{loss_type}, label smoothing 0.2")
    axes.set_ylim(-0.5, 6)
    axes.set_xlabel("h")
    axes.set_ylabel("loss")


def fitted(axes: Any) -> None:
    """Fitted weights with their intervals, where the truth is 2/3, 1/3 and 0."""
    sizes, truth = (300, 1000, 3000, 10_000), np.array([0.10, 0.05, 0.0])
    rng = np.random.default_rng(0)
    for place, size in enumerate(sizes):
        margins = rng.normal(0, 8, (size, 3)) + rng.normal(0, 5, (size, 1))
        first = rng.random(size) < 1 / (1 + np.exp(-margins @ truth))
        margins = np.where(first[:, None], margins, -margins)
        fit = fit_weights(margins, np.arange(size), bootstrap=300)
        assert fit.intervals is not None
        for k in range(3):
            low, high = fit.intervals[k]
            x = place + 0.18 * (k - 1)
            label = ("useful", "half as useful", "noise")[k] if place == 0 else None
            axes.plot([x, x], [low, high], color=f"C{k}", linewidth=2)
            axes.plot(x, fit.weights[k], "o", color=f"C{k}", label=label)
    for k, share in enumerate(truth / truth.sum()):
        axes.axhline(share, linestyle=":", color=f"C{k}")
    axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    axes.set_xlabel("pairs")
    axes.set_ylabel("weight")


PLOTS: dict[str, Callable[[Any], None]] = {
    "kinds": kinds,
    "weights": weights,
    "saturation": saturation,
    "losses": losses,
    "fitted": fitted,
}


def main() -> None:
    import matplotlib

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the SVG files")
    out = parser.parse_args().out
    matplotlib.use("svg")
    # Text stays text, and neither ids nor dates differ from run to run.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "mrpo"})
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    for name, draw in PLOTS.items():
        figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
        draw(axes)
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        path = out / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
        print(path)


if __name__ == "__main__":
    main()
