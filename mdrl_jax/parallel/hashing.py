"""Pseudo-random bits for every entry of a tree of parameters, as a function of the entry's position.

`recovery/rollback/selection.py` draws random sets of coordinates with them, and `rl/random_signs.py` random signs. Both
are elementwise, so no data moves between devices. `jax.random.bits` would give such bits too, but XLA takes ten times
as long to compile it for all leaves of a model.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax import tree
from mdrl_jax.parallel.counting import KEY_BITS


def tensor_numbers(like: Any) -> Any:
    """For each entry, the number of its tensor (a leaf, or one layer of a stacked leaf) within the tree.

    Args:
      like: a tree of parameters, whose values are not used.

    Returns:
      A tree of uint32 arrays with the shapes of `like`. Numbers count from 0 in the order of the leaves; a stacked leaf
      has one number for each of its layers, in their order.
    """
    first, out = 0, []
    for keys, x in jax.tree_util.tree_leaves_with_path(like):
        n = x.shape[0] if tree.is_stacked(tree.path(keys)) else 1
        within = jax.lax.broadcasted_iota(jnp.uint32, x.shape, 0) if n > 1 else jnp.zeros(x.shape, jnp.uint32)
        out.append(within + np.uint32(first))
        first += n
    return jax.tree.structure(like).unflatten(out)


def position_bits(like: Any, words: Any = (0, 0, 0)) -> Any:
    """31 pseudo-random bits for each entry, a function of `words`, its tensor's number and its index in the tensor.

    Entries of one tensor have different bits; entries of two tensors may have the same. In one tensor they differ
    because each step of the mixing is a bijection of 31-bit integers: an offset that depends on the tensor, then xors
    with `words`, multiplications by odd numbers and xors with shifted copies, as in the last steps of the hash murmur3.
    The tensors are those of `tensor_numbers`, with at most 2³¹ entries each.

    Args:
      like: a tree of parameters, whose values are not used.
      words: three integers below 2³¹, traced or not (`words`).

    Returns:
      A tree of uint32 arrays with the shapes of `like`, each value below 2³¹.
    """
    kept = np.uint32(2**KEY_BITS - 1)

    def mix(name: str, x: jax.Array, number: jax.Array) -> jax.Array:
        axes = range(1 if tree.is_stacked(name) else 0, x.ndim)
        position = number * np.uint32(0x9E3779B1)
        for axis in axes:
            stride = math.prod(x.shape[axis + 1 :])
            position = position + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride)
        for word, factor, shift in zip(words, (0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F), (16, 15, 16), strict=True):
            position = ((position ^ jnp.uint32(word)) * np.uint32(factor)) & kept
            position = position ^ (position >> np.uint32(shift))
        return position

    named = ((tree.path(keys), x) for keys, x in jax.tree_util.tree_leaves_with_path(like))
    numbers = jax.tree.leaves(tensor_numbers(like))
    return jax.tree.structure(like).unflatten([mix(*leaf, number) for leaf, number in zip(named, numbers, strict=True)])


def words(key: jax.Array) -> list[jax.Array]:
    """Draws the three words of `position_bits` with a PRNG key: uint32 scalars, uniform over 0 … 2³¹ − 1."""
    return list(jax.random.bits(key, (3,), jnp.uint32) >> np.uint32(1))
