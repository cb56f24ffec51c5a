"""Protect: updates kept out of the subspaces that earlier domains need (definitions §10).

    g ← g − s P g,    u ← u − s P u,    P the projection onto the sum of the S_i, s the strength

g is the gradient before it is clipped, u the finished update: Adam's division by coordinate takes even a projected
gradient out of the complement of S_i, and the moments of one that was not projected belong to directions that are not
taken.

S_i at the parameters θ_t of the step is spanned by the gradients ∇log π(y) of k completions y of domain i that were
rewarded, of those drawn at θ*_i; every step takes the next k of them [chosen: the paper's protected subspaces are not
public]. A step outside S_i leaves log π(y) as it is, to first order: this is orthogonal gradient descent (arXiv
1910.07104) with its gradients taken anew at each step. They are the range of k terms of domain i's empirical Fisher
matrix, whose damage δᵀF_iδ is so avoided step by step.

What did worse on the quickstart, where the damage is far from its first order at θ*_i: the 8 to 96 leading eigenvectors
of that matrix at θ*_i, held fixed, which kept Math at the price of QA, or lost it where g was projected too; and bases
of each layer's inputs (arXiv 2103.09762), which kept all of Math and let QA learn little. Eigenvectors of the Hessian
on a route (`analysis/conflict.py`) were not tried: they span only MLP neurons and miss the first order.

Memory is k trees like the parameters for each kept domain; where that is too much, few vectors or PCGrad
(`prevent.gradients`), which needs one, are the choice.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from mdrl_jax import tree
from mdrl_jax.model.transformer import at_least_float32
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import stacked
from mdrl_jax.second_order import subspace
from mdrl_jax.second_order.fisher import LogProbs, completion_gradients, weighted
from mdrl_jax.second_order.objectives import CompletionBatch

# Share of the largest eigenvalue of a Gram matrix that float32 does not resolve.
DEPENDENT = 1e-6


def protect(strength: Any) -> optax.GradientTransformationExtraArgs:
    """Removes from each update `strength` times its component in a protected subspace.

    Extra argument `protected`: an orthonormal basis, a tree like the parameters with a leading axis k; vectors of it
    may be zero. Each leaf keeps its dtype; products are float32. Bitwise the identity at strength 0.
    """

    def update(updates: Any, state: Any, params: Any = None, *, protected: Any, **_: Any):
        def one(u: jax.Array, inside: jax.Array) -> jax.Array:
            wide = at_least_float32(u.dtype)
            share = jnp.asarray(strength, wide)
            left = (u.astype(wide) - share * inside.astype(wide)).astype(u.dtype)
            return jnp.where(share != 0, left, u)  # −0 − 0·x may be +0

        return jax.tree.map(one, updates, subspace.project(protected, updates)), state

    return stateless(update)


def stateless(update: Callable[..., Any]) -> optax.GradientTransformationExtraArgs:
    """The optax transform of `update(updates, state, params, **extra)` without a state; arguments may be required."""
    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), cast(Any, update))


def gradients(log_probs: LogProbs, shardings: Any = None) -> Callable[[Any, CompletionBatch], Any]:
    """(params, rows) -> w ∇log π(y) of each of k completions, float32: trees like the parameters, leading axis k.

    Compiled once for rows of one shape (`fisher.completion_gradients`).

    Args:
      log_probs: (params, rows) -> log π of completion tokens [B, Tc], 0 on padding.
      shardings: of the parameters; each gradient lies as they do.
    """
    places = None if shardings is None else jax.tree.map(stacked, shardings)
    options = {} if places is None else {"out_shardings": places}
    return program("protect_gradients", functools.partial(_gradients, log_probs, places), **options)


def basis(spans: Sequence[Any]) -> Any:
    """An orthonormal basis of what trees of vectors [k_1, ...], [k_2, ...], ... span together: [k_1 + k_2 + ..., ...].

    As many vectors are zero as depend on others.
    """
    return _basis_program(tuple(spans))


def _basis(spans: tuple[Any, ...]) -> Any:
    def unit(vector: Any) -> Any:
        length = tree.norm(vector)
        return tree.scale(jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0), vector)

    block = jax.tree.map(lambda *x: jnp.concatenate([v.astype(jnp.float32) for v in x]), *spans)
    return _whitened(_whitened(jax.vmap(unit)(block)))  # the second pass removes what rounding left of the first


def _whitened(block: Any) -> Any:
    """Λ^(-½) Uᵀ X of vectors X with the Gram matrix X Xᵀ = U Λ Uᵀ, rows of 0 for what is small in Λ.

    Two passes over the vectors; Gram–Schmidt would make as many as there are vectors.
    """
    gram = subspace.cross(block, block)
    values, vectors = jnp.linalg.eigh(gram)
    kept = values > DEPENDENT * values[-1]
    factors = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1)), 0)
    weights = (vectors * factors[None, :]).T
    return jax.tree.map(lambda x: jnp.tensordot(weights, x, axes=1, precision=subspace.EXACT), block)


def _gradients(log_probs: LogProbs, places: Any, params: Any, rows: CompletionBatch) -> Any:
    found = jax.tree.map(functools.partial(weighted, rows.weight_B), completion_gradients(log_probs, params, rows))
    return found if places is None else jax.lax.with_sharding_constraint(found, places)


_basis_program = program("protect_basis", _basis)
