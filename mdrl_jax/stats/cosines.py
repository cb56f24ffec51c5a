"""Inner products and cosines of two mean gradients, from Gram matrices of noisy block gradients (definitions §4; C3).

A block is an equal part of a domain's prompts. Block i of domain A has the gradient x_i = g_A + noise, block j of
domain B has y_j = g_B + noise, and the noise of different blocks is independent. A Gram matrix has the inner products
of blocks as its entries. From its entries

  x = mean_ij ⟨x_i, y_j⟩,   signal S = mean_{i≠j} ⟨x_i, x_j⟩,   power T = mean_i ‖x_i‖²

are unbiased for ⟨g_A, g_B⟩, for ‖g‖² and for ‖g‖² plus noise. The squared norm of a domain's mean gradient over its n
blocks, S + (T − S)/n, still contains noise, which pulls the raw cosine towards 0. To correct for it, let r be the
cosine of the mean gradients of two halves of the blocks. Over all half splits, as a ratio of averages [chosen], it is
r = S / (S + 2(T − S)/n). The reliability of all n blocks is ρ = 2r/(1 + r) = S / (S + (T − S)/n), and the corrected
("disattenuated") cosine is cos/√(ρ_A ρ_B) = x/√(S_A S_B).

Intervals are Student's t with the delta method, for cosines on the scale of Fisher's z = artanh. The variance is
split, as for crossed random effects, into the parts of single blocks of A, of single blocks of B and of pairs of
blocks, with Satterthwaite's degrees of freedom. A bootstrap of blocks is not used: it counts the variance of pairs
three times (Owen, doi 10.1214/07-AOAS122), and if that variance is small, percentiles over 8 to 16 blocks are too
narrow. README.md of this folder has the coverage in simulations.

All functions take stacks [T, ...] of Gram matrices, one for each of T tensors or groups of tensors, or moments of
them. n and m are the numbers of blocks of A and of B. `StackedEstimates` has `value`, `low` and `high`, [T] each.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from mdrl_jax.stats.estimate import LEVEL, Estimate

Array = NDArray[np.float64]
FEWEST_BLOCKS = 4  # with fewer, the variance of pairs of blocks has no degrees of freedom


@dataclass(frozen=True)
class Within:
    """Moments of the inner products among one domain's blocks.

    Attributes:
      n: number of blocks.
      effect: deviation from S that belongs to each block, [T, n].
      own: ‖x_i‖² of each block, [T, n].
      signal: S, [T].
      power: T, [T].
      pair: variance of the product of two blocks beyond the effects of the two, [T].
    """

    n: int
    effect: Array
    own: Array
    signal: Array
    power: Array
    pair: Array

    @property
    def squared_norm(self) -> Array:
        """‖mean gradient‖², which includes noise."""
        return self.signal + (self.power - self.signal) / self.n


@dataclass(frozen=True)
class Between:
    """Moments of the inner products of A's blocks with B's.

    Attributes:
      of_a: mean product of each block of A with the blocks of B, [T, n].
      of_b: mean product of each block of B with the blocks of A, [T, m].
      inner: mean of all products, [T].
      pair: variance of a product beyond the effects of its two blocks, [T].
    """

    of_a: Array
    of_b: Array
    inner: Array
    pair: Array


@dataclass(frozen=True)
class StackedEstimates:
    """T estimates: values and interval ends, [T] each; nan where a value is undefined."""

    value: Array
    low: Array
    high: Array

    def estimate(self, t: int, n: int) -> Estimate | None:
        """One of the T estimates as an `Estimate`; None if it is undefined or its interval has no bounds.

        Args:
          t: its index, from 0.
          n: number of blocks that it rests on; "block" becomes the unit.

        Raises:
          IndexError: if there is no estimate `t`.
        """
        value, low, high = (float(x[t]) for x in (self.value, self.low, self.high))
        if not (math.isfinite(value) and math.isfinite(low) and math.isfinite(high)):
            return None
        return Estimate(value, low, high, n, "block")


def within(gram_Tnn: Array) -> Within:
    """Moments of the inner products among one domain's blocks.

    Args:
      gram_Tnn: for each of T tensors the inner products ⟨x_i, x_j⟩ of the domain's n blocks, [T, n, n].

    Raises:
      ValueError: if there are fewer than `FEWEST_BLOCKS` = 4 blocks.
    """
    n = gram_Tnn.shape[-1]
    if n < FEWEST_BLOCKS:
        raise ValueError(f"the noise of a gradient can be estimated from at least {FEWEST_BLOCKS} blocks, not {n}")
    own = np.diagonal(gram_Tnn, axis1=-2, axis2=-1).copy()
    others = (gram_Tnn.sum(-1) - own) / (n - 1)
    signal = others.mean(-1)
    effect = (others - signal[:, None]) * (n - 1) / (n - 2)
    rest = gram_Tnn - signal[:, None, None] - effect[:, :, None] - effect[:, None, :]
    pair = np.sum(rest**2 * (1 - np.eye(n)), axis=(-2, -1)) / (n * (n - 3))
    return Within(n, effect, own, signal, own.mean(-1), pair)


def between(gram_Tnm: Array) -> Between:
    """Moments of the inner products of A's blocks with B's.

    Args:
      gram_Tnm: for each of T tensors the inner products ⟨x_i, y_j⟩ of A's n blocks with B's m blocks, [T, n, m]. Both
        need at least two blocks. This is not checked: with a single block `pair` is nan or infinite, all intervals are
        nan, and NumPy warns.
    """
    return _between(gram_Tnm.mean(-1), gram_Tnm.mean(-2), np.sum(gram_Tnm**2, axis=(-2, -1)))


def _between(of_a: Array, of_b: Array, squares: Array) -> Between:
    """The moments from row means [..., n], column means [..., m] and the sum of the squared products [...]."""
    n, m = of_a.shape[-1], of_b.shape[-1]
    inner = of_a.mean(-1)
    rest = squares - m * np.sum(of_a**2, -1) - n * np.sum(of_b**2, -1) + n * m * inner**2
    return Between(of_a, of_b, inner, np.maximum(rest, 0.0) / ((n - 1) * (m - 1)))


def _error(sides: Iterable[tuple[Array, Array]], of_pairs: Array, dof_pairs: int) -> tuple[Array, Array]:
    """Standard error [T] and Satterthwaite's degrees of freedom [T] of a linear statistic of the Gram matrices.

    A side that shows no variance beyond that of pairs is left out.

    Args:
      sides: for each domain, the contribution of each of its blocks, [T, n], and the part of the variance of their
        mean that belongs to pairs of blocks, [T].
      of_pairs: the variance of the statistic that belongs to pairs of blocks, counted once, [T].
      dof_pairs: its degrees of freedom.
    """
    variance, rest, spread = of_pairs.copy(), of_pairs.copy(), np.zeros_like(of_pairs)
    for contribution, excess in sides:
        n = contribution.shape[-1]
        mean_square = contribution.var(-1, ddof=1) / n
        own = mean_square > excess
        variance += np.where(own, mean_square - excess, 0.0)
        rest -= np.where(own, excess, 0.0)
        spread += np.where(own, mean_square**2 / (n - 1), 0.0)
    spread += rest**2 / dof_pairs
    with np.errstate(divide="ignore", invalid="ignore"):
        dof = np.where(spread > 0, variance**2 / spread, np.inf)
    return np.sqrt(variance), np.maximum(dof, 1.0)


def _linear(ab: Between, sides: tuple[Within, Within], x: Array, s: tuple[Array, Array], t: tuple[Array, Array]):
    """`_error` of x·inner + Σ_sides (s·S + t·T), whose coefficients are [T]."""
    n, m = sides[0].n, sides[1].n
    of_pairs = x**2 * ab.pair / (n * m)
    parts = []
    for own, other, of_block, si, ti in zip(sides, sides[::-1], (ab.of_a, ab.of_b), s, t, strict=True):
        k = own.n
        contribution = x[:, None] * of_block + 2 * si[:, None] * own.effect + ti[:, None] * own.own
        excess = x**2 * ab.pair / other.n + 4 * si**2 * own.pair * (k - 1) / (k - 2) ** 2
        parts.append((contribution, excess / k))
        of_pairs = of_pairs + 2 * si**2 * own.pair / (k * (k - 1))
    return _error(parts, of_pairs, (n - 1) * (m - 1))


def _student(value: Array, error: tuple[Array, Array]) -> StackedEstimates:
    """`value` with Student's t interval from (standard error, degrees of freedom)."""
    half = stdtrit(error[1], 0.5 + LEVEL / 2) * error[0]
    return StackedEstimates(value, value - half, value + half)


def _fisher(value: Array, error: tuple[Array, Array]) -> StackedEstimates:
    """A cosine with Student's t interval on the scale of z = artanh, from (standard error, degrees of freedom).

    The delta method takes the slope of z at the cosine c, 1/(1 − c²), which is too steep where noise carries c to ±1 or
    beyond. Therefore |c| is cut at 1 − se/2, and 1 − c² is replaced by √((1 − c²)² + 3 se²) [chosen]: both matter only
    where se is not small beside 1 − |c|. The end towards ±1 is at least that of the interval without z, and is cut at
    ±1.
    """
    stderr, dof = error
    half, size = stdtrit(dof, 0.5 + LEVEL / 2) * stderr, np.abs(value)
    with np.errstate(invalid="ignore"):
        at = np.clip(np.minimum(size, 1 - stderr / 2), 0.0, 1 - 1e-12)
        on_z = half / np.maximum(np.sqrt((1 - at**2) ** 2 + 3 * stderr**2), 1e-12)
        near = np.minimum(np.tanh(np.arctanh(at) - on_z), size)
        far = np.maximum(np.tanh(np.arctanh(at) + on_z), np.minimum(size + half, 1.0))
    return StackedEstimates(value, np.where(value < 0, -far, near), np.where(value < 0, -near, far))


def inner_product(ab: Between) -> tuple[StackedEstimates, Array]:
    """⟨g_A, g_B⟩, and the two-sided p-value of its t test against 0.

    Args:
      ab: moments of the products of A's blocks with B's. They may have any leading axes in place of [T].

    Returns:
      (the inner products, the p-values), with the leading axes of `ab`. Where all products of blocks are equal the
      interval has no width, and p is 1 if they are 0, otherwise 0. Where a product is nan, the inner product, its
      interval and p are nan.
    """
    n, m = ab.of_a.shape[-1], ab.of_b.shape[-1]
    excess = ab.pair / (n * m)
    error, dof = _error([(ab.of_a, excess), (ab.of_b, excess)], excess, (n - 1) * (m - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stdtr(dof, -np.abs(ab.inner) / error)
    return _student(ab.inner, (error, dof)), np.where((ab.inner == 0) & (error == 0), 1.0, p)


def raw_cosine(ab: Between, a: Within, b: Within) -> StackedEstimates:
    """Cosine of the two mean gradients, which noise pulls towards 0; nan where a mean gradient is 0.

    Args:
      ab: moments of the products of A's blocks with B's.
      a, b: moments of the products among A's blocks, and among B's.

    Returns:
      T cosines, with intervals within [−1, 1].
    """
    na, nb = a.squared_norm, b.squared_norm
    with np.errstate(divide="ignore", invalid="ignore"):
        x = 1 / np.sqrt(na * nb)
        value = x * ab.inner
        da, db = -value / (2 * na), -value / (2 * nb)
        s = (da * (1 - 1 / a.n), db * (1 - 1 / b.n))
        return _fisher(value, _linear(ab, (a, b), x, s, (da / a.n, db / b.n)))


def disattenuated_cosine(ab: Between, a: Within, b: Within) -> StackedEstimates:
    """Cosine corrected for noise, x/√(S_A S_B) = cos/√(ρ_A ρ_B); nan where a signal S is not positive.

    It is not cut at ±1, so noise may carry it beyond, and out of its interval, which is within [−1, 1].

    Args:
      ab: moments of the products of A's blocks with B's.
      a, b: moments of the products among A's blocks, and among B's.

    Returns:
      T cosines with their intervals.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        x = 1 / np.sqrt(np.where((a.signal > 0) & (b.signal > 0), a.signal * b.signal, np.nan))
        value = x * ab.inner
        zero = np.zeros_like(x)
        s = (-value / (2 * a.signal), -value / (2 * b.signal))
        return _fisher(value, _linear(ab, (a, b), x, s, (zero, zero)))


def half_cosine(a: Within) -> StackedEstimates:
    """r, the cosine between the mean gradients of two halves of the blocks; nan where every block's gradient is 0.

    r lies in [−1, 1], and has the sign of S. It increases with S/T, so its interval is made from Student's interval of
    S/T: both ends are cut to [−1/(n − 1), 1], which holds all values of S/T, and mapped to r.

    Args:
      a: moments of the products among the domain's blocks.

    Returns:
      T values of r.
    """
    n = a.n
    with np.errstate(divide="ignore", invalid="ignore"):
        share = a.signal / a.power
        contribution = (2 * a.effect - share[:, None] * a.own) / a.power[:, None]
        excess = 4 * a.pair * (n - 1) / (n - 2) ** 2 / a.power**2 / n
        error = _error([(contribution, excess)], 2 * a.pair / a.power**2 / (n * (n - 1)), n * (n - 3) // 2)
    figure = _student(share, error)
    ends = (np.clip(x, -1 / (n - 1), 1.0) for x in (figure.low, figure.high))
    return StackedEstimates(*(x / (x + 2 * (1 - x) / n) for x in (share, *ends)))


def reliability(half: StackedEstimates) -> StackedEstimates:
    """ρ = 2r/(1 + r) of all blocks (Spearman–Brown formula); −1 where r is below −1/3, and nan where r is nan.

    Args:
      half: r and its interval, as `half_cosine` returns them.

    Returns:
      T values of ρ, and the ends of the interval of r mapped in the same way.
    """
    ends = (np.maximum(x, -1 / 3) for x in (half.value, half.low, half.high))
    return StackedEstimates(*(2 * r / (1 + r) for r in ends))


def permuted_tests(gram_Tnm: Array, signs_Rn: Array) -> tuple[Array, Array]:
    """Inner products and their p-values after each of R sign changes of A's blocks.

    A block changes sign in all tensors at once, so that the tensors stay correlated.

    Args:
      gram_Tnm: inner products of A's blocks with B's, for each tensor; at least two blocks of each (not checked).
      signs_Rn: 1 or −1 for each block of A, in each of the R sign changes.

    Returns:
      (inner products, two-sided p-values as in `inner_product`), [R, T] each.
    """
    n, m = gram_Tnm.shape[-2:]
    of_a = signs_Rn[:, None, :] * gram_Tnm.mean(-1)[None]
    of_b = np.einsum("rn,tnm->rtm", signs_Rn / n, gram_Tnm, optimize=True)
    squares = np.broadcast_to(np.sum(gram_Tnm**2, axis=(-2, -1)), of_a.shape[:-1])
    ab = _between(of_a, of_b, squares)
    return ab.inner, inner_product(ab)[1]


def sums_by_sign(gram_Tnm: Array, rng: np.random.Generator, n_splits: int = 200) -> StackedEstimates:
    """Sums over tensors of the positive inner products, of the negative ones, and of all of them.

    If the sign of a tensor came from the same blocks as its inner product, pure noise would give two large sums.
    Therefore each product ⟨x_i, y_j⟩ counts as positive with a weight, and as negative with the rest of it. A half
    split chooses half of A's blocks and half of B's. Among the random half splits that choose neither i nor j, the
    weight is the share in which the inner product of the tensor over the chosen blocks is positive [chosen]. Noise then
    adds nothing to either sum on average. A sign that half of the blocks cannot determine makes both sums smaller in
    size by the same amount, so they are lower bounds in size.

    Args:
      gram_Tnm: inner products of A's blocks with B's, for each tensor; at least two blocks of each (not checked). Of an
        odd number of blocks the chosen half has one less.
      rng: of the half splits; the call changes its state.
      n_splits: number of half splits. A product with i or j chosen in each of them counts as negative.

    Returns:
      Three estimates (T = 3) in this order: the positive sum, the negative sum, and the sum of both; with the intervals
      of `inner_product`.
    """
    halves = [rng.permuted(np.tile(np.arange(k) % 2, (n_splits, 1)), axis=1) for k in gram_Tnm.shape[1:]]
    (a, b), (rest_a, rest_b) = halves, [1 - h for h in halves]
    positive = np.einsum("kn,tnm,km->kt", a, gram_Tnm, b, optimize=True) > 0
    weight = np.einsum("kn,km,kt->tnm", rest_a, rest_b, positive.astype(float), optimize=True)
    weight /= np.maximum(rest_a.T @ rest_b, 1)
    parts = (gram_Tnm * weight, gram_Tnm * (1 - weight), gram_Tnm)
    return inner_product(between(np.stack([part.sum(axis=0) for part in parts])))[0]
