"""Sets of coordinates of a parameter tree, as trees of booleans: the highest scores, and random ones (definitions §9).

Thresholds are found by counting: of positive floats the bits, read as integers, have the same order, so halvings of
their range end at the threshold exactly. A sharded tree is never sorted or gathered; each halving is a sum on each
device and an all-reduce of a few integers. Sizes are arguments, not shapes: a sweep compiles nothing anew.

Ties at the threshold are broken by a fixed scramble of positions, so that sets have their size to the coordinate and
ties (edits of checkpoints kept in bfloat16 are full of them) favour no tensor; the order depends neither on the scores
nor on how arrays are sharded. Any tree may have more than 2³¹ entries, none of its tensors may.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax import tree
from mdrl_jax.parallel import distributed
from mdrl_jax.parallel.programs import program

KEY_BITS = 31
LIMB = 15  # a count is (high, low) with low < 2^15: without 64-bit integers, of more than 2^31 entries
LOW = 2**LIMB - 1

Count = tuple[jax.Array, jax.Array]


def largest(scores: Any, count: int, within: Any = None) -> Any:
    """The `count` highest positive scores: a mask of exactly min(count, number of positive scores) coordinates.

    Args:
      scores: a tree; zeros, negative numbers and NaN are never chosen. Compared in float32.
      count: how many, 0 or more.
      within: a mask that the set must lie in; None: everywhere.
    """
    return largest_program(scores, _split(count), within)


def top(scores: Any, share: float, within: Any = None) -> Any:
    """The highest positive scores that make up `share` of all coordinates, or of those in `within` [chosen].

    At least one, if any score is positive: `largest` of round(share · number of coordinates).

    Raises:
      ValueError: unless 0 < share ≤ 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share of coordinates is {share}; allowed: above 0, up to 1")
    n = sum(x.size for x in jax.tree.leaves(scores)) if within is None else size(within)
    return largest(scores, max(1, round(share * n)), within)


def random_set(seed: int, count: int, within: Any) -> Any:
    """`count` coordinates of a mask, all sets of that size equally likely.

    Raises:
      ValueError: if it has fewer.
    """
    available = size(within)
    if available < count:
        raise ValueError(f"{count} coordinates were asked for out of {available}")
    return _random_program(jax.random.key(seed), _split(count), within)


def size(mask: Any) -> int:
    """Number of coordinates in a mask."""
    return sum(int(x.sum(dtype=np.int64)) for x in distributed.gather(_sizes_program(mask)).values())


def support(edit: Any, within: Any = None) -> Any:
    """The coordinates that an edit changed, in `within` if given: a mask."""
    changed = jax.tree.map(lambda x: x != 0, edit)
    return changed if within is None else jax.tree.map(jnp.logical_and, changed, within)


def complement(mask: Any) -> Any:
    """The coordinates outside a mask."""
    return jax.tree.map(jnp.logical_not, mask)


def _split(count: int) -> tuple[np.int32, np.int32]:
    if count < 0:
        raise ValueError(f"a set cannot have {count} coordinates")
    return np.int32(count >> LIMB), np.int32(count & LOW)


def _sizes(mask: Any) -> dict[str, jax.Array]:
    return tree.per_tensor(lambda x: jnp.sum(x, dtype=jnp.int32), mask)


def _count(mask: Any) -> Count:
    parts = list(_sizes(mask).values())
    low = sum((jnp.sum(x & LOW) for x in parts), start=jnp.int32(0))
    high = sum((jnp.sum(x >> LIMB) for x in parts), start=jnp.int32(0))
    return high + (low >> LIMB), low & LOW


def _reaches(a: Count, b: Count) -> jax.Array:
    """a ≥ b."""
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))


def _minus(a: Count, b: Count) -> Count:
    """a − b for a ≥ b."""
    low = a[1] - b[1]  # >> of a negative number borrows
    return a[0] - b[0] + (low >> LIMB), low & LOW


def _names(like: Any) -> Iterator[tuple[str, jax.Array]]:
    return ((tree.path(keys), x) for keys, x in jax.tree_util.tree_leaves_with_path(like))


def _tensor_numbers(like: Any) -> Any:
    """The number of each entry's tensor among all of the tree's."""
    first, out = 0, []
    for name, x in _names(like):
        n = x.shape[0] if tree.is_stacked(name) else 1
        within = jax.lax.broadcasted_iota(jnp.uint32, x.shape, 0) if n > 1 else jnp.zeros(x.shape, jnp.uint32)
        out.append(within + np.uint32(first))
        first += n
    return jax.tree.structure(like).unflatten(out)


def _scrambled(like: Any) -> Any:
    """31 pseudo-random bits of each entry's position, different for all entries of one tensor.

    Each step is a bijection of 31-bit integers: an offset by tensor, odd multiples and shifts (as murmur3 ends).
    """
    kept = np.uint32(2**KEY_BITS - 1)

    def mix(name: str, x: jax.Array, number: jax.Array) -> jax.Array:
        axes = range(1 if tree.is_stacked(name) else 0, x.ndim)
        position = number * np.uint32(0x9E3779B1)
        for axis in axes:
            stride = math.prod(x.shape[axis + 1 :])
            position = position + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride)
        for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 15), (0x27D4EB2F, 16)):
            position = (position * np.uint32(factor)) & kept
            position = position ^ (position >> np.uint32(shift))
        return position

    numbers = jax.tree.leaves(_tensor_numbers(like))
    mixed = [mix(name, x, number) for (name, x), number in zip(_names(like), numbers, strict=True)]
    return jax.tree.structure(like).unflatten(mixed)


def _at_least(keys: Any, among: Any, least: jax.Array) -> Any:
    return jax.tree.map(lambda key, a: a & (key >= least), keys, among)


def _threshold(keys: Any, among: Any, count: Count) -> jax.Array:
    """A key that at least `count` entries reach: exactly `count` of them, or else it is the largest such key."""

    def going(state: tuple[jax.Array, jax.Array, Count]) -> jax.Array:
        low, high, reached = state  # `reached` ≥ count entries reach `low`, fewer than count reach `high`
        return (high - low > 1) & ((reached[0] != count[0]) | (reached[1] != count[1]))

    def halve(state: tuple[jax.Array, jax.Array, Count]) -> tuple[jax.Array, jax.Array, Count]:
        low, high, reached = state
        middle = low + (high - low) // 2
        found = _count(_at_least(keys, among, middle))
        enough = _reaches(found, count)
        reached = jnp.where(enough, found[0], reached[0]), jnp.where(enough, found[1], reached[1])
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle), reached

    return jax.lax.while_loop(going, halve, (jnp.uint32(0), jnp.uint32(2**KEY_BITS), _count(among)))[0]


def _choose(keys: Any, among: Any, count: Count) -> Any:
    """The `count` entries of `among` with the largest 31-bit keys, or all; ties by `_scrambled`, then by tensor."""
    available = _count(among)
    enough = _reaches(available, count)
    left = jnp.where(enough, count[0], available[0]), jnp.where(enough, count[1], available[1])
    chosen = jax.tree.map(jnp.zeros_like, among)
    orders: tuple[Callable[[], Any], ...] = (
        lambda: keys,
        lambda: _scrambled(keys),
        lambda: _tensor_numbers(keys),
    )
    for order in orders:
        now = order()
        least = _threshold(now, among, left)
        above = _at_least(now, among, least + 1)
        chosen = jax.tree.map(jnp.logical_or, chosen, above)
        left = _minus(left, _count(above))
        among = jax.tree.map(lambda key, a, t=least: a & (key == t), now, among)
    some = left[0] + left[1] > 0
    return jax.tree.map(lambda c, a: c | (a & some), chosen, among)


def _largest(scores: Any, count: Count, within: Any) -> Any:
    scores = jax.tree.map(lambda x: x.astype(jnp.float32), scores)
    among = jax.tree.map(lambda x: x > 0, scores)
    if within is not None:
        among = jax.tree.map(jnp.logical_and, among, within)
    keys = jax.tree.map(lambda x, a: jax.lax.bitcast_convert_type(jnp.where(a, x, 0.0), jnp.uint32), scores, among)
    return _choose(keys, among, count)


def _random(key: jax.Array, count: Count, within: Any) -> Any:
    leaves, structure = jax.tree.flatten(within)
    drawn = [jax.random.bits(jax.random.fold_in(key, i), x.shape, jnp.uint32) for i, x in enumerate(leaves)]
    return _choose(structure.unflatten([x >> np.uint32(1) for x in drawn]), within, count)


largest_program = program("rollback_largest", _largest)
_random_program = program("rollback_random", _random)
_sizes_program = program("rollback_sizes", _sizes)
