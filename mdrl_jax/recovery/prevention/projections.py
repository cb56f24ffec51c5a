"""Known transforms that keep earlier domains, which `protect` is compared with (definitions §10).

Optax transforms, which change the gradient before it is clipped; what they need beside it are extra arguments:

| transform | gradient | source |
|---|---|---|
| `ewc` | g + λ Σ_i F_i ⊙ (θ − θ*_i) | elastic weight consolidation, arXiv 1612.00796 |
| `agem` | g − (g·r / ‖r‖²) r where g·r < 0, r the mean of the references | A-GEM, arXiv 1812.00420 |
| `pcgrad` | the same for each reference in turn | PCGrad, arXiv 2001.06782 |

All are sums on each device and all-reduces of a few floats, computed in float32 or wider, each leaf returned in its own
dtype. Deviations: in PCGrad every task's gradient is projected, against the others in random order, and all are summed;
here one domain is trained, so only its gradient is, against the references in their order, which makes steps
reproducible [chosen]. The references of A-GEM are gradients on stored examples; the stage that uses them says of what.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mdrl_jax import tree
from mdrl_jax.model.transformer import at_least_float32
from mdrl_jax.recovery.merging import average
from mdrl_jax.recovery.prevention.protect import stateless
from mdrl_jax.tree import changed


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
        return changed(g, jnp.asarray(weight, wide) * fisher.astype(wide) * away)

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


def _without_conflict(g: Any, reference: Any) -> Any:
    """g − (g·r / ‖r‖²) r if g·r < 0, else g."""
    inner, squared = tree.vdot(g, reference), tree.vdot(reference, reference)
    share = jnp.where(inner < 0, -inner / jnp.where(squared > 0, squared, 1), 0)

    def one(x: jax.Array, r: jax.Array) -> jax.Array:
        wide = at_least_float32(x.dtype)
        return changed(x, share.astype(wide) * r.astype(wide))

    return jax.tree.map(one, g, reference)
