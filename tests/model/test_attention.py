"""Attention for curvature against the library's and against softmax written out; what it holds at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdrl_jax.model.attention import blockwise, choose, plain
from mdrl_jax.model.transformer import causal_attention

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
    library = functools.partial(causal_attention, keep=False)
    (qkv, valid_BT), (tangent, _) = inputs(9, heads, kv_heads), inputs(9, heads, kv_heads, seed=1)
    assert_close(*(orders(f)(qkv, tangent, valid_BT) for f in (KINDS[kind], library)), 1e-5)


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


def test_bfloat16_keeps_scores_in_float32():
    """As the library does; outputs are bfloat16. No operand is promoted unasked."""
    qkv, valid_BT = inputs(9, dtype=jnp.bfloat16)
    wide = tuple(x.astype(jnp.float32) for x in qkv)
    library = causal_attention(valid_BT, keep=False)
    exact, theirs = (np.asarray(library(*x)[0], np.float32) for x in (wide, qkv))
    with jax.numpy_dtype_promotion("strict"):
        outs = [kind(valid_BT)(*qkv)[0] for kind in KINDS.values()]
    for out in outs:
        assert out.dtype == jnp.bfloat16
        error, theirs_error = (np.sqrt(np.mean((np.asarray(x, np.float32) - exact) ** 2)) for x in (out, theirs))
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
