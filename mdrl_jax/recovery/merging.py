"""Merges of several models' parameters into one, without training (definitions §10).

| merge | parameters | source |
|---|---|---|
| `average` | mean of the θ_i | arXiv 2203.05482 |
| `task_arithmetic` | θ_0 + λ Σ_i τ_i | arXiv 2212.04089 |
| `ties` | θ_0 + λ · the disjoint mean of the trimmed τ_i | arXiv 2306.01708 |
| `ram` | θ_0 + λ · the mean, at each coordinate, of the τ_i that changed it | arXiv 2601.13572 |
| `dare` | θ_0 + λ Σ_i τ_i, after random dropping in each τ_i and rescaling of the rest | arXiv 2311.03099 |

θ_0 is the base model, θ_i is the model that was trained on domain i alone, and τ_i = θ_i − θ_0 is its solo edit. Sums
are computed in float32 or wider, and each leaf keeps its dtype. Only the trimming of TIES and the thresholds of RAM
need sums over the devices. Everything else is elementwise, so it moves no data between them.

RAM was made for edits of bfloat16 checkpoints, in which most weights do not change at all. Adam changes every float32
weight a little, so that "changed" needs a threshold. Here an edit has changed an entry if it moved it by more than t
root mean squares of the edit of the same tensor (one layer's, if tensors are stacked by layer) [chosen].
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax.parallel.counting import KEY_BITS
from mdrl_jax.parallel.hashing import position_bits, words
from mdrl_jax.recovery.rollback.selection import top
from mdrl_jax.tree import at_least_float32, changed, is_stacked, path


def average(trees: Sequence[Any]) -> Any:
    """The mean of trees, entry by entry.

    Args:
      trees: one tree or more, all with the same structure and shapes.

    Returns:
      a tree like the first one, with its dtypes.

    Raises:
      ValueError: if the trees differ in structure.
    """

    def one(*leaves: jax.Array) -> jax.Array:
        wide = at_least_float32(leaves[0].dtype)
        return (_sum(leaves, wide) / len(leaves)).astype(leaves[0].dtype)

    return jax.tree.map(one, *trees)


def task_arithmetic(base: Any, edits: Sequence[Any], scale: Any) -> Any:
    """θ_0 + λ Σ_i τ_i (arXiv 2212.04089).

    Args:
      base: θ_0, a tree of parameters.
      edits: the τ_i = θ_i − θ_0, one or more, trees like the base.
      scale: λ, a scalar.

    Returns:
      the merged parameters, a tree like the base.

    Raises:
      ValueError: if an edit differs from the base in structure.
    """

    def one(theta: jax.Array, *deltas: jax.Array) -> jax.Array:
        wide = at_least_float32(theta.dtype)
        return changed(theta, jnp.asarray(scale, wide) * _sum(deltas, wide))

    return jax.tree.map(one, base, *edits)


def ties(base: Any, edits: Sequence[Any], density: float, scale: Any) -> Any:
    """θ_0 + λ τ, where τ merges the edits by TIES (arXiv 2306.01708): trim, elect a sign, take the disjoint mean.

    Trim: each edit keeps its entries of largest magnitude over the whole model and is 0 elsewhere. Elect: the sign of a
    coordinate is that of the sum of its kept entries. Disjoint mean: τ is the mean of only those kept entries that have
    this sign, and 0 if there are none.

    Args:
      base: θ_0, a tree of parameters.
      edits: the τ_i = θ_i − θ_0, one or more, trees like the base.
      density: share of all entries of an edit, those that are 0 included, that it keeps; it keeps at least one entry.
        Entries that are 0 are never kept, so an edit with fewer other entries keeps fewer. Ties are broken as in
        `selection.largest`.
      scale: λ, a scalar.

    Returns:
      the merged parameters, a tree like the base.

    Raises:
      ValueError: unless 0 < density ≤ 1, or if an edit differs from the base in structure.
    """
    kept = [
        jax.tree.map(lambda x, m: jnp.where(m, x, 0), edit, top(jax.tree.map(jnp.abs, edit), density)) for edit in edits
    ]

    def one(theta: jax.Array, *deltas: jax.Array) -> jax.Array:
        wide = at_least_float32(theta.dtype)
        trimmed = [x.astype(wide) for x in deltas]
        sign = jnp.sign(_sum(trimmed, wide))
        agreed = [(jnp.sign(x) == sign) & (sign != 0) for x in trimmed]
        total = _sum([jnp.where(a, x, 0) for a, x in zip(agreed, trimmed, strict=True)], wide)
        count = jnp.maximum(_sum(agreed, wide), 1)
        return changed(theta, jnp.asarray(scale, wide) * total / count)

    return jax.tree.map(one, base, *kept)


def ram(base: Any, edits: Sequence[Any], threshold: Any, scale: Any) -> Any:
    """θ_0 + λ τ, where τ_j is the mean of the τ_ij of those edits i that changed entry j (RAM, arXiv 2601.13572).

    What one edit alone changed is added as it is, and what several changed is averaged. So an edit is not weakened
    where no other one needs the coordinate, as it is in a mean over all edits.

    Args:
      base: θ_0, a tree of parameters.
      edits: the τ_i = θ_i − θ_0, one or more, trees like the base.
      threshold: t ≥ 0, a scalar; an entry has changed if |τ_ij| > t · rms(τ_i of this tensor).
      scale: λ, a scalar.

    Returns:
      the merged parameters, a tree like the base. Entries that no edit changed keep their bits.

    Raises:
      ValueError: if an edit differs from the base in structure.
    """
    sets = [changed_entries(edit, threshold) for edit in edits]

    def one(theta: jax.Array, *leaves: jax.Array) -> jax.Array:
        wide = at_least_float32(theta.dtype)
        deltas, masks = leaves[: len(edits)], leaves[len(edits) :]
        total = _sum([jnp.where(m, x, 0) for m, x in zip(masks, deltas, strict=True)], wide)
        return changed(theta, jnp.asarray(scale, wide) * total / jnp.maximum(_sum(masks, wide), 1))

    return jax.tree.map(one, base, *edits, *sets)


def changed_entries(edit: Any, threshold: Any) -> Any:
    """The entries that an edit changed by more than a threshold, as a mask: a tree of booleans like the edit.

    Args:
      edit: a tree like the parameters.
      threshold: t ≥ 0, a scalar, in root mean squares of the edit of the same tensor and layer. With 0 every entry that
        is not 0 has changed.
    """

    def one(keys: Any, x: jax.Array) -> jax.Array:
        x = x.astype(at_least_float32(x.dtype))
        axes = tuple(range(1 if is_stacked(path(keys)) else 0, x.ndim))
        return jnp.square(x) > jnp.square(jnp.asarray(threshold, x.dtype)) * jnp.mean(
            jnp.square(x), axes, keepdims=True
        )

    return jax.tree_util.tree_map_with_path(one, edit)


def dare(base: Any, edits: Sequence[Any], rate: Any, scale: Any, key: jax.Array) -> Any:
    """θ_0 + λ Σ_i d(τ_i), where d drops each entry with probability p and divides the others by 1 − p (DARE).

    The expectation of d(τ_i) is τ_i, so the expectation of the merge is that of `task_arithmetic`; edits overlap in
    fewer entries (arXiv 2311.03099).

    Args:
      base: θ_0, a tree of parameters.
      edits: the τ_i = θ_i − θ_0, one or more, trees like the base.
      rate: p, a scalar, at least 0 and below 1. With one key, a larger rate drops what a smaller one drops, and more.
      scale: λ, a scalar.
      key: PRNG key of the draws, which differ between edits.

    Returns:
      the merged parameters, a tree like the base.

    Raises:
      ValueError: if an edit differs from the base in structure.
    """
    kept = [_kept(edit, rate, jax.random.fold_in(key, i)) for i, edit in enumerate(edits)]
    return task_arithmetic(base, kept, scale)


def _kept(edit: Any, rate: Any, key: jax.Array) -> Any:
    rate = jnp.asarray(rate, jnp.float32)
    bits = position_bits(edit, words(key))

    def one(x: jax.Array, drawn: jax.Array) -> jax.Array:
        wide = at_least_float32(x.dtype)
        uniform = drawn.astype(jnp.float32) * np.float32(2.0**-KEY_BITS)
        return jnp.where(uniform >= rate, x.astype(wide) / (1 - rate.astype(wide)), 0)

    return jax.tree.map(one, edit, bits)


def _sum(leaves: Sequence[jax.Array], wide: Any) -> jax.Array:
    return functools.reduce(jnp.add, [x.astype(wide) for x in leaves])
