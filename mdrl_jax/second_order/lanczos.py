"""Block Lanczos on pytrees: the largest eigenvalues of a symmetric operator and their vectors (definitions §7).

With a start block of b vectors and n block steps the basis Q is one tree of leaves [m, ...], m = b n, in float32,
orthogonalised in full, each block at least twice against all before it and within itself (reorthogonalised block
Gram–Schmidt, Barlow and Smoktunowicz 2013). What the products left behind is kept in one matrix on the host,

    A Q_m = Q_{m+b} H + E,    H [m + b, m],

where E holds only directions dropped as rounding. Its upper square, symmetrised, is diagonalised in float64
(Rayleigh–Ritz). An eigenvalue of multiplicity up to b is found with all its vectors.

Breakdown: a direction that the basis already holds (identity, low rank, an exhausted Krylov space) is replaced by
a fresh random one, orthogonal to the basis and coupled to it by zero, and the solver goes on [chosen]: eigenvalues
that a start block cannot reach are then found too. `Spectrum.replaced` counts them.

What runs on devices is in `second_order/blocks.py`.
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

SOUND = 0.7  # a unit vector that keeps this much of its length needs no further pass
MAX_PASSES = 8
NOT_FINITE = "a product of the operator is not finite: the loss or its derivatives overflow here"


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Eigenpairs by descending algebraic eigenvalue.

    `values` [k] and `residuals` [k] ‖A x − λ x‖ in float64; `vectors` a tree of leaves [k, ...], orthonormal,
    float32; `scale` the largest magnitude of any Ritz value. `products` counts vectors multiplied, `steps` blocks,
    `replaced` directions lost to breakdown.
    """

    values: np.ndarray
    vectors: Any
    residuals: np.ndarray
    scale: float
    products: int
    steps: int
    replaced: int

    def positive(self) -> "Spectrum":
        """The pairs with a positive eigenvalue, directions in which the loss rises (definitions §7).

        What is below 1e-5 of `scale` is rounding, and counts as zero.
        """
        n = int(np.sum(self.values > TOLERANCE * self.scale))
        vectors = jax.tree.map(lambda x: x[:n], self.vectors)
        return dataclasses.replace(self, values=self.values[:n], vectors=vectors, residuals=self.residuals[:n])


def random_block(key: jax.Array, like: Any, b: int) -> Block:
    """b standard normal vectors of the space of `like` (arrays or their shapes): float32 leaves [b, ...].

    The key is folded by leaf; leaves lie as those of `like` do, and their values do not depend on it.
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
) -> Spectrum:
    """The k algebraically largest eigenpairs of `operator` in the Krylov space of `start` (from `random_block`).

    `operator` maps a tree of leaves [b, ...] to the like: b products with one symmetric matrix, the same batches
    each time. It is called n_steps + 1 times, `progress(step, n_steps)` after each step; n_steps times for an operator
    that is known to be `repeatable`.

    Raises:
      UserError: when b · n_steps exceeds the dimension or is less than k, when two products of the same block
        differ by more than 1e-5 of their norm, or when a product is not finite.
    """
    b = jax.tree.leaves(start)[0].shape[0]
    m, dimension = b * n_steps, sum(x.size for x in jax.tree.leaves(start)) // b
    if not k <= m <= dimension:
        raise UserError(f"{k} vectors of {n_steps} steps by {b}: needs {k} <= {m} <= {dimension}, the dimension")
    start = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    key = jax.random.key(0)  # only for directions that replace dropped ones
    device = programs(start)
    basis = device.empty(start, m)
    h, lost_M = np.zeros((m + b, m)), np.zeros(m)
    replaced, scale = 0, 0.0

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

    values, y = np.linalg.eigh((h[:m] + h[:m].T) / 2)
    scale = float(np.abs(values).max())
    values, y = values[::-1][:k], y[:, ::-1][:, :k]
    padded = np.concatenate([y * values[None, :], np.zeros((b, k))])
    residuals = np.linalg.norm(h @ y - padded, axis=0) + lost_M @ np.abs(y)
    vectors = device.combine(basis, y.astype(np.float32))
    return Spectrum(values, vectors, residuals, scale, b * (n_steps + (not repeatable)), n_steps, replaced)


def _orthonormalise(
    device: Programs, basis: Any, block: Block, scale: float, key: jax.Array, last: bool
) -> tuple[Block, np.ndarray, np.ndarray, np.ndarray]:
    """block = basis · C + Q' R + lost: (Q', C [m, b], R [b, b], norms of what was lost [b]); a row of zeros in R
    is a direction that was replaced.

    Passes are repeated, twice at least, until nothing was dropped in the last and every direction kept its length.
    Of the last block only R is used, and there may be no room for it: it is not filled up.
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
    raise UserError("block Lanczos found no further orthogonal direction: ask for fewer steps")


def _check_repeatable(device: Programs, first: Block, second: Block) -> None:
    difference, length = (float(x) for x in device.difference(first, second))
    if not np.isfinite(difference):
        raise UserError(NOT_FINITE)
    if not difference <= TOLERANCE * length:
        raise UserError(
            f"two products of the same vectors differ by {difference:.3g} of {length:.3g}: the operator must use the "
            "same batches, without dropout or sampling, each time"
        )
