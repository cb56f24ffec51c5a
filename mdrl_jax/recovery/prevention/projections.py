"""Published methods against forgetting that `protect` is compared with: EWC, A-GEM, PCGrad and MGS (definitions §10).

Each is an optax transform that changes the gradient g before it is clipped. The other quantities in the formula are
extra arguments of the transform's update:

| transform | gradient | source |
|---|---|---|
| `ewc` | g + λ Σ_i F_i ⊙ (θ − θ*_i) | elastic weight consolidation, arXiv 1612.00796 |
| `agem` | g − (g·r / ‖r‖²) r where g·r < 0, r the mean of the references | A-GEM, arXiv 1812.00420 |
| `pcgrad` | the same for each reference in turn | PCGrad, arXiv 2001.06782 |
| `mgs` | PCGrad within each module: g·r and ‖r‖² are those of the module | modular gradient surgery, arXiv 2602.02301 |

A reference r is the gradient of a kept domain, computed at the current parameters from stored completions
(`prepare.py`).

Deviation from the PCGrad paper: there the gradient of every task is projected against those of the others in random
order, and all of them are summed. Here a stage trains one domain, so only its gradient is projected. The references
have a fixed order, which makes steps reproducible [chosen]. `mgs` has both differences too. Its modules are tensors or
layers [chosen]: its paper compares several and recommends one by model.

The transforms are sums on each device and all-reduces of a few floats. They compute in float32 or wider, and each leaf
keeps its dtype.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mdrl_jax import tree
from mdrl_jax.recovery.merging import average
from mdrl_jax.recovery.prevention.protect import stateless
from mdrl_jax.tree import at_least_float32, changed


def ewc(weight: Any) -> optax.GradientTransformationExtraArgs:
    """Adds to the gradient that of the penalty Σ_i (λ/2) Σ_j F_ij (θ_j − θ*_ij)², that is λ Σ_i F_i ⊙ (θ − θ*_i).

    Args:
      weight: λ, a scalar.

    Returns:
      The optax transform, which has no state. Its update needs the parameters θ, and the extra argument `anchors`: a
      tuple of (F_i, θ*_i) for each kept domain i, both trees like the parameters; () adds nothing. It raises ValueError
      without the parameters, and TypeError without the anchors.
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
    """Removes from the gradient g its component along r, the mean of the references, if the two point apart (g·r < 0).

    Returns:
      The optax transform, which has no state. Its update needs the extra argument `references`: a tuple of gradients,
      one for each kept domain, as trees like the parameters. It raises TypeError without the argument, or if the tuple
      is empty. If g·r is 0 or above, the gradient stays as it is.
    """

    def update(updates: Any, state: Any, params: Any = None, *, references: Sequence[Any], **_: Any):
        return _without_conflict(updates, average(references)), state

    return stateless(update)


def pcgrad() -> optax.GradientTransformationExtraArgs:
    """Removes from the gradient g its component along each reference r in turn, if the two point apart (g·r < 0).

    For each reference, g is the gradient as the earlier references have left it.

    Returns:
      The optax transform, which has no state. Its update needs the extra argument `references`: a tuple of gradients,
      one for each kept domain, as trees like the parameters. An empty tuple and a reference of zeros change nothing. It
      raises TypeError without the argument.
    """

    def update(updates: Any, state: Any, params: Any = None, *, references: Sequence[Any], **_: Any):
        for reference in references:
            updates = _without_conflict(updates, reference)
        return updates, state

    return stateless(update)


def mgs(module: str = "tensor") -> optax.GradientTransformationExtraArgs:
    """PCGrad within each module: a conflict in one module changes the gradient of this module alone.

    `pcgrad` looks at the inner product of the whole gradient, in which modules that agree with the reference can
    outweigh modules that conflict with it. These then keep their conflict. Here they do not: with one reference, the
    result has an inner product of at least 0 with it in every module.

    Args:
      module: "tensor": every tensor of every layer is a module; "layer": all tensors of a layer together are one, and
        every tensor outside the layers is.

    Returns:
      The optax transform, which has no state. Its update needs the extra argument `references`, as that of `pcgrad`.

    Raises:
      KeyError: at an update, if `module` is another word.
    """

    def update(updates: Any, state: Any, params: Any = None, *, references: Sequence[Any], **_: Any):
        for reference in references:
            updates = _without_conflicts(updates, reference, MODULES[module])
        return updates, state

    return stateless(update)


# Name of the modules of `mgs` -> (path of a leaf) -> the module that its tensors, or those of each layer, belong to.
MODULES: dict[str, Callable[[str], str]] = {
    "tensor": lambda name: name,
    "layer": lambda name: "layers" if tree.is_stacked(name) else name,
}


def _without_conflicts(g: Any, reference: Any, module: Callable[[str], str]) -> Any:
    """`_without_conflict` for each module alone."""
    inner, squared = ({}, {})
    for sums, (a, b) in ((inner, (g, reference)), (squared, (reference, reference))):
        for name, x_L in tree.per_tensor(tree.vdot, a, b).items():
            sums[module(name)] = sums.get(module(name), 0) + x_L
    share = {m: jnp.where(i < 0, -i / jnp.where(squared[m] > 0, squared[m], 1), 0) for m, i in inner.items()}

    def one(keys: Any, x: jax.Array, r: jax.Array) -> jax.Array:
        name, wide = tree.path(keys), at_least_float32(x.dtype)
        of_layers = share[module(name)].astype(wide).reshape(-1, *(1,) * (x.ndim - tree.is_stacked(name)))
        return changed(x, (of_layers if tree.is_stacked(name) else of_layers[0]) * r.astype(wide))

    return jax.tree_util.tree_map_with_path(one, g, reference)


def _without_conflict(g: Any, reference: Any) -> Any:
    """g − (g·r / ‖r‖²) r if g·r < 0, else g."""
    inner, squared = tree.vdot(g, reference), tree.vdot(reference, reference)
    share = jnp.where(inner < 0, -inner / jnp.where(squared > 0, squared, 1), 0)

    def one(x: jax.Array, r: jax.Array) -> jax.Array:
        wide = at_least_float32(x.dtype)
        return changed(x, share.astype(wide) * r.astype(wide))

    return jax.tree.map(one, g, reference)
