"""Training-free rollback θ' = θ_T − β · m ⊙ δ_B, and the scores that choose its coordinates m (definitions §9, C7).

Pure transforms of trees, elementwise, so that nothing moves between devices; `taken_back`, `edit_between` and `masked`
are compiled once for the sweep, the planner and the command. Domain A is the one that peaked and lost; stage B, which
came later, gives its edit δ_B back. The construction of the paper's proxy conflict set is not public: the rules are
ours [chosen].

A score is positive where taking a coordinate of δ_B back should serve A; one that is 0 or negative is never chosen
(`selection.largest`). Magnitude, which is blind to A, is positive on all that changed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mdrl_jax import tree
from mdrl_jax.model.transformer import at_least_float32
from mdrl_jax.parallel.programs import program


def rollback(params: Any, edit: Any, mask: Any, beta: Any) -> Any:
    """θ − β · m ⊙ δ, each leaf in its own dtype, computed in float32 or wider.

    Bitwise the identity where m is false, and everywhere at β = 0.

    Args:
      params: θ, the parameters to take the edit out of; not necessarily the ones it led to.
      edit: δ, a tree like θ.
      mask: booleans, a tree like θ.
      beta: scalar; 1 takes the edit back whole.

    >>> theta, delta = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.25, 0.5])}
    >>> rollback(theta, delta, {"w": jnp.array([True, False])}, 1.0)["w"].tolist()
    [0.75, 2.0]
    """

    def one(theta: jax.Array, delta: jax.Array, chosen: jax.Array) -> jax.Array:
        wide = at_least_float32(theta.dtype)
        strength = jnp.asarray(beta, wide)
        moved = (theta.astype(wide) - strength * delta.astype(wide)).astype(theta.dtype)
        return jnp.where(chosen & (strength != 0), moved, theta)  # −0 − 0·δ may be +0

    return jax.tree.map(one, params, edit, mask)


@struct.dataclass
class Evidence:
    """What the rules score by: trees like the parameters. A rule needs only some of them; the others stay None.

    Attributes:
      edit: δ_B.
      own_edit: δ_A.
      peak_gradient: g_A(θ*_A), of A's loss.
      gradient: g_A(θ_T), of A's loss.
      fisher: F_A, the diagonal of the empirical Fisher matrix (`fisher.fisher_diagonal`); None: first order only.
      kappa: κ, which turns F into A's loss's curvature (`fisher.fit_kappa`).
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
        """A field that a rule cannot do without. Raises ValueError, by name, if it is None."""
        if getattr(self, name) is None:
            raise ValueError(f"this rule needs {name}, which was not given")
        return getattr(self, name)


taken_back = program("rollback", rollback)
edit_between = program("rollback_difference", tree.sub)  # (after, before) -> δ
masked = program("rollback_masked", lambda edit, mask: jax.tree.map(lambda d, m: d * m, edit, mask))


def harm_of_adding(edit: Any, peak_gradient: Any, fisher: Any = None, kappa: Any = 0.0) -> Any:
    """(a) g_A(θ*_A) δ_B + ½ κ F_A δ_B²: what each coordinate of δ_B, added at A's peak, adds to A's loss."""
    return _expansion(edit, peak_gradient, fisher, 0.5 * kappa)


def gain_of_removing(edit: Any, gradient: Any, fisher: Any = None, kappa: Any = 0.0) -> Any:
    """(b) g_A(θ_T) δ_B − ½ κ F_A δ_B²: what each coordinate of δ_B, removed from θ_T, takes off A's loss."""
    return _expansion(edit, gradient, fisher, -0.5 * kappa)


def opposition(edit: Any, own_edit: Any) -> Any:
    """(c) −δ_A δ_B: positive where B moved a coordinate against A's own move."""
    return jax.tree.map(lambda delta, own: -own * delta, edit, own_edit)


def gain_of_return(edit: Any, displacement: Any) -> Any:
    """δ_B (θ_T − θ*_A) − ½ δ_B²: what each coordinate of δ_B, removed from θ_T, takes off ½‖θ − θ*_A‖².

    Rule (b) without data, with a curvature of 1 everywhere around A's peak: g = θ_T − θ*_A and κF = 1. Positive only
    where removing brings the coordinate nearer to the peak.
    """
    return jax.tree.map(lambda delta, moved: delta * moved - 0.5 * delta * delta, edit, displacement)


def magnitude(edit: Any) -> Any:
    """(d) |δ_B|."""
    return jax.tree.map(jnp.abs, edit)


SCORES: dict[str, Callable[[Evidence], Any]] = {
    "adding": lambda e: harm_of_adding(e.edit, e.need("peak_gradient"), e.fisher, e.kappa),
    "removing": lambda e: gain_of_removing(e.edit, e.need("gradient"), e.fisher, e.kappa),
    "opposition": lambda e: opposition(e.edit, e.need("own_edit")),
    "displacement": lambda e: gain_of_return(e.edit, e.need("displacement")),
    "magnitude": lambda e: magnitude(e.edit),
}


def route_mask(like: Any, chosen_LF: Any) -> Any:
    """The coordinates of MLP neurons (gate and up columns, down rows) as a mask; all others are false.

    Args:
      like: parameters, or another tree of their shapes and shardings.
      chosen_LF: booleans, neurons of a route (`points.shared_route`).
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
