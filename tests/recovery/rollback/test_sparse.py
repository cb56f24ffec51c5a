"""Stored edits: bit by bit what was put in, through a file, and smaller where few entries changed."""

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mdrl_jax.parallel.sharding import named
from mdrl_jax.recovery.rollback.sparse import compress, expand


def edit() -> Any:
    """A dense leaf, a sparse one with awkward numbers, one that did not change, one of bfloat16."""
    rng = np.random.default_rng(0)
    sparse = np.where(rng.random((3, 20, 10)) < 0.05, rng.normal(size=(3, 20, 10)), 0.0).astype(np.float32)
    sparse[0, 0, :5] = -0.0, np.nan, np.inf, 1e-45, 7.0
    coarse = jnp.where(jnp.arange(400).reshape(4, 100) % 9 == 0, 0.3, 0.0).astype(jnp.bfloat16)
    return {
        "embedding": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
        "layers": {"up": {"kernel": jnp.asarray(sparse)}, "norm": {"scale": jnp.zeros((2, 40))}},
        "coarse": coarse,
    }


def bits(x: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf).view(f"u{leaf.dtype.itemsize}"), x)


def test_the_round_trip_is_exact():
    x = edit()
    found = expand(compress(x), x)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), found) == jax.tree.map(lambda a: (a.shape, a.dtype), x)
    jax.tree.map(np.testing.assert_array_equal, bits(found), bits(x))
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x)
    jax.tree.map(np.testing.assert_array_equal, bits(expand(compress(x), abstract)), bits(x))


def test_each_leaf_is_stored_the_smaller_way():
    x = edit()
    stored = compress(x)
    assert "embedding" in stored and "layers/up/kernel" not in stored and "layers/norm/scale" not in stored
    assert stored["layers/norm/scale:index"].size == 0
    np.testing.assert_array_equal(stored["coarse:index"], np.arange(0, 400, 9))
    assert stored["layers/up/kernel:index"][0] == 0  # the negative zero
    total = sum(v.nbytes for v in stored.values())
    assert total < 0.4 * sum(leaf.nbytes for leaf in jax.tree.leaves(x))


def test_through_a_file():
    x = {k: v for k, v in edit().items() if k != "coarse"}  # numpy's files know no bfloat16
    buffer = io.BytesIO()
    np.savez(buffer, **compress(x))
    buffer.seek(0)
    with np.load(buffer) as stored:
        jax.tree.map(np.testing.assert_array_equal, bits(expand(stored, x)), bits(x))


def test_shardings_are_those_asked_for(mesh8: Mesh):
    x = jnp.where(jnp.arange(64.0).reshape(8, 8) < 9, 1.0, 0.0)
    placed = {"embedding": jax.device_put(x, named(mesh8, "vocab", "embed"))}
    found = expand(compress(placed), placed)
    np.testing.assert_array_equal(found["embedding"], x)
    assert found["embedding"].sharding == placed["embedding"].sharding


def test_an_edit_of_another_model_is_refused():
    x = edit()
    stored = compress(x)
    with pytest.raises(ValueError, match="has no embedding"):
        expand({k: v for k, v in stored.items() if k != "embedding"}, x)
    wider = {**x, "embedding": jnp.zeros((9, 4))}
    with pytest.raises(ValueError, match=r"embedding is float32\[8, 4\], not float32\[9, 4\]"):
        expand(stored, wider)
    longer = {**x, "coarse": jnp.zeros((5, 100), jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"coarse is bfloat16\[4, 100\], not bfloat16\[5, 100\]"):
        expand(stored, longer)
