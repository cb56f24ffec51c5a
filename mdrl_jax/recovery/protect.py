"""Protect: updates kept out of the subspaces that earlier domains need (definitions §10).

    u ← u − s P u,    P the projection onto the sum of the S_i, s the strength

u is the finished update, after Adam: of a projected gradient, Adam's division by coordinate would leave nothing
orthogonal.

S_i is spanned by the leading eigenvectors, over all parameters, of domain i's empirical Fisher matrix at θ*_i,

    F_i = Σ_y w(y) ∇log π(y) ∇log π(y)ᵀ,    y its own completions, w their weight

[chosen: the paper's protected subspaces are not public]. They are the directions in which the log-probabilities of what
the domain does right change at all, to first order, so that both the first order of its damage and the Gauss–Newton
part of the second vanish outside them; this is orthogonal gradient descent (arXiv 1910.07104) with the stored
gradients cut down to the few directions that they share. Eigenvectors of the Hessian on a route
(`analysis/conflict.py`) span only MLP neurons and miss the first order, the larger part of what later stages do.

The eigenvectors are found in one pass over the completions, a few gradients at a time: the k kept vectors, scaled by
their singular values, and the new gradients g are joined, and the leading k of what they span are kept,

    [√λ_1 v_1, ..., √λ_k v_k, g, ...] = A,    A Aᵀ = U Λ Uᵀ,    √λ_j v_j ← (Uᵀ A)_j

exact for as long as what is cut off is 0. Memory is twice k trees like the parameters, and the new gradients.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from mdrl_jax.analysis import subspace
from mdrl_jax.analysis.objectives import Rows
from mdrl_jax.model.transformer import at_least_float32
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import batch_divisor, stacked
from mdrl_jax.recovery.fisher import LogProbs


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


def fisher_subspace(
    log_probs: LogProbs, k: int, width: int = 1, shardings: Any = None
) -> Callable[[Any, Iterable[Rows]], Any]:
    """(params, micro-batches) -> an orthonormal basis [k, ...] of S_i, leading directions first, float32.

    Compiled once for rows of one shape. Vectors are zero where the completions span fewer than k directions. Gradients
    are taken `width` completions at a time; on a mesh as `fisher.fisher_diagonal` does.

    Args:
      log_probs: (params, rows) -> log π of completion tokens [B, Tc], 0 on padding.
      k: number of vectors.
      width: divides the rows of a micro-batch; `Rows.weight_B` are the weights w.
      shardings: of the parameters; each vector lies as they do.
    """
    places = None if shardings is None else jax.tree.map(stacked, shardings)
    options = {} if places is None else {"out_shardings": places}
    fold = program("protect_fold", functools.partial(_fold, log_probs, width, places), donate_argnums=0, **options)
    empty = program("protect_empty", functools.partial(_empty, k), **options)

    def find(params: Any, batches: Iterable[Rows]) -> Any:
        scaled = empty(params)
        for rows in batches:
            scaled = fold(scaled, params, rows)
        return subspace.orthonormalize(scaled)

    return find


def joined(bases: Sequence[Any]) -> Any:
    """An orthonormal basis of the sum of subspaces [k_1 + k_2 + ..., ...]; what they share becomes zero vectors."""
    return subspace.orthonormalize(jax.tree.map(lambda *b: jnp.concatenate(b), *bases))


def _empty(k: int, params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros((k, *x.shape), jnp.float32), params)


def _fold(log_probs: LogProbs, width: int, places: Any, scaled: Any, params: Any, rows: Rows) -> Any:
    """The leading directions, scaled by singular values, of those at hand and the gradients of more completions."""
    n, k = rows.weight_B.shape[0], subspace.size(scaled)
    if n % width:
        raise ValueError(f"{n} rows a micro-batch cannot be taken {width} at a time")
    mesh: Any = jax.sharding.get_abstract_mesh()
    copies = 1 if mesh.empty else batch_divisor(mesh)

    def gradient(row: Rows) -> Any:
        repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (copies, *x.shape)), row)
        weight = jnp.sqrt(row.weight_B) / copies
        return jax.grad(lambda p: weight * jnp.sum(log_probs(p, repeated)))(params)

    def step(scaled: Any, some: Rows) -> tuple[Any, None]:
        gradients = jax.vmap(gradient)(some)
        whole = jax.tree.map(lambda b, g: jnp.concatenate([b, g.astype(b.dtype)]), scaled, gradients)
        if places is not None:
            whole = jax.lax.with_sharding_constraint(whole, places)
        gram = jax.vmap(subspace.coefficients, in_axes=(None, 0))(whole, whole)
        _, vectors = jnp.linalg.eigh(gram)
        leading = vectors[:, ::-1][:, :k].T
        made = jax.tree.map(lambda a: jnp.tensordot(leading, a, axes=1, precision=subspace.EXACT), whole)
        return made, None

    blocks = jax.tree.map(lambda x: x.reshape((n // width, width) + x.shape[1:]), rows)
    return jax.lax.scan(step, scaled, blocks)[0]
