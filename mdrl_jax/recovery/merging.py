"""Merges of several models' parameters into one, without training (definitions §10).

| merge | parameters | source |
|---|---|---|
| `average` | mean of the θ_i | arXiv 2203.05482 |
| `task_arithmetic` | θ_0 + λ Σ_i τ_i | arXiv 2212.04089 |
| `ties` | θ_0 + λ · the disjoint mean of the trimmed τ_i | arXiv 2306.01708 |

θ_0 is the base model and τ_i = θ_i − θ_0. Sums run on each device in float32 or wider; each leaf keeps its own dtype.
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
    """The mean of trees."""

    def one(*leaves: jax.Array) -> jax.Array:
        wide = at_least_float32(leaves[0].dtype)
        return (_sum(leaves, wide) / len(leaves)).astype(leaves[0].dtype)

    return jax.tree.map(one, *trees)


def task_arithmetic(base: Any, edits: Sequence[Any], scale: Any) -> Any:
    """θ_0 + λ Σ_i τ_i, with λ = `scale`."""

    def one(theta: jax.Array, *deltas: jax.Array) -> jax.Array:
        wide = at_least_float32(theta.dtype)
        return changed(theta, jnp.asarray(scale, wide) * _sum(deltas, wide))

    return jax.tree.map(one, base, *edits)


def ties(base: Any, edits: Sequence[Any], density: float, scale: Any) -> Any:
    """θ_0 + λ τ, with λ = `scale`, by trimming, electing a sign and a disjoint mean.

    Of each edit the share `density` of all coordinates, those of largest magnitude over the whole model, is kept. A
    coordinate's sign is that of the sum of what was kept; τ is the mean over the edits that kept it with that sign.

    Raises:
      ValueError: unless 0 < density ≤ 1.
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
