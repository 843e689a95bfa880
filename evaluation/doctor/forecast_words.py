"""The forecast as people read it: one table, and the sentences that follow from it.

`forecast.py` has the numbers. A sentence claims no more than an interval over prompts allows, and
none of them what only `mrpo compare` can find out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isnan, log

from ...terminal import Rows
from ..intervals import Interval
from .forecast import NOTABLE, Effect, Forecast, MethodForecast
from .verdicts import FEWEST

TITLE = (
    "forecast: the weight of labels that the references contradict, over that of labels that they "
    "support"
)
STILL = 0.05  # share of the gradient weight moved, below which a method is DPO with the base
NOTE = "1: no distinction, 0: dropped, below 0: read as their opposite"


def forecast_rows(forecast: Forecast) -> Rows:
    """A row for each method: its relative weight and the weight moved by beta, who is heard."""
    betas = list(dict.fromkeys(row.beta for row in forecast.rows))
    heading = ["method", *(word for b in betas for word in (f"beta {b:g}", "moved"))]
    heading += ["references heard", "CTRO moves", "leaves"]
    rows = [heading]
    for method, of_method in _by_method(forecast.rows).items():
        cells = [
            cell for row in of_method for cell in (_shown(row.relative_weight), _percent(row.moved))
        ]
        first = of_method[0]
        heard = [f"{first.references:.1f}", _percent(first.clipped), _percent(first.left)]
        rows.append([method, *cells, *heard])
    return rows


def conclusions(forecast: Forecast, base: str) -> list[str]:
    """What follows for training from `base` with these references and labels, a line each."""
    lines = [_of_labels(forecast)]
    if forecast.rows:
        lines += _of_weights(forecast.rows, base)
        if any(row.effect != "open" for row in forecast.rows):
            lines += _of_labels_told(forecast.rows, base)
            lines += _of_settings(forecast.grid)
        lines.append(_recommended(forecast, base))
    if forecast.left_out:
        lines.append(
            f"no forecast for {', '.join(forecast.left_out)}: weights learned while training"
        )
    return lines


def _of_labels(forecast: Forecast) -> str:
    """Whether the references say anything about the labels."""
    if not forecast.rows:
        return (
            f"none: {forecast.pairs:,} pairs that every reference has scored, {FEWEST} are the "
            "fewest to judge by"
        )
    gain = forecast.label_gain
    cost = (
        f"a label costs {log(2) - gain.value:.3f} nats to who knows them, {log(2):.3f} to who does "
        f"not; gain {gain}"
    )
    if not forecast.informed:
        return f"the references do not predict these labels beyond chance: {cost}"
    return (
        f"the references predict these labels: {cost}; they expect {forecast.wrong:.1%} of them to "
        "be wrong"
    )


def _of_weights(rows: Sequence[MethodForecast], base: str) -> Iterator[str]:
    """What can't differ from DPO with the base, whatever the labels, and what clipping does."""
    if still := _at_betas([row for row in rows if row.moved < STILL], base):
        yield f"is DPO with {base} at the start, under {STILL:.0%} of the weight moves: {still}"
    clipped = next((row for row in rows if row.epsilon is not None), None)
    if clipped is not None:
        yield (
            f"CTRO with epsilon {clipped.epsilon:g} moves {clipped.clipped:.0%} of the others' "
            f"log-probs, and leaves {clipped.left:.0%} of what {clipped.method} would change of "
            f"{base}'s margins"
        )


def _of_labels_told(rows: Sequence[MethodForecast], base: str) -> Iterator[str]:
    """The methods by what becomes of contradicted labels."""
    words: dict[Effect, str] = {
        "less": "contradicted labels count less than supported ones",
        "more": "contradicted labels count MORE than supported ones",
        "same": f"contradicted labels count as others do, within {1 - NOTABLE:.0%}",
        "open": "undecided, for want of pairs",
    }
    for effect, meaning in words.items():
        if named := _at_betas([row for row in rows if row.effect == effect], base):
            yield f"{meaning}: {named}"


def _of_settings(grid: Sequence[MethodForecast]) -> Iterator[str]:
    """Which epsilon and beta let mrpo tell labels apart."""
    if not grid:
        return
    mildest: dict[float, MethodForecast] = {}  # the grid's epsilons rise
    for row in grid:
        if row.effect == "less":
            mildest.setdefault(row.beta, row)
    found = [
        f"beta {beta:g} and epsilon {_epsilon(row)} ({row.relative_weight.value:.2f})"
        for beta, row in sorted(mildest.items())
    ]
    epsilons = dict.fromkeys(map(_epsilon, grid))
    betas = dict.fromkeys(f"{row.beta:g}" for row in grid)
    yield (
        f"the least that lets mrpo do so: {', '.join(found) or 'none'}; tried: beta "
        f"{', '.join(betas)}, epsilon {', '.join(epsilons)}"
    )


def _recommended(forecast: Forecast, base: str) -> str:
    """What to train. The forecast never says more than which weights pairs start with."""
    best, single, gain = forecast.best, forecast.single, forecast.gain
    check = "; `mrpo compare` decides, weights at the start are not yet accuracy"
    if best is None:
        if forecast.informed and all(isnan(row.relative_weight.value) for row in forecast.rows):
            why = "the references contradict hardly any label, so there is nothing to tell apart"
        elif forecast.informed:
            why = "none of these methods clearly gives contradicted labels less"
        else:
            why = "nothing here speaks for several references"
        return f"recommended: dpo:{base}, for {why}{check}"
    name = f"{best.method} with beta {best.beta:g}"
    if single is best:
        return f"recommended: {name}, no use of several tells wrong labels better{check}"
    if single is None or gain is None:
        return f"recommended: {name}{check}"
    if gain.low > 0:
        return (
            f"recommended: {name}, and {single.method} beside it: {best.relative_weight.value:.2f} "
            f"against {single.relative_weight.value:.2f}, {gain} less{check}"
        )
    return (
        f"recommended: {single.method} with beta {single.beta:g}, for {best.method} tells wrong "
        f"labels no better beyond doubt ({gain} less){check}"
    )


def _at_betas(rows: Sequence[MethodForecast], base: str) -> str:
    """`mrpo (beta 0.1, 0.5), harmonic (beta 0.1)`, without DPO with the base."""
    return ", ".join(
        f"{method} (beta {', '.join(f'{row.beta:g}' for row in of_method)})"
        for method, of_method in _by_method(rows).items()
        if method != f"dpo:{base}"
    )


def _by_method(rows: Sequence[MethodForecast]) -> dict[str, list[MethodForecast]]:
    methods: dict[str, list[MethodForecast]] = {}
    for row in rows:
        methods.setdefault(row.method, []).append(row)
    return methods


def _shown(value: Interval) -> str:
    if isnan(value.value):
        return "–"
    return f"{value.value:.2f} ({value.low:.2f} to {value.high:.2f})"


def _percent(share: float) -> str:
    return "–" if isnan(share) else f"{share:.0%}"


def _epsilon(row: MethodForecast) -> str:
    return "none" if row.epsilon is None else f"{row.epsilon:g}"
