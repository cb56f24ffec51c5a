"""The device programs of block Lanczos (`lanczos.py`): arithmetic on blocks of vectors that stay trees.

A block of b vectors is a tree whose leaves are [b, ...], in float32. A basis is a block of m vectors. Each leaf is
sharded like the parameter that it belongs to, and its leading axis is not split. An inner product is a sum on each
device and an all-reduce of the coefficients; no vector is gathered or flattened.

Letters of shapes: M vectors of a basis, B vectors of a block, K vectors of a result. N is the number of entries of one
vector.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax import tree
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import replicated

# Relative size of the rounding errors of products with a matrix A in float32. Lanczos drops a vector that is not longer
# than this times ‖A‖, and accepts a difference of this relative size between two products of the same vectors.
TOLERANCE = 1e-5

Block = Any


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs for trees of one structure and one sharding.

    Attributes:
      empty: (block, m) -> a basis of m zero vectors, leaves [m, ...].
      store: (basis, block, first) -> the basis with the block in place of its vectors from number `first` on. The
        memory of the given basis is reused.
      orthogonalise: `orthogonalise` of this module.
      fill: (block, dropped [b], key) -> the block with new random vectors in the places where `dropped` is true.
      combine: `combine` of this module.
      difference: (block a, block b) -> (‖a − b‖, ‖a‖), norms over all vectors together.
    """

    empty: Callable[..., Any]
    store: Callable[..., Any]
    orthogonalise: Callable[..., Any]
    fill: Callable[..., Any]
    combine: Callable[..., Any]
    difference: Callable[..., Any]


def programs(block: Block) -> Programs:
    """The programs for blocks with the structure and the shardings of this one.

    They are made once a process for each structure with its shardings, and compiled at their first call.

    Args:
      block: b vectors, leaves [b, ...]. Every leaf must be a JAX array, because its sharding is read; its axis of
        vectors must not be split.

    Returns:
      the programs `empty`, `store`, `orthogonalise`, `fill`, `combine` and `difference`, as attributes.

    Raises:
      AttributeError: if a leaf is no JAX array.
    """
    leaves, structure = jax.tree.flatten(block)
    return _programs(structure, tuple(x.sharding for x in leaves))


@functools.cache
def _programs(structure: Any, shardings: tuple[Any, ...]) -> Programs:
    vectors, whole = structure.unflatten(shardings), replicated(shardings[0])

    def make(name: str, function: Callable[..., Any], out: Any, **options: Any) -> Callable[..., Any]:
        return program(f"lanczos {name}", function, out_shardings=out, **options)

    return Programs(
        empty=make("empty", _empty, vectors, static_argnums=1),
        store=make("store", _store, vectors, donate_argnums=0),
        orthogonalise=make("orthogonalise", orthogonalise, (vectors, whole, whole, whole)),
        fill=make("fill", _fill, vectors),
        combine=make("combine", combine, vectors),
        difference=make("difference", _difference, whole),
    )


@functools.cache
def drawing(shapes: tuple[Any, ...], shardings: tuple[Any, ...]) -> Callable[[jax.Array], Any]:
    """The program (key) -> leaves with standard normal entries; each leaf has a key of its own, folded from `key`.

    It is made once a process for the same shapes and shardings.

    Args:
      shapes: shape of each leaf.
      shardings: sharding of each leaf; None for a leaf whose sharding the compiler chooses.

    Returns:
      the program; its result is the tuple of the leaves, float32, in the order of `shapes`.
    """
    return program("lanczos random block", lambda key: _normal(key, shapes), out_shardings=shardings)


def _normal(key: jax.Array, shapes: tuple[Any, ...]) -> tuple[jax.Array, ...]:
    keys = (jax.random.fold_in(key, i) for i in range(len(shapes)))
    return tuple(jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, shapes, strict=True))


def orthogonalise(basis: Any, block: Block, scale: jax.Array) -> tuple[Block, jax.Array, jax.Array, jax.Array]:
    """One pass of block Gram–Schmidt: orthogonalises a block against a basis and within itself.

    The result fulfils block = basis · C + Q' R + dropped remainders, with an upper triangular R. First all vectors are
    projected off the basis, then classical Gram–Schmidt takes the vectors of the block one after the other. If the
    remainder of a vector is not longer than 1e-5 · max(scale, longest vector of the given block), it is taken for
    rounding and dropped: its vector in Q' and its row of R become 0. Values that are not finite are not reported; they
    spread to the results.

    One pass leaves rounding errors, so `lanczos.py` repeats it. The cost is 4·m·b·N + 4·b²·N operations, and two reads
    of the basis.

    Args:
      basis: m orthonormal vectors; those that are not filled yet are zero.
      block: b vectors of any length.
      scale: an estimate of ‖A‖, a scalar; 0: only the lengths in the block count; nan: every vector is dropped.

    Returns:
      Q', b vectors that are orthonormal or zero; C [m, b]; R [b, b]; the length of the remainder of each vector [b],
      dropped or not. All are float32.
    """
    block = jax.tree.map(lambda x: x.astype(jnp.float32), block)
    floor = TOLERANCE * jnp.maximum(scale, jnp.sqrt(jnp.max(_squares(block))))
    c_MB = products(basis, block)
    block = tree.sub(block, combine(basis, c_MB))
    b = c_MB.shape[1]
    earlier = jnp.arange(b)

    def column(i: jax.Array, state: Any) -> Any:
        block, r_BB, norms_B = state
        one = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), block)
        above_B1 = jnp.where((earlier < i)[:, None], products(block, one), 0.0)
        one = tree.sub(one, combine(block, above_B1))
        norm = jnp.sqrt(_squares(one)[0])
        kept = norm > floor
        one = tree.scale(jnp.where(kept, 1 / jnp.where(kept, norm, 1.0), 0.0), one)
        block = _store(block, one, i)
        r_B1 = jnp.where((earlier == i)[:, None], jnp.where(kept, norm, 0.0), above_B1)
        return block, jax.lax.dynamic_update_slice(r_BB, r_B1, (0, i)), norms_B.at[i].set(norm)

    empty = jnp.zeros((b, b), jnp.float32), jnp.zeros(b, jnp.float32)
    block, r_BB, norms_B = jax.lax.fori_loop(0, b, column, (block, *empty))
    return block, c_MB, r_BB, norms_B


def products(a: Any, b: Any) -> jax.Array:
    """All inner products ⟨a_i, b_j⟩ of two blocks, in full float32 precision.

    Leaves are not reshaped, because XLA may gather a sharded leaf in order to reshape it.

    Args:
      a: m vectors, leaves [m, ...].
      b: b vectors, leaves [b, ...].

    Returns:
      the products [m, b], in the wider dtype of the two blocks, so float32 if one of them is.
    """

    def dot(x: jax.Array, y: jax.Array) -> jax.Array:
        axes = tuple(range(1, x.ndim))
        return jax.lax.dot_general(x, y, ((axes, axes), ((), ())), precision=jax.lax.Precision.HIGHEST)

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(dot, a, b)))


def combine(basis: Any, y_MK: jax.Array) -> Any:
    """Linear combinations Σ_i basis_i y_ik, in full float32 precision.

    Args:
      basis: m vectors, leaves [m, ...].
      y_MK: coefficients [m, k], one column for each result.

    Returns:
      k vectors, leaves [k, ...], in the wider dtype of basis and coefficients, so float32 if one of them is.
    """

    def dot(x: jax.Array) -> jax.Array:
        return jax.lax.dot_general(y_MK, x, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)

    return jax.tree.map(dot, basis)


def _squares(block: Block) -> jax.Array:
    """The squared length of each vector of a block [b]."""
    parts = [jnp.sum(x * x, axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(block)]
    return functools.reduce(jnp.add, parts)


def _empty(block: Block, m: int) -> Any:
    return jax.tree.map(lambda x: jnp.zeros((m, *x.shape[1:]), jnp.float32), block)


def _store(basis: Any, block: Block, first: jax.Array) -> Any:
    return jax.tree.map(lambda q, x: jax.lax.dynamic_update_slice_in_dim(q, x, first, 0), basis, block)


def _fill(block: Block, dropped_B: jax.Array, key: jax.Array) -> Block:
    """The block with a new random vector, of about unit length, in each place where a vector was dropped."""
    leaves, structure = jax.tree.flatten(block)
    fresh = _normal(key, tuple(x.shape for x in leaves))
    size = float(np.sqrt(sum(x.size for x in leaves) / dropped_B.size))
    dropped = (dropped_B.reshape((-1,) + (1,) * (x.ndim - 1)) for x in leaves)
    return structure.unflatten(jnp.where(d, f / size, x) for d, f, x in zip(dropped, fresh, leaves, strict=True))


def _difference(a: Block, b: Block) -> tuple[jax.Array, jax.Array]:
    a, b = (jax.tree.map(lambda x: x.astype(jnp.float32), block) for block in (a, b))
    return tree.norm(tree.sub(a, b)), tree.norm(a)
