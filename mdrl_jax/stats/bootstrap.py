"""Resampling of whole prompts, seeds or other units: bootstrap-t and percentile intervals, jackknife (definitions §12).

Draws take whole independent units, for example a prompt with all its samples. They come from a fixed seed, so that the
same records give the same intervals. Figures that share their draws are paired: they can be subtracted or divided draw
by draw.

Percentiles of draws are too narrow below about 50 prompts, most of all for skewed data. `Draws` therefore gives
bootstrap-t intervals, and Fieller's for ratios. README.md of this folder has their coverage.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from mdrl_jax.stats.estimate import LEVEL, Estimate, fieller, student, t_quantile

Floats = NDArray[np.float64]
N_RESAMPLES = 2000
HIERARCHICAL_FROM = 8  # seeds; with fewer, Student's t over the seeds is used instead (definitions §12)
TAILS = (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)  # quantiles that bound the central 95 %


def prompt_weights(n_prompts: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each of P prompts counts in the sample and in each of 2,000 bootstrap draws: [2,001, P].

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


class Draws:
    """Draws of P prompts with replacement, from a fixed seed, and the intervals of figures that are made with them.

    A figure starts as `total` of some values, or as arithmetic on several of them. Such an array holds the figure of
    the sample in entry 0. The other entries are the figure on each draw, and on the sample and each draw without one of
    its prompts; the latter give the standard error of each draw. So any function that works elementwise, like a
    difference, a ratio or a maximum, makes another figure:

        draws = Draws(len(loss_P))
        rise = (draws.total(after_P) - draws.total(before_P)) / draws.total(count_P)
        draws.interval(rise, "nats")

    Attributes:
      n: P.
      weights_XP: how often each prompt counts in the sample (row 0) and in each draw (`prompt_weights`).

    Args:
      n_prompts: P, at least 1.
    """

    def __init__(self, n_prompts: int) -> None:
        self.n = n_prompts
        self.weights_XP = prompt_weights(n_prompts, np.random.default_rng(0))

    def total(self, values_P: ArrayLike) -> Floats:
        """The sums of one value for each prompt over the sample, the draws, and each of them without one prompt."""
        values = np.asarray(values_P, float)
        left_out = np.concatenate([[0.0], values])
        return ((self.weights_XP @ values)[:, None] - left_out).ravel()

    def values(self, figure: Floats) -> Floats:
        """The figure on the sample (entry 0) and on each draw, [X]."""
        return figure.reshape(-1, 1 + self.n)[:, 0]

    def stderrs(self, figure: Floats) -> Floats:
        """The jackknife standard error of the figure on the sample (entry 0) and on each draw, [X]."""
        by_draw = figure.reshape(-1, 1 + self.n)
        change_XP = by_draw[:, 1:] - by_draw[:, :1]
        if not np.isfinite(change_XP).all():
            change_XP = np.where(self.weights_XP > 0, change_XP, 0.0)  # only a prompt that was drawn can be left out
        mean_X = np.einsum("xp,xp->x", self.weights_XP, change_XP) / self.n
        square_X = np.einsum("xp,xp,xp->x", self.weights_XP, change_XP, change_XP) / self.n
        return (
            np.sqrt((self.n - 1) * np.maximum(square_X - mean_X**2, 0.0))
            if self.n > 1
            else np.full(len(mean_X), np.inf)
        )

    def interval(self, figure: Floats, unit: str = "") -> Estimate:
        """The figure with its bootstrap-t interval (`bootstrap_t`)."""
        return bootstrap_t(self.values(figure), self.stderrs(figure), self.n, unit)

    def fieller(self, part: Floats, whole: Floats, unit: str = "") -> Estimate | None:
        """part / whole with Fieller's interval, from the jackknife variances and P − 1 degrees of freedom.

        The draws are not used: for a ratio whose denominator is uncertain, the quantiles of draws are too narrow.

        Args:
          part, whole: two figures of these draws.
          unit: of the ratio.

        Returns:
          The estimate; None if the interval is unbounded, because Student's interval of `whole` includes 0.
        """
        sample = np.stack([x[: 1 + self.n] for x in (part, whole)])
        if self.n < 2 or not np.isfinite(sample).all():
            return None
        value, without = sample[:, 0], sample[:, 1:]
        (var_part, cov), (_, var_whole) = (self.n - 1) * np.cov(without, bias=True)
        ends = fieller(value[0], value[1], var_part, var_whole, cov, self.n - 1)
        return None if ends is None else Estimate(float(value[0] / value[1]), *ends, self.n, unit)


def bootstrap_t(value_X: ArrayLike, stderr_X: ArrayLike, n: int, unit: str = "") -> Estimate:
    """A figure with its bootstrap-t (studentized) interval (Efron, 1981).

    With θ and se of the sample, the distances t = (θ_draw − θ)/se_draw of the draws have the 2.5 % quantile t_low and
    the 97.5 % quantile t_high; each is the t of a draw. The interval is [θ − t_high·se, θ − t_low·se]. A draw with
    se_draw = 0, in which all units have the same value, has an infinite t, or t = 0 if θ_draw = θ. If infinite ones
    reach a quantile, that end of the interval is infinite.

    Args:
      value_X: the figure on the sample (entry 0) and on each draw.
      stderr_X: its standard error on each of them. Draws whose figure or error is nan or infinite are left out.
      n: the number of independent units.
      unit: of the figure.

    Returns:
      The estimate with the standard error of the sample. If that error is not finite, or if no draw is left, the
      interval is the whole line and the standard error infinite. Otherwise, if it is 0, the interval has no width.
    """
    value, stderr = np.asarray(value_X, float), np.asarray(stderr_X, float)
    known = np.isfinite(value[1:]) & np.isfinite(stderr[1:])
    if not (known.any() and math.isfinite(stderr[0])):
        return student(float(value[0]), math.inf, 0, n, unit)
    if stderr[0] == 0:  # all units are equal, and so are all draws
        return student(float(value[0]), 0.0, math.inf, n, unit)
    off, scale = value[1:][known] - value[0], stderr[1:][known]
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(off == 0, 0.0, off / scale)
    low, high = np.quantile(t, TAILS, method="inverted_cdf")
    return Estimate(
        float(value[0]), float(value[0] - high * stderr[0]), float(value[0] - low * stderr[0]), n, unit,
        float(stderr[0]),
    )  # fmt: skip


def cluster_bootstrap(
    statistic: Callable[..., float],
    arrays: Sequence[ArrayLike],
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
    unit: str = "",
) -> Estimate:
    """`statistic(*arrays)` with the interval of draws of whole prompts with replacement (`expanded_percentile`).

    The arrays stay paired: each draw takes the same prompts of all. This suits means and ratios alike. For skewed data
    of fewer than about 50 prompts the interval is too narrow; `Draws` serves there.

    Args:
      statistic: called as statistic(*arrays), with arrays like `arrays`; returns a number. If it is nan on one draw,
        both ends of the interval are nan.
      arrays: data with the prompt as the leading axis of each; at least one array.
      n_resamples: the number of draws, at least 1.
      seed: of the draws.
      unit: of the statistic.

    Returns:
      The estimate, with the number of prompts as its `n`. With fewer than two prompts the interval is the whole line.

    Raises:
      ValueError: if the arrays differ in their number of prompts.
      IndexError: if there are no arrays, or if there are at least two prompts but no draws.
    """
    data = [np.asarray(x) for x in arrays]
    draws = resamples(statistic, data, n_resamples, seed)
    return expanded_percentile(float(statistic(*data)), draws, data[0].shape[0], unit)


def resamples(
    statistic: Callable[..., Any], arrays: Sequence[NDArray[Any]], n_resamples: int, seed: int = 0
) -> NDArray[np.float64]:
    """The values of a statistic on the draws of `cluster_bootstrap`, [n_resamples, ...].

    Args:
      statistic: called as statistic(*arrays), with arrays like `arrays`; returns a number or an array.
      arrays: data with the prompt as the leading axis of each; at least one array.
      n_resamples: the number of draws.
      seed: of the draws. Equal seeds and numbers of prompts give the same draws.

    Returns:
      the values in the order of the draws; the axes after the first are those of the statistic.

    Raises:
      ValueError: if the arrays differ in their number of prompts.
      IndexError: if there are no arrays.
    """
    n = arrays[0].shape[0]
    if any(x.shape[0] != n for x in arrays):
        raise ValueError(f"arrays differ in their number of prompts: {[x.shape[0] for x in arrays]}")
    rng = np.random.default_rng(seed)
    return np.array([statistic(*(x[rows] for x in arrays)) for rows in rng.integers(0, n, (n_resamples, n))])


def hierarchical_bootstrap(values_N: ArrayLike, replicates_NR: ArrayLike, unit: str = "") -> Estimate:
    """Mean of a figure over N seeds whose runs share their prompts, with an interval over both seeds and prompts.

    The seeds and the prompts are crossed random effects. The variance of the mean is s²/N + p, with s² the variance of
    the figures over seeds and p the part of the prompts that all seeds share. With m_r the mean of replicate r over
    seeds, p = max(var_r(m_r) − a/N, 0). Here a = N/(N − 1) · mean over seeds of var_r(replicate − m_r) is the variance
    by prompts of single seeds beside m_r, which s² counts already. The interval is Student's t with Satterthwaite's
    degrees of freedom (N − 1)·((s²/N + p)/(s²/N))², which are infinite if s² is 0. Draws of seeds are not used:
    percentiles over eight seeds are too narrow.

    Args:
      values_N: the figure of each of at least two seeds.
      replicates_NR: for each of the same seeds, the figure on R ≥ 2 draws, with replacement, of the prompts. Replicate
        r of every seed has the same draw.
      unit: of the figure.

    Returns:
      The estimate, with the number of seeds as its `n`. Only its interval and standard error depend on the replicates.

    Raises:
      ValueError: if seeds have different numbers of replicates, or none, or if there are not as many seeds as figures.
      ZeroDivisionError: if there is only one seed.
    """
    values, replicates = np.asarray(values_N, float), np.asarray(replicates_NR, float)
    n = replicates.shape[0]
    if replicates.ndim != 2 or replicates.size == 0:
        raise ValueError(f"every seed needs the same number of replicates, not an array of shape {replicates.shape}")
    if values.shape != (n,):
        raise ValueError(f"{values.size} figures of seeds, but replicates of {n}")
    common_R = replicates.mean(axis=0)
    apart = float((replicates - common_R).var(axis=1, ddof=1).mean()) * n / (n - 1)
    of_seeds = float(values.var(ddof=1)) / n
    of_prompts = max(float(common_R.var(ddof=1)) - apart / n, 0.0)
    variance = of_seeds + of_prompts
    dof = (n - 1) * (variance / of_seeds) ** 2 if of_seeds > 0 else math.inf
    return student(float(values.mean()), math.sqrt(variance), dof, n, unit)


def expanded_percentile(value: float, draws: ArrayLike, n: int, unit: str = "", level: float = LEVEL) -> Estimate:
    """`value` with percentiles of bootstrap draws of n units, further out than the central ones (Hesterberg, 2015).

    Draws of n units vary by √((n − 1)/n) less than samples do, and a normal shape ignores that the variance is
    estimated. The lower percentile is therefore Φ(−√(n/(n − 1)) t), with t the quantile of Student's t with n − 1
    degrees of freedom, and the upper one is its mirror. For symmetric draws of a mean this is Student's interval.

    Args:
      value: the figure on the sample.
      draws: the figure on each draw, of any shape, with at least one entry. A nan among them makes both ends nan.
      n: the number of units; below two, the interval is the whole line.
      unit: of the figure.
      level: coverage of the interval, above 0 and below 1.

    Returns:
      The estimate, without a standard error.

    Raises:
      IndexError: if there are no draws and at least two units.
    """
    if n < 2:
        return student(value, math.inf, 0, n, unit)
    tail = float(ndtr(-math.sqrt(n / (n - 1)) * t_quantile(n - 1, level)))
    low, high = np.quantile(np.asarray(draws, float), (tail, 1 - tail))
    return Estimate(value, float(low), float(high), n, unit)


def percentile(value: float, draws: ArrayLike, n: int, unit: str = "") -> Estimate:
    """`value` with the central 95 % of its draws as its interval.

    Args:
      value: the figure on the sample.
      draws: the figure on each draw, of any shape, with at least one entry. A nan among them makes both ends nan.
      n: the number of independent units.
      unit: of the figure.

    Returns:
      The estimate, without a standard error.

    Raises:
      IndexError: if there are no draws.
    """
    low, high = np.quantile(np.asarray(draws, float), TAILS)
    return Estimate(value, float(low), float(high), n, unit)


def band(values: ArrayLike, method: Literal["linear", "inverted_cdf"] = "linear") -> list[float]:
    """[low, high], the quantiles 0.025 and 0.975 of `values`, as records list the spread of drawn values.

    Args:
      values: numbers of any shape, at least one. A nan among them makes both quantiles nan.
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
      without_N: θ₍₋ᵢ₎ for each unit i. With fewer than two units the interval is the whole line; with a nan it is nan.
      unit: of the figure.

    Returns:
      The estimate, with N as its `n` and this standard error, which is infinite for fewer than two units.
    """
    without = np.asarray(without_N, float)
    n = without.size
    if n < 2:
        return student(value, math.inf, 0, n, unit)
    return student(value, math.sqrt((n - 1) * float(without.var())), n - 1, n, unit)
