"""The removal test on exactly quadratic damage: against dense algebra, norms of the controls, degenerate cases."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdrl_jax import tree
from mdrl_jax.analysis.subspace import removal
from mdrl_jax.parallel.sharding import named

Array = np.ndarray
SHAPE = (2, 8, 4)  # of the route, a leaf "route"; the leaf "rest" has as many coordinates
N, P = 64, 24
ALL = 2 * N
AXES = (None, "embed", "mlp")


def to_tree(x: Array) -> dict[str, jax.Array]:
    """A tree of all parameters from a dense vector: first the route, then the rest."""
    return {"route": jnp.float32(x[:N].reshape(SHAPE)), "rest": jnp.float32(x[N:].reshape(SHAPE))}


def to_dense(x: Any) -> Array:
    return np.concatenate([np.asarray(x[name], np.float64).ravel() for name in ("route", "rest")])


def lifted(x_N: Array) -> Array:
    return np.concatenate([x_N, np.zeros(N)])


@dataclasses.dataclass
class World:
    """Damage ½ eᵀH_p e with e = θ − θ* for each prompt p of two halves, and an orthonormal basis found on each half."""

    h_HPNN: Array
    d_N: Array
    bases_HkN: list[Array]
    points: list[Array] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def start_N(self) -> Array:
        return np.random.default_rng(3).normal(size=ALL)

    def damage(self, half: int, e_N: Array) -> Array:
        """The damage of each prompt at θ* + e."""
        return 0.5 * np.einsum("i,pij,j->p", e_N, self.h_HPNN[half], e_N)

    def space(self, place: Any = lambda x: x) -> removal.Space:
        start, moved = place(to_tree(self.start_N)), place(to_tree(self.d_N))
        return removal.Space(
            name="route",
            size=N,
            start=start,
            displacement=moved,
            part={"route": moved["route"]},
            support={"route": jnp.ones(SHAPE)},
            lift=lambda z: {"route": z["route"], "rest": jnp.zeros_like(start["rest"])},
            along=lambda x, v, alpha: tree.axpy(alpha, v, x),
        )

    def measure(self, place: Any = lambda x: x, dimension: int | None = None, **more: Any) -> dict[str, Any]:
        def measured(half: int, params: Any) -> Array:
            e_N = to_dense(params) - self.start_N
            self.points.append(e_N)
            return self.damage(half, e_N)

        halves = []
        for half, basis_kN in enumerate(self.bases_HkN):
            vectors = {"route": jnp.float32(basis_kN.reshape(-1, *SHAPE))}
            k = len(basis_kN) if dimension is None else dimension
            halves.append(removal.Half(vectors, k, functools.partial(measured, half)))
        return removal.measure((halves[0], halves[1]), self.space(place), jax.random.key(0), "nats", **more)


def orthonormal(rng: np.random.Generator, k: int) -> Array:
    return np.linalg.qr(rng.normal(size=(N, k)))[0].T


def planted(seed: int = 0) -> World:
    """Every prompt is hurt along the same four directions of the route, and a little along all others."""
    rng = np.random.default_rng(seed)
    v = np.concatenate([orthonormal(rng, 4), np.zeros((4, N))], axis=1)
    strength_HPk = np.array([9.0, 7.0, 5.0, 4.0]) * rng.gamma(10, 0.1, (2, P, 4))
    h = np.einsum("hpk,ki,kj->hpij", strength_HPk, v, v) + 0.02 * np.eye(ALL)
    d_N = np.ones(4) @ v + 0.2 * rng.normal(size=ALL)
    turned = [np.linalg.qr((v[:, :N] + 0.02 * rng.normal(size=(4, N))).T)[0].T for _ in range(2)]
    return World(h, d_N, turned)


def test_removal_undoes_what_dense_algebra_says_with_the_vectors_of_the_other_half():
    world = planted()
    record = world.measure(ks=(1, 2, 4, 16), n_random=3)
    d = world.d_N
    total = np.mean([world.damage(half, d) for half in (0, 1)])
    assert record["damage"]["estimate"] == pytest.approx(total, rel=1e-4)

    def left(k: int) -> float:
        """The damage at θ* + D − P_S D over both halves."""
        kept = []
        for half in (0, 1):
            basis = world.bases_HkN[1 - half][:k]
            kept.append(world.damage(half, d - lifted(basis.T @ (basis @ d[:N]))))
        return float(np.mean(kept))

    assert [step["k"] for step in record["curve"]] == [1, 2, 4, 16]
    assert [step["dimension"] for step in record["curve"]] == [[1, 1], [2, 2], [4, 4], [4, 4]]
    for step in record["curve"]:
        assert step["left"]["estimate"] == pytest.approx(left(step["k"]) / total, rel=1e-3)
    assert record["undone"]["estimate"] == pytest.approx(1 - left(4) / total, rel=1e-4)
    assert record["undone"]["estimate"] > 0.8 and record["k"] == [4, 4]

    parts = [lifted(b.T @ (b @ d[:N])) for b in world.bases_HkN[::-1]]
    added = np.mean([world.damage(half, part) for half, part in enumerate(parts)])
    assert record["added"]["estimate"] == pytest.approx(added, rel=1e-4)
    assert record["share_of_norm"] == pytest.approx(np.mean([p @ p for p in parts]) / (d @ d), rel=1e-4)
    off_route = np.mean([world.damage(half, d - lifted(d[:N])) for half in (0, 1)])
    assert record["route"]["estimate"] == pytest.approx(1 - off_route / total, rel=1e-4)
    shrunk = []
    for half, part in enumerate(parts):
        rest = d - part
        shrunk.append(world.damage(half, d - np.linalg.norm(part) / np.linalg.norm(rest) * rest))
    complement = record["margins"][1]
    assert complement["share"]["estimate"] == pytest.approx(1 - np.mean(shrunk) / total, rel=1e-3)
    margin = record["undone"]["estimate"] - complement["share"]["estimate"]
    assert complement["margin"]["estimate"] == pytest.approx(margin, abs=1e-9) and complement["margin"]["ci95"][0] > 0
    random = record["margins"][0]
    assert random["margin"]["estimate"] == pytest.approx(record["undone"]["estimate"] - max(random["shares"]))
    assert random["margin"]["ci95"][0] > 0.3
    assert record["undone"]["null"] == max(*random["shares"], complement["share"]["estimate"])
    json.dumps(record, allow_nan=False)


def test_controls_are_removed_at_the_norm_of_the_part_in_the_subspace():
    world = planted()
    world.measure(ks=(4,), n_random=5)
    # Each half: θ_t, without the route, without S, without the complement, θ* + P_S D. Then each draw on both halves.
    known, drawn = world.points[:10], world.points[10:]
    assert len(drawn) == 10
    for found, judged in ((1, 0), (0, 1)):
        basis = world.bases_HkN[found]
        size = np.linalg.norm(basis @ world.d_N[:N])
        own = known[5 * judged : 5 * judged + 5]
        pieces = [own[0] - point for point in (own[2], own[3], *drawn[judged::2])]
        np.testing.assert_allclose([np.linalg.norm(x) for x in pieces], size, rtol=1e-4)
        np.testing.assert_allclose(own[4], pieces[0], atol=1e-5)
        assert abs(pieces[0] @ pieces[1]) < 1e-3 * size**2
        for piece in pieces[2:]:
            assert np.abs(piece[N:]).max() < 1e-5  # random pieces lie in the route, as S does
    assert min(np.linalg.norm(a - b) for i, a in enumerate(drawn[::2]) for b in drawn[::2][:i]) > 0.1


def test_random_pieces_are_components_in_uniformly_random_subspaces():
    """The cosine of D's part and the piece, against random subspaces that are drawn as bases."""
    world, rng = planted(), np.random.default_rng(0)
    world.measure(ks=(4,), n_random=120)
    unit = world.d_N[:N] / np.linalg.norm(world.d_N[:N])
    pieces = np.array([world.points[0] - point for point in world.points[10::2]])[:, :N]
    pieces /= np.linalg.norm(pieces, axis=1, keepdims=True)
    squared = (pieces @ unit) ** 2
    drawn = np.array([np.sum((orthonormal(rng, 4) @ unit) ** 2) for _ in range(400)])
    np.testing.assert_allclose(np.quantile(squared, [0.1, 0.5, 0.9]), np.quantile(drawn, [0.1, 0.5, 0.9]), rtol=0.25)
    # Beside D every direction is as likely as any other: the mean of ppᵀ is a multiple of the identity there.
    aside = pieces - np.outer(pieces @ unit, unit)
    spread = np.linalg.eigvalsh(aside.T @ aside / len(aside))
    # Of 120 draws in 63 dimensions, the smallest is near 0.08 / N and the largest near 3 / N (Marchenko and Pastur).
    assert spread[1] > 0.03 / N and spread[-1] < 4.5 / N


def test_nothing_is_undone_where_the_displacement_has_no_part_in_the_subspace():
    world = planted()
    spanned = np.linalg.qr(np.concatenate([world.d_N[None, :N], world.bases_HkN[0]]).T)[0].T
    world = World(world.h_HPNN, world.d_N, [spanned[1:4], spanned[2:5]])
    record = world.measure(ks=(3,), n_random=2)
    assert record["undone"]["estimate"] == pytest.approx(0, abs=1e-5) and record["share_of_norm"] < 1e-9
    assert [abs(x) < 1e-5 for x in record["margins"][0]["shares"]] == [True, True]
    assert record["added"]["estimate"] == pytest.approx(0, abs=1e-6)
    # Not one coordinate moves where the part is exactly 0, and no control divides by its norm.
    still = World(world.h_HPNN, np.r_[np.zeros(N), np.ones(N)], world.bases_HkN)
    record = still.measure(ks=(3,), n_random=2)
    assert record["undone"]["estimate"] == 0 and record["margins"][0]["shares"] == [0, 0]
    assert record["margins"][1]["margin"]["estimate"] == 0 and record["route"]["estimate"] == 0


def test_what_cannot_be_measured_says_why():
    world = planted()
    record = world.measure(dimension=0, n_random=2)
    assert record["k"] == [0, 0] and record["share_of_norm"] == 0
    for figure in (record["undone"], record["added"], record["curve"][0]["left"], record["margins"][1]["margin"]):
        assert figure["estimate"] is None and figure["reason"] == removal.NONE
    assert record["damage"]["estimate"] > 0 and record["route"]["estimate"] > 0
    json.dumps(record, allow_nan=False)
    # Half of the prompts gain what the others lose.
    sign_P = np.where(np.arange(P) % 2, 1.0, -1.0)[None, :, None, None]
    record = World(world.h_HPNN * sign_P, world.d_N, world.bases_HkN).measure(n_random=2)
    low, high = record["damage"]["ci95"]
    assert low < 0 < high
    for figure in (record["undone"], record["route"], record["margins"][0]["margin"], record["curve"][0]["left"]):
        assert figure["estimate"] is None and figure["reason"] == removal.OPEN
    assert record["margins"][0]["shares"] == [] and record["added"]["estimate"] is not None
    json.dumps(record, allow_nan=False)
    world.h_HPNN[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite: total"):
        world.measure(n_random=2)


def test_without_random_pieces_the_complement_still_has_its_margin():
    some, none = (planted().measure(n_random=n) for n in (2, 0))
    random, complement = none["margins"]
    assert complement == some["margins"][1] and complement["margin"]["estimate"] is not None
    assert (random["n"], random["shares"], random["band95"]) == (0, [], None)
    assert random["margin"]["estimate"] is None and random["margin"]["reason"] == "no random piece was removed"
    assert none["undone"]["null"] == pytest.approx(complement["share"]["estimate"])
    record = planted().measure(dimension=0, n_random=0)
    assert [m["margin"]["reason"] for m in record["margins"]] == [removal.NONE] * 2
    assert record["undone"]["null"] is None or record["undone"]["estimate"] is None


def test_eight_devices_give_the_figures_of_one(mesh8):
    def place(x: Any) -> Any:
        return {name: jax.device_put(leaf, named(mesh8, *AXES)) for name, leaf in x.items()}

    one, eight = planted().measure(n_random=3), planted().measure(place, n_random=3)
    for name in ("undone", "added", "route", "damage"):
        assert eight[name]["estimate"] == pytest.approx(one[name]["estimate"], rel=1e-4), name
    np.testing.assert_allclose(eight["margins"][0]["shares"], one["margins"][0]["shares"], atol=1e-4)
