"""Norms inside and outside S against dense projections, the theorem where it is exact, rates against hand figures."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdrl_jax.recovery.refresh import contraction as module
from mdrl_jax.recovery.refresh.contraction import Basis, bound, contraction, lengths
from mdrl_jax.second_order import subspace
from mdrl_jax.stats.estimate import student

pytestmark = pytest.mark.usefixtures("fast_compile")

L, D, F, R = 2, 4, 6, 3
INDEX_LR = np.array([[4, 0, 2], [1, 5, 0]], np.int32)
MASK_LR = np.array([[1, 1, 1], [1, 1, 0]], np.float32)  # the second layer has a place of padding
N_ROUTE, N_ALL = 5 * 3 * D, 3 * L * D * F + 7


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "N_RANDOM", 25)


def to_params(route_n: np.ndarray, rest_n: np.ndarray) -> Any:
    """Parameters with 60 numbers on the route, neuron by neuron, and the others elsewhere."""
    kernels = {name: np.zeros((L, D, F)) for name in ("gate", "up", "down")}
    taken = np.zeros((L, F), bool)
    for i, (layer, neuron) in enumerate(neurons()):
        taken[layer, neuron] = True
        for j, name in enumerate(kernels):
            at = (i * 3 + j) * D
            kernels[name][layer, :, neuron] = route_n[at : at + D]
    free = iter(rest_n)
    for name in kernels:
        for layer, neuron in zip(*np.nonzero(~taken), strict=True):
            kernels[name][layer, :, neuron] = [next(free) for _ in range(D)]
    kernels["down"] = kernels["down"].swapaxes(1, 2)
    layers = {name: {"kernel": jnp.asarray(x, jnp.float32)} for name, x in kernels.items()}
    return {"embedding": jnp.asarray(list(free), jnp.float32), "layers": layers}


def neurons() -> list[tuple[int, int]]:
    return [(layer, int(INDEX_LR[layer, r])) for layer in range(L) for r in range(R) if MASK_LR[layer, r]]


def to_slices(vectors_kn: np.ndarray) -> Any:
    """Route vectors as trees of slices [k, ...]."""
    k = len(vectors_kn)
    out = {"gate": np.zeros((k, L, D, R)), "up": np.zeros((k, L, D, R)), "down": np.zeros((k, L, R, D))}
    places = [(layer, r) for layer in range(L) for r in range(R) if MASK_LR[layer, r]]
    for i, (layer, r) in enumerate(places):
        block = vectors_kn[:, i * 3 * D : (i + 1) * 3 * D].reshape(k, 3, D)
        out["gate"][:, layer, :, r], out["up"][:, layer, :, r], out["down"][:, layer, r] = block.swapaxes(0, 1)
    return {name: jnp.asarray(x, jnp.float32) for name, x in out.items()}


def orthonormal(rng: np.random.Generator, k: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(N_ROUTE, k)))[0].T


def basis_of(vectors_kn: np.ndarray, values: Any, half: int = 0) -> Basis:
    return Basis("reward", half, "cw", to_slices(vectors_kn), np.asarray(values, float), INDEX_LR, MASK_LR)


def test_lengths_are_those_of_a_dense_projection():
    rng = np.random.default_rng(0)
    route, rest = rng.normal(size=N_ROUTE), rng.normal(size=N_ALL - N_ROUTE)
    first, second = orthonormal(rng, 3), orthonormal(rng, 5)
    # Of the second, two eigenvalues are not positive, but for rounding: their vectors do not belong to S.
    bases = [basis_of(first, [3.0, 2.0, 1.0]), basis_of(second, [3.0, 2.0, 1.0, 1e-6, -4.0], 1)]
    found = lengths(bases, to_params(route, rest))
    assert [(f["half"], f["k"]) for f in found] == [(0, 3), (1, 3)]
    for f, vectors in zip(found, (first, second[:3]), strict=True):
        inside = vectors.T @ (vectors @ route)
        assert f["within"] == pytest.approx(np.linalg.norm(inside), rel=1e-5)
        np.testing.assert_allclose(f["coordinates"], vectors @ route, rtol=1e-3, atol=1e-5)
        assert f["route"] == pytest.approx(np.linalg.norm(route - inside), rel=1e-5)
        assert f["outside"] == pytest.approx(np.linalg.norm(np.append(route - inside, rest)), rel=1e-5)
    json.dumps(found, allow_nan=False)


def test_random_subspaces_are_those_of_their_vectors_and_stay_the_same():
    rng = np.random.default_rng(1)
    route, rest = rng.normal(size=N_ROUTE), rng.normal(size=N_ALL - N_ROUTE)
    basis = basis_of(orthonormal(rng, 2), [2.0, 1.0])
    (found,) = lengths([basis], to_params(route, rest), seed=3)
    part = jax.tree.map(lambda x: x[0], to_slices(route[None]))
    support = jax.tree.map(lambda x: x[0] != 0, to_slices(np.ones((1, N_ROUTE))))
    for i in (0, 7, 24):
        drawn = subspace.random_basis(jax.random.fold_in(jax.random.key(3), i), part, 2, support)
        expected = np.linalg.norm(subspace.coefficients(drawn, part))
        assert found["random"][i] == pytest.approx(float(expected), rel=1e-4)
    # E‖P e‖² = k/n ‖e‖², with n the route's dimensions without padding.
    squares = np.square(found["random"])
    expected = 2 / N_ROUTE * route @ route
    assert abs(squares.mean() - expected) < 4.5 * squares.std() / np.sqrt(25)
    (again,) = lengths([basis], to_params(2 * route, 0 * rest), seed=3)
    np.testing.assert_allclose(again["random"], 2 * np.array(found["random"]), rtol=1e-5)
    # A basis beside it with more vectors changes nothing but its own.
    both = lengths([basis, basis_of(orthonormal(rng, 4), [4.0, 3.0, 2.0, 1.0])], to_params(route, rest), seed=3)
    assert len(both[1]["random"]) == 25 and np.all(np.array(both[1]["random"]) >= both[0]["random"])


# --- the theorem ----------------------------------------------------------------------------------------------------


def quadratic(coupling: float = 0.0) -> tuple[np.ndarray, Basis, np.ndarray]:
    """(H of the whole space, S with its eigenvalues, S's vectors): S invariant up to `coupling` = ‖H_{S,S⊥}‖."""
    rng = np.random.default_rng(2)
    vectors, values = orthonormal(rng, 3), np.array([4.0, 2.0, 1.0])
    rest = np.linalg.svd(vectors)[2][3:]
    H = np.zeros((N_ALL, N_ALL))
    H[:N_ROUTE, :N_ROUTE] = (vectors.T * values) @ vectors + (rest.T * np.linspace(0.01, 0.2, len(rest))) @ rest
    H[N_ROUTE:, N_ROUTE:] = np.diag(np.linspace(0.01, 0.2, N_ALL - N_ROUTE))
    cross = np.outer(vectors[2], rest[0])
    H[:N_ROUTE, :N_ROUTE] += coupling * (cross + cross.T)
    return H, basis_of(vectors, values), vectors


def descend(H: np.ndarray, gradient: np.ndarray, error: np.ndarray, rate: float, steps: int) -> list[np.ndarray]:
    """e_t of gradient descent on L(θ* + e) = g·e + ½ eᵀHe."""
    path = [error]
    for _ in range(steps):
        path.append(path[-1] - rate * (gradient + H @ path[-1]))
    return path


def rows_of(path: list[np.ndarray], basis: Basis) -> list[dict[str, Any]]:
    return [{"step": t, "subspaces": lengths([basis], to_params(e[:N_ROUTE], e[N_ROUTE:]))} for t, e in enumerate(path)]


def test_the_theorem_is_exact_on_a_quadratic():
    """‖P_S e_t‖ ≤ (1 − αμ)ᵗ ‖P_S δ‖ with μ = λmin(H|_S) > 0, P_S∇L(θ*) = 0, S invariant under H and α ≤ 1/λmax."""
    H, basis, vectors = quadratic()
    rng = np.random.default_rng(3)
    rate = 0.2
    gradient = rng.normal(size=N_ALL)
    gradient[:N_ROUTE] -= vectors.T @ (vectors @ gradient[:N_ROUTE])  # what is left at θ* lies outside S
    rows = rows_of(descend(H, gradient, rng.normal(size=N_ALL), rate, 6), basis)
    limit = bound(basis, rate)
    assert limit["factor"] == pytest.approx(1 - rate * 1.0) and limit["alpha_top"] == pytest.approx(0.8)
    first = rows[0]["subspaces"][0]["within"]
    for row in rows:
        assert row["subspaces"][0]["within"] <= limit["factor"] ** row["step"] * first * (1 + 1e-5)
    (found,) = contraction(rows, [basis], rate)
    assert found["within"]["estimate"] <= limit["factor"] + 1e-5
    # The other eigenvalues are at most 0.2: S contracts faster than its complement, in the route and in all.
    assert found["faster"]["ci95"][1] < 0 and found["faster_in_route"]["ci95"][1] < 0
    assert found["faster"]["estimate"] < found["faster"]["null"]["low"]
    # On the slowest direction of S alone it is an equality.
    alone = np.append(vectors[2], np.zeros(N_ALL - N_ROUTE))
    (slow,) = contraction(rows_of(descend(H, 0 * gradient, alone, rate, 4), basis), [basis], rate)
    assert slow["within"]["estimate"] == pytest.approx(limit["factor"], rel=1e-5)
    json.dumps(found, allow_nan=False)


def test_with_a_gradient_left_it_contracts_toward_the_newton_point():
    H, basis, vectors = quadratic()
    gradient = np.append(vectors.T @ np.array([0.5, -1.0, 2.0]), np.zeros(N_ALL - N_ROUTE))
    newton = np.append(vectors.T @ (-np.array([0.5, -1.0, 2.0]) / [4.0, 2.0, 1.0]), np.zeros(N_ALL - N_ROUTE))
    path = descend(H, gradient, np.append(vectors.T @ np.ones(3), np.zeros(N_ALL - N_ROUTE)), 0.2, 40)
    factor = bound(basis, 0.2)["factor"]
    shifted = [r["subspaces"][0]["within"] for r in rows_of([e - newton for e in path[:8]], basis)]
    assert all(x <= factor**t * shifted[0] * (1 + 1e-5) for t, x in enumerate(shifted))
    # Toward θ* itself it does not: what is left is the Newton step.
    (last,) = rows_of(path[-1:], basis)
    assert last["subspaces"][0]["within"] == pytest.approx(np.linalg.norm(newton), rel=1e-3)


def test_a_coupling_to_the_complement_adds_its_share_each_step():
    """‖P_S e_{t+1}‖ ≤ (1 − αμ) ‖P_S e_t‖ + αε ‖e_⊥‖ with ‖H_{S,S⊥}‖ ≤ ε, which without the last term would be false."""
    epsilon, rate = 0.3, 0.2
    H, basis, vectors = quadratic(epsilon)
    error = np.append(vectors.T @ np.array([0.0, 0.0, 0.05]), np.zeros(N_ALL - N_ROUTE))
    error[:N_ROUTE] -= np.linalg.svd(vectors)[2][3]
    rows = [r["subspaces"][0] for r in rows_of(descend(H, np.zeros(N_ALL), error, rate, 6), basis)]
    factor = bound(basis, rate)["factor"]
    for before, after in zip(rows, rows[1:], strict=False):
        assert after["within"] <= factor * before["within"] + rate * epsilon * before["outside"] + 1e-5
    assert rows[1]["within"] > factor * rows[0]["within"] + 1e-3


def test_the_bound_needs_a_positive_eigenvalue():
    found = bound(basis_of(orthonormal(np.random.default_rng(4), 2), [0.0, -1.0]), 0.1)
    assert found["factor"] is None and "not applicable" in found["reason"]


# --- rates ----------------------------------------------------------------------------------------------------------


def planted(steps: list[int], within: Any, outside: Any, random: Any = None) -> list[dict[str, Any]]:
    rows = []
    for i, step in enumerate(steps):
        drawn = [] if random is None else list(random[i])
        row = {"within": within[i], "route": outside[i], "outside": outside[i], "random": drawn}
        rows.append({"step": step, "subspaces": [row]})
    return rows


BASIS = basis_of(orthonormal(np.random.default_rng(5), 2), [2.0, 1.0])


def test_rates_are_student_over_steps():
    within, outside = np.array([8.0, 5.0, 3.0, 2.5, 1.0]), np.array([4.0, 4.1, 4.4, 4.5, 4.9])
    random = np.stack([0.1 * outside * 0.9 ** np.arange(5), 0.2 * outside], axis=1)
    (found,) = contraction(planted([0, 1, 2, 3, 4], within, outside, random), [BASIS], 0.1)
    x = np.diff(np.log(within))
    expected = student(x.mean(), x.std(ddof=1) / 2, 3, 4)
    assert found["within"]["estimate"] == pytest.approx((1 / 8) ** 0.25)
    assert found["within"]["ci95"] == pytest.approx(np.exp([expected.low, expected.high]))
    assert found["within"]["n"] == 4
    x = np.diff(np.log(within / outside))
    expected = student(x.mean(), x.std(ddof=1) / 2, 3, 4)
    assert found["faster"]["ci95"] == pytest.approx([expected.low, expected.high])
    # Of a random subspace, too, the complement is what is left of e: here within² + outside² = all².
    whole = within**2 + outside**2
    by_hand = [np.log(r / np.sqrt(whole - r**2)) for r in random.T]
    assert found["faster"]["null"]["mean"] == pytest.approx(np.mean([(y[-1] - y[0]) / 4 for y in by_hand]))


def test_looks_that_are_apart_count_by_their_distance():
    """A path with equal factors has an empty interval whatever the looks; noise g steps apart has variance g."""
    even = contraction(planted([0, 3, 4], [1.0, 0.5**3, 0.5**4], [1.0, 1.0, 1.0]), [BASIS], 0.1)[0]
    assert even["within"]["estimate"] == pytest.approx(0.5)
    assert even["within"]["ci95"] == pytest.approx([0.5, 0.5])
    uneven = contraction(planted([0, 4, 5], [1.0, np.exp(-2.0), np.exp(-3.0)], [1.0, 1.0, 1.0]), [BASIS], 0.1)[0]
    mean = -3 / 5
    variance = ((-2 - 4 * mean) ** 2 / 4 + (-1 - mean) ** 2) / 1
    expected = student(mean, np.sqrt(variance / 5), 1, 2)
    assert uneven["faster"]["ci95"] == pytest.approx([expected.low, expected.high])


def ends(coordinates: Any, random: Any, steps: int = 4) -> list[dict[str, Any]]:
    """First and last row of a stream, by the coordinates of P_S e and the norms in random subspaces."""
    rows = []
    for t, x, drawn in zip((0, steps), coordinates, random, strict=True):
        norm = float(np.linalg.norm(x))
        row = {"within": norm, "coordinates": list(x), "route": 1.0, "outside": 1.0, "random": list(drawn)}
        rows.append({"step": t, "subspaces": [row]})
    return rows


def test_streams_are_compared_with_random_subspaces_and_with_other_domains():
    rng = np.random.default_rng(6)
    basis = basis_of(orthonormal(rng, 6), np.arange(6, 0, -1.0))
    start, random = rng.normal(size=6), rng.uniform(0.5, 1.5, (2, 40))
    streams = [
        ends([start, 0.7 * start + 0.05 * rng.normal(size=6)], random * rng.uniform(0.99, 1.01, (2, 40)))
        for _ in "12345"
    ]
    other = ends([start, 1.1 * start], random)
    (found,) = contraction(streams[0], [basis], 0.1, streams[1:], {"cw": other})
    rates = np.array([np.log(s[1]["subspaces"][0]["within"] / s[0]["subspaces"][0]["within"]) / 4 for s in streams])
    by_hand = student(rates.mean(), rates.std(ddof=1) / np.sqrt(5), 4, 5)
    assert found["streams"] == 5 and found["shrinks"]["ci95"] == pytest.approx([by_hand.low, by_hand.high])
    drawn = [np.log(np.divide(s[1]["subspaces"][0]["random"], s[0]["subspaces"][0]["random"])) / 4 for s in streams]
    apart = rates.mean() - np.mean(drawn, axis=0)
    assert found["than_random"]["estimate"] == pytest.approx(apart.mean())
    assert found["than_random"]["ci95"] == pytest.approx(np.quantile(apart, [0.025, 0.975]).tolist())
    assert found["than_random"]["p"] == pytest.approx((1 + np.sum(apart >= 0)) / 41)
    by_hand = student(rates.mean() - np.log(1.1) / 4, rates.std(ddof=1) * np.sqrt(1 + 1 / 5), 4, 5)
    assert found["than_other"]["cw"]["ci95"] == pytest.approx([by_hand.low, by_hand.high])
    moved = np.mean([np.subtract(s[1]["subspaces"][0]["coordinates"], start) for s in streams], axis=0) / 4
    (slope,), (left,), *_ = np.linalg.lstsq(start[:, None], moved, rcond=None)
    by_hand = student(slope, np.sqrt(left / 5 / (start @ start)), 5, 6)
    assert found["toward"]["estimate"] == pytest.approx(-0.3 / 4, abs=0.03)
    assert found["toward"]["ci95"] == pytest.approx([by_hand.low, by_hand.high])
    json.dumps(found, allow_nan=False)


def test_a_random_movement_in_s_points_at_the_peak_as_rarely_as_its_level():
    """A share of 2.5 % of random directions has an interval below 0, whatever the length of the movement."""
    rng, below = np.random.default_rng(7), 0
    basis = basis_of(orthonormal(rng, 4), [4.0, 3.0, 2.0, 1.0])
    for _ in range(2000):
        start = rng.normal(size=4)
        (found,) = contraction(ends([start, start + 5 * rng.normal(size=4)], np.ones((2, 3))), [basis], 0.1)
        below += found["toward"]["ci95"][1] < 0
    assert abs(below / 2000 - 0.025) < 3 * np.sqrt(0.025 * 0.975 / 2000)


def test_an_s_without_a_vector_is_not_measurable():
    empty = basis_of(orthonormal(np.random.default_rng(8), 2), [0.0, -1.0])
    row = {"within": 0.0, "coordinates": [], "route": 1.0, "outside": 1.0, "random": []}
    rows = [{"step": t, "subspaces": [row]} for t in (0, 1, 2)]
    (found,) = contraction(rows, [empty], 0.1, (), {"cw": rows})
    figures = [found["shrinks"], found["than_random"], found["toward"], found["than_other"]["cw"]]
    assert {f["reason"] for f in figures} == {"S has no converged vector with a positive eigenvalue"}


def test_what_cannot_be_measured_says_why():
    (one,) = contraction(planted([0], [1.0], [1.0]), [BASIS], 0.1)
    assert one["faster"]["estimate"] is None and one["faster"]["reason"] == "needs two steps"
    (two,) = contraction(planted([0, 1], [1.0, 0.5], [1.0, 1.0]), [BASIS], 0.1)
    assert two["within"]["estimate"] == pytest.approx(0.5) and two["within"]["ci95"] is None
    (zero,) = contraction(planted([0, 1, 2], [0.0, 0.5, 0.4], [1.0, 1.0, 1.0]), [BASIS], 0.1)
    assert zero["within"]["reason"] == "a norm is 0" and zero["outside"]["estimate"] == pytest.approx(1.0)
    json.dumps([one, two, zero], allow_nan=False)
    # Of the domain trained last, whose peak is the start: e_0 = 0.
    nowhere = lengths([BASIS, basis_of(np.eye(2, N_ROUTE), [0.0, -1.0])], to_params(np.zeros(N_ROUTE), np.zeros(N_ALL)))
    found = contraction([{"step": t, "subspaces": nowhere} for t in (0, 1)], [BASIS, BASIS], 0.1)
    assert [f["faster"]["reason"] for f in found] == ["a norm is 0", "a norm is 0"]
