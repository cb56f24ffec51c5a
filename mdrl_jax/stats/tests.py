"""Nulls, p-values, and statistics that compare predictions with measurements (definitions §12, §13).

A null is the distribution of a figure under chance alone. Records hold the mean and the central 95 % of its draws.
Tests of many tensors at once use a false discovery rate (Benjamini and Hochberg, 1995). A *record* of a figure is
{"estimate", "ci95", "null", "n", "unit"}, with "reason" if something could not be measured (`stats/estimate.py`).
"""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mdrl_jax.stats.bootstrap import TAILS, jackknife
from mdrl_jax.stats.estimate import Estimate, Record, missing, over_seeds, t_quantile

FEWEST_PAIRS = 5  # with fewer, even a perfect order is no evidence
FEWEST_CLUSTERS = 6  # with fewer, the jackknife over clusters does not cover
Floats = NDArray[np.float64]


def null_record(draws: ArrayLike) -> Record:
    """A null as JSON: {"mean", "low", "high", "n"} of its draws, where low and high bound the central 95 %.

    Args:
      draws: the figure under chance alone, of any shape. "n" is their number. A nan among them makes the mean and both
        bounds nan.

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
      value: the figure.
      draws: the figure under chance alone, of any shape; without draws p is 1. A nan counts as above the value.

    Raises:
      ValueError: if `value` is nan.
    """
    if math.isnan(value):
        raise ValueError("a p-value needs a figure, not nan")
    draws_R = np.asarray(draws, float)
    return (1 + int(np.sum(~(draws_R < value)))) / (1 + draws_R.size)


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

    Args:
      x, y: the pairs, arrays of one shape.

    Raises:
      ValueError: if the shapes do not fit together.
    """
    from scipy.stats import rankdata  # here, because its import takes a second, which few commands need

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


def spearman(x: ArrayLike, y: ArrayLike, seeds: ArrayLike | None = None) -> Estimate | None:
    """Spearman's rank correlation of N pairs (x, y) with its interval.

    Without `seeds`, or if they are all the same, the pairs are the independent units and the interval is that of
    `fisher_interval`, the whole line for fewer than five pairs. With several seeds the correlation is taken within each
    training seed and averaged over them: Student's t over the seeds (definitions §12), cut at −1 and 1.

    Args:
      x, y: the pairs, [N] each.
      seeds: the training seed of each pair, [N].

    Returns:
      The estimate, with the number of pairs or of seeds as its `n` and "point" or "seed" as its unit. None if there are
      no pairs, or if `spearman_rho` is nan, for example because x or y is constant: on all pairs, or with several seeds
      on the pairs of one of them.

    Raises:
      ValueError: if x and y are not two vectors of numbers of the same length.
      IndexError: if `seeds` has another length than x, and is not empty.
    """
    return _agreement(spearman_rho, lambda x_N, y_N, r: fisher_interval(r, x_N.size), (-1.0, 1.0), x, y, seeds)


def r_squared(predicted: ArrayLike, measured: ArrayLike, seeds: ArrayLike | None = None) -> Estimate | None:
    """R² of the line measured = predicted (`explained`) with its interval.

    With one seed the interval is that of `explained_interval`, the whole line for fewer than five pairs. With several
    seeds R² is taken within each seed and averaged over them: Student's t over the seeds, cut at 1.

    Args:
      predicted, measured: one of each for every pair, [N].
      seeds: the training seed of each pair, [N]; None if it is the same for all.

    Returns:
      The estimate, with the number of pairs or of seeds as its `n` and "point" or "seed" as its unit. None if there are
      no pairs, or if `explained` is nan, for example because the measured values are constant: on all pairs, or with
      several seeds on the pairs of one of them.

    Raises:
      ValueError, IndexError: as in `spearman`.
    """
    return _agreement(explained, explained_interval, (-math.inf, 1.0), predicted, measured, seeds)


def _agreement(
    statistic: Callable[[Floats, Floats], Floats],
    interval: Callable[[Floats, Floats, float], tuple[float, float]],
    within: tuple[float, float],
    x: ArrayLike,
    y: ArrayLike,
    seeds: ArrayLike | None,
) -> Estimate | None:
    """A statistic of pairs, with its interval over pairs or over seeds; None where it is undefined."""
    x_N, y_N = np.asarray(x, float), np.asarray(y, float)
    if x_N.shape != y_N.shape or x_N.ndim != 1:
        raise ValueError(f"a statistic of pairs needs two vectors of one length, not {x_N.shape} and {y_N.shape}")
    seed_N = np.zeros(x_N.size) if seeds is None else np.asarray(seeds)
    values = [float(statistic(x_N[seed_N == s], y_N[seed_N == s])) for s in np.unique(seed_N)]
    if not values or not np.all(np.isfinite(values)):
        return None
    if len(values) > 1:
        return over_seeds(values, "seed", within)
    return Estimate(values[0], *interval(x_N, y_N, values[0]), x_N.size, "point")


def fisher_interval(r: float, n: int) -> tuple[float, float]:
    """The interval (low, high) of a rank correlation r of n independent pairs, from Fisher's z = artanh r.

    z is taken as normal with the variance (1 + r²/2)/(n − 3) (Bonett and Wright, 2000). Pairs are not resampled,
    because resampling would give every perfect order, of however few pairs, the interval [1, 1]. For artanh, |r| is cut
    at 1 − 6/(n³ − n), which is halfway between a perfect order and one with a swap of neighbours. With five pairs r
    takes only 21 values, and the interval excludes 0 only for a perfect order, whose two-sided p is 2/5!.

    Returns:
      (low, high) within [−1, 1]; (−inf, inf) if n is below five.
    """
    if n < FEWEST_PAIRS:
        return -math.inf, math.inf
    short = 1 - 6 / (n * (n * n - 1))
    z, half = math.atanh(min(max(r, -short), short)), t_quantile(math.inf) * math.sqrt((1 + r * r / 2) / (n - 3))
    return math.tanh(z - half), math.tanh(z + half)


def rank_agreement(effects: ArrayLike, transfers: ArrayLike, clusters: Sequence[Hashable] | None = None) -> Record:
    """Spearman's correlation of pairs of figures, as a record.

    If the pairs are independent, the interval is that of `fisher_interval`. Pairs that are not independent of each
    other, such as a short and a long refresh of one domain, belong to one cluster. The interval is then a jackknife
    over clusters of z = artanh r, with |r| cut as in `fisher_interval` and Student's t of one degree of freedom less
    than there are clusters.

    Args:
      effects, transfers: the two figures of each pair, vectors of one length. A pair in which one is None, nan or
        infinite is left out.
      clusters: a name for the cluster of each pair; None if every pair is independent.

    Returns:
      The record, with the null 0 and the unit "Spearman". Its "n" is the number of pairs, or of clusters, that are not
      left out. With fewer than five pairs, or if all values of one of the two are equal, it has no estimate but a
      reason, and "n" is the number of pairs. With fewer than six clusters, or if r is undefined without one of them, it
      has an estimate, but a reason in place of an interval.

    Raises:
      ValueError, IndexError: if the two differ in length. ValueError: if the clusters do; they are not read if there is
        no estimate.
    """
    x, y = np.asarray(effects, float), np.asarray(transfers, float)
    known = np.isfinite(x) & np.isfinite(y)
    x, y, n = x[known], y[known], int(known.sum())
    if n < FEWEST_PAIRS:
        return missing(f"{n} pairs are too few", "Spearman", n, 0.0)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return missing("one of the two figures is the same for all pairs", "Spearman", n, 0.0)
    r = float(spearman_rho(x, y))
    if clusters is None:
        return Estimate(r, *fisher_interval(r, n), n, "Spearman").record(0.0)
    names = [name for name, keep in zip(clusters, known, strict=True) if keep]
    label_N = np.array([list(dict.fromkeys(names)).index(name) for name in names])
    k = int(label_N.max()) + 1
    without = np.array([spearman_rho(x[label_N != c], y[label_N != c]) for c in range(k)])
    if k < FEWEST_CLUSTERS or not np.isfinite(without).all():
        reason = f"no interval: {k} independent groups of actions are too few"
        return Estimate(r, -math.inf, math.inf, k, "Spearman").record(0.0) | {"reason": reason}
    short = 1 - 6 / (n * (n * n - 1))
    z, z_without = (np.arctanh(np.clip(value, -short, short)) for value in (r, without))
    on_z = jackknife(float(z), z_without)
    return Estimate(r, math.tanh(on_z.low), math.tanh(on_z.high), k, "Spearman").record(0.0)


def explained_interval(predicted: Floats, measured: Floats, value: float) -> tuple[float, float]:
    """The interval (low, high) of R² (`explained`) of N independent pairs: a jackknife with Student's t.

    Args:
      predicted, measured: the pairs, [N] each.
      value: their R².

    Returns:
      (low, high), with `high` cut at 1; (−inf, inf) with fewer than five pairs, or if R² is nan without one of them.
    """
    n = measured.size
    if n < FEWEST_PAIRS:
        return -math.inf, math.inf
    without = np.array([explained(np.delete(predicted, i), np.delete(measured, i)) for i in range(n)])
    if not np.isfinite(without).all():
        return -math.inf, math.inf
    found = jackknife(value, without)
    return found.low, min(found.high, 1.0)
