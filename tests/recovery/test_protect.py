"""Protected subspaces against a dense eigendecomposition, and the projection against dense float64."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import Mesh

from mdrl_jax.analysis import stack, subspace
from mdrl_jax.analysis.objectives import Forward, Rows
from mdrl_jax.model.transformer import Decoder, param_shapes
from mdrl_jax.parallel.programs import compilations
from mdrl_jax.parallel.sharding import param_shardings, put, stacked
from mdrl_jax.recovery.protect import fisher_subspace, joined, protect
from mdrl_jax.rl.logprobs import token_log_probs

pytestmark = pytest.mark.usefixtures("fast_compile")

SIZES = {"vocab_size": 8, "n_layers": 2, "d_model": 8, "d_mlp": 8, "n_heads": 2, "n_kv_heads": 2, "head_dim": 4}
PROMPT, COMPLETION, TEMPERATURE = 3, 4, 0.7


@pytest.fixture(scope="module")
def small(tiny_models: Any) -> tuple[Decoder, Any]:
    model = Decoder(dataclasses.replace(tiny_models["qwen3"].config, **SIZES))
    rng = np.random.default_rng(0)
    shapes = nn.unbox(param_shapes(model))
    return model, jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32), shapes)


def batches(n: int = 3, rows: int = 4) -> list[Rows]:
    """Micro-batches of completions of unequal lengths and weights; the last row only fills up."""
    rng = np.random.default_rng(1)
    out = []
    for i in range(n):
        lengths = rng.integers(1, COMPLETION + 1, rows)
        mask_BT = (np.arange(COMPLETION)[None, :] < lengths[:, None]).astype(np.float32)
        padding_BT = np.arange(PROMPT)[None, :] >= rng.integers(0, PROMPT, rows)[:, None]
        weight_B = rng.uniform(0.2, 1.0, rows).astype(np.float32)
        if i == n - 1:
            weight_B[-1] = 0
        out.append(
            Rows(
                tokens_BT=rng.integers(0, SIZES["vocab_size"], (rows, PROMPT + COMPLETION)).astype(np.int32),
                valid_BT=np.concatenate([padding_BT, mask_BT > 0], axis=1),
                mask_BT=mask_BT,
                adv_B=np.zeros(rows, np.float32),
                success_B=np.ones(rows, np.float32),
                weight_B=weight_B,
            )
        )
    return out


def log_probs(model: Decoder) -> Any:
    forward = Forward(stack.whole(model), TEMPERATURE)
    return lambda params, rows: forward(params, rows, ())


def flat(tree: Any) -> np.ndarray:
    """[N] of a vector's tree."""
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def dense(basis: Any) -> np.ndarray:
    """[k, N] of a basis."""
    k = subspace.size(basis)
    return np.concatenate([np.asarray(x, np.float64).reshape(k, -1) for x in jax.tree.leaves(basis)], axis=1)


@pytest.fixture(scope="module")
def find(small: Any) -> Callable[[int, int], Any]:
    """(k, width) -> `fisher_subspace` of the small model, compiled once a module."""
    return functools.cache(lambda k, width: fisher_subspace(log_probs(small[0]), k, width))


@pytest.fixture(scope="module")
def gradients(small: Any) -> np.ndarray:
    """√w ∇log π(y) of the completions that have weight [11, N], by the trainer's own log-probs."""
    model, params = small

    @jax.jit
    def gradient(params: Any, tokens_T: jax.Array, valid_T: jax.Array, mask_T: jax.Array) -> Any:
        def logp(params: Any) -> jax.Array:
            found_BT: Any = token_log_probs(
                model, params, tokens_T[None], valid_T[None], start=PROMPT, temperature=TEMPERATURE
            )
            return jnp.sum(found_BT[0] * mask_T)

        return jax.grad(logp)(params)

    made = []
    for rows in batches():
        for b in np.flatnonzero(rows.weight_B):
            g = gradient(params, rows.tokens_BT[b], rows.valid_BT[b], rows.mask_BT[b])
            made.append(np.sqrt(rows.weight_B[b]) * flat(g))
    return np.stack(made)


def angle(a_kN: np.ndarray, b_kN: np.ndarray) -> float:
    """The largest principal angle between two spans."""
    cosines = np.linalg.svd(a_kN @ b_kN.T, compute_uv=False)
    return float(np.arccos(np.clip(cosines.min(), 0, 1)))


# --- S_i --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 4])
def test_the_subspace_is_that_of_the_largest_eigenvalues_of_the_fisher_matrix(
    small: Any, find: Any, gradients: np.ndarray, width: int
):
    """With room for all gradients nothing is cut off on the way: k of 11 then lead exactly, in order."""
    n = len(gradients)
    found = dense(find(n, width)(small[1], batches()))
    np.testing.assert_allclose(found @ found.T, np.eye(n), atol=2e-4)
    _, _, right = np.linalg.svd(gradients, full_matrices=False)
    for k in (1, 3, 6, n):
        assert angle(found[:k], right[:k]) < 2e-2, k


def test_a_few_kept_vectors_hold_nearly_all_that_the_best_few_hold(small: Any, find: Any, gradients: np.ndarray):
    found = dense(find(4, 2)(small[1], batches()))
    held, values = np.sum((gradients @ found.T) ** 2), np.linalg.svd(gradients, compute_uv=False)
    assert 0.95 * np.sum(values[:4] ** 2) < held <= 1.0001 * np.sum(values[:4] ** 2) < 0.95 * np.sum(values**2)


def test_room_that_is_not_filled_is_zero_vectors_and_one_program_serves_all_parameters(small: Any, find: Any):
    _, params = small
    three = batches(1)  # completions with weight
    basis = find(11, 4)(params, three)
    before = compilations["protect_fold"]
    sizes = np.linalg.norm(dense(basis), axis=1)
    np.testing.assert_allclose(sizes[:3], 1, atol=1e-4)
    only = jax.tree.map(lambda b: b[:3], basis)
    update = jax.tree.map(jnp.ones_like, params)
    projected = [flat(subspace.project(b, update)) for b in (basis, only)]
    np.testing.assert_allclose(*projected, atol=1e-3 * np.abs(projected[1]).max())
    again = find(11, 4)(jax.tree.map(lambda x: 2 * x, params), three)
    assert angle(dense(only), dense(again)[:3]) > 0.1
    assert compilations["protect_fold"] == before


def test_eight_devices_equal_one_and_vectors_lie_as_parameters_do(small: Any, find: Any, mesh8: Mesh):
    model, params = small
    shardings = param_shardings(mesh8, param_shapes(model))
    params8 = jax.tree.map(jax.device_put, params, shardings)
    with jax.set_mesh(mesh8):
        on_eight = fisher_subspace(log_probs(model), 4, 2, shardings)
        found = on_eight(params8, [put(rows, mesh8) for rows in batches()])
    assert angle(dense(found), dense(find(4, 2)(params, batches()))) < 5e-3
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(stacked(s), x.ndim), found, shardings)
    assert all(jax.tree.leaves(same)), same


def test_rows_that_do_not_divide_are_refused(small: Any):
    model, params = small
    with pytest.raises(ValueError, match="4 rows a micro-batch cannot be taken 3 at a time"):
        fisher_subspace(log_probs(model), 2, 3)(params, batches())


def test_the_first_order_of_what_is_protected_stays(small: Any, find: Any):
    """After a small protected step the log-probabilities change in second order only; unprotected, in first."""
    model, params = small
    basis = find(11, 4)(params, batches())
    rng = np.random.default_rng(2)
    u = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    kept, _ = protect(1.0).update(u, optax.EmptyState(), protected=basis)
    total = jax.jit(lambda p: jnp.stack([jnp.sum(log_probs(model)(p, rows), axis=1) for rows in batches()]))

    def change(update: Any, size: float) -> float:
        moved = jax.tree.map(lambda p, x: p + size * x, params, update)
        return float(jnp.max(jnp.abs(total(moved) - total(params)) * (np.stack([r.weight_B for r in batches()]) > 0)))

    assert change(kept, 1e-3) < 0.05 * change(u, 1e-3)


# --- the transform ----------------------------------------------------------------------------------------------------


def vectors(rng: np.random.Generator, like: Any, k: int) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=(k, *x.shape)), jnp.float32), like)


def test_protect_is_the_dense_projection(small: Any):
    _, params = small
    rng = np.random.default_rng(3)
    block = vectors(rng, params, 5)
    basis = subspace.orthonormalize(jax.tree.map(lambda b: b.at[3].set(b[0] - 2 * b[1]), block))  # its 4th is zero
    u = jax.tree.map(lambda x: x[0], vectors(rng, params, 1))
    q = np.linalg.qr(dense(block)[[0, 1, 2, 4]].T)[0]
    for strength in (0.4, 1.0):
        transform = optax.chain(optax.identity(), protect(strength))
        found, _ = transform.update(u, transform.init(params), params, protected=basis, other=None)
        expected = flat(u) - strength * q @ (q.T @ flat(u))
        np.testing.assert_allclose(flat(found), expected, atol=2e-5)
    assert np.abs(dense(basis) @ flat(found)).max() < 2e-5 * np.linalg.norm(flat(u))


def test_joined_subspaces_hold_each_and_share_what_they_share(small: Any):
    _, params = small
    rng = np.random.default_rng(4)
    block = vectors(rng, params, 5)
    a, b = (subspace.orthonormalize(jax.tree.map(lambda x, i=i: x[i], block)) for i in (slice(0, 3), slice(2, 5)))
    both = joined([a, b])
    assert subspace.size(both) == 6
    rows = dense(both)
    np.testing.assert_allclose(np.sort(np.linalg.norm(rows, axis=1)), [0, 1, 1, 1, 1, 1], atol=1e-4)
    q = np.linalg.qr(dense(block).T)[0]
    np.testing.assert_allclose(rows.T @ rows, q @ q.T, atol=1e-4)


def test_an_update_without_a_basis_is_refused(small: Any):
    update: Callable[..., Any] = protect(1.0).update
    with pytest.raises(TypeError, match="protected"):
        update(small[1], optax.EmptyState())
