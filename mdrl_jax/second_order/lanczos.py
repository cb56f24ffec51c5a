"""Block Lanczos on trees: the algebraically largest eigenvalues of a symmetric matrix A, and their eigenvectors.

`analysis/subspace/conflict.py` finds the conflict subspace with it (definitions §7). There A is the Hessian on a route,
known only by its products (`hvp.py`). This file is the loop on the host; `blocks.py` has what runs on devices.

**Method** (Golub and Underwood 1977). From a start block of b vectors, n steps build an orthonormal basis
Q_m = (q_1, …, q_m) of m = b·n vectors. Each step multiplies the newest block with A, and orthogonalises the product
against all vectors of the basis and within itself; the result is the next block. The coefficients are kept on the host
in float64:

    A Q_m = Q_{m+b} H + E,    H [m + b, m].

E has only the directions that were dropped as rounding. With T the upper square of H, the eigenpairs (λ, y) of
½(T + Tᵀ) in float64 give the Ritz pairs (λ, x = Q_m y) of the Rayleigh–Ritz method. A block of b vectors finds all
eigenvectors of an eigenvalue whose multiplicity is at most b.

**Orthogonality.** Vectors are float32. Each block is orthogonalised at least twice (block classical Gram–Schmidt with
reorthogonalisation, Barlow and Smoktunowicz 2013), and again until every unit vector keeps at least 0.7 ≈ 1/√2 of its
length in a pass (Daniel, Gragg, Kaufman and Stewart 1976). The basis therefore stays orthonormal up to rounding, and an
eigenvalue that has converged does not appear a second time.

**Residuals.** ‖A x − λ x‖ is computed from H without a further product: the norm of H y − λ (y; 0), plus the lengths of
the dropped directions weighted by |y|. This is an upper bound, up to rounding. There is an eigenvalue of A within it of
λ, and a pair with a residual far below |λ| is close to an eigenpair. Most of the m pairs are not: those with residuals
above 0.1·|λ| only describe the basis. `Spectrum.converged` leaves them out (definitions §7).

**Breakdown.** A new direction can lie in the basis already: A is the identity or has low rank, or the Krylov space is
exhausted. It is then replaced by a random direction orthogonal to the basis, with coefficients 0 in H, and the
iteration continues [chosen]. In this way it also finds eigenvalues that the start block cannot reach.
`Spectrum.replaced` counts these directions.

**Cost**, for vectors with N entries: n block products with A, and one more to check that they are repeatable; n + 1
orthogonalisations of at least two passes, each of 4·(m + b)·b·N operations; m·N floats of memory for the basis, and
k·N for the result.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax.errors import UserError
from mdrl_jax.parallel.sharding import stacked
from mdrl_jax.second_order.blocks import TOLERANCE, Block, Programs, drawing, programs

CONVERGED = 0.1  # largest residual ‖A x − λ x‖ of a pair that may be read, as a share of |λ| (definitions §7)
SOUND = 0.7  # a unit vector that keeps more than this of its length in a pass needs no further pass
MAX_PASSES = 8
NOT_FINITE = "a product of the operator is not finite: the loss or its derivatives overflow at this point"


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Approximate eigenpairs (λ, x) of A, in descending order of λ with its sign.

    Attributes:
      values: the Ritz values λ [k], float64.
      vectors: the Ritz vectors x, orthonormal, a tree of leaves [k, ...], float32.
      residuals: an upper bound, up to rounding, of ‖A x − λ x‖ of each pair [k], float64, computed from H.
      scale: the largest |λ| among all m Ritz values, an estimate of ‖A‖.
      products: number of vectors that were multiplied with A.
      steps: number of block steps.
      replaced: number of directions that were replaced after a breakdown.
    """

    values: np.ndarray
    vectors: Any
    residuals: np.ndarray
    scale: float
    products: int
    steps: int
    replaced: int

    def converged(self) -> "Spectrum":
        """The spectrum of only the pairs that may be read (definitions §7); it may have none.

        These have a residual of at most 0.1·|λ|, and λ above 1e-5 of `scale`.
        """
        kept = _readable(self.values, self.residuals, self.scale)
        if kept.all():
            return self
        chosen = np.eye(kept.size, dtype=np.float32)[:, kept]  # a product with it leaves sharded vectors where they are
        vectors = programs(self.vectors).combine(self.vectors, chosen)
        return dataclasses.replace(self, values=self.values[kept], vectors=vectors, residuals=self.residuals[kept])


def random_block(key: jax.Array, like: Any, b: int) -> Block:
    """A block of b vectors with standard normal entries, float32.

    Args:
      key: a JAX random key. Each leaf uses a key folded from it, so values do not depend on the sharding.
      like: a tree of arrays, or of their shapes. The block has their shapes with a leading axis b, and their shardings.
      b: number of vectors.

    Returns:
      the block, leaves [b, ...]. Its vectors are not normalised.
    """
    leaves, structure = jax.tree.flatten(like)
    shapes = tuple((b, *x.shape) for x in leaves)
    shardings = tuple(stacked(getattr(x, "sharding", None)) for x in leaves)
    return structure.unflatten(drawing(shapes, shardings)(key))


def block_lanczos(
    operator: Callable[[Block], Block],
    start: Block,
    n_steps: int,
    k: int,
    progress: Callable[[int, int], None] | None = None,
    repeatable: bool = False,
    stop: bool = False,
) -> Spectrum:
    """The k algebraically largest Ritz pairs of a symmetric matrix A.

    Args:
      operator: maps b vectors, leaves [b, ...], to their products with A. A must be the same at every call, so a loss
        must use the same batches.
      start: the start block of b vectors, leaves [b, ...], for example from `random_block`. The vectors need not be
        orthonormal or independent: they are orthonormalised first.
      n_steps: number of block steps n, at least 1.
      k: number of pairs to return, at least 0 and at most b · n.
      progress: called as progress(steps done, n_steps) after each step.
      repeatable: True if the operator is known to give the same products each time. Otherwise the first block is
        multiplied twice to check it, and the operator is called n + 1 times in place of n.
      stop: True to stop before n steps, once the k leading pairs have converged (`Spectrum.converged`).

    Returns:
      the pairs in descending order of the eigenvalue (`Spectrum`): `values` [k], `vectors` with leaves [k, ...], bounds
      of their `residuals` [k], and the numbers of `steps`, `products` and `replaced` directions. They need not have
      converged. Random directions come from a fixed key, so equal arguments give equal results.

    Raises:
      UserError: if b · n is less than k or more than the dimension; if the two products of the first block differ by
        more than 1e-5 of the norm of one, each norm taken over all vectors of the block together; if a product or the
        start block is not finite; or if 8 passes do not find a further orthogonal direction.
    """
    b = jax.tree.leaves(start)[0].shape[0]
    m, dimension = b * n_steps, sum(x.size for x in jax.tree.leaves(start)) // b
    if not k <= m <= dimension:
        raise UserError(
            f"{k} eigenvectors from {n_steps} Lanczos steps of {b} vectors: "
            f"needs {k} <= {m} (steps × vectors) <= {dimension} (dimension of the space)"
        )
    start = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    key = jax.random.key(0)  # only for random directions after a breakdown
    device = programs(start)
    basis = device.empty(start, m)
    h, lost_M = np.zeros((m + b, m)), np.zeros(m)
    replaced, scale, size = 0, 0.0, 0

    def next_block(block: Block, step: int) -> tuple[Block, np.ndarray, np.ndarray, np.ndarray]:
        return _orthonormalise(device, basis, block, scale, jax.random.fold_in(key, step), last=step == n_steps)

    block, _, below, _ = next_block(start, 0)
    for step in range(n_steps):
        replaced += int(np.sum(~below.any(axis=1)))
        first = step * b
        basis = device.store(basis, block, np.int32(first))
        product = operator(block)
        if step == 0 and not repeatable:
            _check_repeatable(device, product, operator(block))
        block, coupling, below, lost = next_block(product, step + 1)
        columns = slice(first, first + b)
        h[:m, columns], h[first + b : first + 2 * b, columns], lost_M[columns] = coupling, below, lost
        scale = max(scale, float(np.linalg.norm(h[:, columns], axis=0).max()))
        if progress is not None:
            progress(step + 1, n_steps)
        size = first + b
        if stop and size >= k:
            values, _, residuals, scale_now = _ritz(h[: size + b, :size], lost_M[:size], k)
            if _readable(values, residuals, scale_now).all():
                break

    values, y, residuals, scale = _ritz(h[: size + b, :size], lost_M[:size], k)
    y = np.concatenate([y, np.zeros((m - size, k))])
    vectors = device.combine(basis, y.astype(np.float32))
    return Spectrum(values, vectors, residuals, scale, size + b * (not repeatable), size // b, replaced)


def _ritz(h: np.ndarray, lost_M: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """The k leading Ritz pairs of a basis of m vectors.

    Args:
      h: the coefficients H [m + b, m].
      lost_M: the length of what was dropped from the product of each vector.
      k: how many.

    Returns:
      values [k], coordinates y of the vectors in the basis [m, k], residuals [k], and the largest |λ| of all m pairs.
    """
    m = h.shape[1]
    values, y = np.linalg.eigh((h[:m] + h[:m].T) / 2)
    scale = float(np.abs(values).max())
    values, y = values[::-1][:k], y[:, ::-1][:, :k]
    padded = np.concatenate([y * values[None, :], np.zeros((len(h) - m, k))])
    return values, y, np.linalg.norm(h @ y - padded, axis=0) + lost_M @ np.abs(y), scale


def _readable(values: np.ndarray, residuals: np.ndarray, scale: float) -> np.ndarray:
    return (residuals <= CONVERGED * np.abs(values)) & (values > TOLERANCE * scale)


def _orthonormalise(
    device: Programs, basis: Any, block: Block, scale: float, key: jax.Array, last: bool
) -> tuple[Block, np.ndarray, np.ndarray, np.ndarray]:
    """Orthogonalises a block in at least two passes: block = basis · C + Q' R + dropped remainders.

    Passes are repeated until one drops nothing and leaves every vector more than `SOUND` of its length. If a pass drops
    a vector, a random one takes its place. The block after the last step gets two passes in any case.

    Args:
      device: the compiled programs.
      basis: the basis so far; vectors that are not filled yet are zero.
      block: b vectors.
      scale: estimate of ‖A‖; shorter remainders than 1e-5 of it are dropped in the first pass.
      key: for random vectors.
      last: True for the block after the last step. Only C, R and the norms of it are used. It is not filled up with
        random vectors, because the space may have no room for them.

    Returns:
      Q'; C [m, b]; R [b, b], in which a row of zeros belongs to a vector that was replaced; and a bound of the length
      of what was dropped from each vector [b]. All but Q' are float64.

    Raises:
      UserError: if a value is not finite, or if `MAX_PASSES` passes are not enough.
    """
    m, b = jax.tree.leaves(basis)[0].shape[0], jax.tree.leaves(block)[0].shape[0]
    coupling, below, lost = np.zeros((m, b)), np.eye(b), np.zeros(b)
    for number in range(MAX_PASSES):
        block, *small = device.orthogonalise(basis, block, np.float32(scale if number == 0 else 0.0))
        c, r, norms = (np.asarray(x, np.float64) for x in small)
        if not np.isfinite(c).all() or not np.isfinite(r).all():
            raise UserError(NOT_FINITE)
        dropped = np.diagonal(r) == 0
        coupling += c @ below
        lost += norms[dropped] @ np.abs(below[dropped])
        below = r @ below
        if last and number:
            return block, coupling, below, lost
        if dropped.any() and not last:
            block = device.fill(block, dropped, jax.random.fold_in(key, number))
        elif number and np.diagonal(r).min() > SOUND:
            return block, coupling, below, lost
    raise UserError("block Lanczos found no further direction that is orthogonal to its basis: ask for fewer steps")


def _check_repeatable(device: Programs, first: Block, second: Block) -> None:
    difference, length = (float(x) for x in device.difference(first, second))
    if not np.isfinite(difference):
        raise UserError(NOT_FINITE)
    if not difference <= TOLERANCE * length:
        raise UserError(
            f"two products of the same vectors differ by a norm of {difference:.3g} (the norm of one is {length:.3g}): "
            "the operator must use the same batches each time, without dropout or sampling"
        )
