"""Thresholds of sharded trees by counting: which entries are the largest, without a sort or a gather.

The bits of non-negative floats, read as integers, have the order of the floats, so that bisection over these integers
ends at a threshold exactly. Each step is a sum on each device and an all-reduce of a few integers. The number of
entries that is asked for is an argument, not a shape: another number compiles nothing anew.

A tree may have more than 2³¹ entries, each of its tensors has fewer.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax import tree

KEY_BITS = 31
LIMB = 15  # a count is (high, low) with low < 2^15: without 64-bit integers, of more than 2^31 entries
LOW = 2**LIMB - 1

Count = tuple[Any, Any]  # of int32


def split(n: int) -> Count:
    """A number as a `Count`.

    Raises:
      ValueError: if it is negative.
    """
    if n < 0:
        raise ValueError(f"a set cannot have {n} coordinates")
    return np.int32(n >> LIMB), np.int32(n & LOW)


def sizes(mask: Any) -> dict[str, jax.Array]:
    """Number of entries in a mask, by tensor (`tree.per_tensor`)."""
    return tree.per_tensor(lambda x: jnp.sum(x, dtype=jnp.int32), mask)


def count(mask: Any) -> Count:
    """Number of entries in a mask."""
    parts = list(sizes(mask).values())
    low = sum((jnp.sum(x & LOW) for x in parts), start=jnp.int32(0))
    high = sum((jnp.sum(x >> LIMB) for x in parts), start=jnp.int32(0))
    return high + (low >> LIMB), low & LOW


def reaches(a: Count, b: Count) -> jax.Array:
    """a ≥ b."""
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))


def minus(a: Count, b: Count) -> Count:
    """a − b for a ≥ b."""
    low = a[1] - b[1]  # >> of a negative number borrows
    return a[0] - b[0] + (low >> LIMB), low & LOW


def keys(scores: Any) -> Any:
    """31-bit integers in the order of the scores' magnitudes, which are compared in float32."""
    return jax.tree.map(lambda x: jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32), scores)


def at_least(keys: Any, among: Any, least: jax.Array) -> Any:
    """The entries of the mask `among` whose keys reach `least`: a mask."""
    return jax.tree.map(lambda key, a: a & (key >= least), keys, among)


def threshold(keys: Any, among: Any, wanted: Count) -> jax.Array:
    """A key that at least `wanted` entries reach: exactly so many of them, or else it is the largest such key.

    It is 0 where `among` has fewer entries.

    Args:
      keys: a tree of 31-bit integers.
      among: the entries that are counted, a mask.
      wanted: how many.
    """

    def going(state: tuple[jax.Array, jax.Array, Count]) -> jax.Array:
        low, high, reached = state  # `reached` ≥ wanted entries reach `low`, fewer than wanted reach `high`
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
    """The `wanted` entries of largest magnitude, and those as large as the last of them: a mask."""
    found = keys(scores)
    everywhere = jax.tree.map(lambda key: jnp.ones_like(key, bool), found)
    return at_least(found, everywhere, threshold(found, everywhere, wanted))
