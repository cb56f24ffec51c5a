"""Thresholds by counting against sorts in numpy: ties, neighbouring floats, counts beyond 31 bits, eight devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mdrl_jax.parallel import counting, hlo
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import named

pytestmark = pytest.mark.usefixtures("fast_compile")

SHAPES = {"embedding": (8, 4), "layers": {"gate": {"kernel": (3, 4, 8)}, "norm": {"scale": (3, 4)}}, "scale": (4,)}
AXES = {
    "embedding": ("vocab", "embed"),
    "layers": {"gate": {"kernel": (None, "embed", "mlp")}, "norm": {"scale": (None, "embed")}},
    "scale": ("embed",),
}
N = 32 + 96 + 12 + 4

highest = program("highest", counting.highest)


def is_tuple(x: Any) -> bool:
    return isinstance(x, tuple)


def flat(x: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(x)])


def to_tree(x: np.ndarray) -> Any:
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=is_tuple)
    parts = np.split(x, np.cumsum([np.prod(s) for s in leaves])[:-1])
    return structure.unflatten([jnp.asarray(p.reshape(s)) for p, s in zip(parts, leaves, strict=True)])


@pytest.mark.parametrize("k", [1, 7, 30, 100])
def test_threshold_is_at_the_kth_largest(k: int):
    size = np.abs(np.random.default_rng(2).normal(size=(10, 10)) * 1e-9).astype(np.float32)
    keys, descending = counting.keys(size), np.sort(size.ravel())[::-1]
    found = jax.jit(counting.threshold)(keys, np.ones((10, 10), bool), counting.split(k))
    np.testing.assert_array_equal(np.asarray(keys) >= found, size >= descending[k - 1])
    assert (size >= descending[k - 1]).sum() == k
    few = jax.jit(counting.threshold)(keys, size > descending[k - 1], counting.split(k))
    assert few == 0  # fewer than k are counted


@pytest.mark.parametrize("k", [0, 1, 2, 17, 60, N, N + 5])
def test_the_highest_are_those_of_a_sort_by_magnitude(k: int):
    x = np.random.default_rng(0).normal(size=N).astype(np.float32)
    x[3], x[100] = 1e-30, -1e30
    expected = np.zeros(N, bool)
    expected[np.argsort(-abs(x))[:k]] = True
    np.testing.assert_array_equal(flat(highest(to_tree(x), counting.split(k))), expected)


def test_neighbouring_floats_are_told_apart_and_ties_are_all_in():
    order = np.random.default_rng(0).permutation(N)
    x = (1 + order * 2.0**-23).astype(np.float32)
    for k in range(1, 12):
        np.testing.assert_array_equal(flat(highest(to_tree(x), counting.split(k))), order >= N - k)
    tied = np.where(order < 10, -2.0, 1.0).astype(np.float32)
    for k, n in ((1, 10), (10, 10), (11, N)):
        assert flat(highest(to_tree(tied), counting.split(k))).sum() == n


def test_one_array_is_a_tree_too_and_so_is_each_layer_of_one():
    x = np.random.default_rng(1).normal(size=(3, 50)).astype(np.float32)
    by_layer = jax.jit(lambda x: jax.lax.map(lambda one: counting.highest(one, counting.split(7)), x))(x)
    at_once = jax.jit(jax.vmap(lambda one: counting.highest(one, counting.split(7))))(x)
    for found in (by_layer, at_once):
        np.testing.assert_array_equal(found, abs(x) >= np.sort(abs(x), axis=1)[:, -7:-6])


def test_counts_beyond_31_bits():
    rng = np.random.default_rng(5)
    for _ in range(50):
        b, a = sorted(int(v) for v in rng.integers(0, 2**40, 2))
        split = [tuple(map(jnp.int32, counting.split(v))) for v in (a, b)]
        high, low = counting.minus(*split)
        assert int(high) * 2**15 + int(low) == a - b and 0 <= int(low) < 2**15
        assert bool(counting.reaches(*split)) and bool(counting.reaches(split[0], split[0]))
        assert bool(counting.reaches(split[1], split[0])) == (a == b)


def test_counts_are_those_of_the_mask_over_more_than_one_limb():
    mask = {"a": np.random.default_rng(3).random(100_000) < 0.7, "layers": {"b": np.ones((3, 40_000), bool)}}
    high, low = jax.jit(counting.count)(mask)
    assert int(high) * 2**15 + int(low) == mask["a"].sum() + 120_000 and 0 <= int(low) < 2**15
    sizes = counting.sizes(mask)
    assert {name: np.asarray(n).tolist() for name, n in sizes.items()} == {
        "a": [mask["a"].sum()],
        "layers/b": [40_000] * 3,
    }


def test_eight_devices_choose_what_one_chooses_and_only_counts_travel(mesh8: Mesh):
    x = np.round(4 * np.random.default_rng(4).normal(size=N).astype(np.float32))  # with ties
    x8 = jax.tree.map(lambda a, p: jax.device_put(p, named(mesh8, *a)), AXES, to_tree(x), is_leaf=is_tuple)
    one, eight = (highest(tree, counting.split(30)) for tree in (to_tree(x), x8))
    np.testing.assert_array_equal(flat(one), flat(eight))
    same = jax.tree.map(lambda m, x: m.sharding.is_equivalent_to(x.sharding, x.ndim), eight, x8)
    assert all(jax.tree.leaves(same)), same
    text = highest.lower(x8, counting.split(30)).compile().as_text()
    found = hlo.collectives(text, unknown_trips=counting.KEY_BITS)
    assert {c.kind for c in found} == {"all-reduce"} and max(c.bytes for c in found) <= 64
