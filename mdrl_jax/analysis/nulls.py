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

from mdrl_jax.analysis.statistics import LEVEL, Estimate, hierarchical_bootstrap, over_seeds, percentile, student

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


def jackknife(value: float, without_N: ArrayLike, unit: str = "") -> Estimate:
    """`value` with Student's t interval from its N values with one unit left out each.

    stderr² = (N − 1)/N · Σ (θ₍₋ᵢ₎ − mean)²; also the conservative error of a mean over pairs of units.
    """
    without = np.asarray(without_N, float)
    n = without.size
    if n < 2:
        return student(value, math.inf, 0, n, unit)
    return student(value, math.sqrt((n - 1) * float(without.var())), n - 1, n, unit)


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
