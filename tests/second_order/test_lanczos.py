"""Block Lanczos against numpy, matfree and its own definition; residuals are computed here, in float64."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from matfree import decomp, eig

from mdrl_jax.errors import UserError
from mdrl_jax.model import attention
from mdrl_jax.parallel import hlo
from mdrl_jax.parallel.programs import compilations, program
from mdrl_jax.parallel.sharding import named, stacked
from mdrl_jax.second_order import blocks, decoder_parts, lanczos, subspace
from mdrl_jax.second_order.objectives import CompletionBatch, Forward, reward_loss

pytestmark = pytest.mark.usefixtures("fast_compile")

N = 48
LIKE = {"a": jax.ShapeDtypeStruct((4, 2, 3), jnp.float32), "b": [jax.ShapeDtypeStruct((24,), jnp.float32)]}


def flat(block: Any) -> np.ndarray:
    """[k, N] in float64."""
    return np.concatenate([np.asarray(x, np.float64).reshape(x.shape[0], -1) for x in jax.tree.leaves(block)], axis=1)


def multiply(matrix: jax.Array, block: Any) -> Any:
    leaves, structure = jax.tree.flatten(block)
    rows = jnp.concatenate([x.reshape(x.shape[0], -1) for x in leaves], axis=1) @ matrix
    parts = jnp.split(rows, np.cumsum([x[0].size for x in leaves])[:-1], axis=1)
    return structure.unflatten(p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True))


multiplied = program("dense operator", multiply)


def operator(matrix: np.ndarray) -> Callable[[Any], Any]:
    return lambda block: multiplied(matrix.astype(np.float32), block)


def symmetric(values: Any, seed: int = 0) -> np.ndarray:
    """A matrix with these eigenvalues, exactly symmetric and exactly what float32 holds."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(N, N)))
    matrix = ((q * np.asarray(values, float)) @ q.T).astype(np.float32).astype(np.float64)
    return (matrix + matrix.T) / 2


def start(b: int, seed: int = 1) -> Any:
    return lanczos.random_block(jax.random.key(seed), LIKE, b)


def check(found: lanczos.Spectrum, matrix: np.ndarray, tolerance: float = 2e-5) -> np.ndarray:
    """That pairs are orthonormal Ritz pairs, and residuals what they say; returns the true residuals."""
    x, size = flat(found.vectors), max(np.abs(np.linalg.eigvalsh(matrix)).max(), 1e-30)
    assert np.abs(x @ x.T - np.eye(len(x))).max() < 1e-5
    assert np.all(np.diff(found.values) <= 0)
    np.testing.assert_allclose(found.values, np.einsum("kn,nm,km->k", x, matrix, x), atol=tolerance * size)
    residuals = np.linalg.norm(x @ matrix - found.values[:, None] * x, axis=1)
    np.testing.assert_allclose(found.residuals, residuals, atol=tolerance * size)
    return residuals / size


TAIL = np.linspace(-1, 1, N - 8)
SPECTRA = {
    "identity": np.ones(N),
    "zero": np.zeros(N),
    "low rank": np.r_[5, 4, 3, np.zeros(N - 3)],
    "low rank, multiple": np.r_[5, 5, 5, 5, 2, np.zeros(N - 5)],
    "indefinite": np.r_[-30, -20, 8, 7, 6, 5, 4, 3, TAIL],
    "multiple": np.r_[9, 9, 9, 9, 4, 4, 4, 4, TAIL],
    "clustered": np.r_[9, 9 - 1e-5, 9 - 2e-5, 9 - 3e-5, 6, 5, 4, 3, TAIL],
    "negative": -np.linspace(1, 10, N),
}


# Of the 40 directions those that a start block of 4 cannot reach: by each eigenvalue it reaches 4, and the rank.
REPLACED = {"identity": 36, "zero": 36, "low rank": 40 - 4 - 3, "low rank, multiple": 40 - 4 - 5}


@pytest.mark.parametrize("name", SPECTRA)
def test_largest_pairs_are_those_of_the_dense_matrix(name: str) -> None:
    matrix = symmetric(SPECTRA[name])
    found = lanczos.block_lanczos(operator(matrix), start(4), 10, 6)
    residuals = check(found, matrix)
    exact = np.linalg.eigvalsh(matrix)[::-1][:6]
    accuracy = 0.3 if name == "negative" else 1e-5  # the end nearest to zero converges last
    np.testing.assert_allclose(found.values, exact, atol=accuracy * np.abs(exact).max())
    assert (residuals < 1e-3).all() or name == "negative"
    assert (found.products, found.steps) == (44, 10)
    assert found.replaced == REPLACED.get(name, 0)
    # Ten block steps that each round by √44 · 2^-24 give 4e-6.
    assert found.scale == pytest.approx(np.abs(SPECTRA[name]).max(), rel=1e-5)
    assert subspace.positive(found.values).sum() == min(np.sum(SPECTRA[name] > 0), 6)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_changes_nothing_else(scale: float) -> None:
    matrix = symmetric(SPECTRA["multiple"])
    one = lanczos.block_lanczos(operator(matrix), start(4), 10, 6)
    other = lanczos.block_lanczos(operator(scale * matrix), start(4), 10, 6)
    np.testing.assert_allclose(other.values / scale, one.values, rtol=1e-5)
    assert check(other, scale * matrix).max() < 1e-5


def test_the_whole_space_gives_the_whole_spectrum() -> None:
    matrix = symmetric(np.random.default_rng(3).normal(size=N))
    found = lanczos.block_lanczos(operator(matrix), start(6), 8, N)
    assert check(found, matrix).max() < 1e-5
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(matrix)[::-1], atol=1e-5)
    projector = np.r_[np.ones(10), np.zeros(N - 10)]  # every step breaks down, up to the last direction
    found = lanczos.block_lanczos(operator(symmetric(projector)), start(6), 8, N)
    assert check(found, symmetric(projector)).max() < 1e-5
    np.testing.assert_allclose(found.values, projector, atol=1e-5)


def test_unconverged_ritz_values_are_those_of_matfree() -> None:
    matrix = symmetric(np.random.default_rng(4).normal(size=N))
    block = start(1)
    found = lanczos.block_lanczos(operator(matrix), block, 9, 9)
    partial = jax.jit(eig.eigh_partial(decomp.tridiag_sym(9)), static_argnums=0)
    values, vectors = partial(lambda v, a: a @ v, flat(block)[0].astype(np.float32), matrix.astype(np.float32))
    np.testing.assert_allclose(found.values, np.asarray(values)[::-1], atol=2e-5)
    overlap = np.abs(flat(found.vectors) @ np.asarray(vectors, np.float64)[::-1].T)
    np.testing.assert_allclose(overlap, np.eye(9), atol=2e-4)
    assert check(found, matrix).max() > 0.05


def test_a_block_finds_all_vectors_of_a_multiple_eigenvalue() -> None:
    matrix = symmetric(SPECTRA["multiple"])
    _, exact = np.linalg.eigh(matrix)
    found = lanczos.block_lanczos(operator(matrix), start(4), 10, 4)
    cosines = np.linalg.svd(flat(found.vectors) @ exact[:, -4:], compute_uv=False)
    np.testing.assert_allclose(cosines, 1, atol=1e-5)


def test_a_start_that_depends_on_itself_is_filled_up() -> None:
    matrix = symmetric(SPECTRA["indefinite"])
    block = jax.tree.map(lambda x: jnp.stack([x[0], x[1], 2 * x[0] - x[1], 0 * x[0]]), start(4))
    found = lanczos.block_lanczos(operator(matrix), block, 10, 6)
    assert found.replaced == 2
    assert check(found, matrix).max() < 1e-4
    np.testing.assert_allclose(found.values, [8, 7, 6, 5, 4, 3], atol=1e-4)


def test_what_is_dropped_as_rounding_stays_in_the_residual() -> None:
    matrix = np.diag(np.r_[5.0, np.ones(N - 1)])
    matrix[0, 1] = matrix[1, 0] = 3e-5
    block = jax.tree.map(lambda x: jnp.zeros_like(x), start(1))
    block["a"] = block["a"].at[0, 0, 0, 0].set(1.0)
    found = lanczos.block_lanczos(operator(matrix), block, 1, 1)
    assert found.values[0] == pytest.approx(5)
    assert found.residuals[0] == pytest.approx(3e-5, rel=1e-5)


def test_positive_pairs_are_a_prefix() -> None:
    matrix = symmetric(np.r_[3, 2, 1, -np.linspace(1, 4, N - 3)])
    found = lanczos.block_lanczos(operator(matrix), start(4), 10, 6)
    assert subspace.positive(found.values).tolist() == [True] * 3 + [False] * 3
    np.testing.assert_allclose(found.values[:3], [3, 2, 1], atol=1e-4)


def test_pairs_that_have_not_converged_are_dropped() -> None:
    """Below a few large eigenvalues lies a dense bulk, of which a small Krylov space has no eigenvector."""
    matrix = symmetric(np.r_[30, 20, 12, np.linspace(-1, 1, N - 3)])
    whole = lanczos.block_lanczos(operator(matrix), start(2), 6, 8)
    found = whole.converged()
    assert len(whole.values) == 8 and whole.values.min() > 0
    assert len(found.values) == len(flat(found.vectors)) == len(found.residuals) == 3
    check(found, matrix)
    np.testing.assert_allclose(found.values, [30, 20, 12], rtol=1e-3)
    np.testing.assert_array_equal(flat(found.vectors), flat(whole.vectors)[:3])
    wider = lanczos.block_lanczos(operator(matrix), start(2), 24, 8).converged()
    np.testing.assert_allclose(wider.values, np.linalg.eigvalsh(matrix)[::-1][:8], rtol=1e-4)
    assert wider.converged() is wider
    negative = lanczos.block_lanczos(operator(symmetric(SPECTRA["negative"])), start(4), 10, 6).converged()
    assert negative.values.size == 0 and negative.vectors["a"].shape == (0, 4, 2, 3)


def test_a_pair_between_converged_ones_is_dropped_alone() -> None:
    some = lanczos.block_lanczos(operator(symmetric(SPECTRA["indefinite"])), start(4), 10, 4)
    spoilt = dataclasses.replace(some, residuals=some.residuals + np.array([0, 0.11, 0, 0]) * some.values)
    kept = [0, 2, 3]
    np.testing.assert_array_equal(spoilt.converged().values, some.values[kept])
    np.testing.assert_array_equal(flat(spoilt.converged().vectors), flat(some.vectors)[kept])


def test_a_search_stops_when_its_leading_pairs_have_converged() -> None:
    matrix, told = symmetric(np.r_[30, 20, 12, np.linspace(-1, 1, N - 3)]), []
    found = lanczos.block_lanczos(operator(matrix), start(2), 20, 1, lambda *s: told.append(s), True, stop=True)
    assert found.steps == len(told) < 6 and found.products == 2 * found.steps
    check(found, matrix)
    assert found.residuals[0] <= 0.1 * found.values[0]
    assert 30 - found.residuals[0] ** 2 / (found.values[0] - 20) <= found.values[0] + 1e-4  # Temple's bound
    sooner = lanczos.block_lanczos(operator(matrix), start(2), found.steps - 1, 1)
    assert sooner.residuals[0] > 0.1 * sooner.values[0]
    hopeless = symmetric(-np.linspace(1, 2, N))
    assert lanczos.block_lanczos(operator(hopeless), start(2), 4, 1, stop=True).steps == 4


@pytest.mark.slow  # the dense Hessian takes long to compile
def test_leading_pairs_of_a_models_hessian_are_those_of_the_dense_one(decoder64: Any) -> None:
    model, params = decoder64("llama")
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, 5, (6, 7))
    rows = CompletionBatch(
        tokens_BT, np.ones((6, 7), bool), np.ones((6, 4)), rng.normal(size=6), np.ones(6), np.ones(6)
    )
    forward = Forward(decoder_parts.whole(model, attention.plain), 0.7)
    flattened, restore = ravel_pytree(params)
    dense = jax.jit(jax.hessian(lambda x: jnp.divide(*reward_loss(forward)(restore(x), rows, ()))))(flattened)
    product = operator(np.asarray(dense))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)
    begin = lanczos.random_block(jax.random.key(0), shapes, 2)
    exact = np.linalg.eigvalsh(np.asarray(dense))[::-1]
    few = lanczos.block_lanczos(product, begin, 4, 8)
    assert np.abs(few.values / exact[:8] - 1).max() > 0.3 and few.converged().values.size < 4
    found = lanczos.block_lanczos(product, begin, 40, 8).converged()
    assert found.values.size == 8
    np.testing.assert_allclose(found.values, exact[:8], rtol=2e-2)


def test_what_cannot_be_done_is_refused() -> None:
    matrix = symmetric(SPECTRA["indefinite"])
    calls = itertools.count()

    def drifting(block: Any) -> Any:
        return multiplied((matrix * (1 + 3e-5 * next(calls))).astype(np.float32), block)

    with pytest.raises(UserError, match="two products of the same vectors differ"):
        lanczos.block_lanczos(drifting, start(4), 4, 4)
    with pytest.raises(UserError, match="not finite"):
        lanczos.block_lanczos(operator(np.nan * matrix), start(4), 4, 4)
    late = itertools.count()

    def overflowing(block: Any) -> Any:
        return multiplied((matrix if next(late) < 3 else matrix * np.inf).astype(np.float32), block)

    with pytest.raises(UserError, match="not finite"), np.errstate(all="ignore"):
        lanczos.block_lanczos(overflowing, start(4), 4, 4)
    for steps, k in ((13, 4), (2, 9)):
        with pytest.raises(UserError, match="needs"):
            lanczos.block_lanczos(operator(matrix), start(4), steps, k)


def test_progress_is_told_and_nothing_is_compiled_twice() -> None:
    matrix, told = symmetric(SPECTRA["multiple"]), []
    for _ in range(2):
        before = compilations.copy()
        lanczos.block_lanczos(operator(matrix), start(4), 10, 6, lambda *step: told.append(step))
    assert told == 2 * [(i, 10) for i in range(1, 11)]
    assert compilations == before


def test_random_blocks_are_normal_by_leaf_and_do_not_depend_on_the_devices(mesh8: Mesh) -> None:
    whole, split = named(mesh8), named(mesh8, "embed", "mlp")
    like = {"u": jnp.zeros((64, 32)), "v": jnp.zeros((64, 32))}
    drawn = [lanczos.random_block(jax.random.key(5), jax.device_put(like, s), 3) for s in (whole, split)]
    np.testing.assert_array_equal(flat(drawn[0]), flat(drawn[1]))
    assert drawn[1]["u"].sharding.is_equivalent_to(named(mesh8, None, "embed", "mlp"), 3)
    values = flat(drawn[0])
    assert abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05
    assert np.abs(np.corrcoef(np.concatenate([values[:, :2048], values[:, 2048:]]))[np.triu_indices(6, 1)]).max() < 0.1
    assert np.abs(values - flat(lanczos.random_block(jax.random.key(6), like, 3))).min() > 0


def sharded(mesh: Mesh) -> Any:
    """A direction whose leaves are split in several ways, as parameters are."""
    leaves = {
        "up": ((2, 32, 8), (None, "embed", "mlp")),
        "down": ((2, 8, 32), (None, "mlp", "embed")),
        "table": ((6, 32), ("vocab", "embed")),
        "norm": ((32,), ("embed",)),
    }
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=named(mesh, *axes))
        for name, (shape, axes) in leaves.items()
    }


def test_eight_devices_agree_with_one_and_vectors_stay_where_they_are(mesh8: Mesh) -> None:
    like = sharded(mesh8)
    n = sum(x.size for x in jax.tree.leaves(like))
    diagonal = np.random.default_rng(7).normal(size=n) ** 3
    parts = np.split(diagonal.astype(np.float32), np.cumsum([x.size for x in jax.tree.leaves(like)])[:-1])
    weights = jax.tree.unflatten(jax.tree.structure(like), parts)
    weights = jax.tree.map(lambda w, x: w.reshape((1, *x.shape)), weights, like)

    def apply(weights: Any, block: Any) -> Any:
        total = sum(jnp.sum(x, axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(block))

        def coupled(w: jax.Array, x: jax.Array) -> jax.Array:
            return w * x + 0.1 * total.reshape((-1,) + (1,) * (x.ndim - 1))

        return jax.tree.map(coupled, weights, block)

    matrix = np.diag(np.concatenate([p.ravel() for p in jax.tree.leaves(weights)])) + 0.1
    applied = program("coupled diagonal", apply)
    key = jax.random.key(8)
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
    one = lanczos.block_lanczos(lambda b: applied(weights, b), lanczos.random_block(key, plain, 2), 4, 3)
    many = lanczos.block_lanczos(lambda b: applied(weights, b), lanczos.random_block(key, like, 2), 4, 3)
    check(one, matrix)
    check(many, matrix)
    np.testing.assert_allclose(many.values, one.values, rtol=1e-5)
    for name, vectors in many.vectors.items():
        expected = stacked(like[name].sharding)
        assert vectors.sharding.is_equivalent_to(expected, vectors.ndim) and not vectors.is_fully_replicated
    spoilt = dataclasses.replace(many, residuals=np.array([0, np.inf, 0])).converged()
    for name, vectors in spoilt.vectors.items():
        assert vectors.sharding.is_equivalent_to(many.vectors[name].sharding, vectors.ndim)
    np.testing.assert_array_equal(flat(spoilt.vectors), flat(many.vectors)[[0, 2]])


def test_the_solver_gathers_nothing(mesh8: Mesh) -> None:
    """Inner products are local sums and an all-reduce of a few numbers; the rest is local."""
    b, m = 4, 12
    block = lanczos.random_block(jax.random.key(9), sharded(mesh8), b)
    device = blocks.programs(block)
    basis = device.store(device.empty(block, m), block, np.int32(0))
    for q, x in zip(*map(jax.tree.leaves, (basis, block)), strict=True):
        assert q.sharding.is_equivalent_to(x.sharding, x.ndim)
    zero = np.float32(0)
    calls = {
        "store": (basis, block, np.int32(4)),
        "orthogonalise": (basis, block, zero),
        "fill": (block, np.ones(b, bool), jax.random.key(0)),
        "combine": (basis, np.zeros((m, 6), np.float32)),
        "difference": (block, block),
    }
    for name, args in calls.items():
        found = hlo.collectives(getattr(device, name).lower(*args).compile().as_text())
        assert {c.kind for c in found} <= {"all-reduce"}, name
        # The coefficients, and norms, of all leaves in one; the basis' smallest leaf alone has twice as many bytes.
        assert all(c.bytes <= 4 * (m + 1) * b * len(block) for c in found), name
        assert bool(found) == (name in ("orthogonalise", "difference")), name
