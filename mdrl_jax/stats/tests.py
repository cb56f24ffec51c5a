"""Nulls, p-values, and statistics that compare predictions with measurements (definitions §12, §13).

A null is the distribution of a figure under chance alone. Records hold the mean and the central 95 % of its draws.
Tests of many tensors at once use a false discovery rate (Benjamini and Hochberg, 1995).
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from mdrl_jax.stats.bootstrap import HIERARCHICAL_FROM, N_RESAMPLES, TAILS, hierarchical_bootstrap, percentile
from mdrl_jax.stats.estimate import Estimate, Record, missing, over_seeds, student, t_quantile

Floats = NDArray[np.float64]


def null_record(draws: ArrayLike) -> Record:
    """A null as JSON: {"mean", "low", "high", "n"} of its draws, where low and high bound the central 95 %.

    Args:
      draws: the figure under chance alone, of any shape. "n" is their number.

    Raises:
      IndexError: if there are no draws.
    """
    draws_R = np.asarray(draws, float)
    low, high = np.quantile(draws_R, TAILS)
    return {"mean": float(draws_R.mean()), "low": float(low), "high": float(high), "n": int(draws_R.size)}


def permutation_p(value: float, draws: ArrayLike) -> float:
    """One-sided p-value of the hypothesis that `value` is no larger than chance gives, from draws of chance.

    p = (1 + number of draws at or above the value) / (1 + number of draws), which is never 0.

    Args:
      value: the figure. It must not be nan, which would get the smallest p.
      draws: the figure under chance alone, of any shape; without draws p is 1. A nan counts as below the value.
    """
    draws_R = np.asarray(draws, float)
    return (1 + int(np.sum(draws_R >= value))) / (1 + draws_R.size)


def benjamini_hochberg(p_values: ArrayLike, q: float = 0.05) -> NDArray[np.bool_]:
    """Which null hypotheses are rejected at false discovery rate `q`, over the last axis: [..., T] -> [..., T].

    With the p-values sorted, p(1) ≤ … ≤ p(T), let k be the largest index with p(k) ≤ q·k/T; every hypothesis with a
    p-value of at most p(k) is rejected, and none if there is no such k. The rate holds for independent and for
    positively dependent tests.

    Args:
      p_values: p-values with at least one axis. T may be 0. A nan is never rejected, but counts in T.
      q: the rate, in [0, 1].

    Raises:
      IndexError: if `p_values` is a single number.
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
    """Spearman's rank correlation over the last axis, [..., N] -> [...]; nan if x or y is constant or has a nan.

    Ties get the mean of their ranks. A single pair, or none, counts as constant.
    """
    x, y = (rankdata(z, axis=-1) - (z.shape[-1] + 1) / 2 for z in (x, y))
    with np.errstate(invalid="ignore"):
        return np.sum(x * y, axis=-1) / np.sqrt(np.sum(x**2, axis=-1) * np.sum(y**2, axis=-1))


def explained(predicted: Floats, measured: Floats) -> Floats:
    """R² of the line measured = predicted, over the last axis, [..., N] -> [...]; no line is fitted.

    R² = 1 − Σ(measured − predicted)² / Σ(measured − mean of measured)². It is at most 1, negative if the mean of the
    measured values would have been the better prediction, and nan if the measured values are constant (also if there is
    only one, or none) or if one of the values is nan.
    """
    spread = np.sum((measured - measured.mean(axis=-1, keepdims=True)) ** 2, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.sum((measured - predicted) ** 2, axis=-1) / spread
        return np.where(spread > 0, 1.0 - ratio, np.nan)


def spearman(x: ArrayLike, y: ArrayLike, seeds: ArrayLike | None = None, **options: int) -> Estimate | None:
    """Spearman's rank correlation of x and y with its interval.

    Args:
      x, y, seeds: as in `paired_statistic`.
      options: `n_resamples` and `seed` of `paired_statistic`; TypeError for any other.

    Returns:
      The estimate; None if `spearman_rho` is nan, for example because x or y is constant: on all pairs, or with several
      seeds on the pairs of one of them.

    Raises:
      ValueError, IndexError: as in `paired_statistic`.
    """
    return paired_statistic(spearman_rho, x, y, seeds, **options)


def r_squared(
    predicted: ArrayLike, measured: ArrayLike, seeds: ArrayLike | None = None, **options: int
) -> Estimate | None:
    """R² of the line measured = predicted (`explained`) with its interval.

    Args:
      predicted, measured, seeds: as x, y and seeds in `paired_statistic`.
      options: `n_resamples` and `seed` of `paired_statistic`; TypeError for any other.

    Returns:
      The estimate; None if `explained` is nan, for example because the measured values are constant: on all pairs, or
      with several seeds on the pairs of one of them.

    Raises:
      ValueError, IndexError: as in `paired_statistic`.
    """
    return paired_statistic(explained, predicted, measured, seeds, **options)


def paired_statistic(
    statistic: Callable[[Floats, Floats], Floats],
    x: ArrayLike,
    y: ArrayLike,
    seeds: ArrayLike | None = None,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Estimate | None:
    """A statistic of N pairs (x, y) with its interval.

    Without `seeds`, or if they are all the same, the pairs are the independent units, and they are resampled; with
    fewer than three pairs the interval is the whole line. With several seeds the statistic is taken within each
    training seed and averaged over them: below `HIERARCHICAL_FROM` seeds the interval is Student's t over the seeds,
    from there on seeds are resampled, and pairs within each of them (definitions §12). A resample on which the
    statistic is undefined is dropped.

    Args:
      statistic: of two arrays [..., N], over the last axis; nan where it is undefined.
      x, y: the pairs, [N] each.
      seeds: the training seed of each pair, [N].
      n_resamples: the number of resamples, at least 1.
      seed: of the resampling.

    Returns:
      the estimate, with the number of pairs or of seeds as its `n` and "point" or "seed" as its unit; None if the
      statistic is undefined on the pairs or on one of the seeds, or if there are no pairs.

    Raises:
      ValueError: if x and y are not two vectors of numbers of the same length, or if seeds are resampled and the
        statistic is undefined on all resamples of one of them.
      IndexError: if `seeds` names several seeds but has another length, or if there is no resample on which the
        statistic is defined.
    """
    x_N, y_N = np.asarray(x, float), np.asarray(y, float)
    if x_N.shape != y_N.shape or x_N.ndim != 1:
        raise ValueError(f"a statistic of pairs needs two vectors of one length, not {x_N.shape} and {y_N.shape}")
    rng = np.random.default_rng(seed)

    def resampled(x_N: Floats, y_N: Floats) -> Floats:
        rows_RN = rng.integers(0, x_N.size, (n_resamples, x_N.size))
        draws = statistic(x_N[rows_RN], y_N[rows_RN])
        return draws[np.isfinite(draws)]

    if seeds is None or len(set(np.asarray(seeds).tolist())) < 2:
        value = float(statistic(x_N, y_N)) if x_N.size else math.nan
        if not math.isfinite(value):
            return None
        if x_N.size < 3:  # two pairs are perfectly correlated in every resample
            return student(value, math.inf, 0, x_N.size, "point")
        return percentile(value, resampled(x_N, y_N), x_N.size, "point")
    seed_N = np.asarray(seeds)
    groups = [(x_N[seed_N == s], y_N[seed_N == s]) for s in np.unique(seed_N)]
    values = [float(statistic(*group)) for group in groups]
    if not np.all(np.isfinite(values)):
        return None
    if len(values) < HIERARCHICAL_FROM:
        return over_seeds(values, "seed")
    draws = [resampled(*group) for group in groups]
    shortest = min(d.size for d in draws)
    return hierarchical_bootstrap(values, [d[:shortest] for d in draws], n_resamples, seed, "seed")


def rank_agreement(effects: ArrayLike, transfers: ArrayLike) -> Record:
    """Spearman's correlation r of n pairs of figures, as a record, with the interval of Fisher's z = artanh r.

    z has the variance (1 + r²/2)/(n − 3) (Bonett and Wright, 2000), with Student's t of n − 3 degrees of freedom in
    place of the normal [chosen], because n is small. Pairs are not resampled, because resampling would give every
    perfect order, of however few pairs, the interval [1, 1]. For the interval, |r| is cut at 1 − 6/(n³ − n), which is
    halfway between a perfect order and one with a swap of neighbours.

    Args:
      effects, transfers: the two figures of each pair, vectors of one length. A pair in which one is None, nan or
        infinite is left out.

    Returns:
      The record, with the null 0, the unit "Spearman", and the number of pairs that are not left out as its "n". It has
      no estimate but a reason with fewer than five pairs, or if all values of one of the two are equal.

    Raises:
      ValueError, IndexError: if the two differ in length.
    """
    x, y = np.asarray(effects, float), np.asarray(transfers, float)
    known = np.isfinite(x) & np.isfinite(y)
    x, y, n = x[known], y[known], int(known.sum())
    if n < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
        reason = f"{n} pairs are too few" if n < 5 else "all pairs are equal"
        return missing(reason, "Spearman", n, 0.0)
    r = float(spearman_rho(x, y))
    short = 1 - 6 / (n * (n * n - 1))
    z, stderr = math.atanh(min(max(r, -short), short)), math.sqrt((1 + r * r / 2) / (n - 3))
    half = t_quantile(n - 3) * stderr
    return Estimate(r, math.tanh(z - half), math.tanh(z + half), n, "Spearman").record(0.0)
