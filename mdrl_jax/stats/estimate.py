"""Estimates with 95 % intervals whose unit is the prompt, or the seed (definitions §12).

A prompt's samples share the prompt's difficulty, so a prompt with its group of samples counts once:
each row of `values_PG` is averaged first, and the spread between rows gives the error. Over fewer
than eight seeds the unit is the seed mean with Student's t (bootstrapping three seeds covers 74 %);
from eight on, resample seeds, then prompts. Numbers keep the unit they come in; `Estimate.scaled`
turns rewards into points.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

LEVEL = 0.95
POINTS = 100.0  # points of a score in a reward of 1
# A figure in the records of a run: {"estimate", "ci95", "null", "n", "unit"}, and "reason" where it has no estimate.
Record = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A value with its interval [low, high] at the level of this module.

    `n` is the number of independent units behind it (prompts or seeds). With a single unit the
    interval is the whole line. `stderr` is the standard error where the interval was made from one,
    else None.
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
        """The estimate of `factor` times the quantity, in `unit`."""
        low, high = sorted((factor * self.low, factor * self.high))
        stderr = None if self.stderr is None else abs(factor) * self.stderr
        return replace(self, value=factor * self.value, low=low, high=high, unit=unit, stderr=stderr)

    def in_points(self) -> "Estimate":
        """The estimate of a reward in [0, 1] as points of a score."""
        return self.scaled(POINTS, "points")

    def record(self, null: Any = None) -> dict[str, Any]:
        """The form of the work folder's records; an interval without bounds is null there, as JSON
        has no infinity.
        """
        bounded = math.isfinite(self.low) and math.isfinite(self.high)
        ci95 = [self.low, self.high] if bounded else None
        return {"estimate": self.value, "ci95": ci95, "null": null, "n": self.n, "unit": self.unit}


def missing(reason: str, unit: str = "", n: int = 0, null: Any = None) -> Record:
    """The record of a figure that could not be measured, in the form of `Estimate.record`, with the reason."""
    return {"estimate": None, "ci95": None, "null": null, "n": n, "unit": unit, "reason": reason}


def t_quantile(dof: float) -> float:
    """Half-width of the two-sided 95 % Student t interval in standard errors; infinite without
    degrees of freedom.
    """
    return float(stdtrit(dof, 0.5 + LEVEL / 2)) if dof > 0 else math.inf


def student(value: float, stderr: float, dof: float, n: int, unit: str = "") -> Estimate:
    """value ± t(dof) · stderr; the whole line when there are no degrees of freedom."""
    half = t_quantile(dof) * stderr if dof > 0 else math.inf
    return Estimate(value, value - half, value + half, n, unit, stderr)


def clustered_mean(values_PG: ArrayLike) -> tuple[float, float]:
    """Mean of the rewards, each prompt weighing the same, and its standard error with the prompt as
    the cluster.

    stderr = sd_P(mean_G values) / √P, with P − 1 in the sd. One prompt has an infinite standard
    error. A vector is taken as one value a prompt. Raises ValueError without prompts or with ragged
    rows.
    """
    mean_P = _per_prompt(values_PG)
    n = mean_P.size
    stderr = float(mean_P.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return float(mean_P.mean()), stderr


def clustered(values_PG: ArrayLike, unit: str = "") -> Estimate:
    """`clustered_mean` with Student's t of P − 1 degrees of freedom."""
    mean, stderr = clustered_mean(values_PG)
    n = len(np.asarray(values_PG))
    return student(mean, stderr, n - 1, n, unit)


def paired_difference(a_PG: ArrayLike, b_PG: ArrayLike) -> Estimate:
    """Mean of a − b over the same prompts in the same order, Student t with P − 1 degrees of
    freedom.

    The numbers of samples a prompt may differ, those of prompts may not (ValueError).
    """
    a_P, b_P = _per_prompt(a_PG), _per_prompt(b_PG)
    if a_P.size != b_P.size:
        raise ValueError(f"paired data need the same prompts: {a_P.size} against {b_P.size}")
    return clustered(a_P - b_P)


def independent_mean(estimates: Sequence[Estimate]) -> Estimate:
    """Plain average of independent estimates that carry a standard error, e.g. one a domain.

    stderr = √Σ se² / m, degrees of freedom by Welch and Satterthwaite. `n` is the units behind all
    of them.
    """
    se2 = np.array([math.inf if e.stderr is None else e.stderr**2 for e in estimates])
    n = np.array([e.n for e in estimates])
    value = float(np.mean([e.value for e in estimates]))
    total = float(se2.sum())
    if not math.isfinite(total):
        return student(value, math.inf, 0, int(n.sum()), estimates[0].unit)
    # With no spread at all every choice of degrees of freedom gives the same, empty interval.
    dof = total**2 / float(np.sum(se2**2 / (n - 1))) if total > 0 else float(n.sum())
    return student(value, math.sqrt(total) / len(estimates), dof, int(n.sum()), estimates[0].unit)


def fieller(
    num: float, den: float, var_num: float, var_den: float, cov: float, dof: float
) -> tuple[float, float] | None:
    """95 % interval of num/den for two jointly normal means with the given variances and covariance
    (Fieller, 1954).

    It holds every r with (num − r·den)² ≤ t² (var_num − 2 r cov + r² var_den). None, "undefined",
    where that set is unbounded, which is exactly where the interval of the denominator includes 0.
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


def ratio_of_means(num_P: ArrayLike, den_P: ArrayLike, unit: str = "") -> Estimate | None:
    """mean(num) / mean(den) over the same units with its Fieller interval; None where that is
    undefined.
    """
    num, den = np.asarray(num_P, float), np.asarray(den_P, float)
    n = num.size
    if n < 2:
        return None
    (var_num, cov), (_, var_den) = np.cov(num, den) / n
    interval = fieller(num.mean(), den.mean(), var_num, var_den, cov, n - 1)
    if interval is None:
        return None
    return Estimate(float(num.mean() / den.mean()), *interval, n, unit)


def over_seeds(values: ArrayLike, unit: str = "") -> Estimate:
    """Mean over seeds with Student's t, n − 1 degrees of freedom: the interval for fewer than eight
    seeds.

    One value a seed. A single seed has no interval. From eight seeds on use
    `hierarchical_bootstrap`.
    """
    return clustered(values, unit)


def recorded(record: dict[str, Any]) -> Estimate | None:
    """The estimate behind `Estimate.record`; None for a figure that could not be measured."""
    if record["estimate"] is None:
        return None
    low, high = (-math.inf, math.inf) if record["ci95"] is None else record["ci95"]
    return Estimate(record["estimate"], low, high, record["n"], record["unit"])


def magnitude(estimate: Estimate) -> Estimate:
    """The estimate of |x|: an interval with 0 in it starts at 0."""
    near, far = sorted((abs(estimate.low), abs(estimate.high)))
    low = 0.0 if estimate.includes(0.0) else near
    return replace(estimate, value=abs(estimate.value), low=low, high=far, stderr=None)


def _per_prompt(values_PG: ArrayLike) -> NDArray[np.float64]:
    try:
        values = np.asarray(values_PG, float)
    except ValueError:
        raise ValueError("every prompt needs the same number of samples") from None
    if values.ndim not in (1, 2) or values.size == 0:
        raise ValueError(f"expected rewards of shape (prompts, samples) with something in it, not {values.shape}")
    return values if values.ndim == 1 else values.mean(axis=1)
