"""Finds the largest entries of a sharded tree by counting, without a sort or a gather.

The bits of non-negative floats, read as integers, have the same order as the floats. Bisection over these integers
therefore finds the exact threshold in at most 31 steps. In each step every device counts its own entries, and an
all-reduce adds a few integers. The wanted number of entries is an argument of the program and not a shape, so another
number does not recompile it.

A tree may have more than 2³¹ entries, but each tensor (a leaf, or one layer of a stacked leaf) must have fewer.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax import tree

KEY_BITS = 31
LIMB = 15  # a count is high · 2^15 + low with low < 2^15, because JAX has no 64-bit integers by default
LOW = 2**LIMB - 1

Count = tuple[Any, Any]  # (high, low), both int32


def split(n: int) -> Count:
    """The number n as a `Count`.

    Args:
      n: a Python integer with 0 <= n < 2^46.

    Returns:
      (high, low), NumPy int32 scalars with n = high · 2^15 + low and 0 <= low < 2^15.

    Raises:
      ValueError: if n is negative.
      OverflowError: if n is 2^46 or more.
      TypeError: if n is not an integer.
    """
    if n < 0:
        raise ValueError(f"a set cannot have {n} coordinates")
    return np.int32(n >> LIMB), np.int32(n & LOW)


def sizes(mask: Any) -> dict[str, jax.Array]:
    """Number of true entries of a mask in each tensor.

    Args:
      mask: a tree of boolean arrays with the structure of the parameters.

    Returns:
      path of a leaf -> counts, int32: [L] for leaves stacked by layer, [1] for others (`tree.per_tensor`).
    """
    return tree.per_tensor(lambda x: jnp.sum(x, dtype=jnp.int32), mask)


def count(mask: Any) -> Count:
    """Number of true entries of a mask in all tensors together.

    Args:
      mask: a tree of boolean arrays.

    Returns:
      a `Count` of int32 scalars with 0 <= low < 2^15; (0, 0) for an empty tree.
    """
    parts = list(sizes(mask).values())
    low = sum((jnp.sum(x & LOW) for x in parts), start=jnp.int32(0))
    high = sum((jnp.sum(x >> LIMB) for x in parts), start=jnp.int32(0))
    return high + (low >> LIMB), low & LOW


def reaches(a: Count, b: Count) -> jax.Array:
    """Whether the number a is at least the number b, as a boolean scalar array."""
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))


def minus(a: Count, b: Count) -> Count:
    """The number a − b, as a `Count`; it requires a ≥ b, which is not checked."""
    low = a[1] - b[1]  # if it is negative, `low >> LIMB` is −1, the borrow
    return a[0] - b[0] + (low >> LIMB), low & LOW


def keys(scores: Any) -> Any:
    """31-bit integers, as uint32, that have the same order as the magnitudes of the scores in float32.

    Args:
      scores: a tree of float arrays. Wider ones are rounded to float32, so magnitudes above its range become infinite.

    Returns:
      a tree of the same structure and shapes. The key of 0 and −0 is 0; the key of NaN is above that of infinity.
    """
    return jax.tree.map(lambda x: jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32), scores)


def at_least(keys: Any, among: Any, least: jax.Array) -> Any:
    """The mask of the entries whose key is at least `least`.

    Args:
      keys: a tree of 31-bit integers (`keys`).
      among: a mask, a tree of boolean arrays of the same shapes; entries outside it are not taken.
      least: a key, a uint32 scalar.

    Returns:
      a tree of boolean arrays, of the same structure and shapes.

    Raises:
      ValueError: if `keys` and `among` differ in structure.
    """
    return jax.tree.map(lambda key, a: a & (key >= least), keys, among)


def threshold(keys: Any, among: Any, wanted: Count) -> jax.Array:
    """A key t such that at least `wanted` entries of `among` have keys ≥ t, and as few more as possible.

    If some t gives exactly `wanted` entries, such a t is returned. Otherwise ties prevent it, and the largest t that
    gives more is returned.

    Args:
      keys: a tree of 31-bit integers (`keys`).
      among: a mask of the entries that are counted, a tree of boolean arrays of the same shapes.
      wanted: number of entries, as a `Count` (`split`); for 0 the key t is above all keys of `among`.

    Returns:
      the key t, a uint32 scalar; 0 if `among` has `wanted` entries or fewer.

    Raises:
      ValueError: if `keys` and `among` differ in structure.
    """

    def going(state: tuple[jax.Array, jax.Array, Count]) -> jax.Array:
        low, high, reached = state  # invariant: `reached` ≥ wanted keys are ≥ low, and fewer than wanted are ≥ high
        return (high - low > 1) & ((reached[0] != wanted[0]) | (reached[1] != wanted[1]))

    def halve(state: tuple[jax.Array, jax.Array, Count]) -> tuple[jax.Array, jax.Array, Count]:
        low, high, reached = state
        middle = low + (high - low) // 2
        found = count(at_least(keys, among, middle))
        enough = reaches(found, wanted)
        reached = jnp.where(enough, found[0], reached[0]), jnp.where(enough, found[1], reached[1])
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle), reached

    return jax.lax.while_loop(going, halve, (jnp.uint32(0), jnp.uint32(2**KEY_BITS), count(among)))[0]


def highest(scores: Any, wanted: Count) -> Any:
    """The mask of the `wanted` entries of largest magnitude, with all entries that tie with the smallest of them.

    Args:
      scores: a tree of float arrays; magnitudes are compared in float32 over all of them together. NaN counts as
        larger than infinity.
      wanted: number of entries, as a `Count` (`split`).

    Returns:
      a tree of boolean arrays; all true if there are `wanted` entries or fewer, otherwise all false if `wanted` is 0.
    """
    found = keys(scores)
    everywhere = jax.tree.map(lambda key: jnp.ones_like(key, bool), found)
    return at_least(found, everywhere, threshold(found, everywhere, wanted))
