"""The decoder in laws: cache against full forward, padding, remat, dtypes, one device against eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mdrl_jax.model import cache
from mdrl_jax.model.packing import Grouped
from mdrl_jax.model.transformer import Decoder, param_shapes
from mdrl_jax.parallel.sharding import named, param_shardings

pytestmark = pytest.mark.usefixtures("fast_compile")

LENGTHS = (6, 2, 1, 4)  # of left-padded prompts
WIDTH = 6
NEW = 5


def prompts(vocab, seed=0):
    """Left-padded random prompts (tokens, valid), [4, 6]."""
    tokens_PT = np.random.default_rng(seed).integers(0, vocab, (len(LENGTHS), WIDTH)).astype(np.int32)
    valid_PT = np.arange(WIDTH)[None] >= WIDTH - np.array(LENGTHS)[:, None]
    return jnp.asarray(tokens_PT), jnp.asarray(valid_PT)


def nll(model, params, tokens_BT, valid_BT):
    """Mean negative log-likelihood of real tokens given the real tokens before them."""
    logits_BTV = model.apply({"params": params}, tokens_BT, valid_BT)[:, :-1]
    logp_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), tokens_BT[:, 1:, None], axis=-1)[:, :, 0]
    mask_BT = (valid_BT[:, 1:] & valid_BT[:, :-1]).astype(jnp.float32)
    return -jnp.sum(logp_BT * mask_BT) / jnp.sum(mask_BT)


def assert_trees_close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def test_rows_that_cannot_share_a_prompt_are_named():
    valid_BT = jnp.ones((4, 6), bool)
    with pytest.raises(ValueError, match="start is 0"):
        Grouped(valid_BT, 0)
    with pytest.raises(ValueError, match="4 rows cannot be divided into groups of 3"):
        Grouped(valid_BT, 3, 3)


@pytest.mark.parametrize(
    ("tiny", "group"), [("llama", 1), ("llama", 3), ("qwen2", 3), ("qwen3", 3), ("mixed", 3)], indirect=["tiny"]
)
def test_cached_decode_equals_full_forward(tiny, group):
    model, variables = tiny.model, {"params": tiny.params}
    tokens_PT, valid_PT = prompts(tiny.config.vocab_size)
    batch = len(LENGTHS) * group
    new_BT = np.random.default_rng(1).integers(0, tiny.config.vocab_size, (batch, NEW)).astype(np.int32)

    @jax.jit
    def cached(tokens_PT, valid_PT, new_BT):
        hidden_PD, prefix = model.apply(variables, tokens_PT, valid_PT, method="prefill")
        cache, start_P = model.apply(variables, batch, NEW, method="empty_cache"), jnp.zeros(len(LENGTHS), jnp.int32)

        def one(cache, step_and_token):
            step, token_B = step_and_token
            hidden_BD, cache = model.apply(variables, token_B, step, start_P, prefix, cache, method="decode")
            return cache, hidden_BD

        _, hidden_TBD = jax.lax.scan(one, cache, (jnp.arange(NEW), new_BT.T))
        first_1BD = jnp.repeat(hidden_PD, group, axis=0)[None]
        hidden_TBD = jnp.concatenate([first_1BD, hidden_TBD])
        return jnp.swapaxes(model.apply(variables, hidden_TBD, method="logits"), 0, 1)

    whole_BT = np.concatenate([np.repeat(tokens_PT, group, axis=0), new_BT], axis=1)
    whole_valid_BT = np.concatenate([np.repeat(valid_PT, group, axis=0), np.ones((batch, NEW), bool)], axis=1)
    full_BTV = jax.jit(model.apply)(variables, whole_BT, whole_valid_BT)[:, WIDTH - 1 :]
    np.testing.assert_allclose(cached(tokens_PT, valid_PT, new_BT), full_BTV, atol=2e-5)


@pytest.mark.parametrize("tiny", ["llama", "mixed"], indirect=True)
def test_a_long_cache_is_read_only_as_far_as_it_is_filled(tiny, monkeypatch):
    """To within an eighth of its length: what lies further back is NaN here, and would spoil whatever reads it."""
    model, variables, length = tiny.model, {"params": tiny.params}, 20
    tokens_PT, valid_PT = prompts(tiny.config.vocab_size)
    _, prefix = jax.jit(lambda t, v: model.apply(variables, t, v, method="prefill"))(tokens_PT, valid_PT)
    token_B, start_P = tokens_PT[:, -1], jnp.zeros(len(LENGTHS), jnp.int32)

    def decode():
        """A new function, so that each one is traced with the `LONG` of its first call."""
        run = lambda step, cache: model.apply(variables, token_B, step, start_P, prefix, cache, method="decode")  # noqa: E731
        return jax.jit(lambda step, cache: run(step, cache)[0])

    whole, in_parts = decode(), decode()
    empty = model.apply(variables, len(LENGTHS), length, method="empty_cache")
    random = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape, x.dtype), empty)
    slot_T = np.arange(length)[:, None, None]
    for step in (0, 1, 2, 4, 5, 9, 12, 17, 18, 19, 20, 33):
        filled = min(step + 1, length)
        expected = whole(jnp.int32(step), jax.tree.map(lambda x, n=filled: jnp.where(slot_T < n, x, 0.0), random))
        with monkeypatch.context() as patch:
            patch.setattr(cache, "LONG", length)
            far = filled + length / cache.PARTS
            found = in_parts(jnp.int32(step), jax.tree.map(lambda x, n=far: jnp.where(slot_T < n, x, jnp.nan), random))
        np.testing.assert_allclose(found, expected, atol=2e-5)  # as cached against full above
    spoilt = whole(jnp.int32(0), jax.tree.map(lambda x: jnp.where(slot_T < 1, x, jnp.nan), random))
    assert np.isnan(spoilt).all()


def test_padding_never_changes_anything(tiny):
    """Neither what stands in the padding nor how much of it there is; and no token sees a later one."""
    model, vocab = tiny.model, tiny.config.vocab_size
    tokens_PT, valid_PT = prompts(vocab)
    other_PT = jnp.where(valid_PT, tokens_PT, (tokens_PT + 7) % vocab)
    logits = jax.jit(lambda t, v: model.apply({"params": tiny.params}, t, v))
    reference_BTV = np.asarray(logits(tokens_PT, valid_PT))
    seen = np.asarray(valid_PT)
    np.testing.assert_array_equal(reference_BTV[seen], np.asarray(logits(other_PT, valid_PT))[seen])
    later_PT = tokens_PT.at[:, -1].set((tokens_PT[:, -1] + 1) % vocab)
    earlier = seen & (np.arange(WIDTH) < WIDTH - 1)
    np.testing.assert_array_equal(reference_BTV[earlier], np.asarray(logits(later_PT, valid_PT))[earlier])
    wider_PT = [jnp.pad(x, ((0, 0), (2, 0))) for x in (other_PT, valid_PT)]
    np.testing.assert_allclose(logits(*wider_PT)[:, 2:][seen], reference_BTV[seen], atol=2e-5)
    alone_1TV = logits(tokens_PT[1:2, -LENGTHS[1] :], jnp.ones((1, LENGTHS[1]), bool))
    np.testing.assert_allclose(reference_BTV[1, -LENGTHS[1] :], alone_1TV[0], atol=2e-5)


def test_padding_never_changes_a_gradient(tiny_models):
    tiny = tiny_models["qwen3"]
    tokens_PT, valid_PT = prompts(tiny.config.vocab_size)
    gradient = jax.jit(jax.value_and_grad(lambda p, t: nll(tiny.model, p, t, valid_PT)))
    other_PT = jnp.where(valid_PT, tokens_PT, (tokens_PT + 7) % tiny.config.vocab_size)
    assert_trees_close(gradient(tiny.params, tokens_PT), gradient(tiny.params, other_PT), rtol=0)


def residuals(config, remat, dtype=jnp.float32, batch=3, length=16):
    """Shapes that the backward pass of `nll` keeps, by element count; parameters are among them."""
    model = Decoder(config, dtype, remat)
    shapes = nn.unbox(param_shapes(model))
    tokens_BT = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    valid_BT = jax.ShapeDtypeStruct((batch, length), bool)
    kept = jax.eval_shape(lambda p, t, v: jax.vjp(lambda q: nll(model, q, t, v), p)[1], shapes, tokens_BT, valid_BT)
    return [leaf.shape for leaf in jax.tree.leaves(kept)]


def test_remat_keeps_less(tiny_models):
    """Of each layer, "full" keeps its input alone, "dots" the projections too, and "none" more than that."""
    config = dataclasses.replace(tiny_models["llama"].config, n_layers=5)
    size = {remat: sum(int(np.prod(s)) for s in residuals(config, remat)) for remat in ("none", "dots", "full")}
    assert size["full"] < size["dots"] < size["none"]
    stacked = [s for s in residuals(config, "full") if s[:2] == (5, 3)]  # [L, B, ...]
    assert stacked == [(5, 3, 16, config.d_model)]
    widths = {s[2:] for s in residuals(config, "dots", batch=4) if s[:2] == (5, 4 * 16)}  # [L, B * T, ...]
    assert {(48,), (32,)} <= widths  # MLP channels, heads
    assert not any(s[-2:] == (16, 16) for s in residuals(config, "dots"))  # attention weights


def test_remat_changes_no_value(tiny_models):
    tiny = tiny_models["qwen3"]
    tokens_PT, valid_PT = prompts(tiny.config.vocab_size)

    def value_and_grad(remat):
        model = Decoder(tiny.config, remat=remat)
        return jax.jit(jax.value_and_grad(lambda p: nll(model, p, tokens_PT, valid_PT)))(tiny.params)

    found = value_and_grad("none")
    assert all(float(jnp.max(jnp.abs(g))) > 1e-4 for g in jax.tree.leaves(found[1]))
    assert_trees_close(value_and_grad("full"), found, rtol=1e-5, atol=1e-6)
    assert_trees_close(value_and_grad("dots"), found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_under_strict_promotion(tiny, dtype, monkeypatch):
    """Master weights, gradients and logits stay float32, and hidden states and caches have the compute dtype."""
    library = jax.nn.dot_product_attention  # promotes bfloat16 itself, in all jax versions so far

    def attention(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return library(*args, **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    model, variables = Decoder(tiny.config, dtype, remat="dots"), {"params": tiny.params}
    tokens_PT, valid_PT = prompts(tiny.config.vocab_size)

    def serve(params):
        hidden_PD, prefix = model.apply({"params": params}, tokens_PT, valid_PT, method="prefill")
        cache = model.apply({"params": params}, len(LENGTHS), NEW, method="empty_cache")
        step, start_P = jnp.int32(0), jnp.zeros(len(LENGTHS), jnp.int32)
        token_B = tokens_PT[:, 0]
        hidden_BD, cache = model.apply({"params": params}, token_B, step, start_P, prefix, cache, method="decode")
        return hidden_PD, jax.tree.leaves(prefix)[:2], hidden_BD, cache  # keys and values

    with jax.numpy_dtype_promotion("strict"):
        served = jax.eval_shape(serve, tiny.params)
        gradient = jax.eval_shape(jax.grad(lambda p: nll(model, p, tokens_PT, valid_PT)), tiny.params)
        hidden = jax.eval_shape(lambda: model.apply(variables, tokens_PT, valid_PT, method="hidden"))
        logits = jax.eval_shape(model.apply, variables, tokens_PT, valid_PT)
    assert {leaf.dtype for leaf in jax.tree.leaves((served, hidden))} == {jnp.dtype(dtype)}
    masters = jax.tree.leaves((gradient, tiny.params, logits))
    assert {leaf.dtype for leaf in masters} == {jnp.dtype(jnp.float32)}


def test_bfloat16_is_near_float32(tiny_models):
    tiny = tiny_models["qwen3"]
    inputs = {"params": tiny.params}, *prompts(tiny.config.vocab_size)
    exact_BTV, rounded_BTV = (jax.jit(Decoder(tiny.config, d).apply)(*inputs) for d in (jnp.float32, jnp.bfloat16))
    error = jnp.sqrt(jnp.mean((rounded_BTV - exact_BTV) ** 2) / jnp.var(exact_BTV))
    assert 1e-4 < error < 0.05


def test_every_product_with_weights_runs_in_the_compute_dtype(tiny):
    model = Decoder(tiny.config, jnp.bfloat16)
    tokens_PT, valid_PT = prompts(tiny.config.vocab_size)
    jaxpr = jax.make_jaxpr(model.apply)({"params": tiny.params}, tokens_PT, valid_PT)

    def products(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield tuple(v.aval.dtype for v in equation.invars)
            for sub in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(sub, "jaxpr", sub)
                if hasattr(inner, "eqns"):
                    yield from products(inner)

    found = list(products(jaxpr.jaxpr))
    assert len(found) >= 9  # seven projections, the unembedding, and attention's own
    assert found.count((jnp.bfloat16, jnp.bfloat16)) >= 8
    assert not [pair for pair in found if pair[0] != pair[1]]


@pytest.mark.parametrize("tied", [True, False])
def test_n_params_is_the_real_count(tiny, tied):
    config = dataclasses.replace(tiny.config, tied=tied)
    shapes = nn.unbox(param_shapes(Decoder(config)))
    assert config.n_params == sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("family", ["qwen2", "mixed"])  # with biases; with every other part
def test_one_device_equals_eight(tiny_models, mesh8, family):
    tiny = tiny_models[family]
    tokens_PT, valid_PT = prompts(tiny.config.vocab_size)
    model = tiny.model

    def both(params, tokens_PT, valid_PT):
        loss = lambda p: nll(model, p, tokens_PT, valid_PT)  # noqa: E731
        return model.apply({"params": params}, tokens_PT, valid_PT), jax.grad(loss)(params)

    one = jax.jit(both)(tiny.params, tokens_PT, valid_PT)
    shardings = param_shardings(mesh8, param_shapes(model))
    with jax.set_mesh(mesh8):
        rows = named(mesh8, "batch", None)
        program = jax.jit(both, out_shardings=(None, shardings))
        params = jax.device_put(tiny.params, shardings)
        eight = program(params, jax.device_put(tokens_PT, rows), jax.device_put(valid_PT, rows))
    assert len(eight[1]["embedding"].sharding.device_set) == 8
    assert eight[1]["layers"]["gate"]["kernel"].addressable_shards[0].data.shape == (tiny.config.n_layers, 16, 24)
    assert_trees_close(jax.device_get(one), jax.device_get(eight), rtol=1e-4, atol=2e-5)
