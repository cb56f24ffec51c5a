"""How far two gradients are from being Pareto-stationary: against the exact minimum, without and with noise."""

import numpy as np
import pytest

from mdrl_jax.recovery.refresh.pareto import smallest

DIM = 400


def gram(a: np.ndarray, b: np.ndarray, noise: float, blocks: int = 8, seed: int = 0) -> np.ndarray:
    """Inner products of blocks whose gradients are a, or b, with noise of this norm."""
    rng = np.random.default_rng(seed)
    rows = np.concatenate([np.tile(a, (blocks, 1)), np.tile(b, (blocks, 1))])
    rows = rows + noise / np.sqrt(DIM) * rng.normal(size=rows.shape)
    return rows @ rows.T


def vectors(*angles: float) -> list[np.ndarray]:
    return [np.concatenate([[np.cos(x), np.sin(x)], np.zeros(DIM - 2)]) for x in angles]


@pytest.mark.parametrize(
    ("lengths", "angle", "expected", "weight"),
    [
        ((1.0, 1.0), np.pi, 0.0, 0.5),  # opposed: nothing lowers both losses
        ((3.0, 1.0), np.pi, 0.0, 0.25),
        ((1.0, 1.0), np.pi / 2, np.sqrt(0.5), 0.5),
        ((2.0, 1.0), 0.0, 1.0, 0.0),  # the shorter one alone
        ((1.0, 2.0), np.pi / 3, 1.0, 1.0),
    ],
)
def test_without_noise_it_is_the_exact_minimum(lengths, angle, expected, weight):
    a, b = (n * v for n, v in zip(lengths, vectors(0.0, angle), strict=True))
    found = smallest(gram(a, b, 0.0), 8)
    by_search = min(np.linalg.norm(w * a + (1 - w) * b) for w in np.linspace(0, 1, 1001))
    assert found["norm"]["estimate"] == pytest.approx(expected, abs=1e-6) == pytest.approx(by_search, abs=1e-3)
    assert found["weight"] == pytest.approx(weight, abs=1e-6) and found["norms"] == pytest.approx(list(lengths))
    assert found["noise"] == pytest.approx(0, abs=1e-6)


def test_noise_is_not_taken_for_a_gradient():
    """With gradients of 0 the mean over blocks has a norm, but the interval holds 0; with gradients it holds theirs."""
    a, b = vectors(0.0, np.pi / 2)
    zeros = [smallest(gram(0 * a, 0 * b, 1.0, seed=i), 8) for i in range(200)]
    assert np.mean([z["norm"]["ci95"][0] == 0.0 for z in zeros]) > 0.9
    w = np.array([z["weight"] for z in zeros])
    expected = np.sqrt((w**2 + (1 - w) ** 2) / 8)
    np.testing.assert_allclose([z["noise"] for z in zeros], expected, rtol=0.2)
    some = [smallest(gram(a, b, 1.0, seed=i), 8)["norm"]["ci95"] for i in range(200)]
    assert np.mean([low <= np.sqrt(0.5) <= high for low, high in some]) > 0.9
    assert np.mean([low > 0 for low, _ in some]) > 0.9


def test_a_gradient_that_is_not_finite_is_said():
    bad = gram(*vectors(0.0, 1.0), 0.0)
    bad[0, 0] = np.nan
    assert smallest(bad, 8)["norm"]["reason"] == "a gradient is not finite"
