"""Protect: orthogonal gradient projection (OGD, arXiv 1910.07104) on fresh log-prob gradients (definitions §10).

At every step of a later stage, the part of the gradient and of the update that would change the rewarded completions
of earlier domains is removed:

    g ← g − s P g,    u ← u − s P u

g is the gradient before clipping, and u is the finished update before the learning rate. s is the strength
(`prevent.protect`). P is the projection onto the sum of the subspaces S_i of the kept domains i.

S_i is spanned by the gradients ∇log π(y) of k rewarded completions y of domain i. The completions were sampled at the
domain's peak θ*_i, and each step uses the next k of them. OGD stores its gradients; here they are computed anew at the
parameters of each step [chosen, because the paper's protected subspaces are not public]. An update orthogonal to S_i
leaves log π(y) unchanged, to first order. These gradients also span the range of k terms of domain i's empirical Fisher
matrix F_i, so at every step the update δ has no damage δᵀF_iδ from these terms.

Both g and u are projected. Adam divides each coordinate by a different number, so the update from a projected gradient
is no longer orthogonal to S_i, and u must be projected too. If only u were projected, Adam's moments would accumulate
directions that are never taken.

Alternatives did worse on the quickstart, where the damage is not well described by its first order at θ*_i:
  * The 8 to 96 leading eigenvectors of F_i at θ*_i, held fixed, kept Math but at the price of QA. They lost Math if g
    was projected too.
  * Bases of each layer's inputs (arXiv 2103.09762) kept all of Math, but QA learned little.

Eigenvectors of the Hessian on a route (`analysis/subspace/conflict.py`) were not tried, because they span only MLP
neurons and ignore the first order.

Memory: k trees like the parameters for each kept domain. If that is too much, use fewer vectors (`prevent.vectors`) or
PCGrad (`prevent.gradients`), which needs one tree for each kept domain.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import stacked
from mdrl_jax.second_order import subspace
from mdrl_jax.second_order.fisher import LogProbs, completion_gradients, weighted
from mdrl_jax.second_order.objectives import CompletionBatch
from mdrl_jax.tree import at_least_float32


def protect(strength: Any) -> optax.GradientTransformationExtraArgs:
    """Makes the transform x ← x − s P x, which removes a share s of x's component in a protected subspace.

    x is a gradient or an update, a tree like the parameters. P is the orthogonal projection onto the subspace. Inner
    products are computed in float32, and each leaf of x keeps its dtype. At strength 0 the transform is bitwise the
    identity.

    Args:
      strength: s, a scalar: 0 removes nothing, 1 the whole component.

    Returns:
      The optax transform. It has no state and ignores the parameters. Its update is called as
      `update(x, state, protected=basis)`, and raises TypeError without `protected`. This is an orthonormal basis of the
      subspace, for example from `basis`: a tree like the parameters whose leaves have a leading axis k, one entry for
      each vector. Vectors that are zero are allowed, and change nothing.
    """

    def update(updates: Any, state: Any, params: Any = None, *, protected: Any, **_: Any):
        def one(u: jax.Array, inside: jax.Array) -> jax.Array:
            wide = at_least_float32(u.dtype)
            share = jnp.asarray(strength, wide)
            left = (u.astype(wide) - share * inside.astype(wide)).astype(u.dtype)
            return jnp.where(share != 0, left, u)  # at strength 0, `left` may be +0 where u is −0

        return jax.tree.map(one, updates, subspace.project(protected, updates)), state

    return stateless(update)


def stateless(update: Callable[..., Any]) -> optax.GradientTransformationExtraArgs:
    """The optax transform with a given update function and without a state.

    Args:
      update: (updates, state, params, **extra) -> (new updates, the state as given). It may require some of the extra
        arguments; optax's type allows only optional ones.

    Returns:
      The transform. Its `init` gives an empty state for any parameters, and `update` is its `update` itself.
    """
    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), cast(Any, update))


def gradients(log_probs: LogProbs, shardings: Any = None) -> Callable[[Any, CompletionBatch], Any]:
    """Makes the compiled function (params, rows) -> w ∇log π(y) for each of k completions y with weight w.

    Its result is a float32 tree like the parameters with a leading axis k (`fisher.completion_gradients`); a row of
    weight 0 gives zeros. It is compiled once for each shape of the rows.

    Args:
      log_probs: (params, rows) -> log π of completion tokens [B, Tc], 0 on padding.
      shardings: of the parameters; each gradient is sharded in the same way. None leaves the sharding to the compiler.

    Returns:
      The function. On a mesh, every device must have all k rows.
    """
    places = None if shardings is None else jax.tree.map(stacked, shardings)
    options = {} if places is None else {"out_shardings": places}
    return program("protect_gradients", functools.partial(_gradients, log_probs, places), **options)


def basis(spans: Sequence[Any]) -> Any:
    """An orthonormal basis of the sum of several subspaces.

    Args:
      spans: for each of one or more subspaces, k_i vectors that span it, as a tree like the parameters with a leading
        axis k_i. The vectors need not be orthonormal or independent.

    Returns:
      A float32 tree like the parameters with a leading axis Σ k_i. If only r of the Σ k_i vectors are independent, the
      other Σ k_i − r vectors of the basis are zero.
    """
    return _basis_program(tuple(spans))


def _basis(spans: tuple[Any, ...]) -> Any:
    block = jax.tree.map(lambda *x: jnp.concatenate([v.astype(jnp.float32) for v in x]), *spans)
    return subspace.orthonormalize(block)


def _gradients(log_probs: LogProbs, places: Any, params: Any, rows: CompletionBatch) -> Any:
    found = jax.tree.map(functools.partial(weighted, rows.weight_B), completion_gradients(log_probs, params, rows))
    return found if places is None else jax.lax.with_sharding_constraint(found, places)


_basis_program = program("protect_basis", _basis)
