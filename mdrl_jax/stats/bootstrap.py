"""Resampling of whole prompts, seeds or other units: draws, percentile intervals, jackknife (definitions §12).

Draws take whole independent units, for example a prompt with all its samples. They come from a fixed seed, so that the
same records give the same intervals. Figures that share their draws are paired: they can be subtracted or divided draw
by draw.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mdrl_jax.stats.estimate import LEVEL, Estimate, student

N_RESAMPLES = 2000
HIERARCHICAL_FROM = 8  # seeds; with fewer, Student's t over the seeds is used instead (definitions §12)
TAILS = (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)  # quantiles that bound the central 95 %


def prompt_weights(n_prompts: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each of P prompts counts in the sample and in each bootstrap draw: [1 + N_RESAMPLES, P].

    Row 0 is the sample, in which every prompt counts once. In each other row P prompts are drawn with replacement.
    `prompt_weights(P, rng) @ values_P / P` is therefore the mean of the sample, followed by the means of the draws.

    Args:
      n_prompts: P, at least 1.
      rng: of the draws; the call changes its state.

    Raises:
      ZeroDivisionError: if there are no prompts.
    """
    drawn = rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), N_RESAMPLES)
    return np.concatenate([np.ones((1, n_prompts)), drawn.astype(float)])


def cluster_bootstrap(
    statistic: Callable[..., float],
    arrays: Sequence[ArrayLike],
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
    unit: str = "",
) -> Estimate:
    """`statistic(*arrays)` with its percentile interval over draws of whole prompts with replacement.

    The arrays stay paired: each draw takes the same prompts of all. This suits means and ratios alike. Below about 20
    prompts the interval is too narrow.

    Args:
      statistic: a number from arrays like `arrays`. If it is nan on one draw, both ends of the interval are nan.
      arrays: data with the prompt as the leading axis of each; at least one array.
      n_resamples: the number of draws, at least 1.
      seed: of the draws.
      unit: of the statistic.

    Returns:
      The estimate, with the number of prompts as its `n`.

    Raises:
      ValueError: if the arrays differ in their number of prompts.
      IndexError: if there are no arrays, or no draws.
    """
    data = [np.asarray(x) for x in arrays]
    draws = resamples(statistic, data, n_resamples, seed)
    return percentile(float(statistic(*data)), draws, data[0].shape[0], unit)


def resamples(
    statistic: Callable[..., Any], arrays: Sequence[NDArray[Any]], n_resamples: int, seed: int = 0
) -> NDArray[np.float64]:
    """The values of a statistic on the draws of `cluster_bootstrap`, [n_resamples, ...].

    Args:
      statistic: a number or an array from arrays like `arrays`.
      arrays: data with the prompt as the leading axis of each; at least one array.
      n_resamples: the number of draws.
      seed: of the draws. Equal seeds and numbers of prompts give the same draws.

    Raises:
      ValueError: if the arrays differ in their number of prompts.
      IndexError: if there are no arrays.
    """
    n = arrays[0].shape[0]
    if any(x.shape[0] != n for x in arrays):
        raise ValueError(f"arrays differ in their number of prompts: {[x.shape[0] for x in arrays]}")
    rng = np.random.default_rng(seed)
    return np.array([statistic(*(x[rows] for x in arrays)) for rows in rng.integers(0, n, (n_resamples, n))])


def hierarchical_bootstrap(
    values_N: ArrayLike,
    replicates_NR: ArrayLike,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
    unit: str = "",
) -> Estimate:
    """Mean of a figure over N seeds, with the percentile interval of two levels of draws.

    Each draw takes N seeds with replacement, and for each of them one of its R replicates at random, so that both the
    seeds and the prompts within them vary. It is meant for N ≥ `HIERARCHICAL_FROM`, which is not checked.

    Args:
      values_N: the figure of each seed.
      replicates_NR: for each seed, the same figure on R draws, with replacement, of the seed's prompts. R is at least
        1, and the same for all seeds.
      n_resamples: the number of draws, at least 1.
      seed: of the draws.
      unit: of the figure.

    Returns:
      The estimate, with the number of seeds as its `n`. Only its interval depends on the replicates.

    Raises:
      ValueError: if seeds have different numbers of replicates, or none.
      IndexError: if there are no draws.
    """
    values, replicates = np.asarray(values_N, float), np.asarray(replicates_NR, float)
    rng = np.random.default_rng(seed)
    n, r = replicates.shape
    seeds_XN = rng.integers(0, n, (n_resamples, n))
    draws = replicates[seeds_XN, rng.integers(0, r, (n_resamples, n))].mean(axis=1)
    return percentile(float(values.mean()), draws, n, unit)


def percentile(value: float, draws: ArrayLike, n: int, unit: str = "") -> Estimate:
    """`value` with the central 95 % of its draws as its interval.

    Args:
      value: the figure on the sample.
      draws: the figure on each draw, of any shape, with at least one entry. A nan among them makes both ends nan.
      n: the number of independent units.
      unit: of the figure.

    Raises:
      IndexError: if there are no draws.
    """
    low, high = np.quantile(np.asarray(draws, float), TAILS)
    return Estimate(value, float(low), float(high), n, unit)


def band(values: ArrayLike, method: Literal["linear", "inverted_cdf"] = "linear") -> list[float]:
    """[low, high], the quantiles 0.025 and 0.975 of `values`, as records list the spread of drawn values.

    Args:
      values: numbers of any shape, at least one.
      method: how NumPy places a quantile between two values: "linear" interpolates, "inverted_cdf" takes one of them.

    Raises:
      IndexError: if there are no values.
    """
    # Not `TAILS`: rounding puts its lower end above 0.025, where "inverted_cdf" takes the next of 2,000 draws.
    return np.quantile(np.asarray(values), [0.025, 0.975], method=method).tolist()


def jackknife(value: float, without_N: ArrayLike, unit: str = "") -> Estimate:
    """`value`, a figure θ of N units, with Student's t interval from the N values θ₍₋ᵢ₎ that leave out one unit each.

    stderr² = (N − 1)/N · Σ (θ₍₋ᵢ₎ − mean)². If the figure is a mean over pairs of units, this error is conservative.

    Args:
      value: θ.
      without_N: θ₍₋ᵢ₎ for each unit i. With fewer than two units the interval is the whole line.
      unit: of the figure.

    Returns:
      The estimate, with N as its `n` and this standard error.
    """
    without = np.asarray(without_N, float)
    n = without.size
    if n < 2:
        return student(value, math.inf, 0, n, unit)
    return student(value, math.sqrt((n - 1) * float(without.var())), n - 1, n, unit)
