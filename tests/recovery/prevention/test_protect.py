"""Gradients of completions one by one, what they span, and the projection against dense float64."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import Mesh

from mdrl_jax.model.transformer import Decoder, param_shapes
from mdrl_jax.parallel.sharding import param_shardings, put, stacked
from mdrl_jax.recovery.prevention.protect import basis, gradients, protect
from mdrl_jax.rl.logprobs import token_log_probs
from mdrl_jax.second_order import decoder_parts, subspace
from mdrl_jax.second_order.objectives import CompletionBatch, Forward

pytestmark = pytest.mark.usefixtures("fast_compile")

SIZES = {"vocab_size": 8, "n_layers": 2, "d_model": 8, "d_mlp": 8, "n_heads": 2, "n_kv_heads": 2, "head_dim": 4}
PROMPT, COMPLETION, TEMPERATURE = 3, 4, 0.7


@pytest.fixture(scope="module")
def small(tiny_models: Any) -> tuple[Decoder, Any]:
    model = Decoder(dataclasses.replace(tiny_models["qwen3"].config, **SIZES))
    rng = np.random.default_rng(0)
    shapes = nn.unbox(param_shapes(model))
    return model, jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32), shapes)


def completions(n: int = 6) -> CompletionBatch:
    """Completions of unequal lengths; the last one only fills up."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, COMPLETION + 1, n)
    mask_BT = (np.arange(COMPLETION)[None, :] < lengths[:, None]).astype(np.float32)
    padding_BT = np.arange(PROMPT)[None, :] >= rng.integers(0, PROMPT, n)[:, None]
    return CompletionBatch(
        tokens_BT=rng.integers(0, SIZES["vocab_size"], (n, PROMPT + COMPLETION)).astype(np.int32),
        valid_BT=np.concatenate([padding_BT, mask_BT > 0], axis=1),
        mask_BT=mask_BT,
        adv_B=np.zeros(n, np.float32),
        success_B=np.ones(n, np.float32),
        weight_B=(np.arange(n) < n - 1).astype(np.float32),
    )


def log_probs(model: Decoder) -> Any:
    forward = Forward(decoder_parts.whole(model), TEMPERATURE)
    return lambda params, rows: forward(params, rows, ())


def flat(tree: Any) -> np.ndarray:
    """[N] of a vector's tree."""
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def dense(basis: Any) -> np.ndarray:
    """[k, N] of a basis."""
    k = subspace.size(basis)
    return np.concatenate([np.asarray(x, np.float64).reshape(k, -1) for x in jax.tree.leaves(basis)], axis=1)


@pytest.fixture(scope="module")
def taken(small: Any) -> Any:
    """The gradients of `completions()`."""
    return gradients(log_probs(small[0]))(small[1], completions())


# --- S_i --------------------------------------------------------------------------------------------------------------


def one_by_one(model: Decoder, params: Any) -> np.ndarray:
    """∇log π(y) of each completion that has weight [5, N], by the trainer's own log-probs."""

    @jax.jit
    def gradient(params: Any, tokens_T: jax.Array, valid_T: jax.Array, mask_T: jax.Array) -> Any:
        def logp(params: Any) -> jax.Array:
            found_BT: Any = token_log_probs(
                model, params, tokens_T[None], valid_T[None], start=PROMPT, temperature=TEMPERATURE
            )
            return jnp.sum(found_BT[0] * mask_T)

        return jax.grad(logp)(params)

    rows = completions()
    each = [jax.tree.map(lambda x, b=b: x[b], rows) for b in np.flatnonzero(rows.weight_B)]
    return np.stack([flat(gradient(params, row.tokens_BT, row.valid_BT, row.mask_BT)) for row in each])


def test_gradients_are_those_of_completions_one_by_one(small: Any, taken: Any):
    expected = one_by_one(*small)
    found = dense(taken)
    np.testing.assert_allclose(found[:5], expected, rtol=2e-3, atol=2e-6 * np.abs(expected).max())
    assert not found[5].any()


def test_eight_devices_equal_one_and_gradients_lie_as_parameters_do(small: Any, taken: Any, mesh8: Mesh):
    model, params = small
    shardings = param_shardings(mesh8, param_shapes(model))
    params8 = jax.tree.map(jax.device_put, params, shardings)
    with jax.set_mesh(mesh8):
        found = gradients(log_probs(model), shardings)(params8, put(completions(), mesh8, None))
        spanned = basis([found])
    scale = np.abs(dense(taken)).max()
    np.testing.assert_allclose(dense(found), dense(taken), rtol=2e-3, atol=1e-5 * scale)
    for made in (found, spanned):
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(stacked(s), x.ndim), made, shardings)
        assert all(jax.tree.leaves(same)), same
    one, eight = (dense(x) for x in (basis([taken]), spanned))
    assert np.linalg.norm(one.T @ one - eight.T @ eight) < 1e-3


def test_the_first_order_of_what_is_protected_stays(small: Any, taken: Any):
    """After a small protected step the log-probabilities change in second order only; unprotected, in first."""
    model, params = small
    rng, rows = np.random.default_rng(2), completions()
    u = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    kept, _ = protect(1.0).update(u, optax.EmptyState(), protected=basis([taken]))
    total = jax.jit(lambda p: jnp.sum(log_probs(model)(p, rows), axis=1)[:5])

    def change(update: Any) -> float:
        moved = jax.tree.map(lambda p, x: p + 1e-3 * x, params, update)
        return float(jnp.max(jnp.abs(total(moved) - total(params))))

    assert change(kept) < 0.05 * change(u)


# --- the transform ----------------------------------------------------------------------------------------------------


def vectors(rng: np.random.Generator, like: Any, k: int) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=(k, *x.shape)), jnp.float32), like)


def test_protect_is_the_dense_projection(small: Any):
    _, params = small
    rng = np.random.default_rng(3)
    block = vectors(rng, params, 5)
    spanned = basis([jax.tree.map(lambda b: b.at[3].set(b[0] - 2 * b[1]), block)])  # its 4th is zero
    u = jax.tree.map(lambda x: x[0], vectors(rng, params, 1))
    q = np.linalg.qr(dense(block)[[0, 1, 2, 4]].T)[0]
    for strength in (0.4, 1.0):
        transform = optax.chain(optax.identity(), protect(strength))
        found, _ = transform.update(u, transform.init(params), params, protected=spanned, other=None)
        expected = flat(u) - strength * q @ (q.T @ flat(u))
        np.testing.assert_allclose(flat(found), expected, atol=2e-5)
    assert np.abs(dense(spanned) @ flat(found)).max() < 2e-5 * np.linalg.norm(flat(u))


def test_a_basis_holds_every_span_and_shares_what_they_share(small: Any):
    _, params = small
    block = vectors(np.random.default_rng(4), params, 5)
    a, b = (jax.tree.map(lambda x, i=i: x[i], block) for i in (slice(0, 3), slice(2, 5)))
    both = basis([a, b])
    assert subspace.size(both) == 6
    rows = dense(both)
    np.testing.assert_allclose(np.sort(np.linalg.norm(rows, axis=1)), [0, 1, 1, 1, 1, 1], atol=1e-4)
    q = np.linalg.qr(dense(block).T)[0]
    np.testing.assert_allclose(rows.T @ rows, q @ q.T, atol=1e-4)


def test_an_update_without_a_basis_is_refused(small: Any):
    update: Callable[..., Any] = protect(1.0).update
    with pytest.raises(TypeError, match="protected"):
        update(small[1], optax.EmptyState())
