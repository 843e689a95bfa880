"""What the human labels teach of the references, and the references of the labels.

With the geometric virtual reference, DPO's implied preference is a logistic model of the margins
D_k = log pi_k(chosen) − log pi_k(rejected). So the weights are the coefficients of a logistic
regression of the label on (D_1 … D_K), without intercept and none below 0: exact for the geometric
kind, a heuristic for the others. A training pair gets the weights fitted to the prompts of other
folds, which have not seen its label; a bootstrap over prompts gives intervals, and the references
that may be dropped.

The same regression with a noise rate (`fit_reliability`) tells how likely each label is wrong.
Numpy and scipy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit, logsumexp

from ..errors import UserError

FOLDS = 5
RIDGE = 1e-4
"""On margins scaled to a mean square of 1; it matters only where labels are separable."""

NOISES = np.linspace(0, 0.35, 15)
"""Noise rates that are weighed against one another, [G]. People contradict one another in a quarter
to a third of the pairs; a higher rate looks the same as references that are surely wrong."""

CONFIDENCE = 0.95
"""Of all K intervals together; each has 1 − 0.05/K (Bonferroni)."""


@dataclass(frozen=True, slots=True, eq=False)
class FittedWeights:
    """The fit to all pairs, the fits that leave out a fold each, and their intervals."""

    weights: np.ndarray  # [K], sum 1: for held-out pairs
    coefficients: np.ndarray  # [K], per nat of margin: before they were made to sum to 1
    fold_weights: np.ndarray  # [F, K]: row f was fitted without the prompts of fold f
    pairs: int  # pairs that every reference has scored, the ones that were used
    intervals: np.ndarray | None = None  # [K, 2] on the weights; None without a bootstrap
    drop: tuple[int, ...] = ()  # columns whose coefficient's interval contains 0

    def for_prompts(self, prompts: np.ndarray) -> np.ndarray:
        """[N, K]: for each training pair, the weights that have not seen its prompt."""
        return self.fold_weights[_fold_of(prompts)]

    def describe(self, aliases: Sequence[str]) -> list[str]:
        """Lines for the user: each weight with its interval, and what to drop."""
        lines = [f"fitted weights from {self.pairs:,} pairs:"]
        for k, alias in enumerate(aliases):
            between = ""
            if self.intervals is not None:
                between = "  ({:.3f} to {:.3f})".format(*self.intervals[k])
            lines.append(f"  {alias}  {self.weights[k]:.3f}{between}")
        if not self.coefficients.any():
            lines.append(
                f"WARNING: no reference predicts the labels; {aliases[0]}, the base, is used ALONE"
            )
        elif self.drop:
            names = ", ".join(aliases[k] for k in self.drop)
            lines.append(f"references that may add nothing (interval contains 0): {names}")
        return lines


def fit_weights(
    margins: np.ndarray, prompts: np.ndarray, *, bootstrap: int = 0, seed: int = 0
) -> FittedWeights:
    """Fit weights to pairs whose first response is the one people chose.

    Minimizes mean_i log(1 + exp(−Σ_k w_k D_ik)) + ridge over w ≥ 0; the weights are w / Σ w, or the
    base alone if every w is 0. Deterministic.

    Args:
        margins: [N, K] D in nats, NaN where a reference is missing (such pairs are left out).
        prompts: [N] integers, equal for equal prompts; the fold is the number modulo `FOLDS`.
        bootstrap: resamples of the prompts for the intervals; 0: no intervals.
        seed: of the bootstrap alone.

    The first reference agrees with the labels, the second is their opposite:

    >>> d = np.random.default_rng(0).logistic(1.0, 1.0, 500)
    >>> fit_weights(np.stack([d, -d], axis=1), np.arange(500)).weights
    array([1., 0.])
    """
    margins, prompts = _complete(margins, prompts, "weighting fitted", "use --weighting arwc")
    scale = np.sqrt(np.mean(margins**2)) or 1.0
    scaled = np.asfortranarray(margins / scale)  # the layout that `logistic_regression` uses
    fold = _fold_of(prompts)
    full = _coefficients(scaled, np.ones(len(prompts)))
    fold_fits = [_coefficients(scaled, fold != f) for f in range(FOLDS)]
    intervals: np.ndarray | None = None
    drop: tuple[int, ...] = ()
    if bootstrap:
        intervals, drop = _intervals(scaled, prompts, bootstrap, seed)
    return FittedWeights(
        weights=_sum_to_one(full),
        coefficients=full / scale,
        fold_weights=np.stack([_sum_to_one(fit) for fit in fold_fits]),
        pairs=len(prompts),
        intervals=intervals,
        drop=drop,
    )


@dataclass(frozen=True, slots=True, eq=False)
class NoisyFit:
    """A regression under every noise rate of `NOISES`, and how probable the labels make each."""

    probabilities: np.ndarray  # [G], sum 1
    coefficients: np.ndarray  # [G, K], per nat of margin

    @property
    def noise(self) -> float:
        """The mean noise rate."""
        return float(self.probabilities @ NOISES)

    def interval(self) -> tuple[float, float]:
        """The rates between which 95 % of the probability lies, in steps of `NOISES`."""
        total = self.probabilities.cumsum()
        low, high = np.searchsorted(total, [0.025, 0.975])
        return float(NOISES[low]), float(NOISES[min(high, len(NOISES) - 1)])

    def chance_wrong(self, margins: np.ndarray) -> np.ndarray:
        """[N] chance that the label is wrong, from margins [N, K]; NaN margins say nothing."""
        support = np.nan_to_num(margins) @ self.coefficients.T  # [N, G]
        with np.errstate(divide="ignore"):  # logit(0) is −inf, and the chance 0
            return expit(logit(NOISES) - support) @ self.probabilities

    def label_logp(self, margins: np.ndarray) -> np.ndarray:
        """[N] log P(label) before it is seen, nats: of eps + (1 − 2 eps) sigmoid(w·D), averaged.

        From margins [N, K]; NaN ones say nothing, and a pair of such alone gets log 1/2.
        """
        support = np.nan_to_num(margins) @ self.coefficients.T  # [N, G]
        right, wrong = _log_chances(support, NOISES)
        return logsumexp(np.logaddexp(right, wrong), axis=1, b=self.probabilities)


@dataclass(frozen=True, slots=True, eq=False)
class Reliability:
    """How likely each label is wrong, by what the references say of the pair.

    A pair's true preference follows the references, P(as the label says) = sigmoid(w·D), and a
    share eps of the labels is turned round, whatever the pair. Then a label is wrong with chance

        s = eps sigmoid(−w·D) / [eps + (1 − 2 eps) sigmoid(w·D)] = sigmoid(logit(eps) − w·D)

    so the label is one more witness, of weight logit(1 − eps) in log-odds. Few pairs can't tell
    noise from references that are seldom sure, so s is the mean over the rates of `NOISES`, each
    as probable as it makes the labels.
    """

    full: NoisyFit
    folds: tuple[NoisyFit, ...]  # number f was fitted without the prompts of fold f
    pairs: int  # pairs that every reference has scored, the ones that were used
    doubted: int  # of these, labels that are wrong with a chance above 1/2

    def chance_wrong(self, margins: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        """[N]: for each training pair, by the fit that has not seen its prompt.

        Args:
            margins: [N, K] D in nats, NaN where a reference is missing; it then says nothing.
            prompts: [N] integers, as for `fit_reliability`.
        """
        return self._by_other_folds(NoisyFit.chance_wrong, margins, prompts)

    def label_logp(self, margins: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        """[N] log P(label) before it is seen, nats, by the fit that has not seen its prompt.

        To know nothing gives log 1/2. Args: as of `chance_wrong`.
        """
        return self._by_other_folds(NoisyFit.label_logp, margins, prompts)

    def _by_other_folds(
        self,
        judge: Callable[[NoisyFit, np.ndarray], np.ndarray],
        margins: np.ndarray,
        prompts: np.ndarray,
    ) -> np.ndarray:
        fold, judged = _fold_of(prompts), np.empty(len(margins))
        for f, fit in enumerate(self.folds):
            judged[fold == f] = judge(fit, margins[fold == f])
        return judged

    def describe(self, aliases: Sequence[str]) -> list[str]:
        """Lines for the user: the noise rate, the references' say, and the labels doubted."""
        low, high = self.full.interval()
        say = self.full.probabilities @ self.full.coefficients
        return [
            f"labels      {self.full.noise:.1%} of {self.pairs:,} wrong by the references' word "
            f"({low:.1%} to {high:.1%}); {self.doubted:,} count more as their opposite",
            f"            log-odds per nat: {', '.join(map('{} {:.3g}'.format, aliases, say))}",
        ]


def fit_reliability(margins: np.ndarray, prompts: np.ndarray) -> Reliability:
    """Fit noise rate and coefficients to pairs whose first response is the one people chose.

    Labels are symmetric (a pair may be written either way round), so noise is no intercept of the
    logit, but P(label) = eps + (1 − 2 eps) sigmoid(w·D) with w ≥ 0. Deterministic.

    Args:
        margins: [N, K] D in nats, NaN where a reference is missing (such pairs are left out).
        prompts: [N] integers, equal for equal prompts; the fold is the number modulo `FOLDS`.

    A quarter of the labels is turned round, under a reference that is sure and right:

    >>> rng = np.random.default_rng(0)
    >>> d = np.where(rng.random(2000) < 0.25, -1, 1) * abs(rng.logistic(0, 20, 2000))
    >>> fit = fit_reliability(d[:, None], np.arange(2000))
    >>> bool(0.22 < fit.full.noise < 0.28), fit.doubted > 400
    (True, True)
    """
    margins, prompts = _complete(margins, prompts, "+reliable", "leave it out")
    fold = _fold_of(prompts)
    fit = Reliability(
        full=fit_noise(margins, np.ones(len(prompts), bool)),
        folds=tuple(fit_noise(margins, fold != f) for f in range(FOLDS)),
        pairs=len(prompts),
        doubted=0,
    )
    return replace(fit, doubted=int((fit.chance_wrong(margins, prompts) > 0.5).sum()))


def fit_noise(margins: np.ndarray, used: np.ndarray) -> NoisyFit:
    """The fits to the pairs `used` [N] of margins [N, K].

    For each rate of `NOISES`, w ≥ 0 minimizes −mean log(eps + (1 − 2 eps) sigmoid(w·x)) +
    ridge/2 |w|² on scaled margins x, found from the w of the rate before (for eps > 0 it is not
    convex). A rate's probability is the likelihood there, normalized: a flat prior.
    """
    scale = np.sqrt(np.mean(margins**2)) or 1.0
    x = np.ascontiguousarray(margins[used].T) / scale  # [K, n]
    size, n = x.shape

    def objective(w: np.ndarray, noise: float) -> tuple[float, np.ndarray]:
        """The value and the gradient [K]."""
        z = w @ x
        right, wrong = _log_chances(z, noise)
        log_p = np.logaddexp(right, wrong)
        turned = np.exp(wrong - log_p)  # the chance that the label is wrong, given the label
        gradient = -(x @ (expit(-z) - turned)) / n + RIDGE * w
        return RIDGE / 2 * w @ w - log_p.mean(), gradient

    w = _coefficients(x.T, np.ones(n)) if n else np.zeros(size)
    coefficients, log_likelihoods = [], []
    for noise in NOISES if n else ():
        fit = minimize(
            objective,
            w,
            args=(noise,),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, None)] * size,
            options={"gtol": 1e-9, "ftol": 0, "maxcor": 20, "maxiter": 1000},
        )
        w = fit.x
        coefficients.append(w / scale)
        log_likelihoods.append(-n * fit.fun)
    if not n:  # all prompts are in one fold: nothing is known of the labels
        return NoisyFit(np.eye(len(NOISES))[0], np.zeros((len(NOISES), size)))
    likelihoods = np.exp(np.array(log_likelihoods) - max(log_likelihoods))
    return NoisyFit(likelihoods / likelihoods.sum(), np.stack(coefficients))


def _log_chances(support: np.ndarray, noise: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log P of labels that are right, and of labels turned round, from the support w·D of each."""
    with np.errstate(divide="ignore"):
        return np.log1p(-noise) + log_expit(support), np.log(noise) + log_expit(-support)


def logistic_regression(
    features: np.ndarray, sample_weights: np.ndarray, *, ridge: float, non_negative: bool
) -> np.ndarray:
    """argmin over w of the weighted mean of log(1 + exp(−w·x)) + ridge/2 |w|², without intercept.

    Every sample stands for a label of 1: one of label 0 is given as its negative features.

    Args:
        features: [N, K] x; about 1 in size, or the minimum is less exact.
        sample_weights: [N], ≥ 0, with any sum.
        ridge: the penalty, > 0 for a minimum also where the samples are separable.
        non_negative: minimize over w ≥ 0.

    Returns:
        [K] coefficients, 0 where all sample weights are 0; the gradient's largest entry there is
        about 1e-9.

    With x = 1 in three samples of four and −1 in the other, sigmoid(w) = 3/4, so w = log 3:

    >>> x = np.array([[1.0], [1.0], [1.0], [-1.0]])
    >>> bool(np.isclose(logistic_regression(x, np.ones(4), ridge=0, non_negative=True), np.log(3)))
    True
    >>> logistic_regression(-x, np.ones(4), ridge=0, non_negative=True)
    array([0.])
    """
    used = sample_weights > 0
    size = features.shape[1]
    if not used.any():
        return np.zeros(size)
    negative = -np.ascontiguousarray(features.T)[:, used]  # [K, n]
    shares = sample_weights[used] / sample_weights[used].sum()

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        """The value and the gradient [K]."""
        logits = w @ negative  # of the label being wrong
        small = np.exp(-np.abs(logits))  # no overflow
        loss = shares @ (np.maximum(logits, 0) + np.log1p(small))
        sigmoid = np.where(logits > 0, 1, small) / (1 + small)
        return loss + ridge / 2 * w @ w, negative @ (shares * sigmoid) + ridge * w

    return minimize(
        objective,
        np.zeros(size),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * size if non_negative else None,
        options={"gtol": 1e-9, "ftol": 0, "maxcor": 20, "maxiter": 1000},
    ).x


def _complete(
    margins: np.ndarray, prompts: np.ndarray, what: str, way_out: str
) -> tuple[np.ndarray, np.ndarray]:
    """Margins [n, K] and prompts [n] of the pairs that every reference has scored."""
    complete = ~np.isnan(margins).any(axis=1)
    if not complete.any():
        raise UserError(
            f"{what} found no pair that every reference has scored; {way_out}, or leave out the "
            "reference that misses most"
        )
    return margins[complete].astype(np.float64), np.asarray(prompts)[complete]


_coefficients = partial(logistic_regression, ridge=RIDGE, non_negative=True)


def _intervals(
    scaled: np.ndarray, prompts: np.ndarray, resamples: int, seed: int
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Percentile intervals [K, 2] of the weights, and the columns whose coefficient may be 0.

    Each resample draws as many prompts anew, with all their pairs.
    """
    rng = np.random.default_rng(seed)
    distinct, prompt_of = np.unique(prompts, return_inverse=True)
    fits = []
    for _ in range(resamples):
        drawn = np.bincount(rng.integers(0, len(distinct), len(distinct)), minlength=len(distinct))
        fits.append(_coefficients(scaled, drawn[prompt_of]))
    tail = (1 - CONFIDENCE) / 2 / scaled.shape[1]
    weights = [_sum_to_one(fit) for fit in fits]
    low = np.quantile(weights, tail, axis=0, method="lower")
    high = np.quantile(weights, 1 - tail, axis=0, method="higher")
    may_be_zero = np.quantile(fits, tail, axis=0, method="lower") <= 0
    return np.stack([low, high], axis=1), tuple(np.flatnonzero(may_be_zero).tolist())


def _sum_to_one(coefficients: np.ndarray) -> np.ndarray:
    """Weights [K]; the base alone (column 0) if there is nothing to divide."""
    total = coefficients.sum()
    return coefficients / total if total > 0 else np.eye(len(coefficients))[0]


def _fold_of(prompts: np.ndarray) -> np.ndarray:
    return (np.asarray(prompts).astype(np.uint64) % np.uint64(FOLDS)).astype(np.intp)
