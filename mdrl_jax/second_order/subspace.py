"""Linear algebra of subspaces whose vectors are trees: bases, projections, principal angles, number of dimensions.

`analysis/subspace/captured.py` and `recovery/refresh/contraction.py` use it for the conflict subspace S, the span of
the eigenvectors that `lanczos.py` finds (definitions §7). `recovery/prevention/protect.py` uses it for gradients.

A vector is a tree, for S a route slice {"gate": [L, D, R], "up": [L, D, R], "down": [L, R, D]}. A basis of k vectors is
the same tree with a leading axis k. Trees are not flattened: an inner product is a sum on each device and an all-reduce
of a few floats. Products have full float32 precision, also on accelerators that would round their factors by default.

**Orthonormal bases.** A block X, whose rows are k vectors, becomes R X with R computed from the k × k Gram matrix
G = X Xᵀ. This is done twice, because the first time leaves errors that grow with the condition number of G.

- `random_basis`: R = L⁻¹ with G = L Lᵀ. The vectors must be independent. (CholeskyQR2: Yamamoto, Nakatsukasa,
  Yanagisawa and Fukaya 2015, ETNA 44.)
- `orthonormalize`: R = Λ^(-½) Uᵀ with G = U Λ Uᵀ. Small eigenvalues are dropped, so vectors may depend on others.

The cost is 8·k²·N operations for vectors with N entries. Each of the two times reads the block twice, where
Gram–Schmidt reads it k times. Block Lanczos has its own algorithm (`blocks.orthogonalise`), because its basis grows
block by block, it needs the coefficients, and it replaces directions that break down.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from mdrl_jax import tree
from mdrl_jax.parallel import counting
from mdrl_jax.parallel.programs import program
from mdrl_jax.second_order.blocks import TOLERANCE, combine, products
from mdrl_jax.second_order.lanczos import random_block

DEPENDENT = 1e-6  # eigenvalues of a Gram matrix below this share of the largest are rounding errors in float32


def _wide(x: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x)


def _coefficients(basis: Any, x: Any) -> jax.Array:
    return products(_wide(basis), jax.tree.map(lambda leaf: leaf[None], _wide(x)))[:, 0]


def _project(basis: Any, x: Any, k: jax.Array) -> Any:
    weights_k = _coefficients(basis, x)
    weights_k = jnp.where(jnp.arange(weights_k.size) < k, weights_k, 0.0)
    return jax.tree.map(lambda leaf: leaf[0], combine(_wide(basis), weights_k[:, None]))


def _whiten(root: Callable[[jax.Array], jax.Array], block: Any) -> Any:
    """Makes a block X orthonormal: X ← R X with R = root(X Xᵀ), twice.

    Args:
      root: maps a Gram matrix G [k, k] to a matrix R [k, k] with R G Rᵀ = I.
      block: k vectors.
    """
    for _ in range(2):  # the second time removes the rounding errors of the first
        block = combine(block, root(products(block, block)).T)
    return block


def _by_cholesky(gram_kk: jax.Array) -> jax.Array:
    """R = L⁻¹ with G = L Lᵀ, for independent vectors. For every j the first j new vectors span the first j old ones."""
    lower_kk = jnp.linalg.cholesky(gram_kk)
    return jax.scipy.linalg.solve_triangular(lower_kk, jnp.eye(lower_kk.shape[0]), lower=True)


def _by_eigenvalues(gram_kk: jax.Array) -> jax.Array:
    """R = Λ^(-½) Uᵀ with G = U Λ Uᵀ; rows that belong to small eigenvalues are 0."""
    values_k, vectors_kk = jnp.linalg.eigh(gram_kk)
    kept_k = values_k > DEPENDENT * values_k[-1]
    factors_k = jnp.where(kept_k, 1 / jnp.sqrt(jnp.where(kept_k, values_k, 1)), 0)
    return (vectors_kk * factors_k[None, :]).T


def orthonormalize(block: Any) -> Any:
    """An orthonormal basis of the span of a block's vectors, at least one.

    If only r of the k vectors are independent, the first k − r vectors of the result are zero. A direction counts as
    dependent if its eigenvalue in the Gram matrix is at most 1e-6 of the largest one. The vectors are scaled to length
    1 first, so a short vector is not mistaken for a dependent one. This function is not jitted; the caller jits it.

    Args:
      block: k vectors, leaves [k, ...], float32.

    Returns:
      k vectors that are orthonormal or zero, like `block`; all are NaN if `block` has a NaN.

    Raises:
      NotImplementedError: if the leaves are bfloat16.
    """

    def unit(vector: Any) -> Any:
        length = tree.norm(vector)
        return tree.scale(jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0), vector)

    return _whiten(_by_eigenvalues, jax.vmap(unit)(block))


def _top(x: Any, wanted: counting.Count) -> Any:
    return jax.tree.map(lambda v, chosen: jnp.where(chosen, v, 0.0), _wide(x), counting.highest(x, wanted))


_coefficients_program = program("subspace_coefficients", _coefficients)
_project_program = program("subspace_project", _project)
_whiten_program = program("subspace_whiten", functools.partial(_whiten, _by_cholesky))
_cross_program = program("subspace_cross", lambda a, b: products(_wide(a), _wide(b)))
_top_program = program("subspace_top_coordinates", _top)


def size(basis: Any) -> int:
    """The number of vectors of a basis."""
    return jax.tree.leaves(basis)[0].shape[0]


def coefficients(basis: Any, x: Any) -> jax.Array:
    """The inner products ⟨b_j, x⟩ with the k vectors of a basis.

    Args:
      basis: k vectors, leaves [k, ...]. They need not be orthonormal.
      x: a vector, a tree like one of them.

    Returns:
      the products, float32 [k].
    """
    return _coefficients_program(basis, x)


def project(basis: Any, x: Any, k: int | None = None) -> Any:
    """The projection P_S x = Σ_j b_j ⟨b_j, x⟩ onto the span of the first k vectors of an orthonormal basis.

    Args:
      basis: orthonormal vectors, leaves [k or more, ...].
      x: a vector.
      k: number of vectors that are used; 0 or less: none, so the projection is 0; None, or more than there are: all.
        Another k does not recompile.

    Returns:
      a tree like `x`, float32.
    """
    return _project_program(basis, x, size(basis) if k is None else k)


def random_basis(key: jax.Array, like: Any, k: int, support: Any = None) -> Any:
    """An orthonormal basis of a uniformly random k-dimensional subspace.

    Args:
      key: a JAX random key.
      like: a tree of arrays, or of their shapes, that gives the space.
      k: number of dimensions. It must not exceed the number of coordinates that the subspace may use. This is not
        checked: the vectors are then not orthonormal, and mostly NaN.
      support: a tree like `like`, 1 at coordinates that the subspace may use and 0 elsewhere, such as at the padding of
        a route. None: all coordinates.

    Returns:
      k orthonormal vectors, leaves [k, ...], float32.
    """
    block = random_block(key, like, k)
    return _whiten_program(block if support is None else jax.tree.map(lambda x, s: x * s[None], block, support))


def top_coordinates(x: Any, k: int) -> Any:
    """x with all but its k entries of largest magnitude set to zero; entries that tie with the k-th are all kept.

    Args:
      x: a vector, as a tree. Magnitudes are compared over all leaves together, in float32; a NaN counts as the largest.
      k: number of entries, 0 or more. If it is more than x has, all are kept.

    Returns:
      a tree like `x`, float32.

    Raises:
      ValueError: if k is negative.
    """
    return _top_program(x, counting.split(k))


def principal_angles(a: Any, b: Any) -> NDArray[np.float64]:
    """The principal angles between two subspaces (Björck and Golub 1973).

    They are the arc cosines of the singular values of the matrix ⟨a_i, b_j⟩. In float32 a cosine near 1 has an error
    of about 1e-7, so angles below about 5e-4 cannot be told from 0.

    Args:
      a: an orthonormal basis of the first subspace.
      b: an orthonormal basis of the second.

    Returns:
      the angles in radians, from 0 to π/2, ascending; as many as the smaller basis has vectors.

    Raises:
      numpy.linalg.LinAlgError: if an inner product of two vectors is nan. If one is infinite, angles are nan instead.
    """
    cosines = np.linalg.svd(np.asarray(_cross_program(a, b), np.float64), compute_uv=False)
    return np.arccos(np.clip(cosines, 0.0, 1.0))


def positive(values: ArrayLike) -> NDArray[np.bool_]:
    """True for eigenvalues that are positive by more than rounding: above 1e-5 times the largest magnitude of all.

    Args:
      values: eigenvalues [k], in any order; k may be 0.

    Returns:
      booleans [k], one for each eigenvalue. If one eigenvalue is nan, all are False.
    """
    values = np.asarray(values, float)
    return values > TOLERANCE * np.max(np.abs(values), initial=0.0)


def measured_dimension(values: ArrayLike, null_top_values: ArrayLike) -> int:
    """Number of dimensions of S: of positive eigenvalues above the 95th percentile of the null (definitions §7).

    Positive are those of `positive`.

    Args:
      values: eigenvalues of the Hessian on the route [k], in any order.
      null_top_values: the top eigenvalue in each draw of the null [draws].

    Returns:
      the number, from 0 to k; 0 if a value of the null or an eigenvalue is nan.

    Raises:
      ValueError: if the null has no draw.
    """
    null = np.asarray(null_top_values, float)
    if null.size == 0:
        raise ValueError("the measured dimension needs the top eigenvalue of at least one permutation")
    return int(np.sum(positive(values) & (np.asarray(values, float) > np.quantile(null, 0.95))))
