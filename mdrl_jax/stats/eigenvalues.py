"""Extreme eigenvalues of matrices that are means over blocks of prompts, with intervals over blocks (definitions §12).

`analysis/subspace/theorem.py` uses them for the Hessian on a subspace. A *block* is a part of the prompts. Each
function but `root` takes sums over the prompts of each of M blocks, and the number of prompts of each block. Its
estimate has M as its `n`. It raises ValueError if there are fewer than `FEWEST_BLOCKS` = 4 blocks. The input has to be
finite: otherwise numpy may raise LinAlgError, or the value or an end of the interval is nan.

Noise moves extreme eigenvalues outwards: the smallest eigenvalue of a noisy matrix is too small, and the largest one is
too large. Two values are therefore computed:

- The *plain* value is that of the mean over all blocks. It lies too far outwards.
- The *crossed* value judges the eigenvector of all blocks but one on this one block, averaged over the blocks. The best
  direction for the other blocks is not the best one for this block, so it lies too far inwards. It is never further
  outwards than the plain value.

The interval has the inner end of the crossed value and the outer end of the plain value, both with Student's t and
M − 1 degrees of freedom. The estimate is the plain value without the bias that the jackknife finds,
M·θ − (M − 1)·mean θ₍₋ᵢ₎, cut at the ends of the interval. Where noise is larger than the gaps between eigenvalues, a
jackknife interval of the plain value alone holds the smallest eigenvalue in 0 to 20 % of simulated samples. README.md
of this folder has the coverage.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mdrl_jax.stats.bootstrap import jackknife
from mdrl_jax.stats.cosines import FEWEST_BLOCKS
from mdrl_jax.stats.estimate import Estimate, student

Array = NDArray[np.float64]


def of_mean(sums_Mkk: ArrayLike, counts_M: ArrayLike, largest: bool, unit: str = "") -> Estimate:
    """The smallest or the largest eigenvalue of a mean of symmetric matrices.

    Args:
      sums_Mkk: sum of the matrices of each block's prompts; only the symmetric part counts.
      counts_M: number of prompts of each block, at least 1.
      largest: True for the largest eigenvalue, False for the smallest.
      unit: of the eigenvalue.

    Returns:
      The estimate, with M as its `n` and without a standard error.

    Raises:
      ValueError: if there are fewer than four blocks.
      numpy.linalg.LinAlgError: for most inputs that are not finite.
    """
    sums, counts = _symmetric(sums_Mkk), _counted(counts_M)
    plain = float(_extreme(sums.sum(0) / counts.sum(), largest)[0])
    without_M, crossed = _crossed(sums, counts, largest)
    rest_M = [_crossed(np.delete(sums, i, 0), np.delete(counts, i), largest)[1] for i in range(counts.size)]
    return _joined(jackknife(plain, without_M, unit), without_M, jackknife(crossed, rest_M), largest)


def squared_norm(own_Mkk: ArrayLike, rows_Mkk: ArrayLike, counts_M: ArrayLike, unit: str = "") -> Estimate:
    """‖R‖², the largest eigenvalue of RᵀR, of a matrix R [N, k] that is a mean over prompts.

    Only products of different blocks count: Σ_{a≠b} R_aᵀR_b / Σ_{a≠b} n_a n_b is unbiased for RᵀR, with R_b the sum
    over the n_b prompts of block b. So the largest eigenvalue may be negative.

    The standard error of the crossed value is 2·sd/√M of its parts, because a block takes part in a product on both
    sides. It counts the variance of pairs of blocks twice, so intervals near 0 are too wide.

    Args:
      own_Mkk: R_bᵀR_b of each block.
      rows_Mkk: R_bᵀ Σ_a R_a of each block, the sum over all blocks, b included.
      counts_M: number of prompts of each block, at least 1.
      unit: of the square.

    Returns:
      The estimate of ‖R‖², with M as its `n` and without a standard error; `root` gives ‖R‖.

    Raises:
      ValueError: if there are fewer than four blocks.
      numpy.linalg.LinAlgError: for most inputs that are not finite.
    """
    counts = _counted(counts_M)
    between = _symmetric(np.asarray(rows_Mkk, float) - np.asarray(own_Mkk, float))  # a block with all others
    n, total, prompts = counts.size, between.sum(0), counts.sum()
    pairs, others = prompts**2 - np.sum(counts**2), counts * (prompts - counts)
    plain = float(_extreme(total / pairs, True)[0])
    without_M, vectors_Mk = _extreme((total - 2 * between) / (pairs - 2 * others)[:, None, None], True)
    crossed_M = np.einsum("mi,mij,mj->m", vectors_Mk, between, vectors_Mk) / others
    error = 2 * float(crossed_M.std(ddof=1)) / math.sqrt(n)
    crossed = student(float(np.average(crossed_M, weights=others)), error, n - 1, n)
    return _joined(jackknife(plain, without_M, unit), without_M, crossed, True)


def squared_length(
    vectors_Mk: ArrayLike, counts_M: ArrayLike, unit: str = "", matrices_Mkk: ArrayLike | None = None
) -> Estimate:
    """‖g‖² of a vector g that is a mean over prompts, or ‖H⁻¹g‖² with a matrix H that is one too; jackknife interval.

    Only products of the vectors of different blocks count, so the noise of g adds nothing on average, and the estimate
    may be negative. The noise of H is not taken out: H must be well away from singular.

    Args:
      vectors_Mk: sum of the vectors of each block's prompts.
      counts_M: number of prompts of each block, at least 1.
      unit: of the square.
      matrices_Mkk: sum of the symmetric matrices of each block's prompts; None: H is the identity.

    Returns:
      The estimate of the square, with M as its `n` and the jackknife standard error; `root` gives the length.

    Raises:
      ValueError: if there are fewer than four blocks.
      numpy.linalg.LinAlgError: if H, or H without one block, is singular.
    """
    vectors, counts = np.asarray(vectors_Mk, float), _counted(counts_M)
    matrices = None if matrices_Mkk is None else _symmetric(matrices_Mkk)

    def square(kept: NDArray[np.int_]) -> float:
        steps_Mk, n_M = vectors[kept], counts[kept]
        if matrices is not None:
            steps_Mk = np.linalg.solve(matrices[kept].sum(0) / n_M.sum(), steps_Mk.T).T
        return float((np.sum(steps_Mk.sum(0) ** 2) - np.sum(steps_Mk**2)) / (n_M.sum() ** 2 - np.sum(n_M**2)))

    every = np.arange(counts.size)
    return jackknife(square(every), [square(np.delete(every, i)) for i in every], unit)


def root(square: Estimate, unit: str = "") -> Estimate:
    """The square root of an estimated square, of its value and of both ends; a negative value or end becomes 0.

    Args:
      square: the estimate of the square.
      unit: of the root.

    Returns:
      The estimate, with the `n` of the square and without a standard error.
    """
    value, low, high = (math.sqrt(max(x, 0.0)) for x in (square.value, square.low, square.high))
    return Estimate(value, low, high, square.n, unit)


def _counted(counts_M: ArrayLike) -> Array:
    counts = np.asarray(counts_M, float)
    if counts.size < FEWEST_BLOCKS:
        raise ValueError(f"an error over blocks needs at least {FEWEST_BLOCKS} blocks, not {counts.size}")
    return counts


def _symmetric(x_Mkk: ArrayLike) -> Array:
    x = np.asarray(x_Mkk, float)
    return (x + np.swapaxes(x, -1, -2)) / 2


def _extreme(matrix: Array, largest: bool) -> tuple[Array, Array]:
    """The smallest or largest eigenvalue [...] of symmetric matrices [..., k, k], and its eigenvector [..., k]."""
    values, vectors = np.linalg.eigh(matrix)
    i = -1 if largest else 0
    return values[..., i], vectors[..., i]


def _crossed(sums: Array, counts: Array, largest: bool) -> tuple[Array, float]:
    """The extreme eigenvalue without each of the blocks [M], and the crossed value."""
    rest = (sums.sum(0) - sums) / (counts.sum() - counts)[:, None, None]
    without_M, vectors_Mk = _extreme(rest, largest)
    judged_M = np.einsum("mi,mij,mj->m", vectors_Mk, sums, vectors_Mk)
    return without_M, float(judged_M.sum() / counts.sum())


def _joined(plain: Estimate, without_M: Array, crossed: Estimate, largest: bool) -> Estimate:
    """The estimate from the plain value, the plain values without each of the blocks, and the crossed value."""
    low, high = (crossed.low, plain.high) if largest else (plain.low, crossed.high)
    corrected = plain.n * plain.value - (plain.n - 1) * float(without_M.mean())
    return Estimate(min(max(corrected, low), high), low, high, plain.n, plain.unit)
