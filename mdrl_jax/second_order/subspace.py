"""Linear algebra of the conflict subspace S (definitions §7): projections, angles, baselines, dimension.

A vector is a pytree z of the space of a route's slices, e.g. {"gate": [L,D,r], "up": [L,D,r], "down": [L,r,D]};
a basis is the same tree with a leading axis k. Trees stay trees: an inner product is a sum on each device and an
all-reduce of a few floats. Products are float32 at full precision, on accelerators too.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from mdrl_jax import tree
from mdrl_jax.parallel.programs import program
from mdrl_jax.second_order.lanczos import random_block

EXACT = jax.lax.Precision.HIGHEST
# What is left of a vector in float32 after projecting out a space that holds it.
DEPENDENT = 1e-5


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _coefficients(basis: Any, x: Any) -> jax.Array:
    parts = jax.tree.map(lambda b, v: jnp.tensordot(_wide(b), _wide(v), axes=v.ndim, precision=EXACT), basis, x)
    return functools.reduce(jnp.add, jax.tree.leaves(parts))


cross = jax.vmap(_coefficients, in_axes=(None, 0), out_axes=1)  # ⟨a_i, b_j⟩ of two blocks, to be jitted


def _combine(basis: Any, weights_k: jax.Array) -> Any:
    return jax.tree.map(lambda b: jnp.tensordot(weights_k, _wide(b), axes=1, precision=EXACT), basis)


def _project(basis: Any, x: Any, k: jax.Array) -> Any:
    weights_k = _coefficients(basis, x)
    return _combine(basis, jnp.where(jnp.arange(weights_k.size) < k, weights_k, 0.0))


def _orthonormalize(block: Any) -> Any:
    def add(i: jax.Array, done: Any) -> Any:
        x = jax.tree.map(lambda b: _wide(b[i]), block)
        size = tree.norm(x)
        for _ in range(2):  # the second pass removes what rounding left of the first
            x = jax.tree.map(jnp.subtract, x, _combine(done, _coefficients(done, x)))
        left = tree.norm(x)
        factor = jnp.where(left > DEPENDENT * size, 1.0 / jnp.where(left > 0, left, 1.0), 0.0)
        return jax.tree.map(lambda q, v: q.at[i].set(factor * v), done, x)

    k = jax.tree.leaves(block)[0].shape[0]
    empty = jax.tree.map(lambda b: jnp.zeros_like(b, jnp.float32), block)
    return jax.lax.fori_loop(0, k, add, empty)


def _whiten(block: Any) -> Any:
    """L⁻¹ X of a block X with the Gram matrix X Xᵀ = L Lᵀ, twice: two passes over the block each, not k² / 2."""
    for _ in range(2):  # the second pass removes what rounding left of the first (CholeskyQR2, arXiv 1401.5171)
        lower_kk = jnp.linalg.cholesky(cross(block, block))
        inverse_kk = jax.scipy.linalg.solve_triangular(lower_kk, jnp.eye(lower_kk.shape[0]), lower=True)
        block = jax.tree.map(lambda x, m=inverse_kk: jnp.tensordot(m, x, axes=1, precision=EXACT), block)
    return block


def _top(x: Any, k: jax.Array) -> Any:
    # Of non-negative floats the bits, read as integers, have the same order: 31 halvings find the exact threshold.
    bits = jax.tree.map(lambda v: jax.lax.bitcast_convert_type(jnp.abs(_wide(v)), jnp.int32), x)

    def count(threshold: jax.Array) -> jax.Array:
        return functools.reduce(jnp.add, [jnp.sum(b >= threshold) for b in jax.tree.leaves(bits)])

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # count(low) >= k > count(high)
        middle = low + (high - low) // 2
        enough = count(middle) >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.int32(0), jnp.int32(2**31 - 1)))
    return jax.tree.map(lambda v, b: jnp.where(b >= low, _wide(v), 0.0), x, bits)


_coefficients_program = program("subspace_coefficients", _coefficients)
_project_program = program("subspace_project", _project)
_orthonormalize_program = program("subspace_orthonormalize", _orthonormalize)
_whiten_program = program("subspace_whiten", _whiten)
_cross_program = program("subspace_cross", cross)
_top_program = program("subspace_top_coordinates", _top)


def size(basis: Any) -> int:
    """Number of vectors of a basis."""
    return jax.tree.leaves(basis)[0].shape[0]


def coefficients(basis: Any, x: Any) -> jax.Array:
    """⟨b_j, x⟩ for each vector of the basis, [k] float32."""
    return _coefficients_program(basis, x)


def project(basis: Any, x: Any, k: int | None = None) -> Any:
    """P_S x = Σ_j b_j ⟨b_j, x⟩ over the first k vectors (all by default) of an orthonormal basis, a tree like x."""
    return _project_program(basis, x, size(basis) if k is None else k)


def orthonormalize(block: Any) -> Any:
    """An orthonormal basis whose first j vectors span the block's first j, for every j.

    A vector that depends on those before it becomes zero, which leaves every projection right.
    """
    return _orthonormalize_program(block)


def random_basis(key: jax.Array, like: Any, k: int, support: Any = None) -> Any:
    """k orthonormal vectors of a uniformly random k-dimensional subspace of the space of `like`.

    With `support`, a tree of ones and zeros, of the coordinates where it is 1: padding of a route is no dimension.
    """
    block = random_block(key, like, k)
    return _whiten_program(block if support is None else jax.tree.map(lambda x, s: x * s[None], block, support))


def top_coordinates(x: Any, k: int) -> Any:
    """x on its k entries of largest magnitude, zero elsewhere; entries as large as the k-th are all kept."""
    return _top_program(x, k)


def principal_angles(a: Any, b: Any) -> NDArray[np.float64]:
    """Principal angles between the spans of two orthonormal bases, ascending, in radians.

    They are the arc cosines of the singular values of the k × k matrix ⟨a_i, b_j⟩, which float32 resolves to
    some 5e-4 near 0.
    """
    cosines = np.linalg.svd(np.asarray(_cross_program(a, b), np.float64), compute_uv=False)
    return np.arccos(np.clip(cosines, 0.0, 1.0))


def measured_dimension(values: ArrayLike, null_top_values: ArrayLike) -> int:
    """Number of positive eigenvalues above the 95th percentile of the top eigenvalue under the null.

    The null's are found with advantages permuted within groups. Raises ValueError where there are none.
    """
    null = np.asarray(null_top_values, float)
    if null.size == 0:
        raise ValueError("the measured dimension needs the top eigenvalue of at least one permutation")
    return int(np.sum(np.asarray(values, float) > max(float(np.quantile(null, 0.95)), 0.0)))
