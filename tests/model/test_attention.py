"""Attention in blocks and by the TPU's kernel against the library's and softmax written out; what is held at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdrl_jax.model import attention
from mdrl_jax.model.attention import block_sizes, blockwise, causal_attention, choose, padded_length, plain, splash
from mdrl_jax.model.transformer import Decoder
from mdrl_jax.parallel import hlo
from mdrl_jax.rl.logprobs import token_log_probs

pytestmark = pytest.mark.usefixtures("fast_compile")

PADDING = np.array([0, 4, 9, 1])  # on the left
HEAD_DIM = 4

KINDS = {"plain": plain} | {f"block of {n}": functools.partial(blockwise, block=n) for n in (1, 4, 16)}


def inputs(length, heads=4, kv_heads=2, dtype=jnp.float32, seed=0):
    """(q, k, v) and valid [4, length]: the third row is padding alone where length is 9 or less."""
    rng = np.random.default_rng(seed)
    shapes = [(len(PADDING), length, n, HEAD_DIM) for n in (heads, kv_heads, kv_heads)]
    valid_BT = np.arange(length)[None] >= PADDING[:, None]
    return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in shapes), jnp.asarray(valid_BT)


def textbook(valid_BT):
    """Softmax written out; query head i reads key head i // (query heads per key head)."""

    def attend(q, k, v):
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
        scores = jnp.einsum("bqhd,bthd->bhqt", q, k) / HEAD_DIM**0.5
        length = valid_BT.shape[1]
        allowed = jnp.tril(jnp.ones((length, length), bool))[None] & valid_BT[:, None, :]
        # A query of padding may look at nothing; what it then gives is no one's, as long as it is finite.
        weight = jnp.exp(scores) * jnp.where(allowed.any(-1, keepdims=True), allowed, 1.0)[:, None]
        return jnp.einsum("bhqt,bthd->bqhd", weight / weight.sum(-1, keepdims=True), v), None

    return attend


@functools.cache
def orders(kind, real_only=False):
    """(qkv, tangent, valid) -> (value, gradient, Hessian product) of a sum that weighs every output differently."""

    def loss(qkv, valid_BT):
        out = kind(valid_BT)(*qkv)[0]
        weight = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        weight = weight * valid_BT[:, :, None, None] if real_only else weight
        return jnp.sum(weight * out + 0.5 * weight * out * out), out

    def run(qkv, tangent, valid_BT):
        gradient = jax.grad(lambda x: loss(x, valid_BT), has_aux=True)
        (grad, out), (hv, _) = jax.jvp(gradient, (qkv,), (tangent,))
        return out, grad, hv

    return jax.jit(run)


def assert_close(found, truth, relative):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=0, atol=relative * float(jnp.max(jnp.abs(y))))


@pytest.mark.parametrize(
    ("kind", "heads", "kv_heads"),
    [(kind, 4, 2) for kind in KINDS]
    + [(kind, *heads) for kind in ("plain", "block of 4") for heads in ((3, 3), (4, 1))],
)
def test_equals_the_library_to_second_order(kind, heads, kv_heads):
    """With left padding, one row of nothing else, and a length that blocks of 4 do not divide."""
    (qkv, valid_BT), (tangent, _) = inputs(9, heads, kv_heads), inputs(9, heads, kv_heads, seed=1)
    found, truth = (orders(f, real_only=True)(qkv, tangent, valid_BT) for f in (KINDS[kind], causal_attention))
    real = np.asarray(valid_BT)
    assert_close((found[0][real], found[1:]), (truth[0][real], truth[1:]), 1e-5)
    assert bool(jnp.isfinite(found[0]).all())


@pytest.mark.parametrize("kind", KINDS)
def test_equals_softmax_written_out(kind):
    """In float64: softmax is not rounded to float32; and no key of padding or of a later place is looked at."""
    with jax.enable_x64(True):
        (qkv, valid_BT), (tangent, _) = inputs(11, dtype=jnp.float64), inputs(11, dtype=jnp.float64, seed=1)
        found, truth = (orders(f, real_only=True)(qkv, tangent, valid_BT) for f in (KINDS[kind], textbook))
        real = np.asarray(valid_BT)
        assert_close((found[0][real], found[1:]), (truth[0][real], truth[1:]), 1e-12)
        assert bool(jnp.isfinite(found[0]).all())


def sizes_of_arrays(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars)
        for sub in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(sub, "jaxpr", sub)
            if hasattr(inner, "eqns"):
                yield from sizes_of_arrays(inner)


def test_blockwise_never_holds_all_scores():
    """Neither in the backward pass nor in a Hessian product."""
    (qkv, valid_BT), length = inputs(64), 64
    largest = {}
    for name, kind in {"plain": plain, "blockwise": functools.partial(blockwise, block=8)}.items():
        jaxpr = jax.make_jaxpr(orders(kind))(qkv, qkv, valid_BT)
        largest[name] = max(sizes_of_arrays(jaxpr.jaxpr))
    scores = len(PADDING) * 4 * length * length
    assert largest["plain"] >= scores
    assert largest["blockwise"] == scores / 8


def test_blockwise_computes_little_of_what_a_causal_mask_leaves_out():
    """10 blocks in as many parts: of 100 pairs of blocks the 55 that are not wholly masked."""
    qkv, valid_BT = inputs(40)
    pairs = {}
    for name, kind in {"plain": plain, "blockwise": functools.partial(blockwise, block=4)}.items():
        attend = jax.jit(lambda q, k, v, kind=kind: kind(valid_BT)(q, k, v)[0])
        pairs[name] = hlo.matmul_flops(attend.lower(*qkv).compile().as_text())
    assert attention.PARTS == 10 and pairs["blockwise"] / pairs["plain"] == 0.55


def test_bfloat16_keeps_scores_in_float32():
    """As the library does; outputs are bfloat16. No operand is promoted unasked."""
    qkv, valid_BT = inputs(9, dtype=jnp.bfloat16)
    wide = tuple(x.astype(jnp.float32) for x in qkv)
    library = causal_attention(valid_BT)
    exact, theirs = (np.asarray(library(*x)[0], np.float32) for x in (wide, qkv))
    with jax.numpy_dtype_promotion("strict"):
        outs = [kind(valid_BT)(*qkv)[0] for kind in KINDS.values()]
    real = np.asarray(valid_BT)
    for out in outs:
        assert out.dtype == jnp.bfloat16
        wrong = [(np.asarray(x, np.float32) - exact)[real] for x in (out, theirs)]
        error, theirs_error = (np.sqrt(np.mean(x**2)) for x in wrong)
        assert 0 < error < 1.2 * theirs_error


def test_nothing_is_kept():
    """An `Attend` gives what the layer scan stacks up: here nothing."""
    qkv, valid_BT = inputs(9)
    assert [kind(valid_BT)(*qkv)[1] for kind in KINDS.values()] == [None] * len(KINDS)


def test_choose_goes_by_the_bytes_of_one_layers_scores():
    scores = 4 * 8 * 2 * 128 * 128  # float32, 8 rows, 2 heads, 128 by 128
    assert choose(8, 2, 128, scores) is plain
    assert choose(8, 2, 128, scores - 1) is blockwise
    assert choose(8, 2, 256, 4 * scores) is plain
    assert choose(8, 2, 256, 2 * scores) is blockwise
    assert choose(16, 2, 128, scores) is blockwise and choose(8, 4, 128, scores) is blockwise
    assert choose(8, 2, 128, scores, causal_attention, splash) is causal_attention
    assert choose(8, 2, 128, scores - 1, causal_attention, splash) is splash


INTERPRETED = functools.partial(splash, interpret=True)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that a length of 300 has several of, in both passes."""
    monkeypatch.setattr(attention, "SPLASH_BLOCK", 128)
    monkeypatch.setattr(attention, "SPLASH_BACKWARD", 256)


def first_order(kind):
    """(qkv, valid) -> (value, gradient) of a sum over real tokens that weighs every output differently."""

    def loss(qkv, valid_BT):
        out = kind(valid_BT)(*qkv)[0]
        weight = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape) * valid_BT[:, :, None, None]
        return jnp.sum(weight * out + 0.5 * weight * out * out), jnp.where(valid_BT[:, :, None, None], out, 0.0)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(9, 4, 2), (300, 4, 2), (256, 3, 3)])
def test_the_kernel_equals_plain_attention(small_blocks, length, heads, kv_heads):
    """Values and gradients, with padding on both sides, at lengths that are no whole blocks."""
    qkv, valid_BT = inputs(length, heads, kv_heads)
    valid_BT = valid_BT.at[1, -3:].set(False)
    assert_close(*(first_order(f)(qkv, valid_BT) for f in (INTERPRETED, plain)), 1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "kernel"])
def test_the_last_queries_alone_get_what_they_get_among_all(small_blocks, kind):
    """Values, and gradients in the queries, keys and values."""
    length, last = (300, 140) if kind == "kernel" else (11, 5)
    qkv, valid_BT = inputs(length)
    attention = {**KINDS, "kernel": INTERPRETED}[kind]

    def weighted(out):
        out = jnp.where(valid_BT[:, -last:, None, None], out, 0.0)
        return jnp.sum(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape) * out), out

    def alone(q, k, v):
        return weighted(attention(valid_BT)(q[:, -last:], k, v)[0])

    def among_all(q, k, v):
        return weighted(plain(valid_BT)(q, k, v)[0][:, -last:])

    found, truth = (jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(*qkv) for f in (alone, among_all))
    assert_close(found, truth, 1e-5)


def test_each_device_runs_the_kernel_on_its_rows_and_heads(small_blocks, mesh8):
    qkv, valid_BT = inputs(140)
    truth = first_order(plain)(qkv, valid_BT)
    with jax.set_mesh(mesh8):
        found = first_order(INTERPRETED)
        assert_close(found(qkv, valid_BT), truth, 1e-5)
        text = found.lower(qkv, valid_BT).as_text()
    rows, kernel_heads, kernel_length = len(PADDING) // 4, 4 // 2, 256
    assert f"tensor<{rows}x{kernel_heads}x{kernel_length}x{HEAD_DIM}xf32>" in text


def test_a_decoder_may_take_the_kernel(small_blocks, tiny):
    """Log-probs, their gradient under "full" rematerialisation, and what a prefill keeps."""
    rng = np.random.default_rng(0)
    tokens_BT = jnp.asarray(rng.integers(0, tiny.config.vocab_size, (4, 11)), jnp.int32)
    valid_BT = jnp.arange(11)[None] >= jnp.asarray([0, 4, 9, 1])[:, None]

    def both(model, params):
        def loss(params):
            logp_BT = token_log_probs(model, params, tokens_BT, valid_BT, start=10)
            return jnp.sum(jnp.cos(jnp.arange(4.0))[:, None] * logp_BT), logp_BT

        hidden, prefix = model.apply({"params": params}, tokens_BT, valid_BT, method="prefill")
        kept = [jnp.where(valid_BT[None, :, :, None, None], x, 0.0) for x in (prefix.k_LPTKh, prefix.v_LPTKh)]
        return jax.grad(loss, has_aux=True)(params), hidden, kept

    models = Decoder(tiny.config, remat="full", attention=INTERPRETED), Decoder(tiny.config)
    assert_close(*(jax.jit(functools.partial(both, model))(tiny.params) for model in models), 1e-5)


def names_of_kernels(jaxpr):
    """Of those whose results are used."""
    for equation in jaxpr.eqns:
        if not equation.outvars:
            continue
        if equation.primitive.name == "pallas_call":
            yield str(equation.params["name"])
        for sub in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(sub, "jaxpr", sub)
            if hasattr(inner, "eqns"):
                yield from names_of_kernels(inner)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_a_backward_pass_does_not_run_the_forward_kernel_again(tiny_models, remat):
    """Its output and log-sum-exp are kept, although "full" keeps nothing else of a layer."""
    tiny = tiny_models["qwen3"]
    model = Decoder(tiny.config, remat=remat, attention=INTERPRETED)
    tokens_BT = jnp.zeros((2, 8), jnp.int32)
    apply = functools.partial(model.apply, tokens_BT=tokens_BT, valid_BT=tokens_BT == 0)
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(apply({"params": p}))))(tiny.params)
    found = list(names_of_kernels(jaxpr.jaxpr))
    assert sorted("dkv" in name for name in found) == [False, True], found


def test_blocks_divide_the_padded_length():
    for length in (1, 128, 129, 500, 513, 1100, 10240):
        padded = padded_length(length)
        sizes = block_sizes(padded, padded)
        assert padded - length < 1024 and padded % sizes.block_q == padded % sizes.block_kv_dkv == 0
    assert padded_length(10240) == 10240
