"""Gradient comparisons against planted gradients with noise, brute-force splits, and Grams of real trees."""

import itertools
import json
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mdrl_jax import tree
from mdrl_jax.analysis import gradients
from mdrl_jax.parallel.sharding import named
from mdrl_jax.stats import cosines
from mdrl_jax.stats.estimate import recorded

Array = np.ndarray


def planted(
    rng: np.random.Generator, n: int, m: int, cosine: float, rho: float, reps: int, d: int = 300, falloff: float = 0.0
) -> tuple[Array, Array, Array]:
    """Grams (A with A, B with B, A with B), `reps` of each, of blocks whose unit mean gradients have `cosine` and a
    reliability `rho`. The noise has a spectrum j^-falloff over directions in random order.
    """
    scale = rng.permutation(1 / np.arange(1, d + 1) ** (falloff / 2))
    scale /= np.linalg.norm(scale)
    means = np.zeros((2, d))
    means[0, 0], means[1, :2] = 1.0, (cosine, np.sqrt(1 - cosine**2))

    def blocks(mean: Array, k: int) -> Array:
        return mean + np.sqrt((1 / rho - 1) * k) * scale * rng.normal(size=(reps, k, d))

    a, b = blocks(means[0], n), blocks(means[1], m)
    return a @ a.swapaxes(1, 2), b @ b.swapaxes(1, 2), a @ b.swapaxes(1, 2)


def coverage(figure: cosines.StackedEstimates, truth: float, where: Array | None = None) -> float:
    inside = (figure.low <= truth) & (truth <= figure.high)
    return float(np.mean(inside if where is None else inside[where]))


def test_disattenuation_recovers_the_planted_cosine() -> None:
    aa, bb, ab = planted(np.random.default_rng(0), 8, 16, 0.5, 0.5, 3000)
    a, b, c = cosines.within(aa), cosines.within(bb), cosines.between(ab)
    raw, clean = cosines.raw_cosine(c, a, b), cosines.disattenuated_cosine(c, a, b)
    assert np.median(raw.value) == pytest.approx(0.25, abs=0.01)
    assert np.median(clean.value) == pytest.approx(0.5, abs=0.01)
    halves = [cosines.half_cosine(x) for x in (a, b)]
    measurable = (halves[0].low > 0) & (halves[1].low > 0)
    assert measurable.mean() > 0.9
    assert 0.93 < coverage(clean, 0.5, measurable) < 0.98
    assert 0.93 < coverage(raw, 0.25) < 0.98
    assert 0.92 < coverage(halves[0], 1 / 3) < 0.98  # r = ρ/(2 − ρ)
    assert 0.93 < coverage(cosines.inner_product(c)[0], 0.5) < 0.98
    assert np.median(cosines.reliability(halves[1]).value) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("n", "m", "cosine", "rho", "falloff"),
    [(16, 16, 0.0, 0.5, 0.5), (8, 8, 0.0, 0.8, 0.0), (16, 8, -0.3, 0.9, 1.0), (8, 8, 0.5, 0.98, 0.0)],
)
def test_intervals_cover_in_other_regimes(n: int, m: int, cosine: float, rho: float, falloff: float) -> None:
    """At high reliability as at low, where noise meets noise; too wide is allowed for steep spectra, too narrow not."""
    aa, bb, ab = planted(np.random.default_rng(1), n, m, cosine, rho, 1500, falloff=falloff)
    a, b, c = cosines.within(aa), cosines.within(bb), cosines.between(ab)
    measurable = (cosines.half_cosine(a).low > 0) & (cosines.half_cosine(b).low > 0)
    assert measurable.mean() > 0.6
    assert 0.93 < coverage(cosines.disattenuated_cosine(c, a, b), cosine, measurable) <= 0.995
    assert 0.93 < coverage(cosines.raw_cosine(c, a, b), cosine * rho) <= 0.995


def test_intervals_are_no_wider_than_the_spread_asks() -> None:
    """Where pairs carry most of the noise, and where the norms' noise cancels in the cosine of two like gradients."""
    _, _, ab = planted(np.random.default_rng(11), 16, 12, 0.5, 0.2, 2000)
    figure = cosines.inner_product(cosines.between(ab))[0]
    width = np.median(figure.high - figure.low) / (2 * figure.value.std())
    assert 1.8 < width < 2.45  # t / 1: counting the pairs' part three times would make it 3.4
    aa, bb, ab = planted(np.random.default_rng(12), 16, 16, 0.9, 0.95, 2000, d=10)
    a, b, c = cosines.within(aa), cosines.within(bb), cosines.between(ab)
    for figure in (cosines.raw_cosine(c, a, b), cosines.disattenuated_cosine(c, a, b)):
        width = np.median(figure.high - figure.low) / (2 * figure.value.std())
        assert 1.75 < width < 2.3


def test_variance_of_pairs_is_the_residual_of_the_additive_model() -> None:
    x = np.random.default_rng(13).normal(size=(1, 5, 7))
    rest = x - x.mean(2, keepdims=True) - x.mean(1, keepdims=True) + x.mean()
    assert cosines.between(x).pair[0] == pytest.approx(np.sum(rest**2) / 24)


def test_noise_is_not_measurable() -> None:
    """A saturated domain has no signal: its halves agree by chance in at most 2.5 % of cases."""
    x = np.random.default_rng(2).normal(size=(3000, 8, 300))
    half = cosines.half_cosine(cosines.within(x @ x.swapaxes(1, 2)))
    assert np.mean(half.low > 0) < 0.025
    assert coverage(half, 0.0) > 0.93


@pytest.mark.parametrize("n", [4, 6])
def test_r_is_the_ratio_of_averages_over_all_half_splits(n: int) -> None:
    x = np.random.default_rng(3).normal(0.4, 1.0, (n, 5))
    products, norms = [], []
    for half in itertools.combinations(range(n), n // 2):
        one, other = x[list(half)].mean(axis=0), x[[i for i in range(n) if i not in half]].mean(axis=0)
        products.append(one @ other)
        norms.append((one @ one + other @ other) / 2)
    a = cosines.within((x @ x.T)[None])
    half = cosines.half_cosine(a)
    assert half.value[0] == pytest.approx(np.mean(products) / np.mean(norms))
    mean = x.mean(axis=0)
    assert a.squared_norm[0] == pytest.approx(mean @ mean)
    assert cosines.reliability(half).value[0] == pytest.approx(a.signal[0] / (mean @ mean))


def test_inner_product_test_is_not_liberal_and_has_power() -> None:
    """Where neither gradient has signal, where only one has, and where both do but are orthogonal."""
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(2, 6000, 8, 100))
    for shift_x, shift_y in (((0, 0), (0, 0)), ((2, 0), (0, 0)), ((2, 0), (0, 2))):
        a, b = x.copy(), y.copy()
        a[..., :2] += shift_x
        b[..., :2] += shift_y
        p = cosines.inner_product(cosines.between(a @ b.swapaxes(1, 2)))[1]
        assert np.mean(p < 0.05) < 0.06 and np.mean(p < 0.001) < 0.003
    p = cosines.inner_product(cosines.between(planted(rng, 8, 8, 0.9, 0.8, 500)[2]))[1]
    assert np.mean(p < 0.001) > 0.9


def test_sign_flips_computed_at_once_are_those_computed_one_by_one() -> None:
    rng = np.random.default_rng(5)
    gram, signs = rng.normal(0.3, 1.0, (4, 6, 5)), rng.choice([-1.0, 1.0], (3, 6))
    inner, p = cosines.permuted_tests(gram, signs)
    for r, s in enumerate(signs):
        figure, want = cosines.inner_product(cosines.between(gram * s[None, :, None]))
        np.testing.assert_allclose(inner[r], figure.value)
        np.testing.assert_allclose(p[r], want, rtol=1e-6)


def simulated_gram(rng: np.random.Generator, cosine_LK: Array, n: int, rho: float, d: int = 60) -> gradients.Gram:
    """Gram of 2n blocks (A's, then B's): leaves of L layers by kind, each tensor with its own planted cosine."""
    out = {}
    for kind, cosine_L in zip(("q", "gate", "down"), cosine_LK.T, strict=True):
        parts = []
        for cosine in cosine_L:
            mean = np.zeros((2, d))
            mean[0, 0], mean[1, :2] = 1.0, (cosine, np.sqrt(1 - cosine**2))
            noise = np.sqrt((1 / rho - 1) * n / d) * rng.normal(size=(2 * n, d))
            x = (np.repeat(mean, n, axis=0) if rho > 0.01 else 0.0) + noise
            parts.append(x @ x.T)
        out[f"layers/{kind}/kernel"] = np.stack(parts)
    return out


def test_tensors_that_conflict_and_agree_are_found_and_cancel() -> None:
    cosine_LK = np.zeros((10, 3))
    cosine_LK[:3, 0], cosine_LK[3:6, 1] = 0.8, -0.8
    gram = simulated_gram(np.random.default_rng(6), cosine_LK, 12, 0.9)
    found = gradients.compare(gram, range(12), range(12, 24))
    assert found["synergistic"]["tensors"] == [f"layers/q/kernel[{i}]" for i in range(3)]
    assert found["conflicting"]["tensors"] == [f"layers/gate/kernel[{i}]" for i in range(3, 6)]
    assert found["conflicting"]["count"]["null"]["high"] < 3 == found["conflicting"]["count"]["estimate"]
    model = found["model"]
    clean = recorded(model["disattenuated"])
    assert clean is not None and clean.includes(0.0) and abs(clean.value) < 0.03
    sums = found["cancellation"]
    assert sums["net"]["estimate"] == pytest.approx(model["inner"]["estimate"])
    assert sums["positive"]["estimate"] + sums["negative"]["estimate"] == pytest.approx(sums["net"]["estimate"])
    for sign, truth in (("positive", 2.4), ("negative", -2.4)):
        low, high = sums[sign]["ci95"]
        assert low < truth < high and high - low < 1.2
    kinds = {row["name"]: row["disattenuated"]["estimate"] for row in found["kinds"]}
    assert kinds == pytest.approx({"q": 0.24, "gate": -0.24, "down": 0.0}, abs=0.05)
    assert [row["layer"] for row in found["layers"]] == list(range(10))
    assert found["layers"][4]["inner"]["estimate"] == pytest.approx(-0.8, abs=0.2)
    assert len(found["tensors"]) == 30 and found["tensors"][12]["name"] == "layers/gate/kernel[2]"
    json.dumps(found, allow_nan=False)


def test_sums_by_sign_cover_what_was_planted_and_noise_adds_nothing() -> None:
    """10 of 40 tensors at 0.5, 10 at −0.5, the others orthogonal; then the same without signal: bounds, not excess."""
    rng = np.random.default_rng(9)
    cosine_T = np.repeat([0.5, -0.5, 0.0], [10, 10, 20])

    def simulate(rho: float, n: int = 12, d: int = 30) -> tuple[Array, Array, Array]:
        a, b = np.sqrt((1 / rho - 1) * n / d) * rng.normal(size=(2, 40, n, d))
        a[..., 0] += 1
        b[..., 0] += cosine_T[:, None]
        b[..., 1] += np.sqrt(1 - cosine_T**2)[:, None]
        cross = a @ b.swapaxes(1, 2)
        figure = cosines.sums_by_sign(cross, rng, n_splits=40)
        return figure.value, (figure.high - figure.low) / 2, np.maximum(cross.mean((1, 2)), 0).sum()

    value, half, plain = (np.array(x) for x in zip(*(simulate(0.9) for _ in range(160)), strict=True))
    assert value[:, 0] + value[:, 1] == pytest.approx(value[:, 2])
    assert value.mean(axis=0) == pytest.approx([5, -5, 0], abs=0.25)
    covered = np.mean(np.abs(value - [5, -5, 0]) < half, axis=0)
    assert np.all((0.87 < covered) & (covered < 0.99))
    weak, _, plain = (np.array(x) for x in zip(*(simulate(0.3) for _ in range(30)), strict=True))
    assert plain.mean() > 7.5 and 1.5 < weak[:, 0].mean() < 5


def test_noise_alone_calls_no_tensor_and_is_not_measurable() -> None:
    """All hypotheses are true: the false discovery rate is the share of runs that call any tensor."""
    rng = np.random.default_rng(7)
    any_called = []
    for _ in range(60):
        gram = simulated_gram(rng, np.zeros((10, 3)), 8, 0.001)
        found = gradients.compare(gram, range(8), range(8, 16), n_null=20)
        any_called.append(bool(found["conflicting"]["tensors"] or found["synergistic"]["tensors"]))
    assert np.mean(any_called) < 0.1
    row = found["model"]
    assert row["disattenuated"]["estimate"] is None and "do not agree" in row["disattenuated"]["reason"]
    assert row["cosine"]["null"]["low"] < row["cosine"]["estimate"] < row["cosine"]["null"]["high"]
    low, high = found["cancellation"]["positive"]["ci95"]
    assert low < 0 < high


def test_a_tensor_without_gradient_is_reported_as_such() -> None:
    gram = simulated_gram(np.random.default_rng(8), np.full((2, 3), 0.5), 6, 0.9)
    gram["norm/scale"] = np.zeros((1, 12, 12))
    found = gradients.compare(gram, range(6), range(6, 12))
    row = found["tensors"][-1]
    assert (row["name"], row["layer"], row["p"]) == ("norm/scale", None, 1.0)
    assert row["cosine"]["estimate"] is None and row["disattenuated"]["estimate"] is None
    assert row["inner"]["estimate"] == 0.0
    json.dumps(found, allow_nan=False)
    with pytest.raises(ValueError, match="at least 4 blocks, not 3"):
        gradients.compare(gram, range(3), range(6, 12))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_has_no_figures_and_leaves_the_other_tensors_theirs(bad: float) -> None:
    gram = simulated_gram(np.random.default_rng(8), np.full((2, 3), 0.8), 8, 0.9)
    whole = gradients.compare(gram, range(8), range(8, 16))
    gram["layers/q/kernel"][1, 3, :] = gram["layers/q/kernel"][1, :, 3] = bad  # one block of A in one tensor
    found = gradients.compare(gram, range(8), range(8, 16))
    rows = {row["name"]: row for row in (found["model"], *found["kinds"], *found["layers"], *found["tensors"])}
    same = {row["name"]: row for row in (*whole["kinds"], *whole["layers"], *whole["tensors"])}
    lost = ("model", "q", "layer 1", "layers/q/kernel[1]")
    for name in lost:
        row = rows.pop(name)
        assert row["p"] is None
        for figure in (row["inner"], row["cosine"], row["disattenuated"]):
            assert figure["estimate"] is None and figure["reason"] == "a gradient is not finite"
        for key in ("halves", "reliability"):
            assert row[key][0]["reason"] == "the gradient is not finite" and row[key][1]["estimate"] is not None
    assert rows == {name: row for name, row in same.items() if name not in lost}
    assert all(f["reason"] == "a gradient is not finite" for f in found["cancellation"].values())
    assert found["synergistic"]["tensors"] == [n for n in whole["synergistic"]["tensors"] if n not in lost]
    assert found["synergistic"]["count"]["n"] == whole["synergistic"]["count"]["n"] - 1 == 5
    json.dumps(found, allow_nan=False)
    every = gradients.compare({"norm": np.full((1, 16, 16), bad)}, range(8), range(8, 16))
    assert every["conflicting"]["tensors"] == [] and every["conflicting"]["count"]["estimate"] is None
    json.dumps(every, allow_nan=False)


def test_a_product_that_is_not_finite_has_no_p_value() -> None:
    gram = np.zeros((3, 4, 4))
    gram[1, 0, 0], gram[2] = np.nan, 1.0
    figure, p = cosines.inner_product(cosines.between(gram))
    np.testing.assert_array_equal(p, [1.0, np.nan, 0.0])
    assert figure.estimate(1, 8) is None


def random_tree(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    layers = {"gate": {"kernel": make(3, 4, 8)}, "attn_norm": {"scale": make(3, 4)}}
    return {"embedding": make(6, 4), "layers": layers}


def dense_gram(n: int) -> gradients.Gram:
    trees = [random_tree(i) for i in range(n)]
    out = {}
    for keys, _ in jax.tree_util.tree_leaves_with_path(trees[0]):
        name = tree.path(keys)
        flat = np.stack([np.asarray(dict(zip_paths(t))[name], float) for t in trees])
        rows = flat.reshape(n, 3 if tree.is_stacked(name) else 1, -1)
        out[name] = np.einsum("iLd,jLd->Lij", rows, rows)
    return out


def zip_paths(t: Any) -> list[tuple[str, Any]]:
    return [(tree.path(keys), x) for keys, x in jax.tree_util.tree_leaves_with_path(t)]


class Counted:
    """Blocks of random gradients; counts calls and how many trees live at once."""

    def __init__(self) -> None:
        self.calls = self.alive = self.most = 0

    def __call__(self, i: int) -> Any:
        made = random_tree(i)
        weakref.finalize(made["embedding"], self.freed)
        self.calls += 1
        self.alive += 1
        self.most = max(self.most, self.alive)
        return made

    def freed(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize(("held", "calls"), [(2, 5 + 4 + 3 + 2), (3, 5 + 3), (4, 5 + 2), (5, 5), (9, 5)])
def test_tiles_give_the_gram_and_bound_what_is_held(held: int, calls: int) -> None:
    blocks = Counted()
    found = gradients.gram(blocks, 5, held)
    for name, want in dense_gram(5).items():
        np.testing.assert_allclose(found[name], want, rtol=1e-4, atol=1e-4)
    assert blocks.calls == calls
    assert blocks.most == min(held, 5)


def test_gram_of_one_block_and_of_too_few_held() -> None:
    assert gradients.gram(random_tree, 1, 2)["embedding"].shape == (1, 1, 1)
    with pytest.raises(ValueError, match="at least 2"):
        gradients.gram(random_tree, 3, 1)


def test_gram_of_sharded_gradients(mesh8: Mesh) -> None:
    def put(i: int) -> Any:
        g = random_tree(i)
        g["embedding"] = jax.device_put(g["embedding"], named(mesh8, "vocab", "embed"))
        gate = g["layers"]["gate"]
        gate["kernel"] = jax.device_put(gate["kernel"], named(mesh8, None, "embed", "mlp"))
        return g

    found = gradients.gram(put, 3, 3)
    for name, want in dense_gram(3).items():
        np.testing.assert_allclose(found[name], want, rtol=1e-4, atol=1e-4)
