"""Sets of coordinates against sorts in numpy: sizes to the coordinate, ties, more than one limb, eight devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mdrl_jax.parallel import counting, hlo
from mdrl_jax.parallel.programs import compilations
from mdrl_jax.parallel.sharding import named
from mdrl_jax.recovery.rollback import selection
from mdrl_jax.recovery.rollback.selection import complement, largest, random_set, size, support, top

pytestmark = pytest.mark.usefixtures("fast_compile")

SHAPES = {"embedding": (8, 4), "layers": {"gate": {"kernel": (3, 4, 8)}, "norm": {"scale": (3, 4)}}, "scale": (4,)}
AXES = {
    "embedding": ("vocab", "embed"),
    "layers": {"gate": {"kernel": (None, "embed", "mlp")}, "norm": {"scale": (None, "embed")}},
    "scale": ("embed",),
}
N = 32 + 96 + 12 + 4


def is_tuple(x: Any) -> bool:
    return isinstance(x, tuple)


def flat(x: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(x)])


def to_tree(x: np.ndarray, mesh: Mesh | None = None) -> Any:
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=is_tuple)
    parts = np.split(x, np.cumsum([np.prod(s) for s in leaves])[:-1])
    arrays = structure.unflatten([p.reshape(s) for p, s in zip(parts, leaves, strict=True)])
    if mesh is None:
        return jax.tree.map(jnp.asarray, arrays)
    return jax.tree.map(lambda a, p: jax.device_put(p, named(mesh, *a)), AXES, arrays, is_leaf=is_tuple)


def numbers(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=N).astype(np.float32)


# --- the largest ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 2, 17, 60, N])
def test_the_largest_are_those_of_a_sort_and_only_positive_ones(k: int):
    x = numbers()
    x[3], x[100] = 1e-30, 1e30
    expected = np.zeros(N, bool)
    expected[np.argsort(-x)[:k]] = True
    expected &= x > 0
    found = largest(to_tree(x), k)
    np.testing.assert_array_equal(flat(found), expected)
    assert size(found) == min(k, (x > 0).sum())
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(bool)}


def test_neighbouring_floats_are_told_apart_and_what_is_no_number_is_never_chosen():
    order = np.random.default_rng(0).permutation(N)
    x = (1 + order * 2.0**-23).astype(np.float32)
    for k in range(1, 12):
        np.testing.assert_array_equal(flat(largest(to_tree(x), k)), order >= N - k)
    x[5], x[6], x[7] = np.nan, np.inf, -np.inf
    found = flat(largest(to_tree(x), N))
    assert found[6] and not found[5] and not found[7] and found.sum() == N - 2


def test_within_a_mask():
    x, inside = abs(numbers()), np.random.default_rng(1).random(N) < 0.4
    expected = np.zeros(N, bool)
    expected[np.argsort(-x * inside)[:9]] = True
    np.testing.assert_array_equal(flat(largest(to_tree(x), 9, to_tree(inside))), expected)
    np.testing.assert_array_equal(flat(largest(to_tree(x), N, to_tree(inside))), inside)


@pytest.mark.parametrize("share", [1e-4, 0.003, 0.01, 0.1, 0.5, 1.0])
def test_a_share_is_exact_to_the_coordinate(share: float):
    x, inside = abs(numbers()), np.random.default_rng(1).random(N) < 0.4
    assert size(top(to_tree(x), share)) == max(1, round(share * N))
    found = top(to_tree(x), share, to_tree(inside))
    assert size(found) == max(1, round(share * inside.sum()))
    assert not (flat(found) & ~inside).any()


@pytest.mark.parametrize("share", [0.0, -0.1, 1.001, float("nan")])
def test_what_is_no_share_is_refused(share: float):
    with pytest.raises(ValueError, match=f"the share of coordinates must be above 0 and at most 1, not {share}"):
        top(to_tree(numbers()), share)


def test_a_sweep_compiles_once():
    x = to_tree(abs(numbers()))
    top(x, 0.5)
    before = compilations["rollback_largest"]
    for share in (0.01, 0.02, 0.3):
        top(x, share)
    assert compilations["rollback_largest"] == before


# --- ties -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, 20, 21, 50, 99])
def test_ties_at_the_threshold_are_broken_to_the_coordinate(k: int):
    x = np.ones(N, np.float32)
    high, low = np.random.default_rng(2).permutation(N)[:20], np.random.default_rng(3).permutation(N)[:8]
    x[high] = 2.0
    x[low] = 0.0
    found = flat(largest(to_tree(x), k))
    assert found.sum() == k
    assert (found[x == 2].all() if k >= (x == 2).sum() else not found[x < 2].any()) and not found[x == 0].any()
    more = flat(largest(to_tree(x), k + 1))
    assert (more >= found).all()  # the order does not depend on how many are taken


def big_tree(x: np.ndarray) -> Any:
    """Stacked and unstacked tensors of 20,000 and 40,000 entries."""
    return {"embedding": x[:40_000].reshape(200, 200), "layers": {"up": {"kernel": x[40_000:].reshape(3, 100, 200)}}}


@pytest.mark.parametrize("k", [1, 32_767, 32_768, 50_000, 65_536, 99_999, 100_000])
def test_more_coordinates_than_one_limb_holds(k: int):
    x = np.random.default_rng(4).permutation(100_000).astype(np.float32) + 1
    np.testing.assert_array_equal(flat(largest(big_tree(x), k)), flat(big_tree(x > 100_000 - k)))
    tied = largest(big_tree(np.minimum(x, 60_000)), k)
    assert size(tied) == k


def test_ties_favour_no_tensor_and_no_place():
    chosen = largest(big_tree(np.ones(100_000, np.float32)), 30_000)
    up = np.asarray(chosen["layers"]["up"]["kernel"])
    parts = [np.asarray(chosen["embedding"]), *up, up[:, :50], up[:, :, 100:], up[:, :, ::2]]
    for part in parts:
        spread = np.sqrt(0.3 * 0.7 / part.size)
        assert abs(part.mean() - 0.3) < 4 * spread
    overlap = (up[0] & up[1]).mean()
    assert abs(overlap - 0.09) < 4 * np.sqrt(0.09 / up[0].size)


# --- random sets ------------------------------------------------------------------------------------------------------


def test_random_sets_have_their_size_and_are_uniform():
    inside = np.random.default_rng(6).random(N) < 0.5
    within, runs, k = to_tree(inside), 200, 20
    drawn = np.stack([flat(random_set(seed, k, within)) for seed in range(runs)])
    assert (drawn.sum(axis=1) == k).all() and not drawn[:, ~inside].any()
    p = k / inside.sum()
    z = (drawn.mean(axis=0)[inside] - p) / np.sqrt(p * (1 - p) / runs)
    assert abs(z).max() < 4.5 and 0.6 < np.mean(z**2) < 1.5
    assert len({row.tobytes() for row in drawn}) == runs
    pairs = (drawn[:, inside].astype(float).T @ drawn[:, inside] / runs)[np.triu_indices(inside.sum(), 1)]
    assert np.mean(pairs) == pytest.approx(p * (k - 1) / (inside.sum() - 1))
    assert pairs.max() < p**2 + 6 * np.sqrt(p**2 / runs)


def test_random_sets_are_the_whole_support_or_refused_where_it_is_short():
    inside = np.random.default_rng(6).random(N) < 0.5
    np.testing.assert_array_equal(flat(random_set(0, int(inside.sum()), to_tree(inside))), inside)
    with pytest.raises(ValueError, match=f"cannot draw {N} coordinates: `within` has only {inside.sum()}"):
        random_set(0, N, to_tree(inside))
    with pytest.raises(ValueError, match="-1 coordinates"):
        random_set(0, -1, to_tree(inside))


def test_support_and_complement():
    x, inside = numbers(), np.random.default_rng(7).random(N) < 0.5
    x[::3] = 0
    np.testing.assert_array_equal(flat(support(to_tree(x))), x != 0)
    np.testing.assert_array_equal(flat(support(to_tree(x), to_tree(inside))), (x != 0) & inside)
    np.testing.assert_array_equal(flat(complement(to_tree(inside))), ~inside)


# --- eight devices ----------------------------------------------------------------------------------------------------


def test_eight_devices_choose_what_one_chooses_and_keep_the_shardings(mesh8: Mesh):
    x = np.round(4 * abs(numbers())) / 4  # with ties
    x8, inside = to_tree(x, mesh8), np.random.default_rng(1).random(N) < 0.6
    inside8 = to_tree(inside, mesh8)
    pairs = [
        (largest(to_tree(x), 30), largest(x8, 30)),
        (top(to_tree(x), 0.2, to_tree(inside)), top(x8, 0.2, inside8)),
        (random_set(5, 30, to_tree(inside)), random_set(5, 30, inside8)),
    ]
    for one, eight in pairs:
        np.testing.assert_array_equal(flat(one), flat(eight))
        same = jax.tree.map(lambda m, x: m.sharding.is_equivalent_to(x.sharding, x.ndim), eight, x8)
        assert all(jax.tree.leaves(same)), same
    assert size(inside8) == inside.sum()


def test_only_counts_travel_between_devices(mesh8: Mesh):
    x8, inside8 = to_tree(abs(numbers()), mesh8), to_tree(numbers() > 0, mesh8)
    count = counting.split(30)
    texts = [
        selection.largest_program.lower(x8, count, None).compile().as_text(),
        selection.largest_program.lower(x8, count, inside8).compile().as_text(),
        selection._random_program.lower(jax.random.key(0), count, inside8).compile().as_text(),
    ]
    for text in texts:
        found = hlo.collectives(text, unknown_trips=31)
        assert {c.kind for c in found} == {"all-reduce"}
        assert sum(c.bytes for c in found if c.times > 1) <= 3 * 64 and max(c.bytes for c in found) <= 64
