"""The report on training: curves from `log.jsonl`, one a run or the mean of a method's seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import UserError
from ..train.logs import LOG_FILE
from .charts import Curve, Lines, Section, Table, thinned

POINTS = 60  # of a curve; what a run logged more is averaged
CURVES = {
    "loss": ("Loss", "nats"),
    "rewards/accuracies": ("Training pairs whose chosen response has the higher reward", "share"),
    "rewards/margins": ("Reward margin of training pairs", "reward"),
    "eval_rewards/accuracies": ("The same of held-out pairs", "share"),
}

Log = Sequence[Mapping[str, float | None]]


def read_log(folder: Path) -> Log:
    """The lines of a run's log. Raises `UserError` where the folder has none."""
    path = folder / LOG_FILE
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise UserError(f"{folder}: no run of `mrpo train` ({LOG_FILE} is missing)") from None
    except ValueError:
        raise UserError(f"{path}: damaged; a line is no JSON") from None


def training_section(groups: Mapping[str, Sequence[Log]]) -> Section:
    """Curves of named groups of runs; a group's curve is the mean over its runs."""
    charts = []
    for name, (title, unit) in CURVES.items():
        curves = [_curve(label, logs, name) for label, logs in groups.items()]
        chart = Lines(
            title=title,
            x_label="optimizer step",
            y_label=unit,
            curves=[curve for curve in curves if curve.x],
            percent=unit == "share",
            rule=0.5 if unit == "share" else None,
            note="Rewards and losses are each method's own: against its own references.",
        )
        if any(len(curve.x) > 1 for curve in chart.curves):
            charts.append(chart)
    tables = [_weights(groups)]
    return Section(title="Training", tables=tables, charts=charts)


def _curve(label: str, logs: Sequence[Log], name: str) -> Curve:
    """The mean of the runs at each step that any of them logged."""
    values: dict[float, list[float]] = {}
    for log in logs:
        for line in log:
            value = line.get(name)
            if value is not None and math.isfinite(value):
                values.setdefault(float(line["step"] or 0), []).append(value)
    steps = sorted(values)
    x, y = thinned(steps, [sum(values[at]) / len(values[at]) for at in steps], POINTS)
    return Curve(name=label, x=x, y=y)


def _weights(groups: Mapping[str, Sequence[Log]]) -> Table:
    """How much each reference counted in training, and how often it was clipped: means."""
    rows = [("run", "reference", "mean weight", "clipped")]
    for label, logs in groups.items():
        names = dict.fromkeys(
            key.removeprefix("refs/weight/")
            for log in logs
            for line in log
            for key in line
            if key.startswith("refs/weight/")
        )
        for name in names:
            weight = _mean(logs, f"refs/weight/{name}")
            clipped = _mean(logs, f"refs/clipped/{name}")
            shown = "" if math.isnan(clipped) else f"{clipped:.0%}"
            rows.append((label, name, f"{weight:.3f}", shown))
    return Table(title="What each reference counted", rows=rows)


def _mean(logs: Sequence[Log], name: str) -> float:
    values = [value for log in logs for line in log if (value := line.get(name)) is not None]
    return sum(values) / len(values) if values else float("nan")
