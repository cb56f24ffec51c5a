"""What chance alone gives, and how predictions agree with measurements (definitions §12, §13).

A null is recorded as the mean and the central 95 % of its draws. Tests of many tensors are held to a false
discovery rate (Benjamini and Hochberg, 1995).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from mdrl_jax.stats.bootstrap import hierarchical_bootstrap, percentile
from mdrl_jax.stats.estimate import LEVEL, Estimate, Record, over_seeds, student, t_quantile

Floats = NDArray[np.float64]
ENOUGH_SEEDS = 8  # from here on seeds are resampled, below it they are averaged (definitions §12)


def null_record(draws: ArrayLike) -> dict[str, Any]:
    """The form of a null in the work folder's records: {"mean", "low", "high", "n"} of its draws, central 95 %."""
    draws_R = np.asarray(draws, float)
    low, high = np.quantile(draws_R, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return {"mean": float(draws_R.mean()), "low": float(low), "high": float(high), "n": int(draws_R.size)}


def permutation_p(value: float, draws: ArrayLike) -> float:
    """One-sided p of "no larger than chance": (1 + draws at or above the value) / (1 + draws), never 0."""
    draws_R = np.asarray(draws, float)
    return (1 + int(np.sum(draws_R >= value))) / (1 + draws_R.size)


def benjamini_hochberg(p_values: ArrayLike, q: float = 0.05) -> NDArray[np.bool_]:
    """Which hypotheses fall at false discovery rate `q`, along the last axis, [..., T] -> [..., T].

    All whose p is at most the largest sorted p(k) with p(k) ≤ q·k/T. The rate is held for independent and for
    positively dependent tests.
    """
    p = np.asarray(p_values, float)
    n = p.shape[-1]
    if n == 0:
        return np.zeros(p.shape, bool)
    ordered = np.sort(p, axis=-1)
    passing = ordered <= q * np.arange(1, n + 1) / n
    cut = np.max(np.where(passing, ordered, -1.0), axis=-1, keepdims=True)
    return p <= cut


def spearman_rho(x: Floats, y: Floats) -> Floats:
    """Rank correlation over the last axis, [..., N] -> [...], mean ranks for ties; nan where one side is constant."""
    x, y = (rankdata(z, axis=-1) - (z.shape[-1] + 1) / 2 for z in (x, y))
    with np.errstate(invalid="ignore"):
        return np.sum(x * y, axis=-1) / np.sqrt(np.sum(x**2, axis=-1) * np.sum(y**2, axis=-1))


def explained(predicted: Floats, measured: Floats) -> Floats:
    """1 − Σ(measured − predicted)² / Σ(measured − mean)² over the last axis: of the line of equality, not of a fit.

    At most 1; negative where the mean of the measured would have predicted better; nan where they are constant.
    """
    spread = np.sum((measured - measured.mean(axis=-1, keepdims=True)) ** 2, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.sum((measured - predicted) ** 2, axis=-1) / spread
        return np.where(spread > 0, 1.0 - ratio, np.nan)


def spearman(x: ArrayLike, y: ArrayLike, seeds: ArrayLike | None = None, **options: int) -> Estimate | None:
    """Rank correlation of predicted and measured figures; see `agreement`."""
    return agreement(spearman_rho, x, y, seeds, **options)


def r_squared(
    predicted: ArrayLike, measured: ArrayLike, seeds: ArrayLike | None = None, **options: int
) -> Estimate | None:
    """Share of the variance of the measured that the predicted explain (`explained`); see `agreement`."""
    return agreement(explained, predicted, measured, seeds, **options)


def agreement(
    statistic: Callable[[Floats, Floats], Floats],
    x: ArrayLike,
    y: ArrayLike,
    seeds: ArrayLike | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Estimate | None:
    """`statistic` (over the last axis) of paired figures with its interval; None where it is undefined.

    Without `seeds` the points are the units and are resampled. With the seed of every point, the statistic is
    taken within each seed and averaged: Student's t over two to seven seeds, from eight on seeds and points within
    are resampled (definitions §12). Resamples on which the statistic is undefined are dropped.
    """
    x_N, y_N = np.asarray(x, float), np.asarray(y, float)
    if x_N.shape != y_N.shape or x_N.ndim != 1:
        raise ValueError(f"agreement needs two vectors of one length, not {x_N.shape} and {y_N.shape}")
    rng = np.random.default_rng(seed)

    def resampled(x_N: Floats, y_N: Floats) -> Floats:
        rows_RN = rng.integers(0, x_N.size, (n_resamples, x_N.size))
        draws = statistic(x_N[rows_RN], y_N[rows_RN])
        return draws[np.isfinite(draws)]

    if seeds is None or len(set(np.asarray(seeds).tolist())) < 2:
        value = float(statistic(x_N, y_N)) if x_N.size else math.nan
        if not math.isfinite(value):
            return None
        if x_N.size < 3:  # two points agree or disagree perfectly in every resample
            return student(value, math.inf, 0, x_N.size, "point")
        return percentile(value, resampled(x_N, y_N), x_N.size, "point")
    of_point = np.asarray(seeds)
    groups = [(x_N[of_point == s], y_N[of_point == s]) for s in np.unique(of_point)]
    values = [float(statistic(*group)) for group in groups]
    if not np.all(np.isfinite(values)):
        return None
    if len(values) < ENOUGH_SEEDS:
        return over_seeds(values, "seed")
    draws = [resampled(*group) for group in groups]
    shortest = min(d.size for d in draws)
    return hierarchical_bootstrap(values, [d[:shortest] for d in draws], n_resamples, seed, "seed")


def rank_agreement(effects: ArrayLike, transfers: ArrayLike) -> Record:
    """Spearman's correlation over pairs with its interval, of Fisher's z with the variance (1 + r²/2)/(n − 3).

    Bonett and Wright (2000), with Student's t of n − 3 degrees of freedom in place of the normal [chosen]: pairs are
    few, and resampling them would give a perfect order of any number the interval [1, 1]. For the interval a
    perfect order is taken half a swap short of perfect. Pairs with a figure missing (None) are left out.
    """
    x, y = np.asarray(effects, float), np.asarray(transfers, float)
    known = np.isfinite(x) & np.isfinite(y)
    x, y, n = x[known], y[known], int(known.sum())
    if n < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
        reason = f"{n} pairs are too few" if n < 5 else "all pairs are equal"
        return {"estimate": None, "ci95": None, "null": 0.0, "n": n, "unit": "Spearman", "reason": reason}
    r = float(spearman_rho(x, y))
    short = 1 - 6 / (n * (n * n - 1))
    z, stderr = math.atanh(min(max(r, -short), short)), math.sqrt((1 + r * r / 2) / (n - 3))
    half = t_quantile(n - 3) * stderr
    return Estimate(r, math.tanh(z - half), math.tanh(z + half), n, "Spearman").record(0.0)
