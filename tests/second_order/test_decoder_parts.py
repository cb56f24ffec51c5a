"""The decoder in pieces: against the decoder whole, and slices of its neurons against all of its parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mdrl_jax.model import attention
from mdrl_jax.model.transformer import Decoder, param_shapes
from mdrl_jax.parallel.sharding import named, param_shardings, stacked
from mdrl_jax.rl.logprobs import token_log_probs
from mdrl_jax.second_order import decoder_parts
from tests.conftest import TINY_CONFIGS

pytestmark = pytest.mark.usefixtures("fast_compile")

START, LENGTH, ROWS = 4, 11, 3  # prompts of up to 4 tokens; 7 positions, which neither 2 nor 3 divides
TEMPERATURE = 0.7
# Neuron 0 fills up the places of a layer that takes it, and of one that does not.
INDEX_LR = np.array([[4, 1, 0, 0], [2, 0, 0, 0]], np.int32)
MASK_LR = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], np.float32)


def sequences(vocab, seed=0):
    """Tokens [3, 11] with left-padded prompts and one completion that ends early."""
    tokens_BT = np.random.default_rng(seed).integers(0, vocab, (ROWS, LENGTH)).astype(np.int32)
    valid_BT = np.arange(LENGTH)[None] >= np.array([0, 3, 1])[:, None]
    valid_BT[2, 8:] = False
    return jnp.asarray(tokens_BT), jnp.asarray(valid_BT)


def normal_like(tree, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), tree)


def assert_close(a, b, relative):
    """Each leaf of a tree, within `relative` of its largest entry."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=relative * max(float(np.max(np.abs(y))), 1e-3))


def with_gradient(function):
    """(log-probs, gradient of a sum over them that weighs every token differently)."""

    def both(point, *rest):
        logp_BT, vjp = jax.vjp(lambda p: function(p, *rest), point)
        weight_BT = jnp.cos(jnp.arange(logp_BT.size, dtype=logp_BT.dtype)).reshape(logp_BT.shape)
        return logp_BT, vjp(weight_BT)[0]

    return jax.jit(both)


# "mixed" has the parts of all families.
@pytest.mark.parametrize(
    "tiny", ["mixed", *(pytest.param(family, marks=pytest.mark.slow) for family in TINY_CONFIGS)], indirect=True
)
def test_log_probs_are_those_of_the_decoder(tiny):
    """And their gradient; the decoder attends by the library's function, in float32."""
    data = sequences(tiny.config.vocab_size)
    kwargs = {"start": START, "temperature": TEMPERATURE}
    truth = with_gradient(lambda p, t, v: token_log_probs(tiny.model, p, t, v, **kwargs))(tiny.params, *data)
    in_blocks = functools.partial(attention.blockwise, block=4)
    for remat, chunk, attend in (("none", 0, attention.plain), ("full", 3, in_blocks)):
        pieces = decoder_parts.whole(Decoder(tiny.config, remat=remat), attend)
        log_probs = functools.partial(decoder_parts.log_probs, pieces, chunk=chunk, **kwargs)
        found = with_gradient(lambda p, t, v, f=log_probs: f(p, (), t, v))(tiny.params, *data)
        assert found[0].dtype == jnp.float32 and found[0].shape == (ROWS, LENGTH - START)
        assert_close(found, truth, 2e-5)


@pytest.mark.parametrize("chunk", [2, 3, 7])
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_remat_and_chunks_change_no_value(tiny_models, remat, chunk):
    tiny = tiny_models["llama"]
    data = sequences(tiny.config.vocab_size)
    kwargs = {"start": START, "temperature": TEMPERATURE}
    pieces = decoder_parts.whole(Decoder(tiny.config, remat=remat))
    found = jax.jit(functools.partial(decoder_parts.log_probs, pieces, chunk=chunk, **kwargs))(tiny.params, (), *data)
    assert_close(found, jax.jit(functools.partial(token_log_probs, tiny.model, **kwargs))(tiny.params, *data), 2e-5)


def test_remat_keeps_less(tiny_models):
    tiny = tiny_models["llama"]
    tokens_BT, valid_BT = sequences(tiny.config.vocab_size)

    def kept(remat, attend=attention.plain):
        pieces = decoder_parts.whole(Decoder(tiny.config, remat=remat), attend)
        log_probs = lambda p: decoder_parts.log_probs(  # noqa: E731
            pieces, p, (), tokens_BT, valid_BT, start=START, temperature=TEMPERATURE, chunk=2
        )
        residuals = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(log_probs, p)[1], tiny.params))
        assert not [x.shape for x in residuals if x.shape[-1:] == (96,) and ROWS in x.shape]  # logits
        return a_token(residuals, tiny.config.n_layers)

    assert kept("full") == [32]  # the input of each layer
    blocks = functools.partial(attention.blockwise, block=4)
    assert kept("full", blocks) == [32, 32]  # and what attention gives
    assert set(kept("dots")) == {32, 48, 16}  # and the projections: q, gate and up, k and v
    assert {2 * 2 * LENGTH} < set(kept("none")) - set(kept("dots"))  # attention weights


def a_token(residuals, layers):
    """Numbers a token of what is kept of every layer."""
    rows = {ROWS, ROWS * LENGTH}  # products with weights are of [B * T, ...]
    stacked = [x for x in residuals if len(x.shape) > 1 and x.shape[0] == layers and x.shape[1] in rows]
    return sorted(x.size // (layers * ROWS * LENGTH) for x in stacked)


def test_of_a_layer_with_a_narrow_slice_input_and_middle_are_kept(tiny_models):
    """However it attends; what attention gives is wider here."""
    tiny = tiny_models["llama"]
    model = Decoder(dataclasses.replace(tiny.config, head_dim=24), remat="full")
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), nn.unbox(param_shapes(model)))
    point, fixed = (
        decoder_parts.route_slice(params, INDEX_LR, MASK_LR),
        decoder_parts.route_fixed(params, INDEX_LR, MASK_LR),
    )
    for attend in (attention.plain, functools.partial(attention.blockwise, block=4)):
        log_probs = functools.partial(
            decoder_parts.log_probs, decoder_parts.on_route(model, attend), start=START, temperature=1.0
        )
        pull = lambda p, f=log_probs: jax.vjp(lambda p: f(p, fixed, *sequences(96)), p)[1]  # noqa: E731
        residuals = jax.tree.leaves(jax.eval_shape(pull, point))
        assert a_token(residuals, tiny.config.n_layers) == [32, 32]


@pytest.fixture
def route(decoder64):
    """A decoder, its parameters, a route of it (slice, what stays fixed), sequences."""
    model, params = decoder64("mixed")  # with biases, a tied readout, and layers that differ
    point = decoder_parts.route_slice(params, INDEX_LR, MASK_LR)
    fixed = decoder_parts.route_fixed(params, INDEX_LR, MASK_LR)
    return model, params, point, fixed, sequences(model.config.vocab_size)


@functools.cache
def derivatives(kind, model):
    """(point, fixed, tokens, valid, v) -> (log-probs, gradient, Hv) of a sum over tokens."""

    def run(point, fixed, tokens_BT, valid_BT, v):
        log_probs = functools.partial(
            decoder_parts.log_probs, kind(model), start=START, temperature=TEMPERATURE, chunk=3
        )
        gradient = with_gradient(lambda p: log_probs(p, fixed, tokens_BT, valid_BT))
        (logp_BT, grad), (_, hv) = jax.jvp(gradient, (point,), (v,))
        return logp_BT, grad, hv

    return jax.jit(run)


def test_a_route_moves_the_model_as_its_neurons_do(route):
    """log π, gradient and Hessian product away from the parameters that the slice was taken at."""
    model, params, point, fixed, data = route
    take, lift = (
        functools.partial(f, index_LR=INDEX_LR, mask_LR=MASK_LR)
        for f in (decoder_parts.route_slice, decoder_parts.lift)
    )
    mask = take(jax.tree.map(jnp.ones_like, params))
    step, v = (jax.tree.map(jnp.multiply, mask, normal_like(point, seed, 0.3)) for seed in (1, 2))
    moved = jax.tree.map(jnp.add, point, step)
    found = derivatives(decoder_parts.on_route, model)(moved, fixed, *data, v)
    whole = derivatives(decoder_parts.whole, model)
    truth = whole(jax.tree.map(jnp.add, params, lift(step, like=params)), (), *data, lift(v, like=params))
    assert_close(found[0], truth[0], 1e-11)
    assert_close(found[1:], tuple(map(take, truth[1:])), 1e-11)
    assert all(float(jnp.max(jnp.abs(x))) > 1e-3 for x in jax.tree.leaves(found))
    still = whole(params, (), *data, lift(v, like=params))
    assert float(jnp.max(jnp.abs(truth[0] - still[0]))) > 1e-3
    assert_close(derivatives(decoder_parts.on_route, model)(point, fixed, *data, v)[0], still[0], 1e-11)


def test_one_device_equals_eight_to_second_order(tiny_models, mesh8):
    """With as little kept as can be, split over all devices; two vectors at once."""
    tiny = tiny_models["llama"]
    model = Decoder(tiny.config, remat="full")
    tokens_BT, valid_BT = (jnp.tile(x, (2, 1))[:4] for x in sequences(tiny.config.vocab_size))
    in_blocks = functools.partial(attention.blockwise, block=4)

    def products(params, directions, tokens_BT, valid_BT):
        point, fixed = (
            decoder_parts.route_slice(params, INDEX_LR, MASK_LR),
            decoder_parts.route_fixed(params, INDEX_LR, MASK_LR),
        )
        take = lambda v: decoder_parts.route_slice(v, INDEX_LR, MASK_LR)  # noqa: E731
        kind = functools.partial(decoder_parts.on_route, attend=in_blocks)
        one = lambda v: derivatives(kind, model)(point, fixed, tokens_BT, valid_BT, take(v))  # noqa: E731
        return jax.vmap(one)(directions)

    directions = jax.tree.map(lambda *x: jnp.stack(x), *(normal_like(tiny.params, seed) for seed in (1, 2)))
    one = jax.jit(products)(tiny.params, directions, tokens_BT, valid_BT)
    shardings, rows = param_shardings(mesh8, param_shapes(model)), named(mesh8, "batch", None)
    with jax.set_mesh(mesh8):
        given = jax.device_put((tiny.params, directions), (shardings, jax.tree.map(stacked, shardings)))
        eight = jax.jit(products)(*given, *jax.device_put((tokens_BT, valid_BT), (rows, rows)))
    assert_close(jax.device_get(eight), jax.device_get(one), 1e-4)


def test_padded_places_have_no_derivatives(route):
    """Exactly: what a direction holds there changes no product, and nothing comes out there."""
    model, params, point, fixed, data = route
    run = derivatives(decoder_parts.on_route, model)
    padded = jax.tree.map(
        lambda x: x == 0, decoder_parts.route_slice(jax.tree.map(jnp.ones_like, params), INDEX_LR, MASK_LR)
    )
    assert [int(x.sum()) for x in jax.tree.leaves(padded)] == [16, 16, 16]  # four places of four numbers
    anything = normal_like(point, 3)
    nothing = jax.tree.map(lambda x, p: jnp.where(p, 0.0, x), anything, padded)
    with_padding, without = (run(point, fixed, *data, v) for v in (anything, nothing))
    for tree in with_padding[1:]:
        assert all(bool(jnp.all(x[p] == 0)) for x, p in zip(tree.values(), padded.values(), strict=True))
    for x, y in zip(jax.tree.leaves(with_padding), jax.tree.leaves(without), strict=True):
        np.testing.assert_array_equal(x, y)


def test_lift_is_the_adjoint_of_route_slice(route):
    """⟨lift(z), x⟩ = ⟨z, slice(x)⟩ for every z, whatever it holds in padded places."""
    _, params, point, _, _ = route
    x, z = normal_like(params, 5), normal_like(point, 6)
    dot = lambda a, b: sum(float(jnp.vdot(i, j)) for i, j in zip(*map(jax.tree.leaves, (a, b)), strict=True))  # noqa: E731
    lifted = decoder_parts.lift(z, INDEX_LR, MASK_LR, params)
    assert dot(lifted, x) == pytest.approx(dot(z, decoder_parts.route_slice(x, INDEX_LR, MASK_LR)), rel=1e-12)
    changed = {jax.tree_util.keystr(k) for k, leaf in jax.tree_util.tree_leaves_with_path(lifted) if jnp.any(leaf != 0)}
    assert changed == {f"['layers']['{name}']['kernel']" for name in ("gate", "up", "down")}
    again = decoder_parts.route_slice(lifted, INDEX_LR, MASK_LR)
    assert_close(
        again, decoder_parts.route_slice(decoder_parts.lift(again, INDEX_LR, MASK_LR, params), INDEX_LR, MASK_LR), 0
    )


def test_a_route_keeps_what_it_does_not_take(route):
    _, params, _, fixed, _ = route
    expected_LF = [[0, 0, 1, 1, 0, 1], [1, 1, 0, 1, 1, 1]]
    np.testing.assert_array_equal(fixed["keep_LF"], expected_LF)
    assert fixed["params"] is params
