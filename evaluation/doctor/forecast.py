"""What each method can do with these references, from the scores alone, before any training.

    forecast(table.pair_scores(), table.aliases).rows    # one for each method and beta

A reference acts on training through the training pairs alone. Where the policy starts as the base,
a pair's gradient starts with the weight w of `Method.initial_weights`, and DPO with the base weighs
all pairs alike. So a method differs from it as far as it weighs pairs otherwise, and gains from
that as far as labels that are wrong get less. Nobody knows which are, but s, the chance that a
label is wrong by the word of the references (`fit_reliability`), is known for every pair, fitted
to other prompts. The one number of a method and a beta is the **relative weight**

    q = [ Σ s w / Σ s ] / [ Σ (1 − s) w / Σ (1 − s) ]

of labels that the references contradict, over that of labels that they support; no unit. 1: no
distinction, 0: dropped, negative: read as their opposite. If s is calibrated these are the means
over wrong and right labels, whatever w is; s being the same for all pairs, q is 1. With a mask of
the labels that are wrong in place of s, q is the truth that it forecasts. `docs/mathematics.md`
derives it, `forecast_words.py` puts it into words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from scipy.special import entr

from ...method.fitted import fit_reliability
from ...method.grammar import parse_method
from ...method.objective import Method, ReferenceLogps
from ..intervals import Interval, bootstrap_means, interval, mean_intervals
from .verdicts import FEWEST

BETAS = (0.1, 0.5)
GRID_BETAS = (0.05, 0.1, 0.2, 0.5, 1.0)
GRID_EPSILONS = (0.1, 0.2, 0.5, 0.9, None)
PER_LENGTH = 25  # times these with log-probs per token or byte: InfiFPO has 2.5 there, 0.1 else
NOTABLE = 0.9  # a relative weight above this, and below 1 over it, is no difference worth a run
LEAST_GAIN = 1e-4  # nats a label, below which references know nothing of it: 51 % right have 2e-4
FEWEST_WRONG = 10.0  # labels that the references expect to be wrong, for a relative weight
NO_INTERVAL = Interval(float("nan"), float("nan"), float("nan"))

Effect = Literal["less", "same", "more", "open"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodForecast:
    """One method at one beta."""

    method: str  # as the user wrote it
    beta: float
    epsilon: float | None  # CTRO's; None: no clipping
    relative_weight: Interval  # q, with an interval over prompts
    effect: Effect  # the weight of contradicted labels, where the interval leaves no doubt
    moved: float  # share of the gradient weight that lies elsewhere than with DPO on the base
    references: float  # effective number in the virtual reference, 1 to K
    clipped: float  # share of the others' log-probs that CTRO moves; NaN without clipping
    left: float  # of |m − D_base| after clipping, over the same without; NaN likewise


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """All methods on one set of pairs; without rows where nothing can be said."""

    pairs: int  # that every reference has scored: the ones that are looked at
    wrong: float  # share of the labels that the references expect to be wrong
    label_gain: Interval  # log 2 less what a label costs by fits to other prompts, nats
    rows: list[MethodForecast] = field(default_factory=list)
    grid: list[MethodForecast] = field(default_factory=list)  # mrpo over epsilons and betas
    left_out: list[str] = field(default_factory=list)  # methods whose weights need training
    best: MethodForecast | None = None  # the row that tells wrong labels best, of "less" ones
    single: MethodForecast | None = None  # plain DPO with one reference that does, at its beta
    gain: Interval | None = None  # q of `single` minus q of `best`

    @property
    def informed(self) -> bool:
        """Whether the references predict labels better than chance, beyond doubt."""
        return self.label_gain.low > LEAST_GAIN


def default_methods(aliases: Sequence[str]) -> list[str]:
    """DPO with each reference, the usual ways to use several, and labels judged by them.

    >>> default_methods(["llama"])
    ['dpo:llama', 'dpo:llama+reliable']
    """
    several = ["mrpo", "harmonic", "geometric", "arithmetic", "multi-dpo", "geometric+arwc"]
    several += ["geometric+max-margin", "geometric+fitted", "geometric+reliable"]
    singles = [f"dpo:{alias}" for alias in aliases]
    return [*singles, *(several if len(aliases) > 1 else []), f"dpo:{aliases[0]}+reliable"]


def default_betas(normalize: str) -> list[float]:
    """Of the forecast.

    >>> default_betas("none"), default_betas("byte")
    ([0.1, 0.5], [2.5, 12.5])
    """
    return _scaled(BETAS, normalize)


def forecast(
    scores: ReferenceLogps,
    aliases: Sequence[str],
    *,
    methods: Sequence[str] | None = None,
    betas: Sequence[float] | None = None,
    epsilon: float | None = None,
    normalize: str = "none",
    contradicted: np.ndarray | None = None,
) -> Forecast:
    """The forecast for each method and beta, and for mrpo over a grid of epsilons and betas.

    Args:
        scores: of training pairs, the column of the base, where the policy starts, first.
        aliases: of the columns.
        methods: texts of the grammar, by default `default_methods`.
        betas: by default `BETAS`, `PER_LENGTH` times as large where log-probs are normalized.
        epsilon: CTRO's, in place of 0.1, of the methods that clip.
        normalize: "none", "token" or "byte".
        contradicted: [N] bool, the labels that are known to be wrong (turned round in a trial):
            measures q by them in place of the references' word.

    Raises `UserError` for a method that is unknown or does not go with the references.
    """
    parsed = {
        text: parse_method(text, aliases, normalize=normalize)
        for text in methods or default_methods(aliases)
    }
    left_out = [text for text, method in parsed.items() if method.online]
    columns = list(range(len(aliases)))
    complete = ~np.isnan(scores.reference_logps(columns, normalize)[0]).any(axis=1)
    scores = scores.of_rows(complete)
    if len(scores) < FEWEST:
        return Forecast(pairs=len(scores), wrong=np.nan, label_gain=NO_INTERVAL, left_out=left_out)
    chosen, rejected = scores.reference_logps(columns, normalize)
    margins, prompts = chosen - rejected, scores.prompts
    judge = fit_reliability(margins, prompts)
    gains = np.log(2) + judge.label_logp(margins, prompts)
    label_gain = mean_intervals(gains[:, None], prompts)[0]
    if contradicted is None:
        wrong, known = judge.chance_wrong(margins, prompts), label_gain.low > LEAST_GAIN
    else:
        wrong, known = contradicted[complete].astype(np.float64), True

    def prepared(method: Method, **changes: Any) -> Method:
        if method.reliable and list(method.columns) == columns:
            changes["reliability"] = judge
        return replace(method, **changes).prepare(scores, scores, bootstrap=0)

    rows = _Rows(scores)
    for text, method in parsed.items():
        clips = epsilon is not None and method.epsilon is not None
        if text not in left_out:
            changes = {"epsilon": epsilon} if clips else {}
            rows.add(text, prepared(method, **changes), betas or default_betas(normalize))
    end = len(rows.rows)
    for epsilon in GRID_EPSILONS if len(aliases) > 1 else ():
        mrpo = parse_method("mrpo", aliases, normalize=normalize)
        rows.add("mrpo", prepared(mrpo, epsilon=epsilon), _scaled(GRID_BETAS, normalize))
    finished, draws = rows.finished(wrong, known)
    best, single, gain = _best(finished[:end], draws)
    return Forecast(
        pairs=len(scores),
        wrong=float(wrong.mean()),
        label_gain=label_gain,
        rows=finished[:end],
        grid=finished[end:],
        left_out=left_out,
        best=best,
        single=single,
        gain=gain,
    )


def _scaled(betas: Sequence[float], normalize: str) -> list[float]:
    return [beta * (1 if normalize == "none" else PER_LENGTH) for beta in betas]


class _Rows:
    """Rows in the making: their weights are kept until all share one bootstrap."""

    def __init__(self, scores: ReferenceLogps) -> None:
        self.scores = scores
        self.rows: list[MethodForecast] = []
        self.weights: list[np.ndarray] = []  # [N] each

    def add(self, text: str, method: Method, betas: Sequence[float]) -> None:
        """The rows of a prepared method, one for each beta."""
        targets = method.targets(self.scores)
        clips = method.epsilon is not None and len(method.references) > 1
        heard = method.reference_shares(self.scores).mean(0)
        for beta in betas:
            weights = replace(method, beta=beta).initial_weights(self.scores)
            self.weights.append(weights)
            self.rows.append(
                MethodForecast(
                    method=text,
                    beta=beta,
                    epsilon=method.epsilon if clips else None,
                    relative_weight=NO_INTERVAL,
                    effect="open",
                    moved=float(np.abs(weights / weights.mean() - 1).mean() / 2),
                    references=float(np.exp(entr(heard).sum())),
                    clipped=float(targets.clipped[:, 1:].mean()) if clips else np.nan,
                    left=_left(method, self.scores) if clips else np.nan,
                )
            )

    def finished(self, wrong: np.ndarray, known: bool) -> tuple[list[MethodForecast], np.ndarray]:
        """The rows with their relative weights, and the draws [B, R] of these.

        `known`: whether `wrong` [N] is more than a guess; otherwise every effect is open.
        """
        weights = np.stack(self.weights, axis=1)
        s = wrong[:, None]
        columns = np.concatenate([s, 1 - s, s * weights, (1 - s) * weights], axis=1)
        means, draws = bootstrap_means(columns, self.scores.prompts)
        if wrong.sum() < FEWEST_WRONG:
            means, draws = np.full_like(means, np.nan), np.full_like(draws, np.nan)
        values, draws = _relative_weights(means), _relative_weights(draws)
        finished = []
        for row, value, column in zip(self.rows, values, draws.T):
            q = interval(value, column)
            finished.append(replace(row, relative_weight=q, effect=_effect(q) if known else "open"))
        return finished, draws


def _relative_weights(means: np.ndarray) -> np.ndarray:
    """[…, R] from means [… , 2 + 2R] of s, 1 − s, s w and (1 − s) w.

    NaN where supported labels have no positive weight on the whole: nothing is relative to that.
    """
    rows = (means.shape[-1] - 2) // 2
    contradicted = means[..., 2 : 2 + rows] / means[..., :1]
    supported = means[..., 2 + rows :] / means[..., 1:2]
    return contradicted / np.where(supported > 0, supported, np.nan)


def _effect(q: Interval) -> Effect:
    """What the interval leaves no doubt of.

    >>> [_effect(Interval(0.5, *bounds)) for bounds in ((0.4, 0.8), (0.95, 1.05), (0.8, 1), (2, 3))]
    ['less', 'same', 'open', 'more']
    """
    if q.high < NOTABLE:
        return "less"
    if q.low > 1 / NOTABLE:
        return "more"
    return "same" if q.low >= NOTABLE and q.high <= 1 / NOTABLE else "open"


def _left(method: Method, scores: ReferenceLogps) -> float:
    """Mean |m − D_base| of a method that clips, over the same without clipping."""
    base = scores.reference_logps([0], method.normalize)
    differences = []
    for each in (method, replace(method, epsilon=None)):
        targets = each.targets(scores)
        m = (targets.virtual_chosen_logps - targets.virtual_rejected_logps).numpy()
        differences.append(np.abs(m - (base[0] - base[1])[:, 0]).mean())
    return float(differences[0] / differences[1]) if differences[1] > 0 else np.nan


def _best(
    rows: Sequence[MethodForecast], draws: np.ndarray
) -> tuple[MethodForecast | None, MethodForecast | None, Interval | None]:
    """The row that gives contradicted labels least, plain DPO that does at its beta, the gain."""
    less = [r for r, row in enumerate(rows) if row.effect == "less"]
    if not less:
        return None, None, None
    best = min(less, key=lambda r: rows[r].relative_weight.value)
    plain = [
        r
        for r, row in enumerate(rows)
        if row.beta == rows[best].beta
        and row.method.partition(":")[0] == "dpo"
        and not row.method.endswith("+reliable")
    ]
    if not plain or best in plain:
        return rows[best], rows[best] if best in plain else None, None
    single = min(plain, key=lambda r: rows[r].relative_weight.value)
    difference = rows[single].relative_weight.value - rows[best].relative_weight.value
    gain = interval(difference, draws[:, single] - draws[:, best])
    return rows[best], rows[single], gain
