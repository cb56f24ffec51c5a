"""(logp, u, w) against dense Hessians in float64, for every token; in chunks, on eight devices, in bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from mdrl_jax import tree
from mdrl_jax.model import attention
from mdrl_jax.model.transformer import Decoder, param_shapes
from mdrl_jax.parallel.sharding import named, param_shardings
from mdrl_jax.rl.logprobs import token_log_probs
from mdrl_jax.second_order import decoder_parts
from mdrl_jax.second_order.jets import jets, push

pytestmark = pytest.mark.usefixtures("fast_compile")

KWARGS = {"start": 3, "temperature": 0.7}
INDEX_LR = np.array([[4, 1, 0, 0], [2, 0, 0, 0]], np.int32)
MASK_LR = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], np.float32)


def sequences(vocab, rows=2, length=7):
    """Tokens [rows, length]: left-padded prompts of up to 3 tokens, and one completion that ends early."""
    tokens_BT = np.random.default_rng(0).integers(0, vocab, (rows, length)).astype(np.int32)
    valid_BT = np.arange(length)[None] >= (np.arange(rows) % 3)[:, None]
    valid_BT[1, 5:] = False
    return jnp.asarray(tokens_BT), jnp.asarray(valid_BT)


def normal_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


@functools.cache
def run(pieces_of, model, **kwargs):
    return jax.jit(functools.partial(jets, pieces_of(model), **(KWARGS | kwargs)))


def assert_close(found, truth, relative):
    """Each of (logp, u, w), within `relative` of its largest entry."""
    for x, y in zip(found, truth, strict=True):
        assert float(jnp.max(jnp.abs(y))) > 1e-2
        np.testing.assert_allclose(x, y, rtol=0, atol=relative * float(jnp.max(jnp.abs(y))))


def dense(log_probs, x):
    """Log-probs [B, T], their Jacobian [B, T, N] and Hessian [B, T, N, N] at x [N]."""
    jacobian = jax.jacrev(lambda x: (log_probs(x),) * 2, has_aux=True)

    def first(x):
        slope, value = jacobian(x)
        return slope, (value, slope)

    hessian, (value, slope) = jax.jacfwd(first, has_aux=True)(x)
    return value, slope, hessian


def along(oracle, direction):
    """The oracle's (logp, u, w) along a vector."""
    logp_BT, jacobian, hessian = oracle
    return logp_BT, jacobian @ direction, jnp.einsum("btij,i,j->bt", hessian, direction, direction)


def test_every_token_against_the_dense_hessian(decoder64):
    """Of all parameters; along a route's slice too, whose neurons are some of their coordinates."""
    model, params = decoder64("qwen3")
    data = sequences(model.config.vocab_size)
    flat, unravel = ravel_pytree(params)
    log_probs = lambda x, *data: token_log_probs(model, unravel(x), *data, **KWARGS)  # noqa: E731
    oracle = jax.jit(lambda x, *data: dense(lambda x: log_probs(x, *data), x))(flat, *data)
    assert oracle[2].shape == (2, 4, model.config.n_params, model.config.n_params)
    whole, narrow = run(decoder_parts.whole, model), run(decoder_parts.on_route, model)
    for seed in range(3):
        v = normal_like(params, seed)
        assert_close(whole(params, (), v, *data), along(oracle, ravel_pytree(v)[0]), 1e-11)

    point = decoder_parts.route_slice(params, INDEX_LR, MASK_LR)
    fixed = decoder_parts.route_fixed(params, INDEX_LR, MASK_LR)
    for seed in range(3):
        v = normal_like(point, seed)  # not zero in padded places: that reaches nothing
        found = narrow(point, fixed, v, *data)
        lifted = decoder_parts.lift(v, INDEX_LR, MASK_LR, params)
        assert_close(found, along(oracle, ravel_pytree(lifted)[0]), 1e-11)
        assert_close(found, whole(params, (), lifted, *data), 1e-11)


# "mixed" has biases and a tied embedding, too.
@pytest.mark.parametrize("family", ["mixed", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_other_families_in_a_subspace(decoder64, family):
    """The Hessian in the span of three directions, by forward mode around the whole model."""
    model, params = decoder64(family)
    directions = [normal_like(params, seed) for seed in range(3)]
    data = sequences(model.config.vocab_size)

    def combined(weights, *trees):
        return jax.tree.map(lambda *leaves: sum(w * x for w, x in zip(weights, leaves, strict=True)), *trees)

    def oracle(params, directions, *data):
        moved = lambda c: combined((1.0, *c), params, *directions)  # noqa: E731
        log_probs = lambda c: token_log_probs(model, moved(c), *data, **KWARGS)  # noqa: E731
        return [f(jnp.zeros(3)) for f in (log_probs, jax.jacfwd(log_probs), jax.jacfwd(jax.jacfwd(log_probs)))]

    truth = jax.jit(oracle)(params, directions, *data)
    for weights in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.3, -1.0, 2.0]):
        v = combined(weights, *directions)
        assert_close(run(decoder_parts.whole, model)(params, (), v, *data), along(truth, jnp.array(weights)), 1e-11)


def test_push_follows_a_curved_path():
    """(y, y₁, y₂) of f(x + εx₁ + ½ε²x₂, p + εv), by derivatives written out."""
    with jax.enable_x64(True):
        x, x1, x2, p, v = (jnp.asarray(a) for a in np.random.default_rng(0).normal(size=(5, 4)))
        y, y1, y2 = push(lambda x, p: jnp.sin(x) * p**2, (x, x1, x2), p, v)
        np.testing.assert_allclose(y, jnp.sin(x) * p**2, rtol=1e-12)
        np.testing.assert_allclose(y1, jnp.cos(x) * x1 * p**2 + jnp.sin(x) * 2 * p * v, rtol=1e-12)
        curved = (jnp.cos(x) * x2 - jnp.sin(x) * x1**2) * p**2
        np.testing.assert_allclose(y2, curved + 4 * jnp.cos(x) * x1 * p * v + jnp.sin(x) * 2 * v**2, rtol=1e-12)


def test_chunks_and_blocks_change_nothing(decoder64):
    """Neither of positions at the head (4 of them, 3 at a time) nor of queries in attention."""
    model, params = decoder64("mixed")
    inputs = params, (), normal_like(params, 1), *sequences(model.config.vocab_size)
    in_blocks = functools.partial(decoder_parts.whole, attend=functools.partial(attention.blockwise, block=2))
    assert_close(run(in_blocks, model, chunk=3)(*inputs), run(decoder_parts.whole, model)(*inputs), 1e-13)


def test_rows_that_share_their_prompt_change_nothing(decoder64):
    """Jets and gradients, of all parameters and of a route's slice; windows are those of unpacked rows.

    A gradient along a direction is what the jets of unpacked rows give.
    """
    model, params = decoder64("mixed")
    tokens_BT, valid_BT = (jnp.repeat(x, 3, axis=0) for x in sequences(model.config.vocab_size))
    start = KWARGS["start"]
    own_BT = jnp.asarray(np.random.default_rng(3).integers(0, 5, tokens_BT[:, start:].shape), tokens_BT.dtype)
    data = tokens_BT.at[:, start:].set(own_BT), valid_BT.at[:, start:].set(True)
    fixed = decoder_parts.route_fixed(params, INDEX_LR, MASK_LR)
    places = {
        decoder_parts.whole: (params, ()),
        decoder_parts.on_route: (decoder_parts.route_slice(params, INDEX_LR, MASK_LR), fixed),
    }
    for make, (point, constant) in places.items():
        v = normal_like(point, 1)
        logp_BT, u_BT, w_BT = run(make, model)(point, constant, v, *data)
        assert_close(run(make, model, group=3)(point, constant, v, *data), (logp_BT, u_BT, w_BT), 1e-13)

        log_probs = functools.partial(decoder_parts.log_probs, make(model), group=3, **KWARGS)
        total = lambda p, f=log_probs, fixed=constant: jnp.sum(jnp.cos(f(p, fixed, *data)))  # noqa: E731
        along_v = tree.vdot(jax.jit(jax.grad(total))(point), v)
        terms_BT = -jnp.sin(logp_BT) * u_BT
        np.testing.assert_allclose(along_v, jnp.sum(terms_BT), rtol=0, atol=1e-13 * float(jnp.sum(jnp.abs(terms_BT))))


def test_temperature_divides_the_logits(decoder64):
    model, params = decoder64("llama")
    v, data = normal_like(params, 1), sequences(model.config.vocab_size)
    scaled = lambda tree: tree | {"unembedding": tree["unembedding"] / 0.7}  # noqa: E731
    warm = run(decoder_parts.whole, model)(params, (), v, *data)
    assert_close(run(decoder_parts.whole, model, temperature=1.0)(scaled(params), (), scaled(v), *data), warm, 1e-12)


@pytest.mark.parametrize(("kind", "family"), [("whole", "qwen2"), ("route", "mixed")])
def test_one_device_equals_eight(tiny_models, mesh8, kind, family):
    """With parameters, direction and rows sharded; log-probs, u and w."""
    tiny = tiny_models[family]
    layers = tiny.config.n_layers
    rng = np.random.default_rng(0)
    index_LR = np.stack([rng.permutation(tiny.config.d_mlp)[:6] for _ in range(layers)]).astype(np.int32)
    mask_LR = (np.arange(6)[None] < 6 - np.arange(layers)[:, None]).astype(np.float32)
    v = normal_like(tiny.params, 1)

    def program(params, v, tokens_BT, valid_BT):
        if kind == "whole":
            return jets(decoder_parts.whole(tiny.model), params, (), v, tokens_BT, valid_BT, chunk=3, **KWARGS)
        point, v = (decoder_parts.route_slice(tree, index_LR, mask_LR) for tree in (params, v))
        fixed = decoder_parts.route_fixed(params, index_LR, mask_LR)
        return jets(decoder_parts.on_route(tiny.model), point, fixed, v, tokens_BT, valid_BT, chunk=3, **KWARGS)

    data = sequences(tiny.config.vocab_size, rows=4, length=8)
    one = jax.jit(program)(tiny.params, v, *data)
    shardings = param_shardings(mesh8, param_shapes(tiny.model))
    with jax.set_mesh(mesh8):
        rows = named(mesh8, "batch", None)
        sharded = jax.device_put((tiny.params, v), (shardings, shardings))
        assert len(sharded[0]["layers"]["gate"]["kernel"].sharding.device_set) == 8
        eight = jax.jit(program)(*sharded, *jax.device_put(data, (rows, rows)))
    assert_close(jax.device_get(eight), jax.device_get(one), 1e-4)


def test_bfloat16_is_near_float32(tiny_models):
    """Rounding of activations and their tangents; log-probs and both derivatives come out in float32."""
    tiny = tiny_models["qwen3"]
    inputs = tiny.params, (), normal_like(tiny.params, 1), *sequences(tiny.config.vocab_size)
    exact = run(decoder_parts.whole, tiny.model)(*inputs)
    rounded = run(decoder_parts.whole, Decoder(tiny.config, jnp.bfloat16))(*inputs)
    for x, y in zip(rounded, exact, strict=True):
        assert x.dtype == jnp.float32
        error = float(jnp.sqrt(jnp.mean((x - y) ** 2) / jnp.mean(y**2)))
        assert 1e-5 < error < 0.1
