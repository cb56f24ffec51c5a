"""Resampling of whole prompts, seeds or other units: draws, percentile intervals, jackknife (definitions §12).

All draws come from a fixed seed, so that the same records give the same intervals, and figures that share their draws
can be subtracted or divided draw by draw.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mdrl_jax.stats.estimate import LEVEL, Estimate, student

N_RESAMPLES = 2000
TAILS = (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)


def cluster_bootstrap(
    statistic: Callable[..., float],
    arrays: Sequence[ArrayLike],
    n_resamples: int = 2000,
    seed: int = 0,
    unit: str = "",
) -> Estimate:
    """Percentile interval of `statistic(*arrays)`; whole prompts, the shared leading axis, are
    drawn with replacement.

    Paired arrays stay paired. For means and ratios alike; below some 20 prompts the percentile
    interval is too narrow. Raises ValueError when the leading axes differ.
    """
    data = [np.asarray(x) for x in arrays]
    draws = resamples(statistic, data, n_resamples, seed)
    return percentile(float(statistic(*data)), draws, data[0].shape[0], unit)


def resamples(
    statistic: Callable[..., Any], arrays: Sequence[NDArray[Any]], n_resamples: int, seed: int = 0
) -> NDArray[np.float64]:
    """`statistic`, a number or an array, on each draw of the prompts: [n_resamples, ...]."""
    n = arrays[0].shape[0]
    if any(x.shape[0] != n for x in arrays):
        raise ValueError(f"arrays differ in their number of prompts: {[x.shape[0] for x in arrays]}")
    rng = np.random.default_rng(seed)
    return np.array([statistic(*(x[rows] for x in arrays)) for rows in rng.integers(0, n, (n_resamples, n))])


def hierarchical_bootstrap(
    values_N: ArrayLike,
    replicates_NR: ArrayLike,
    n_resamples: int = 2000,
    seed: int = 0,
    unit: str = "",
) -> Estimate:
    """Percentile interval of the mean over N ≥ 8 seeds: seeds are drawn, then prompts within each.

    `values_N` is the figure of each seed, `replicates_NR` the same figure on R draws, with
    replacement, of that seed's prompts; a seed drawn twice takes two of them at random.
    """
    values, replicates = np.asarray(values_N, float), np.asarray(replicates_NR, float)
    rng = np.random.default_rng(seed)
    n, r = replicates.shape
    seeds_XN = rng.integers(0, n, (n_resamples, n))
    draws = replicates[seeds_XN, rng.integers(0, r, (n_resamples, n))].mean(axis=1)
    return percentile(float(values.mean()), draws, n, unit)


def percentile(value: float, draws: ArrayLike, n: int, unit: str = "") -> Estimate:
    """`value` with the central 95 % of `draws`."""
    low, high = np.quantile(np.asarray(draws, float), [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Estimate(value, float(low), float(high), n, unit)


def jackknife(value: float, without_N: ArrayLike, unit: str = "") -> Estimate:
    """`value` with Student's t interval from its N values with one unit left out each.

    stderr² = (N − 1)/N · Σ (θ₍₋ᵢ₎ − mean)²; also the conservative error of a mean over pairs of units.
    """
    without = np.asarray(without_N, float)
    n = without.size
    if n < 2:
        return student(value, math.inf, 0, n, unit)
    return student(value, math.sqrt((n - 1) * float(without.var())), n - 1, n, unit)
