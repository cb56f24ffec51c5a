"""Blocks of vectors that stay trees: what block Lanczos runs on devices.

A block of b vectors is a tree of leaves [b, ...], float32. Leaves keep their sharding, whose leading axis is whole;
inner products are local sums and an all-reduce of the coefficients, never a gather.
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

TOLERANCE = 1e-5  # of ‖A‖: what float32 products differ by, and what is dropped as rounding

Block = Any


@dataclasses.dataclass(frozen=True)
class Programs:
    """What runs on devices, for trees of one structure and placement.

    Attributes:
      empty: (block, m) -> a basis [m, ...] of zeros.
      store: (basis, block, first) -> the basis, donated, with the block's vectors from `first` on.
      orthogonalise: the function of this module.
      fill: (block, dropped [b], key) -> the block with fresh random directions where one was dropped.
      combine: (basis, y [m, k]) -> Σ_i basis_i y_ik, leaves [k, ...].
      difference: (block, block) -> (‖a − b‖, ‖a‖).
    """

    empty: Callable[..., Any]
    store: Callable[..., Any]
    orthogonalise: Callable[..., Any]
    fill: Callable[..., Any]
    combine: Callable[..., Any]
    difference: Callable[..., Any]


def programs(block: Block) -> Programs:
    """The programs for blocks like this one, compiled once for all runs."""
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
        combine=make("combine", _combine, vectors),
        difference=make("difference", _difference, whole),
    )


@functools.cache
def drawing(shapes: tuple[Any, ...], shardings: tuple[Any, ...]) -> Callable[[jax.Array], Any]:
    """(key) -> standard normal leaves of these shapes and shardings, the key folded by leaf."""
    return program("lanczos random block", lambda key: _normal(key, shapes), out_shardings=shardings)


def _normal(key: jax.Array, shapes: tuple[Any, ...]) -> tuple[jax.Array, ...]:
    keys = (jax.random.fold_in(key, i) for i in range(len(shapes)))
    return tuple(jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, shapes, strict=True))


def orthogonalise(basis: Any, block: Block, scale: jax.Array) -> tuple[Block, jax.Array, jax.Array, jax.Array]:
    """One pass: block = basis · C + Q' R + what was dropped, Q' orthonormal: (Q', C [m, b], R [b, b], norms [b]).

    Rows of `basis` not yet filled are zero. Within the block, Gram–Schmidt column by column. A column whose
    remainder (`norms`) is within 1e-5 of `scale` or of the block's longest is set to zero, as is its row of R.
    """
    block = jax.tree.map(lambda x: x.astype(jnp.float32), block)
    floor = TOLERANCE * jnp.maximum(scale, jnp.sqrt(jnp.max(_squares(block))))
    c_MB = _products(basis, block)
    block = tree.sub(block, _combine(basis, c_MB))
    b = c_MB.shape[1]
    earlier = jnp.arange(b)

    def column(i: jax.Array, state: Any) -> Any:
        block, r_BB, norms_B = state
        one = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), block)
        above_B1 = jnp.where((earlier < i)[:, None], _products(block, one), 0.0)
        one = tree.sub(one, _combine(block, above_B1))
        norm = jnp.sqrt(_squares(one)[0])
        kept = norm > floor
        one = tree.scale(jnp.where(kept, 1 / jnp.where(kept, norm, 1.0), 0.0), one)
        block = _store(block, one, i)
        r_B1 = jnp.where((earlier == i)[:, None], jnp.where(kept, norm, 0.0), above_B1)
        return block, jax.lax.dynamic_update_slice(r_BB, r_B1, (0, i)), norms_B.at[i].set(norm)

    empty = jnp.zeros((b, b), jnp.float32), jnp.zeros(b, jnp.float32)
    block, r_BB, norms_B = jax.lax.fori_loop(0, b, column, (block, *empty))
    return block, c_MB, r_BB, norms_B


def _products(a: Any, b: Any) -> jax.Array:
    """⟨a_i, b_j⟩ [m, b] of the vectors of two trees with leaves [m, ...], [b, ...], without reshaping a leaf."""

    def dot(x: jax.Array, y: jax.Array) -> jax.Array:
        axes = tuple(range(1, x.ndim))
        return jax.lax.dot_general(x, y, ((axes, axes), ((), ())), precision=jax.lax.Precision.HIGHEST)

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(dot, a, b)))


def _combine(basis: Any, y_MK: jax.Array) -> Any:
    """Σ_i basis_i y_ik: leaves [k, ...]."""

    def dot(x: jax.Array) -> jax.Array:
        return jax.lax.dot_general(y_MK, x, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)

    return jax.tree.map(dot, basis)


def _squares(block: Block) -> jax.Array:
    """‖block_i‖² [b]."""
    parts = [jnp.sum(x * x, axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(block)]
    return functools.reduce(jnp.add, parts)


def _empty(block: Block, m: int) -> Any:
    return jax.tree.map(lambda x: jnp.zeros((m, *x.shape[1:]), jnp.float32), block)


def _store(basis: Any, block: Block, first: jax.Array) -> Any:
    return jax.tree.map(lambda q, x: jax.lax.dynamic_update_slice_in_dim(q, x, first, 0), basis, block)


def _fill(block: Block, dropped_B: jax.Array, key: jax.Array) -> Block:
    """`block` with fresh directions, of about unit length, where one was dropped."""
    leaves, structure = jax.tree.flatten(block)
    fresh = _normal(key, tuple(x.shape for x in leaves))
    size = float(np.sqrt(sum(x.size for x in leaves) / dropped_B.size))
    dropped = (dropped_B.reshape((-1,) + (1,) * (x.ndim - 1)) for x in leaves)
    return structure.unflatten(jnp.where(d, f / size, x) for d, f, x in zip(dropped, fresh, leaves, strict=True))


def _difference(a: Block, b: Block) -> tuple[jax.Array, jax.Array]:
    a, b = (jax.tree.map(lambda x: x.astype(jnp.float32), block) for block in (a, b))
    return tree.norm(tree.sub(a, b)), tree.norm(a)
