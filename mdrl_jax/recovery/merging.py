"""Merges of several models' parameters into one, without training (definitions §10).

| merge | parameters | source |
|---|---|---|
| `average` | mean of the θ_i | arXiv 2203.05482 |
| `task_arithmetic` | θ_0 + λ Σ_i τ_i | arXiv 2212.04089 |
| `ties` | θ_0 + λ · the disjoint mean of the trimmed τ_i | arXiv 2306.01708 |

θ_0 is the base model, θ_i is the model that was trained on domain i alone, and τ_i = θ_i − θ_0 is its solo edit. Sums
are computed in float32 or wider, and each leaf keeps its dtype. All but the trimming of TIES is elementwise, so it
moves no data between devices.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mdrl_jax.model.transformer import at_least_float32
from mdrl_jax.recovery.rollback.selection import top
from mdrl_jax.tree import changed


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


def _sum(leaves: Sequence[jax.Array], wide: Any) -> jax.Array:
    return functools.reduce(jnp.add, [x.astype(wide) for x in leaves])
