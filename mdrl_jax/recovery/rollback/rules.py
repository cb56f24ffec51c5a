"""Training-free rollback θ' = θ_T − β · m ⊙ δ_B, and the scores that choose its coordinates m (definitions §9, C7).

Domain A was trained first and then lost reward. The later stage B is the donor: a part of its edit δ_B is taken back.
The mask m is the paper's proxy conflict set. How the paper constructs it is not public, so the rules here are ours
[chosen].

A rule gives each coordinate a score. The score is positive if taking this coordinate of δ_B back should help A. A
coordinate with a score of 0 or below is never chosen (`selection.largest`). `magnitude` knows nothing of A and is
positive wherever B changed a coordinate.

All functions are elementwise on trees like the parameters, so no data moves between devices. `taken_back` and `masked`
are compiled programs that the sweep, the planner and the command `rollback` share.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mdrl_jax.parallel.programs import program
from mdrl_jax.tree import at_least_float32


def rollback(params: Any, edit: Any, mask: Any, beta: Any) -> Any:
    """θ − β · m ⊙ δ: parameters with a part of an edit taken back.

    Sums are computed in float32 or wider, and each leaf keeps its dtype. The result is bitwise θ where m is false, and
    everywhere at β = 0.

    Args:
      params: θ, the parameters to take the edit out of; not necessarily the end of the stage that made the edit.
      edit: δ, a tree like θ.
      mask: m, booleans, a tree like θ.
      beta: β, the strength, a scalar; 1 removes δ from the chosen coordinates in full.

    Returns:
      A tree like θ; the arguments are not changed.

    >>> theta, delta = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.25, 0.5])}
    >>> rollback(theta, delta, {"w": jnp.array([True, False])}, 1.0)["w"].tolist()
    [0.75, 2.0]
    """

    def one(theta: jax.Array, delta: jax.Array, chosen: jax.Array) -> jax.Array:
        wide = at_least_float32(theta.dtype)
        strength = jnp.asarray(beta, wide)
        moved = (theta.astype(wide) - strength * delta.astype(wide)).astype(theta.dtype)
        return jnp.where(chosen & (strength != 0), moved, theta)  # `moved` may be +0 where θ is −0

    return jax.tree.map(one, params, edit, mask)


@struct.dataclass
class Evidence:
    """The quantities that the rules score with, as trees like the parameters. Those that a rule does not use stay None.

    Attributes:
      edit: δ_B.
      own_edit: δ_A.
      peak_gradient: g_A(θ*_A), the gradient of A's loss at A's peak.
      gradient: g_A(θ_T), the gradient of A's loss at the end of the sequence.
      fisher: F_A, the diagonal of the empirical Fisher matrix (`fisher.fisher_diagonal`); None leaves out the second
        order.
      kappa: κ, a scalar that scales F_A to the curvature of A's loss (`fisher.fit_kappa`).
      displacement: θ_T − θ*_A.
    """

    edit: Any
    own_edit: Any = None
    peak_gradient: Any = None
    gradient: Any = None
    fisher: Any = None
    kappa: Any = 0.0
    displacement: Any = None

    def need(self, name: str) -> Any:
        """The value of the field `name`, which a rule cannot do without. Raises ValueError if it is None."""
        if getattr(self, name) is None:
            raise ValueError(f"this rule needs {name}, which was not given")
        return getattr(self, name)


taken_back = program("rollback", rollback)
signs = program(  # an edit that, taken back, moves every coordinate by `length` against its gradient
    "rollback_signs", lambda gradient, length: jax.tree.map(lambda g: length * jnp.sign(g), gradient)
)
masked = program("rollback_masked", lambda edit, mask: jax.tree.map(lambda d, m: d * m, edit, mask))


def harm_of_adding(edit: Any, peak_gradient: Any, fisher: Any = None, kappa: Any = 0.0) -> Any:
    """Rule `adding`, g_A(θ*_A) δ_B + ½ κ F_A δ_B²: the rise of A's loss if B moves one coordinate away from A's peak.

    Args:
      edit: δ_B, a tree like the parameters.
      peak_gradient: g_A(θ*_A), a tree like it.
      fisher: F_A, a tree like it; None for the first order only, whatever κ is.
      kappa: κ, a scalar; with its default 0 there is only the first order, too.

    Returns:
      The score of every coordinate, in the unit of A's loss, a tree like the edit.
    """
    return _expansion(edit, peak_gradient, fisher, 0.5 * kappa)


def gain_of_removing(edit: Any, gradient: Any, fisher: Any = None, kappa: Any = 0.0) -> Any:
    """Rule `removing`, g_A(θ_T) δ_B − ½ κ F_A δ_B²: the fall of A's loss if one coordinate of δ_B is removed at θ_T.

    Args:
      edit: δ_B, a tree like the parameters.
      gradient: g_A(θ_T), a tree like it.
      fisher: F_A, a tree like it; None for the first order only, whatever κ is.
      kappa: κ, a scalar; with its default 0 there is only the first order, too.

    Returns:
      The score of every coordinate, in the unit of A's loss, a tree like the edit.
    """
    return _expansion(edit, gradient, fisher, -0.5 * kappa)


def opposition(edit: Any, own_edit: Any) -> Any:
    """Rule `opposition`, −δ_A δ_B: positive where B moved a coordinate against the direction that A had moved it in.

    Args:
      edit: δ_B, a tree like the parameters.
      own_edit: δ_A, a tree like it.

    Returns:
      The score of every coordinate, a tree like the edit.
    """
    return jax.tree.map(lambda delta, own: -own * delta, edit, own_edit)


def gain_of_return(edit: Any, displacement: Any) -> Any:
    """Rule `displacement`, δ_B (θ_T − θ*_A) − ½ δ_B²: the fall of ½‖θ − θ*_A‖² if one coordinate of δ_B is removed.

    This is rule `removing` for a loss with curvature 1 everywhere around A's peak: g = θ_T − θ*_A and κF = 1. It needs
    no data. It is positive only where the removal brings the coordinate nearer to the peak.

    Args:
      edit: δ_B, a tree like the parameters.
      displacement: θ_T − θ*_A, a tree like it.

    Returns:
      The score of every coordinate, a tree like the edit.
    """
    return jax.tree.map(lambda delta, moved: delta * moved - 0.5 * delta * delta, edit, displacement)


def magnitude(edit: Any) -> Any:
    """Rule `magnitude`: |δ_B| of every coordinate, a tree like the edit δ_B."""
    return jax.tree.map(jnp.abs, edit)


SCORES: dict[str, Callable[[Evidence], Any]] = {
    "adding": lambda e: harm_of_adding(e.edit, e.need("peak_gradient"), e.fisher, e.kappa),
    "removing": lambda e: gain_of_removing(e.edit, e.need("gradient"), e.fisher, e.kappa),
    "opposition": lambda e: opposition(e.edit, e.need("own_edit")),
    "displacement": lambda e: gain_of_return(e.edit, e.need("displacement")),
    "magnitude": lambda e: magnitude(e.edit),
}


def route_mask(like: Any, chosen_LF: Any) -> Any:
    """The weights of some MLP neurons (gate and up columns, down rows), as a mask that is false on all other weights.

    Args:
      like: parameters, or another tree of their shapes and shardings.
      chosen_LF: booleans [L, F], true for the neurons of a route (`checkpoint_figures.shared_route`).

    Returns:
      A tree of booleans like `like`.
    """
    mask = jax.tree.map(lambda x: jnp.zeros_like(x, bool), like)
    chosen_LF = jnp.asarray(chosen_LF, bool)
    layers = dict(mask["layers"])
    for name, chosen in (("gate", chosen_LF[:, None]), ("up", chosen_LF[:, None]), ("down", chosen_LF[:, :, None])):
        layers[name] = {**layers[name], "kernel": layers[name]["kernel"] | chosen}
    return {**mask, "layers": layers}


def _expansion(edit: Any, gradient: Any, fisher: Any, weight: Any) -> Any:
    if fisher is None:
        return jax.tree.map(lambda delta, g: g * delta, edit, gradient)
    return jax.tree.map(lambda delta, g, f: g * delta + weight * f * delta * delta, edit, gradient, fisher)
