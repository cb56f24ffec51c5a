"""Estimates with 95 % intervals, and the records that they become (definitions §12).

The independent unit is the prompt. Samples of one prompt share its difficulty, so they are averaged first: each row of
`values_PG` gives one number, and the spread between rows gives the standard error. Where prompts depend on each other,
such as questions about one text, `groups` numbers their groups, and the unit is the group. The estimate stays the mean
over prompts.

Over fewer than eight seeds the unit is the seed, with Student's t, because the interval of a bootstrap of three seeds
covers the truth in only 74 % of cases. From eight seeds on use `bootstrap.hierarchical_bootstrap`.

An estimate keeps the unit of the numbers it is made from. `Estimate.in_points` converts rewards to points.

An `Estimate` has `value`, the interval [`low`, `high`], `n` independent units, `unit` and, where the interval is made
from one, `stderr`. Its record is {"estimate", "ci95", "null", "n", "unit"}.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

LEVEL = 0.95
POINTS = 100.0  # points of a score in a reward of 1
ROUNDING = 1e-9  # differences of mean rewards up to this size are rounding
# An object in the JSON records of a run. That of a measured figure is {"estimate", "ci95", "null", "n", "unit"}, and
# "reason" if it has no estimate.
Record = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval [low, high].

    Attributes:
      value, low, high: the value and the ends of its interval, which may be infinite.
      n: the number of independent units (prompts, seeds, …) that the value rests on. With a single unit the interval
        is the whole line.
      unit: of the value, for example "points"; or the name of the independent unit if the value has no unit.
      stderr: the standard error if the interval was made from one, otherwise None.
    """

    value: float
    low: float
    high: float
    n: int
    unit: str = ""
    stderr: float | None = None

    def includes(self, x: float) -> bool:
        """Whether `x` lies in the closed interval."""
        return self.low <= x <= self.high

    def scaled(self, factor: float, unit: str) -> "Estimate":
        """The estimate of `factor` times the quantity, in `unit`; a negative factor swaps the ends of the interval."""
        low, high = sorted((factor * self.low, factor * self.high))
        stderr = None if self.stderr is None else abs(factor) * self.stderr
        return replace(self, value=factor * self.value, low=low, high=high, unit=unit, stderr=stderr)

    def in_points(self) -> "Estimate":
        """The estimate of a reward in [0, 1] as points of a score."""
        return self.scaled(POINTS, "points")

    def record(self, null: Any = None) -> Record:
        """The estimate as JSON.

        Args:
          null: the value that it would have by chance or without any effect: a number, an interval, the record of a
            drawn null (`stats.tests.null_record`), or None.

        Returns:
          {"estimate": the value, "ci95": [low, high], "null", "n", "unit"}. An interval with an end that is infinite or
          nan becomes None, because JSON has neither. The standard error is left out.
        """
        bounded = math.isfinite(self.low) and math.isfinite(self.high)
        ci95 = [self.low, self.high] if bounded else None
        return {"estimate": self.value, "ci95": ci95, "null": null, "n": self.n, "unit": self.unit}


def missing(reason: str, unit: str = "", n: int = 0, null: Any = None) -> Record:
    """The record of a figure that could not be measured: the form of `Estimate.record`, with a "reason".

    Args:
      reason: why it could not be measured.
      unit: of the figure.
      n: the number of independent units.
      null: the value that the figure would have by chance or without any effect.

    Returns:
      {"estimate": None, "ci95": None, "null", "n", "unit", "reason"}.
    """
    return {"estimate": None, "ci95": None, "null": null, "n": n, "unit": unit, "reason": reason}


def t_quantile(dof: float, level: float = LEVEL) -> float:
    """Half-width of the two-sided Student t interval in standard errors; `level` is its coverage, above 0 and below 1.

    At 95 % it is 1.96 for infinitely many degrees of freedom. It is infinite if `dof` is not above 0.
    """
    return float(stdtrit(dof, 0.5 + level / 2)) if dof > 0 else math.inf


def student(value: float, stderr: float, dof: float, n: int, unit: str = "", level: float = LEVEL) -> Estimate:
    """`value` with Student's t interval, value ± t(dof) · stderr.

    Args:
      value: the figure.
      stderr: its standard error.
      dof: degrees of freedom of the standard error, which may be infinite. If they are not above 0, the interval is the
        whole line.
      n: the number of independent units.
      unit: of the figure.
      level: coverage of the interval, above 0 and below 1.

    Returns:
      The estimate, which keeps `stderr`.
    """
    half = t_quantile(dof, level) * stderr if dof > 0 else math.inf
    return Estimate(value, value - half, value + half, n, unit, stderr)


def clustered_mean(values_PG: ArrayLike, groups: ArrayLike | None = None) -> tuple[float, float]:
    """Mean of the rewards with equal weight for each prompt, and its standard error with the group as the cluster.

    With P prompts in K groups, stderr² = K/(K − 1) · Σ_k (Σ_{i in group k} (x_i − mean))² / P², where x_i is the mean
    of prompt i's samples. Where every prompt is a group of its own this is sd(x)/√P, with P − 1 in the variance.

    Args:
      values_PG: rewards of P prompts with G samples each, or one value per prompt [P].
      groups: number of each prompt's group [P], integers; None if every prompt is a group of its own.

    Returns:
      (mean, standard error), both in the unit of the values. The standard error of a single group is infinite. A nan
      or None among the values makes the mean, and the standard error of several groups, nan.

    Raises:
      ValueError: if there are no prompts or no samples, if prompts have different numbers of samples, if the values are
        not numbers with one or two axes, or if `groups` does not have the shape [P].
    """
    mean_P = _per_prompt(values_PG)
    n, ((variance,),) = _clusters([mean_P], groups)
    return float(mean_P.mean()), math.sqrt(variance) if n > 1 else math.inf


def clustered(values_PG: ArrayLike, unit: str = "", groups: ArrayLike | None = None) -> Estimate:
    """`clustered_mean` with its interval: Student's t with one degree of freedom less than there are groups.

    Args:
      values_PG: rewards of P prompts with G samples each, or one value per prompt [P].
      unit: of the values.
      groups: as in `clustered_mean`.

    Returns:
      The estimate, with the number of groups as its `n` and the standard error of `clustered_mean`. The interval of a
      single group is the whole line.

    Raises:
      ValueError: as in `clustered_mean`.
    """
    mean, stderr = clustered_mean(values_PG, groups)
    n = len(np.asarray(values_PG)) if groups is None else len(np.unique(groups))
    return student(mean, stderr, n - 1, n, unit)


def score(rewards_PG: ArrayLike, groups: ArrayLike | None = None) -> Estimate:
    """Score in points: 100 times the mean reward, with an interval that stays within [0, 100] (definitions §12).

    The interval is Wilson's (1927) of m(1 − m)/stderr² cases, with m and stderr of `clustered_mean` and the quantile of
    Student's t with one degree of freedom less than there are groups. It is asymmetric: near 100 points it reaches
    further down than up. If the standard error is 0, for example because all prompts have the same mean, the number of
    cases is that of the groups.

    Args:
      rewards_PG: rewards in [0, 1] of P prompts with G samples each, or one value per prompt [P]. Only their mean is
        checked.
      groups: as in `clustered_mean`.

    Returns:
      The estimate, with the unit "points", the number of groups as its `n`, and 100 · stderr as its standard error. The
      interval of a single group is the whole line.

    Raises:
      ValueError: as in `clustered_mean`, or if the mean reward is not in [0, 1] or is nan.
    """
    plain = clustered(rewards_PG, groups=groups)
    mean, n = plain.value, plain.n
    if not 0 <= mean <= 1:
        raise ValueError(f"rewards must lie in [0, 1], but their mean is {mean:g}")
    if n == 1:
        return plain.in_points()
    cases = mean * (1 - mean) / plain.stderr**2 if 0 < mean < 1 and plain.stderr else n
    low, high = wilson(mean, cases, t_quantile(n - 1))
    return replace(plain, low=low, high=high).in_points()


def wilson(share: float, n: float, quantile: float | None = None) -> tuple[float, float]:
    """Wilson's 95 % interval (low, high) of a share of n trials; it has a width also at the shares 0 and 1.

    Args:
      share: the share, in [0, 1]; this is not checked.
      n: number of trials, above 0; it need not be whole.
      quantile: half-width of the interval in standard errors; None for that of the normal distribution, 1.96.

    Returns:
      (low, high), with 0 ≤ low ≤ share ≤ high ≤ 1.

    Raises:
      ZeroDivisionError: if `n` is 0.
    """
    z2 = (t_quantile(math.inf) if quantile is None else quantile) ** 2 / n
    middle = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) * z2 + z2**2 / 4) / (1 + z2)
    # Rounding may put an end on the wrong side of a share of 0 or 1.
    return min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share)


def paired_difference(a_PG: ArrayLike, b_PG: ArrayLike, groups: ArrayLike | None = None) -> Estimate:
    """Mean of a − b over the same prompts in the same order, with an interval that allows for rare changes.

    A domain that is little affected has the same reward on almost all prompts, and a sample may miss those that differ.
    So the variance counts two more prompts of typical size, one with a gain and one with a loss, as Agresti and Min
    (2005) do for pairs of right and wrong. Off each prompt's difference the median is taken, which is 0 where most
    prompts do not differ. With K groups and D_k, the sum of what is left in group k,

        stderr² = stderr² of `clustered_mean` + 2 · s² · K / ((K − 1) P²),   s² = Σ_k D_k⁴ / Σ_k D_k²

    and s = 1/G, one sample's change of a right answer, if every D_k is 0. The interval is Student's t with K − 1
    degrees of freedom. The estimate remains the mean over the P prompts.

    Args:
      a_PG, b_PG: rewards of P prompts with any number of samples each, or one value per prompt [P]. a and b may have
        different numbers of samples; G is the larger one.
      groups: as in `clustered_mean`.

    Returns:
      The estimate in the unit of the rewards, with "" as its `unit` and the number of groups as its `n`. The interval
      of a single group is the whole line.

    Raises:
      ValueError: if the numbers of prompts differ, or as in `clustered_mean`.
    """
    a_P, b_P = _per_prompt(a_PG), _per_prompt(b_PG)
    if a_P.size != b_P.size:
        raise ValueError(f"paired data need the same prompts: {a_P.size} against {b_P.size}")
    mean, stderr = clustered_mean(a_P - b_P, groups)
    off_P = a_P - b_P - np.median(a_P - b_P)
    squares_K = _group_sums(np.where(np.abs(off_P) > ROUNDING, off_P, 0.0)[None], groups)[0] ** 2
    n = squares_K.size
    if n > 1:
        samples = max(x.shape[1] if (x := np.asarray(values)).ndim == 2 else 1 for values in (a_PG, b_PG))
        typical = (squares_K**2).sum() / squares_K.sum() if squares_K.any() else samples**-2
        stderr = math.sqrt(stderr**2 + 2 * typical * n / ((n - 1) * a_P.size**2))
    return student(mean, stderr, n - 1, n)


def independent_mean(estimates: Sequence[Estimate]) -> Estimate:
    """Unweighted mean of m independent estimates that have a standard error, for example one per domain.

    Each side of the interval has its own half-width t · √(Σ s²) / m (Zou and Donner, 2008). Here s = d / t(n − 1), with
    d the distance from an estimate's value to that end of its interval, and t has the degrees of freedom of Welch and
    Satterthwaite. For Student's intervals s is the standard error. Other intervals, such as those of `score`, give an
    asymmetric interval.

    Args:
      estimates: m ≥ 1 estimates, all in one unit; this is not checked.

    Returns:
      The mean in the unit of the first estimate, with √(Σ stderr²) / m as its standard error and the sum of their `n`
      as its `n`. If an estimate has no standard error or an infinite one, the interval is the whole line and the
      standard error infinite. If an estimate has an `n` of 1, the interval is the whole line, unless all standard
      errors are 0.

    Raises:
      ZeroDivisionError: if there are no estimates.
    """
    value, unit = sum(e.value for e in estimates) / len(estimates), estimates[0].unit
    n = np.array([e.n for e in estimates])
    se2 = np.array([math.inf if e.stderr is None else e.stderr**2 for e in estimates])
    stderr = math.sqrt(se2.sum()) / len(estimates)
    if not math.isfinite(stderr) or (stderr > 0 and (n == 1).any()):
        return student(value, stderr, 0, int(n.sum()), unit)

    def half(distances: Sequence[float]) -> float:
        units2 = np.array([(d / t_quantile(e.n - 1)) ** 2 for d, e in zip(distances, estimates, strict=True)])
        total = float(units2.sum())
        if not total > 0:  # without any spread the interval has no width, whatever the degrees of freedom
            return 0.0
        return t_quantile(total**2 / float(np.sum(units2**2 / (n - 1)))) * math.sqrt(total) / len(estimates)

    low, high = half([e.value - e.low for e in estimates]), half([e.high - e.value for e in estimates])
    return Estimate(value, value - low, value + high, int(n.sum()), unit, stderr)


def fieller(
    num: float, den: float, var_num: float, var_den: float, cov: float, dof: float
) -> tuple[float, float] | None:
    """95 % interval of the ratio num/den of two jointly normal means (Fieller, 1954).

    The interval is the set of all r with (num − r·den)² ≤ t² (var_num − 2 r cov + r² var_den).

    Args:
      num, den: the two means.
      var_num, var_den, cov: variances of the two means, and their covariance.
      dof: degrees of freedom of the variances.

    Returns:
      (low, high), or None if the set is unbounded. That is the case exactly if Student's interval of `den` includes 0,
      so always if `dof` is not above 0.
    """
    if not dof > 0:
        return None
    t2 = t_quantile(dof) ** 2
    a = den**2 - t2 * var_den
    if not a > 0:
        return None
    b = num * den - t2 * cov
    c = num**2 - t2 * var_num
    root = math.sqrt(max(b * b - a * c, 0.0))
    return (b - root) / a, (b + root) / a


def ratio_of_means(
    num_P: ArrayLike, den_P: ArrayLike, unit: str = "", groups: ArrayLike | None = None
) -> Estimate | None:
    """mean(num) / mean(den) over the same prompts, or other units, with its Fieller interval.

    Args:
      num_P, den_P: one value for each of P prompts, in the same order.
      unit: of the ratio.
      groups: as in `clustered_mean`; variances and covariance are those of groups.

    Returns:
      The estimate, with the number of groups as its `n`; None if there are fewer than two groups, or if the interval is
      unbounded, because that of the denominator includes 0 or is nan. A nan in `num_P` makes the estimate nan.

    Raises:
      ValueError: if the two differ in their number of prompts, or if there are prompts and `groups` differs from both.
    """
    num, den = np.asarray(num_P, float), np.asarray(den_P, float)
    if num.shape != den.shape:
        raise ValueError(f"a ratio needs the same prompts: {num.size} against {den.size}")
    if not num.size:
        return None
    n, ((var_num, cov), (_, var_den)) = _clusters([num, den], groups)
    if n < 2:
        return None
    interval = fieller(num.mean(), den.mean(), var_num, var_den, cov, n - 1)
    if interval is None:
        return None
    return Estimate(float(num.mean() / den.mean()), *interval, n, unit)


def over_seeds(values: ArrayLike, unit: str = "", within: tuple[float, float] = (-math.inf, math.inf)) -> Estimate:
    """Mean of one value per seed with Student's t, n − 1 degrees of freedom: for fewer than eight seeds.

    The interval of a single seed is the whole line. From eight seeds on use `bootstrap.hierarchical_bootstrap`.

    Args:
      values: one value for each seed.
      unit: of the values.
      within: the least and the largest value that the quantity can have, for example (−1, 1) of a correlation. The
        interval of several seeds is cut at them.

    Returns:
      The estimate, with the number of seeds as its `n`; nan if a value is.

    Raises:
      ValueError: if there are no values.
    """
    found = clustered(values, unit)
    return found if found.n == 1 else replace(found, low=max(found.low, within[0]), high=min(found.high, within[1]))


def recorded(record: Record) -> Estimate | None:
    """The inverse of `Estimate.record`, without the standard error; None for a figure that could not be measured.

    Args:
      record: the record. An interval of None becomes the whole line.

    Raises:
      KeyError: if the record has no "estimate", or has one that is not None but no "ci95", "n" or "unit".
    """
    if record["estimate"] is None:
        return None
    low, high = (-math.inf, math.inf) if record["ci95"] is None else record["ci95"]
    return Estimate(record["estimate"], low, high, record["n"], record["unit"])


def magnitude(estimate: Estimate) -> Estimate:
    """The estimate of |x| from that of x, in the same unit and with the same `n`, without a standard error.

    The interval of |x| runs from the smaller to the larger of |low| and |high|, or from 0 if that of x includes 0.
    """
    near, far = sorted((abs(estimate.low), abs(estimate.high)))
    low = 0.0 if estimate.includes(0.0) else near
    return replace(estimate, value=abs(estimate.value), low=low, high=far, stderr=None)


def interval_text(
    ci95: Sequence[float] | None, form: str, none: str = "–", number: Callable[[float, str], str] = format
) -> str:
    """An interval as text, `[low, high]`.

    Args:
      ci95: both ends, or None if there is no interval.
      form: the format of each end, for example ".2f".
      none: the text if there is no interval.
      number: writes a number in a format. The report passes its own, which has a typographic minus sign.

    Returns:
      The text `[low, high]`, or `none`.

    Raises:
      ValueError: if there is an interval, and `form` is no format of a number.
    """
    return none if ci95 is None else f"[{number(ci95[0], form)}, {number(ci95[1], form)}]"


def figure_text(
    value: float,
    ci95: Sequence[float] | None,
    form: str,
    none: str = "",
    number: Callable[[float, str], str] = format,
) -> str:
    """A figure as text, `value [low, high]`.

    Args:
      value: the figure.
      ci95: both ends of the interval, or None if there is none.
      form: the format of the numbers. A plus sign at its start applies to the value only.
      none: the text after the value and a space if there is no interval; with "" the text is the value alone.
      number: writes a number in a format, as in `interval_text`.

    Returns:
      The text `value [low, high]`; `value none`, or `value` alone, if there is no interval.

    Raises:
      ValueError: if `form` is no format of a number.
    """
    interval = interval_text(ci95, form.removeprefix("+"), none, number)
    return f"{number(value, form)} {interval}" if interval else number(value, form)


def _clusters(values: Sequence[NDArray[np.float64]], groups: ArrayLike | None) -> tuple[int, NDArray[np.float64]]:
    """The number of groups, and the covariance matrix of the means of several values of the same P prompts."""
    x_VP = np.stack(values)
    off_VP = x_VP - x_VP.mean(axis=1, keepdims=True)
    off_VP = _group_sums(off_VP, groups)
    n = off_VP.shape[1]
    return n, off_VP @ off_VP.T * n / max(n - 1, 1) / x_VP.shape[1] ** 2


def _group_sums(values_VP: NDArray[np.float64], groups: ArrayLike | None) -> NDArray[np.float64]:
    """The sum of each of several values over the prompts of each group, [V, K]; [V, P] as they are without groups."""
    if groups is None:
        return values_VP
    number_P = np.asarray(groups)
    if number_P.shape != values_VP.shape[1:]:
        raise ValueError(f"groups has shape {number_P.shape}, but there are {values_VP.shape[1]} prompts")
    number_P = np.unique(number_P, return_inverse=True)[1]
    return np.array([np.bincount(number_P, row) for row in values_VP], float)


def _per_prompt(values_PG: ArrayLike) -> NDArray[np.float64]:
    """The mean of each prompt's samples, [P]."""
    try:
        values = np.asarray(values_PG, float)
    except ValueError:
        raise ValueError("every prompt needs the same number of samples") from None
    if values.ndim not in (1, 2) or values.size == 0:
        raise ValueError(f"expected rewards of shape (prompts, samples) with something in it, not {values.shape}")
    return values if values.ndim == 1 else values.mean(axis=1)
