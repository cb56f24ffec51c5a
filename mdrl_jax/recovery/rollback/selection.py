"""Chooses sets of coordinates of a parameter tree: those with the highest scores, or random ones (definitions §9).

A set is a mask: a tree of booleans like the parameters.

The threshold of a set is found by counting (`parallel/counting.py`). A sharded tree is therefore never sorted or
gathered, and a sweep over sizes compiles one program. Ties at the threshold are common, for example in edits of
checkpoints that were stored in bfloat16. They are broken by a fixed pseudo-random order of positions. Every set
therefore has exactly the size asked for, and no tensor is favoured. That order depends neither on the scores nor on the
sharding.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax.parallel import counting, distributed, hashing
from mdrl_jax.parallel.counting import Count
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
      fewer. Ties are broken as in `largest`.

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
      seed: of the draw. Equal seeds and masks give nested sets: the smaller set lies in the larger one.
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
    """The coordinates that an edit changed: those where it is not 0; a NaN counts as changed.

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


def _choose(keys: Any, among: Any, count: Count) -> Any:
    """The `count` entries of `among` with the largest keys, or all of them if there are fewer.

    Ties are broken by `hashing.position_bits`, and then by the number of the tensor.

    Args:
      keys: a tree of 31-bit integers.
      among: a mask of the entries that may be chosen.
      count: number of entries.
    """
    available = counting.count(among)
    enough = counting.reaches(available, count)
    left = jnp.where(enough, count[0], available[0]), jnp.where(enough, count[1], available[1])
    chosen = jax.tree.map(jnp.zeros_like, among)
    orders = (keys, hashing.position_bits(keys), hashing.tensor_numbers(keys))

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
    return _choose(hashing.position_bits(within, hashing.words(key)), within, count)


largest_program = program("rollback_largest", _largest)
_random_program = program("rollback_random", _random)
_sizes_program = program("rollback_sizes", counting.sizes)
