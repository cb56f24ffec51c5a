"""Chooses sets of coordinates of a parameter tree: those with the highest scores, or random ones (definitions §9).

A set is a mask: a tree of booleans like the parameters.

The threshold of a set is found by counting (`parallel/counting.py`). A sharded tree is therefore never sorted or
gathered, and a sweep over sizes compiles one program. Ties at the threshold are common, for example in edits of
checkpoints that were stored in bfloat16. They are broken by a fixed pseudo-random order of positions. Every set
therefore has exactly the size asked for, and no tensor is favoured. That order depends neither on the scores nor on the
sharding.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax import tree
from mdrl_jax.parallel import counting, distributed
from mdrl_jax.parallel.counting import KEY_BITS, Count
from mdrl_jax.parallel.programs import program


def largest(scores: Any, count: int, within: Any = None) -> Any:
    """The coordinates with the `count` highest positive scores.

    Args:
      scores: a tree like the parameters, compared in float32. Zeros, negative numbers and NaN are never chosen.
      count: number of coordinates, 0 or more.
      within: a mask that the set must lie in; None for no restriction.

    Returns:
      A mask of exactly min(count, number of positive scores in `within`) coordinates. Which of several equal scores
      are in it depends on their positions alone (module docstring).

    Raises:
      ValueError: if `count` is negative.
    """
    return largest_program(scores, counting.split(count), within)


def top(scores: Any, share: float, within: Any = None) -> Any:
    """The coordinates with the highest positive scores, as many as a share of all coordinates [chosen].

    Args:
      scores: as for `largest`.
      share: share of all coordinates, or of those in `within` if it is given, whether or not their scores are positive.
      within: a mask that the set must lie in; None for no restriction.

    Returns:
      A mask of max(1, round(share · number of coordinates)) coordinates, or of all with a positive score if there are
      fewer.

    Raises:
      ValueError: unless 0 < share ≤ 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of coordinates must be above 0 and at most 1, not {share}")
    n = sum(x.size for x in jax.tree.leaves(scores)) if within is None else size(within)
    return largest(scores, max(1, round(share * n)), within)


def random_set(seed: int, count: int, within: Any) -> Any:
    """A pseudo-random set of coordinates of a mask: every coordinate is as likely as any other, and so is every pair.

    Args:
      seed: of the draw.
      count: number of coordinates, 0 or more.
      within: the mask to draw from, a tree of booleans.

    Returns:
      A mask of exactly `count` coordinates, a tree of booleans like `within`.

    Raises:
      ValueError: if `count` is negative or `within` has fewer coordinates.
    """
    available = size(within)
    if available < count:
        raise ValueError(f"cannot draw {count} coordinates: `within` has only {available}")
    return _random_program(jax.random.key(seed), counting.split(count), within)


def size(mask: Any) -> int:
    """Number of coordinates in a mask, those that are true in all its leaves together. All processes must call it."""
    return sum(int(x.sum(dtype=np.int64)) for x in distributed.gather(_sizes_program(mask)).values())


def support(edit: Any, within: Any = None) -> Any:
    """The coordinates that an edit changed: those where it is not 0.

    Args:
      edit: δ, a difference of parameters, a tree like them.
      within: a mask, a tree of booleans like the edit, that the result must lie in; None for no restriction.

    Returns:
      A mask, a tree of booleans like the edit.
    """
    changed = jax.tree.map(lambda x: x != 0, edit)
    return changed if within is None else jax.tree.map(jnp.logical_and, changed, within)


def complement(mask: Any) -> Any:
    """The coordinates outside a mask, as a mask: true where `mask`, a tree of booleans, is false."""
    return jax.tree.map(jnp.logical_not, mask)


def _names(like: Any) -> Iterator[tuple[str, jax.Array]]:
    """Each leaf of a tree with its path."""
    return ((tree.path(keys), x) for keys, x in jax.tree_util.tree_leaves_with_path(like))


def _tensor_numbers(like: Any) -> Any:
    """For each entry, the number of its tensor (a leaf, or one layer of a stacked leaf) within the tree."""
    first, out = 0, []
    for name, x in _names(like):
        n = x.shape[0] if tree.is_stacked(name) else 1
        within = jax.lax.broadcasted_iota(jnp.uint32, x.shape, 0) if n > 1 else jnp.zeros(x.shape, jnp.uint32)
        out.append(within + np.uint32(first))
        first += n
    return jax.tree.structure(like).unflatten(out)


def _scrambled(like: Any, words: Any = (0, 0, 0)) -> Any:
    """31 pseudo-random bits for each entry, a function of its position. Entries of one tensor have different bits.

    They differ because each step of the mixing is a bijection of 31-bit integers: an offset that depends on the tensor,
    then xors with `words`, multiplications by odd numbers and xors with shifted copies, as in the last steps of the
    hash murmur3. This is used in place of `jax.random.bits`, which XLA compiles for ten times as long.

    Args:
      like: a tree of arrays, whose values are not used.
      words: three integers below 2³¹ that the bits depend on.
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

    numbers = jax.tree.leaves(_tensor_numbers(like))
    mixed = [mix(name, x, number) for (name, x), number in zip(_names(like), numbers, strict=True)]
    return jax.tree.structure(like).unflatten(mixed)


def _choose(keys: Any, among: Any, count: Count) -> Any:
    """The `count` entries of `among` with the largest keys, or all of them if there are fewer.

    Ties are broken by `_scrambled`, and then by the number of the tensor.

    Args:
      keys: a tree of 31-bit integers.
      among: a mask of the entries that may be chosen.
      count: number of entries.
    """
    available = counting.count(among)
    enough = counting.reaches(available, count)
    left = jnp.where(enough, count[0], available[0]), jnp.where(enough, count[1], available[1])
    chosen = jax.tree.map(jnp.zeros_like, among)
    orders = (keys, _scrambled(keys), _tensor_numbers(keys))

    def choose(i: jax.Array, state: tuple[Any, Any, Count]) -> tuple[Any, Any, Count]:
        chosen, among, left = state
        now = jax.tree.map(lambda *keys: jax.lax.select_n(i, *keys), *orders)
        least = counting.threshold(now, among, left)
        above = counting.at_least(now, among, least + 1)
        chosen = jax.tree.map(jnp.logical_or, chosen, above)
        left = counting.minus(left, counting.count(above))
        return chosen, jax.tree.map(lambda key, a: a & (key == least), now, among), left

    # A loop, because XLA would compile the search for a threshold three times otherwise.
    chosen, among, left = jax.lax.fori_loop(0, len(orders), choose, (chosen, among, left))
    some = left[0] + left[1] > 0
    return jax.tree.map(lambda c, a: c | (a & some), chosen, among)


def _largest(scores: Any, count: Count, within: Any) -> Any:
    scores = jax.tree.map(lambda x: x.astype(jnp.float32), scores)
    among = jax.tree.map(lambda x: x > 0, scores)
    if within is not None:
        among = jax.tree.map(jnp.logical_and, among, within)
    keys = counting.keys(jax.tree.map(lambda x, a: jnp.where(a, x, 0.0), scores, among))
    return _choose(keys, among, count)


def _random(key: jax.Array, count: Count, within: Any) -> Any:
    words = jax.random.bits(key, (3,), jnp.uint32) >> np.uint32(1)
    return _choose(_scrambled(within, list(words)), within, count)


largest_program = program("rollback_largest", _largest)
_random_program = program("rollback_random", _random)
_sizes_program = program("rollback_sizes", counting.sizes)
