"""Tests of vector arithmetic on trees: against numpy on one long vector, and on eight devices against one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdrl_jax import tree
from mdrl_jax.model.transformer import param_shapes
from mdrl_jax.parallel.sharding import param_shardings

pytestmark = pytest.mark.usefixtures("fast_compile")

SHAPES = {
    "embedding": (6, 4),
    "layers": {"gate": {"kernel": (3, 4, 5)}, "norm": {"scale": (3, 4)}},
    "norm": {"scale": (4,)},
}


def random_tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    make = lambda shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return jax.tree.map(make, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def flat(x):
    """All entries of a tree as one float64 vector."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(x)])


A, B = random_tree(0), random_tree(1)


def test_products_and_lengths():
    np.testing.assert_allclose(tree.vdot(A, B), flat(A) @ flat(B), rtol=1e-5)
    np.testing.assert_allclose(tree.norm(A), np.linalg.norm(flat(A)), rtol=1e-6)
    assert tree.vdot(A, B).dtype == tree.norm(A).dtype == jnp.float32
    assert tree.vdot(A, B).shape == ()
    assert float(tree.vdot({}, {})) == 0.0


@pytest.mark.parametrize("alpha", [0.3, jnp.float32(0.3), np.float64(0.3)])
def test_sums(alpha):
    for found, expected in (
        (tree.add(A, B), flat(A) + flat(B)),
        (tree.sub(A, B), flat(A) - flat(B)),
        (tree.scale(alpha, A), 0.3 * flat(A)),
        (tree.axpy(alpha, A, B), 0.3 * flat(A) + flat(B)),
        (tree.zeros_like(A), 0 * flat(A)),
    ):
        assert jax.tree.structure(found) == jax.tree.structure(A)
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
        np.testing.assert_allclose(flat(found), expected, rtol=1e-5, atol=1e-7)


def test_products_of_bfloat16_are_summed_in_float32():
    """The sum of 4096 squares of 1.0078. In bfloat16 it would stop growing at 256, and each square would be rounded."""
    x = {"a": jnp.full(4096, 1.0078125, jnp.bfloat16)}
    assert tree.vdot(x, x).dtype == jnp.float32
    np.testing.assert_allclose(tree.vdot(x, x), 4096 * 1.0078125**2, rtol=1e-6)
    assert tree.scale(jnp.float32(2), x)["a"].dtype == jnp.bfloat16
    assert tree.axpy(jnp.float32(2), x, x)["a"].dtype == jnp.bfloat16


def test_float64_stays_float64():
    with jax.enable_x64(True):
        a, b = random_tree(0, jnp.float64), random_tree(1, jnp.float64)
        np.testing.assert_allclose(tree.vdot(a, b), flat(a) @ flat(b), rtol=1e-14)
        np.testing.assert_allclose(tree.norm(a), np.linalg.norm(flat(a)), rtol=1e-14)
        np.testing.assert_allclose(flat(tree.axpy(0.3, a, b)), 0.3 * flat(a) + flat(b), rtol=1e-14)


def test_a_tensor_is_one_layers_slice():
    found = tree.per_tensor(lambda x, y: jnp.sum(x * y), A, B)
    assert {name: value.shape for name, value in found.items()} == {
        "embedding": (1,),
        "layers/gate/kernel": (3,),
        "layers/norm/scale": (3,),
        "norm/scale": (1,),
    }
    gate = [a["layers"]["gate"]["kernel"] for a in (A, B)]
    np.testing.assert_allclose(
        found["layers/gate/kernel"], [np.vdot(*(g[i] for g in gate)) for i in range(3)], rtol=1e-5
    )
    np.testing.assert_allclose(found["norm/scale"][0], np.vdot(A["norm"]["scale"], B["norm"]["scale"]), rtol=1e-5)
    np.testing.assert_allclose(sum(float(x.sum()) for x in found.values()), tree.vdot(A, B), rtol=1e-5)
    shape = tree.per_tensor(lambda x: jnp.float32(x.ndim), A)  # a slice has no layer axis
    assert {name: float(x[0]) for name, x in shape.items()} == {
        "embedding": 2, "layers/gate/kernel": 2, "layers/norm/scale": 1, "norm/scale": 1,
    }  # fmt: skip


def test_paths_name_dictionaries_lists_and_records():
    leaves, _ = jax.tree_util.tree_flatten_with_path({"a": [1, {"b": 2}]})
    assert [tree.path(keys) for keys, _ in leaves] == ["a/0", "a/1/b"]


def test_sharded_equals_whole_and_gathers_nothing(tiny_models, mesh8):
    tiny = tiny_models["qwen3"]
    a, b = tiny.params, jax.tree.map(jnp.cos, tiny.params)

    def program(a, b):
        products = tree.per_tensor(lambda x, y: jnp.sum(x * y), a, b)
        return tree.vdot(a, b), tree.norm(a), products, tree.axpy(0.3, a, b)

    one = program(a, b)
    np.testing.assert_allclose(one[0], flat(a) @ flat(b), rtol=1e-4)
    shardings = param_shardings(mesh8, param_shapes(tiny.model))
    with jax.set_mesh(mesh8):
        sharded = jax.device_put((a, b), (shardings, shardings))
        compiled = jax.jit(program).lower(*sharded).compile()
        eight = compiled(*sharded)
    for x, y in zip(jax.tree.leaves(jax.device_get(eight)), jax.tree.leaves(jax.device_get(one)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    assert "all-reduce" in compiled.as_text() and "all-gather" not in compiled.as_text()
    for x, y in zip(jax.tree.leaves(eight[3]), jax.tree.leaves(shardings), strict=True):
        assert x.sharding.is_equivalent_to(y, x.ndim)
