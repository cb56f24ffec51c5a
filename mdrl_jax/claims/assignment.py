"""The exact test of C4: does each domain's own edit predict its effect better than another domain's (definitions §13)?

For a domain A, correlation ρ_A[b, c] compares, over A's prompts, the effect that the edit of domain b is predicted to
have with the effect that the edit of domain c is measured to have. Under the null hypothesis the predictions say
nothing about which edit was applied. Then the statistic, the mean of ρ_A[b, b] over all ordered pairs (A, b), is as
likely as the mean of ρ_A[π_A(b), b] for any permutations π_A of the other domains. With four domains there are
3!⁴ = 1,296 assignments, and all of them are taken, so the p-value is exact. What a domain's prompts have in common
under every edit, such as their length, is the same under all assignments.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ROUNDING = 1e-12  # statistics closer than this are equal: one sum in two orders


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The result of the test.

    Attributes:
      statistic: the mean correlation of the right assignment.
      p: share of all assignments with a mean at least as large.
      p_opposite: share of all assignments with a mean at most as large.
      means: the means of all assignments.
    """

    statistic: float
    p: float
    p_opposite: float
    means: Floats


def exact(correlations: Sequence[Floats]) -> Assignment:
    """The exact permutation test.

    It lists the product of all K! assignments, one factor for each domain A, so it suits few domains only.

    Args:
      correlations: for each domain A, ρ_A over its K other domains, [K, K], K at least 1: row b for the predictions of
        edit b, column c for the measurements of edit c. The diagonal is the right assignment. An undefined correlation
        (nan), of a constant prediction, counts as 0.

    Returns:
      The statistic, which is the mean over all diagonal entries of all domains; both one-sided p-values; and the means
      of all assignments. The right assignment is one of them, so no p-value is 0. Means that differ by at most 1e-12
      count as equal.

    Raises:
      ValueError: if there is no domain, or a matrix is not square.
    """
    if not correlations:
        raise ValueError("the test needs at least one domain")
    sums, right, cells = np.zeros(1), 0.0, 0
    for rho in correlations:
        rho = np.nan_to_num(np.asarray(rho, float))
        if rho.ndim != 2 or rho.shape[0] != rho.shape[1]:
            raise ValueError(f"the correlations of a domain are a square, not {rho.shape}")
        k = rho.shape[0]
        each = [float(rho[list(order), range(k)].sum()) for order in itertools.permutations(range(k))]
        sums = (sums[:, None] + np.array(each)).ravel()
        right, cells = right + float(np.trace(rho)), cells + k
    means, statistic = sums / cells, right / cells
    p, opposite = np.mean(means >= statistic - ROUNDING), np.mean(means <= statistic + ROUNDING)
    return Assignment(statistic, float(p), float(opposite), means)
