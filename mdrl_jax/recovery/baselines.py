"""Known ways not to forget, or to merge, that `protect`, refresh and rollback are compared with (definitions §10).

Optax transforms, which change the gradient before it is clipped; what they need beside it are extra arguments:

| transform | gradient | source |
|---|---|---|
| `ewc` | g + λ Σ_i F_i ⊙ (θ − θ*_i) | elastic weight consolidation, arXiv 1612.00796 |
| `agem` | g − (g·r / ‖r‖²) r where g·r < 0, r the mean of the references | A-GEM, arXiv 1812.00420 |
| `pcgrad` | the same for each reference in turn | PCGrad, arXiv 2001.06782 |

and merges of whole trees, without any training:

| merge | parameters | source |
|---|---|---|
| `average` | mean of the θ_i | arXiv 2203.05482 |
| `task_arithmetic` | θ_0 + λ Σ_i τ_i | arXiv 2212.04089 |
| `ties` | θ_0 + λ · the disjoint mean of the trimmed τ_i | arXiv 2306.01708 |

All are sums on each device and all-reduces of a few floats, computed in float32 or wider, each leaf returned in its own
dtype. Deviations: in PCGrad every task's gradient is projected, against the others in random order, and all are summed;
here one domain is trained, so only its gradient is, against the references in their order, which makes steps
reproducible [chosen]. The references of A-GEM are gradients on stored examples; the stage that uses them says of what.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mdrl_jax import tree
from mdrl_jax.model.transformer import at_least_float32
from mdrl_jax.recovery.protect import stateless
from mdrl_jax.recovery.selection import top


def ewc(weight: Any) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of Σ_i (λ/2) Σ_j F_ij (θ_j − θ*_ij)², λ = `weight`; the update needs the parameters.

    Extra argument `anchors`: a tuple of (F_i, θ*_i), trees like the parameters.
    """

    def update(updates: Any, state: Any, params: Any = None, *, anchors: Sequence[tuple[Any, Any]], **_: Any):
        if params is None:
            raise ValueError("ewc needs the parameters: update(updates, state, params, anchors=...)")
        for fisher, peak in anchors:
            updates = jax.tree.map(pulled, updates, params, fisher, peak)
        return updates, state

    def pulled(g: jax.Array, theta: jax.Array, fisher: jax.Array, peak: jax.Array) -> jax.Array:
        wide = at_least_float32(g.dtype)
        away = theta.astype(wide) - peak.astype(wide)
        return _changed(g, jnp.asarray(weight, wide) * fisher.astype(wide) * away)

    return stateless(update)


def agem() -> optax.GradientTransformationExtraArgs:
    """Takes out of the gradient what opposes the mean of the references.

    Extra argument `references`: a tuple of gradients, one of each domain to keep, trees like the parameters.
    """

    def update(updates: Any, state: Any, params: Any = None, *, references: Sequence[Any], **_: Any):
        return _without_conflict(updates, average(references)), state

    return stateless(update)


def pcgrad() -> optax.GradientTransformationExtraArgs:
    """Takes out of the gradient what opposes each reference in turn, in their order; extra argument as of `agem`."""

    def update(updates: Any, state: Any, params: Any = None, *, references: Sequence[Any], **_: Any):
        for reference in references:
            updates = _without_conflict(updates, reference)
        return updates, state

    return stateless(update)


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
        return _changed(theta, jnp.asarray(scale, wide) * _sum(deltas, wide))

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
        return _changed(theta, jnp.asarray(scale, wide) * total / count)

    return jax.tree.map(one, base, *kept)


def _sum(leaves: Sequence[jax.Array], wide: Any) -> jax.Array:
    return functools.reduce(jnp.add, [x.astype(wide) for x in leaves])


def _changed(x: jax.Array, change: jax.Array) -> jax.Array:
    """x + change in x's dtype; x itself, −0 too, where the change is 0."""
    return jnp.where(change == 0, x, (x.astype(change.dtype) + change).astype(x.dtype))


def _without_conflict(g: Any, reference: Any) -> Any:
    """g − (g·r / ‖r‖²) r if g·r < 0, else g."""
    inner, squared = tree.vdot(g, reference), tree.vdot(reference, reference)
    share = jnp.where(inner < 0, -inner / jnp.where(squared > 0, squared, 1), 0)

    def one(x: jax.Array, r: jax.Array) -> jax.Array:
        wide = at_least_float32(x.dtype)
        return _changed(x, share.astype(wide) * r.astype(wide))

    return jax.tree.map(one, g, reference)
