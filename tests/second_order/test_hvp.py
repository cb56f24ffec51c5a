"""Curvature products against dense matrices in float64, torch, finite differences and their own costs."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mdrl_jax import tree
from mdrl_jax.model.transformer import param_shapes
from mdrl_jax.parallel import hlo
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import named, param_shardings, put, stacked
from mdrl_jax.rl.logprobs import token_log_probs
from mdrl_jax.second_order import hvp

ROWS, T, D, F, V = 6, 5, 3, 4, 4
TEMPERATURE = 0.7


pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def data(dtype: Any = np.float64) -> tuple[Any, Any, Any]:
    """(point, direction, rows) of a two-layer softmax policy; rows have unequal numbers of tokens."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(dtype)

    point, v = ({"in": {"w": draw(D, F), "b": draw(F)}, "out": draw(F, V)} for _ in range(2))
    rows = {
        "x": draw(ROWS, T, D),
        "y": rng.integers(0, V, (ROWS, T)),
        "mask": (np.arange(T)[None, :] < rng.permutation(ROWS)[:, None]).astype(dtype),
        "adv": draw(ROWS),
    }
    return point, v, rows


def split(rows: Any, m: int = 2, order: Any = slice(None)) -> Any:
    """Rows as m micro-batches."""
    return jax.tree.map(lambda x: x[order].reshape((m, ROWS // m) + x.shape[1:]), rows)


def logits(point: Any, micro: Any) -> jax.Array:
    hidden = jnp.tanh(micro["x"] @ point["in"]["w"] + point["in"]["b"].reshape(1, 1, -1))
    return hidden @ point["out"] / TEMPERATURE


def log_probs(point: Any, micro: Any) -> jax.Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits(point, micro)), micro["y"][..., None], axis=-1)[..., 0]


def loss(point: Any, micro: Any) -> tuple[jax.Array, jax.Array]:
    """−A log π a token: not convex in the logits, as advantages have both signs."""
    weights = micro["adv"][:, None] * micro["mask"]
    return -jnp.sum(weights * log_probs(point, micro)), jnp.sum(micro["mask"])


def token_weights(micro: Any) -> tuple[jax.Array, jax.Array]:
    return micro["mask"], jnp.sum(micro["mask"])


def token_curvature(z: jax.Array, dz: jax.Array, micro: Any) -> tuple[jax.Array, jax.Array]:
    return hvp.softmax_curvature(z, dz, micro["mask"]), jnp.sum(micro["mask"])


def fisher(log_probs: Callable[..., jax.Array], weights: Callable[[Any], tuple[jax.Array, jax.Array]]) -> hvp.Operator:
    """Σ_t w_t ∇logp_t (∇logp_t · v) / count: the Gauss–Newton product of log-probs with curvature w_t = `weights`."""

    def output_curvature(_: Any, u: jax.Array, micro: Any) -> tuple[jax.Array, jax.Array]:
        w, count = weights(micro)
        return w * u, count

    return hvp.gauss_newton(log_probs, output_curvature)


OPERATORS = {
    "exact": hvp.exact(loss),
    "gauss_newton": hvp.gauss_newton(logits, token_curvature),
    "fisher": fisher(log_probs, token_weights),
}
# By name, so that each is compiled once for all tests.
PROGRAMS = {name: program(name, operator) for name, operator in OPERATORS.items()}
BLOCKED = {name: program(name, hvp.blocked(operator)) for name, operator in OPERATORS.items()}


def flat(x: Any, axes: int = 0) -> np.ndarray:
    """Leaves [lead..., ...] side by side, `axes` leading ones kept."""
    return np.concatenate([np.asarray(leaf).reshape(leaf.shape[:axes] + (-1,)) for leaf in jax.tree.leaves(x)], -1)


@functools.cache
def dense() -> dict[str, np.ndarray]:
    """The matrices of `OPERATORS` by other means: second derivatives of means, and outer products of Jacobians."""
    point, _, rows = data()

    def hessian(f: Callable[[Any], jax.Array], at: Any) -> np.ndarray:
        size, leaves = flat(at).size, jax.tree.leaves(jax.jit(jax.hessian(f))(at))
        n = len(jax.tree.leaves(at))
        blocks = [leaves[i * n : (i + 1) * n] for i in range(n)]
        sizes = [x.size for x in jax.tree.leaves(at)]
        found = np.block([[np.asarray(b).reshape(sizes[i], -1) for b in row] for i, row in enumerate(blocks)])
        return found.reshape(size, size)

    def mean(at: Any) -> jax.Array:
        total, count = loss(at, rows)
        return total / count

    def token_loss(z: jax.Array, y: jax.Array) -> jax.Array:
        return -jax.nn.log_softmax(z)[y]

    count = float(rows["mask"].sum())
    point, rows = jax.tree.map(jnp.asarray, (point, rows))
    j_ZN = flat(jax.jit(jax.jacobian(logits))(point, rows), 3)
    h_ZZ = np.asarray(jax.jit(jax.vmap(jax.vmap(jax.hessian(token_loss))))(logits(point, rows), rows["y"]))
    j_TN = flat(jax.jit(jax.jacobian(log_probs))(point, rows), 2)
    mask = np.asarray(rows["mask"])
    return {
        "exact": hessian(mean, point),
        "gauss_newton": np.einsum("bt,btvn,btvw,btwm->nm", mask, j_ZN, h_ZZ, j_ZN) / count,
        "fisher": np.einsum("bt,btn,btm->nm", mask, j_TN, j_TN) / count,
    }


def close(found: Any, expected: np.ndarray, rtol: float) -> None:
    error = np.linalg.norm(flat(found) - expected) / np.linalg.norm(expected)
    assert error < rtol, error


@pytest.mark.parametrize("name", OPERATORS)
def test_products_are_those_of_the_dense_matrix(float64: None, name: str) -> None:
    point, v, rows = data()
    matrix = dense()[name]
    assert np.linalg.eigvalsh(matrix)[0] < -0.01 or name in ("gauss_newton", "fisher")
    found = PROGRAMS[name](point, v, split(rows))
    close(found, matrix @ flat(v), 1e-13)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), point)


@pytest.mark.parametrize("name", OPERATORS)
def test_products_do_not_depend_on_how_rows_are_divided(float64: None, name: str) -> None:
    point, v, rows = data()
    rtol = 1e-12
    halves, alone = split(rows), split(rows, 6)
    whole = flat(PROGRAMS[name](point, v, halves))
    close(PROGRAMS[name](point, v, split(rows, 2, [5, 0, 3, 1, 4, 2])), whole, rtol)
    close(PROGRAMS[name](point, v, alone), whole, rtol)
    assert sorted(alone["mask"].sum((1, 2))) == list(range(6))
    each = [flat(PROGRAMS[name](point, v, jax.tree.map(lambda x, i=i: x[[i, i]], halves))) for i in range(2)]
    assert np.linalg.norm(np.mean(each, axis=0) - whole) > 0.01 * np.linalg.norm(whole)  # it is no mean of means


@pytest.mark.parametrize("name", OPERATORS)
def test_a_block_is_its_vectors(float64: None, name: str) -> None:
    point, v, rows = data()
    block = jax.tree.map(lambda x: np.stack([x, x**2, np.cos(x)]), v)
    found = BLOCKED[name](point, block, split(rows))
    for i in range(3):
        one = PROGRAMS[name](point, jax.tree.map(lambda x, i=i: x[i], block), split(rows))
        close(jax.tree.map(lambda x, i=i: x[i], found), flat(one), 1e-12)


def test_without_a_token_or_a_direction_there_is_no_product(float64: None) -> None:
    point, v, rows = data()
    empty = {**rows, "mask": np.zeros_like(rows["mask"])}
    for operator in PROGRAMS.values():
        assert not flat(operator(point, v, split(empty))).any()
        assert not flat(operator(point, jax.tree.map(np.zeros_like, v), split(rows))).any()


def test_torch_finds_the_same_hessian_and_gauss_newton_matrix(float64: None) -> None:
    torch = pytest.importorskip("torch", reason="the oracle is torch")
    point, v, rows = data()
    x, mask, adv = (torch.tensor(np.asarray(rows[name])) for name in ("x", "mask", "adv"))
    y = torch.tensor(np.asarray(rows["y"], np.int64))
    leaves = tuple(torch.tensor(np.asarray(leaf)) for leaf in jax.tree.leaves(point))  # b, w, out
    direction = tuple(torch.tensor(np.asarray(leaf)) for leaf in jax.tree.leaves(v))

    def outputs(b: Any, w: Any, out: Any) -> Any:
        return torch.tanh(x @ w + b) @ out / TEMPERATURE

    def cross_entropy(z: Any, weights: Any) -> Any:
        tokens = torch.nn.functional.cross_entropy(z.reshape(-1, V), y.reshape(-1), reduction="none")
        return (weights * tokens.reshape(ROWS, T)).sum() / mask.sum()

    def mean(*at: Any) -> Any:
        return cross_entropy(outputs(*at), adv[:, None] * mask)

    functional = torch.autograd.functional
    _, hv = functional.hvp(mean, leaves, direction)
    z, dz = functional.jvp(outputs, leaves, direction)
    _, curved = functional.hvp(lambda at: cross_entropy(at, mask), z, dz)
    _, gv = functional.vjp(outputs, leaves, curved)
    batch = split(rows)
    close(PROGRAMS["exact"](point, v, batch), np.concatenate([t.numpy().ravel() for t in hv]), 1e-12)
    close(PROGRAMS["gauss_newton"](point, v, batch), np.concatenate([t.numpy().ravel() for t in gv]), 1e-12)


def test_sampled_fisher_averages_to_gauss_newton(float64: None) -> None:
    """Σ_y π(y) of the Fisher product of token y is the Gauss–Newton product: the policy is enumerated."""
    point, v, rows = data()

    def weights(micro: Any) -> tuple[jax.Array, jax.Array]:
        return micro["mask"] * jnp.exp(log_probs(point, micro)), jnp.sum(micro["mask"])

    operator = program("enumerated fisher", fisher(log_probs, weights))
    each = [flat(operator(point, v, split({**rows, "y": np.full_like(rows["y"], y)}))) for y in range(V)]
    close(PROGRAMS["gauss_newton"](point, v, split(rows)), np.sum(each, axis=0), 1e-13)


def test_arrays_that_are_fixed_are_not_differentiated(float64: None) -> None:
    """The point is a small change of weights that are fixed."""
    point, v, rows = data()

    def around(deltas: Any, micro: Any, weights: Any) -> tuple[jax.Array, jax.Array]:
        return loss(tree.add(weights, deltas), micro)

    zero, batch = jax.tree.map(np.zeros_like, point), split(rows)
    expected = flat(PROGRAMS["exact"](point, v, batch))
    close(program("exact", hvp.exact(around))(zero, v, batch, point), expected, 1e-13)


def test_symmetry_defect(float64: None) -> None:
    rng = np.random.default_rng(1)
    v, w = ({"a": rng.normal(size=(3, 4)), "b": rng.normal(size=7)} for _ in range(2))
    whole = rng.normal(size=(19, 19))

    def apply(matrix: np.ndarray, x: Any) -> Any:
        out = matrix @ flat(x)
        return {"a": out[:12].reshape(3, 4), "b": out[12:]}

    def defect(matrix: np.ndarray, v: Any = v, w: Any = w) -> float:
        return hvp.symmetry_defect(functools.partial(apply, matrix), v, w)

    form, other = flat(w) @ whole @ flat(v), flat(v) @ whole @ flat(w)
    random = max(np.linalg.norm(flat(b)) * np.linalg.norm(whole @ flat(a)) for a, b in ((v, w), (w, v))) / 19**0.5
    assert defect(whole) == pytest.approx(abs(form - other) / max(abs(form), abs(other), random))
    assert defect(whole + whole.T) < 1e-14
    assert defect(whole - whole.T) > 0.1
    assert defect(np.zeros((19, 19))) == 0
    # Directions that are orthogonal under H: |wᵀHv| is rounding, and no defect.
    u, _ = np.linalg.qr(whole)
    x, y = ({"a": c[:12].reshape(3, 4), "b": c[12:]} for c in u.T[:2])
    assert defect((u * np.arange(19.0)) @ u.T, x, y) < 1e-12


@pytest.mark.parametrize("name", ["exact", "gauss_newton", "fisher"])
def test_float32_products_are_symmetric_and_bfloat16_ones_come_back_in_float32(name: str) -> None:
    point, v, rows = data(np.float32)
    w, batch = jax.tree.map(np.sin, v), split(rows)

    def apply(x: Any) -> Any:
        return PROGRAMS[name](point, x, batch)

    assert hvp.symmetry_defect(apply, v, w) < 1e-5

    def half(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def computed(at: Any, micro: Any) -> Any:
            low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (at, micro["x"]))
            return function(low[0], {**micro, "x": low[1]})

        return computed

    def half_loss(at: Any, micro: Any) -> tuple[jax.Array, jax.Array]:
        logp = half(log_probs)(at, micro).astype(jnp.float32)
        return -jnp.sum(micro["adv"][:, None] * micro["mask"] * logp), jnp.sum(micro["mask"])

    operator = {
        "exact": hvp.exact(half_loss),
        "gauss_newton": hvp.gauss_newton(half(logits), token_curvature),
        "fisher": fisher(half(log_probs), token_weights),
    }[name]
    found = program(name, operator)(point, v, batch)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    close(found, flat(apply(v)), 0.05)
    assert np.linalg.norm(flat(found) - flat(apply(v))) > 0  # it was computed in bfloat16


def decoder_loss(model: Any) -> hvp.Loss:
    def decoder_loss(params: Any, micro: Any) -> tuple[jax.Array, jax.Array]:
        valid = micro["tokens"] >= 0
        tokens = jnp.maximum(micro["tokens"], 0)
        logp = token_log_probs(model, params, tokens, valid, start=4, temperature=TEMPERATURE)
        return -jnp.sum(logp * micro["weight"][:, None]), jnp.sum(micro["weight"]) * logp.shape[1]

    return decoder_loss


def mean(loss: hvp.Loss, batch: Any) -> Callable[[Any], jax.Array]:
    """The loss as a mean over all micro-batches."""

    def total(point: Any) -> jax.Array:
        each = [loss(point, jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(len(batch["tokens"]))]
        return sum(value for value, _ in each) / sum(count for _, count in each)

    return total


def test_the_decoder_on_eight_devices_agrees_with_one_and_with_differences(
    tiny_models: Any, mesh8: Mesh, fast_compile: None
) -> None:
    model, params = tiny_models["qwen2"].model, tiny_models["qwen2"].params
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 96, (2, 4, 10)).astype(np.int32)
    tokens[:, ::2, :3] = -1
    batch = {"tokens": tokens, "weight": rng.normal(1, 0.5, (2, 4)).astype(np.float32)}
    v = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    host = jax.tree.map(np.asarray, params)
    plain = hvp.exact(decoder_loss(model))
    single = flat(program("hvp", plain)(host, v, batch))

    gradient = program("gradient", lambda at: jax.grad(mean(decoder_loss(model), batch))(at))
    step = 1e-3 * np.linalg.norm(flat(host)) / np.linalg.norm(flat(v))
    above, below = (gradient(jax.tree.map(lambda x, d, s=s: x + s * d, host, v)) for s in (step, -step))
    close(jax.tree.map(lambda a, b: (a - b) / (2 * step), above, below), single, 2e-2)

    shardings = param_shardings(mesh8, param_shapes(model))
    sharded = jax.device_put((host, v), (shardings, shardings))
    with jax.set_mesh(mesh8):
        operator = hvp.exact(decoder_loss(model), shardings)
        found = program("hvp sharded", operator)(*sharded, put(batch, mesh8, None, "batch"))
    close(found, single, 1e-4)
    for leaf, sharding in zip(jax.tree.leaves(found), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert any(not s.is_fully_replicated for s in jax.tree.leaves(shardings))


def test_products_lie_where_they_are_told_to(mesh8: Mesh) -> None:
    point, v, rows = data(np.float32)
    shardings = {"in": {"w": named(mesh8, None, "mlp"), "b": named(mesh8, "mlp")}, "out": named(mesh8, "mlp", "embed")}
    whole = jax.device_put((point, v, split(rows)), named(mesh8))
    for operator in (hvp.exact(loss, shardings), hvp.gauss_newton(logits, token_curvature, shardings)):
        found = program("placed", operator)(*whole)
        blocks = program("placed block", hvp.blocked(operator))(
            whole[0], jax.tree.map(lambda x: np.stack([x, x]), v), whole[2]
        )
        for leaf, block, s in zip(*map(jax.tree.leaves, (found, blocks, shardings)), strict=True):
            assert leaf.sharding.is_equivalent_to(s, leaf.ndim)
            assert block.sharding.is_equivalent_to(stacked(s), block.ndim)


def test_costs_are_those_of_the_table(tiny_models: Any) -> None:
    """Matrix products of compiled programs, in units of one gradient's."""
    model, params = tiny_models["llama"].model, jax.tree.map(np.asarray, tiny_models["llama"].params)
    micro = {"tokens": np.zeros((1, 2, 32), np.int32), "weight": np.ones((1, 2), np.float32)}

    def outputs(params: Any, micro: Any) -> jax.Array:
        return model.apply({"params": params}, micro["tokens"], micro["tokens"] >= 0)

    def flops(function: Callable[..., Any], *args: Any) -> float:
        return hlo.matmul_flops(program("cost", function).lower(*args).compile().as_text())

    def gradient(params: Any, batch: Any) -> Any:
        one = jax.tree.map(lambda x: x[0], batch)
        return jax.grad(lambda p: jnp.sum(jax.nn.logsumexp(outputs(p, one), axis=-1)))(params)

    def smooth(params: Any, micro: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(jax.nn.logsumexp(outputs(params, micro), axis=-1)), jnp.float32(1)

    def curved(z: jax.Array, dz: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
        return hvp.softmax_curvature(z, dz, jnp.ones(z.shape[:-1])), jnp.float32(1)

    unit = flops(gradient, params, micro)
    block = jax.tree.map(lambda x: np.stack([x] * 3), params)
    for operator, limit, further in (
        (hvp.exact(smooth), 8 / 3, 2.0),
        (hvp.gauss_newton(outputs, curved), 5 / 3, 4 / 3),
    ):
        one = flops(operator, params, params, micro) / unit
        three = flops(hvp.blocked(operator), params, block, micro) / unit
        assert 0.9 * limit < one < 1.05 * limit, (one, limit)
        assert 0.9 * further < (three - one) / 2 < 1.05 * further, ((three - one) / 2, further)
