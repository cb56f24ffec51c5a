"""Extreme eigenvalues over blocks of prompts: laws, and how often the intervals hold the truth in simulations.

`python -m pytest -m slow tests/stats/test_eigenvalues.py -s` prints the rows of mdrl_jax/stats/README.md.
"""

import dataclasses

import numpy as np
import pytest

from mdrl_jax.stats import bootstrap, eigenvalues
from mdrl_jax.stats.estimate import Estimate

Array = np.ndarray
N = 60  # coordinates outside the subspace


@dataclasses.dataclass(frozen=True)
class World:
    """Prompts with Hessians H_p, of which V^T H_p V and R_p = (I − P_S) H_p V are drawn, and gradients V^T g_p.

    Attributes:
      values_k: eigenvalues of the mean of V^T H_p V.
      epsilon: ‖R‖ of the mean R.
      slope: ‖g‖ of the mean gradient.
      noise: spread of entries of R_p and g_p, and of a symmetric part of V^T H_p V, beside the Hessian's own.
      spread: standard deviation of the strength of a prompt, whose mean is 1.
    """

    values_k: tuple[float, ...]
    epsilon: float = 0.0
    slope: float = 0.0
    noise: float = 0.1
    spread: float = 0.3

    def draw(self, rng: np.random.Generator, blocks: int, size: int) -> tuple[Array, Array, Array]:
        """Sums over the prompts of each block of V^T H_p V, R_p and V^T g_p."""
        values, k, prompts = np.array(self.values_k), len(self.values_k), blocks * size
        strength = rng.gamma(self.spread**-2, self.spread**2, prompts)
        # Six random directions a prompt, whose outer products have the mean diag(values).
        x = rng.normal(size=(prompts, 6, k)) * np.sqrt(np.abs(values))
        curved = np.einsum("p,pri,prj->pij", strength, x * np.sign(values), x) / 6
        free = rng.normal(size=(prompts, k, k))
        curved += self.noise * (free + free.transpose(0, 2, 1)) / 2
        leak = np.zeros((N, k))
        leak[:k] = self.epsilon * np.diag(0.7 ** np.arange(k))
        leaks = strength[:, None, None] * leak + self.noise * rng.normal(size=(prompts, N, k))
        slopes = strength[:, None] * self.slope * np.eye(k)[-1] + self.noise * rng.normal(size=(prompts, k))
        return tuple(a.reshape(blocks, size, *a.shape[1:]).sum(1) for a in (curved, leaks, slopes))  # pyright: ignore


def products(leaks_MNk: Array) -> tuple[Array, Array]:
    transposed = leaks_MNk.transpose(0, 2, 1)
    return transposed @ leaks_MNk, transposed @ leaks_MNk.sum(0)


def estimates(world: World, curved: Array, leaks: Array, slopes: Array, size: int) -> dict[str, tuple[Estimate, float]]:
    """Every figure with its true value; "solution" only where the analysis gives it."""
    counts = np.full(len(curved), size)
    smallest = eigenvalues.of_mean(curved, counts, False)
    found = {
        "smallest": (smallest, min(world.values_k)),
        "largest": (eigenvalues.of_mean(curved, counts, True), max(world.values_k)),
        "norm": (eigenvalues.root(eigenvalues.squared_norm(*products(leaks), counts)), world.epsilon),
        "length": (eigenvalues.root(eigenvalues.squared_length(slopes, counts)), world.slope),
    }
    if smallest.low > 0:
        away = eigenvalues.squared_length(slopes, counts, matrices_Mkk=curved)
        found["solution"] = eigenvalues.root(away), world.slope / world.values_k[-1]
    return found


WORLDS = {
    # Gaps between eigenvalues are larger than the noise.
    "apart": World((1.0, 0.6, 0.35, 0.2), epsilon=0.3, slope=0.3),
    # Noise is larger than most gaps.
    "crowded": World((1.0, *np.geomspace(0.4, 0.2, 15)), epsilon=0.1, slope=0.3, noise=0.3),
    # The smallest eigenvalue occurs seven times, and there is no gradient and no leak.
    "alike": World((1.0, *[0.2] * 7), noise=0.3),
}
SIZES = [(6, 4), (12, 2)]  # blocks, and prompts in a block


def coverage(world: World, blocks: int, size: int, n: int) -> dict[str, Array]:
    """For each figure, whether the interval holds the truth, by sample."""
    rng, held = np.random.default_rng(0), {}
    for _ in range(n):
        for name, (figure, truth) in estimates(world, *world.draw(rng, blocks, size), size).items():
            held.setdefault(name, []).append(figure.includes(truth))
    return {name: np.array(x) for name, x in held.items()}


@pytest.mark.parametrize(("blocks", "size"), SIZES)
def test_intervals_hold_the_truth_where_eigenvalues_are_apart(blocks: int, size: int):
    """In 92 to 98 %, with two standard errors of a coverage of 250 samples."""
    for name, held in coverage(WORLDS["apart"], blocks, size, 250).items():
        assert held.size > 100 and 0.92 - 0.034 < held.mean() < 0.98 + 0.018, (name, held.mean())


@pytest.mark.parametrize("name", ["crowded", "alike"])
def test_intervals_are_too_wide_and_not_too_narrow_where_noise_is_larger_than_the_gaps(name: str):
    """A jackknife interval of the eigenvalue of the mean alone misses the truth in most samples."""
    world, rng, plain, joined = WORLDS[name], np.random.default_rng(1), [], []
    for _ in range(120):
        curved, leaks, _ = world.draw(rng, 12, 2)
        counts, low = np.full(12, 2), min(world.values_k)
        value = lambda kept, x=curved: float(np.linalg.eigvalsh(x[kept].sum(0) / (2 * len(kept)))[0])  # noqa: E731
        every = np.arange(12)
        alone = bootstrap.jackknife(value(every), [value(np.delete(every, i)) for i in every])
        plain.append(alone.includes(low))
        norm = eigenvalues.root(eigenvalues.squared_norm(*products(leaks), counts))
        joined.append(eigenvalues.of_mean(curved, counts, False).includes(low) and norm.includes(world.epsilon))
    assert np.mean(plain) < 0.5 and np.mean(joined) > 0.88


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "size"), SIZES)
@pytest.mark.parametrize("name", WORLDS)
def test_coverage_of_the_readme(name: str, blocks: int, size: int):
    held = coverage(WORLDS[name], blocks, size, 1000)
    print(f"| {name} | {blocks} |", " | ".join(f"{x} {100 * y.mean():.1f} of {y.size}" for x, y in held.items()), "|")
    assert all(0.92 - 0.009 < x.mean() for x in held.values() if x.size > 100)
    assert name != "apart" or all(x.mean() < 0.985 for x in held.values())


def test_the_crossed_value_is_never_further_out_and_the_estimate_lies_in_the_interval():
    rng = np.random.default_rng(2)
    for _ in range(50):
        x = rng.normal(size=(5, 4, 4))
        curved, counts = x + x.transpose(0, 2, 1), rng.integers(1, 4, 5).astype(float)
        for largest, sign in ((True, 1), (False, -1)):
            plain = np.linalg.eigvalsh(curved.sum(0) / counts.sum())[-1 if largest else 0]
            crossed = []
            for i in range(5):
                rest = np.delete(curved, i, 0).sum(0)
                v = np.linalg.eigh(rest)[1][:, -1 if largest else 0]
                crossed.append(v @ curved[i] @ v)
            assert sign * (plain - sum(crossed) / counts.sum()) > -1e-12
            found = eigenvalues.of_mean(curved, counts, largest)
            assert found.low <= found.value <= found.high and found.n == 5
            assert found.high > plain if largest else found.low < plain


def test_blocks_that_are_all_alike_have_exact_figures_without_width():
    rng = np.random.default_rng(3)
    r, g, counts = rng.normal(size=(9, 3)), rng.normal(size=3), np.array([1.0, 2, 3, 4])
    h = np.diag([3.0, 2.0, 0.5])
    sums = lambda x: counts.reshape(-1, *[1] * x.ndim) * x  # noqa: E731
    exact = {
        "norm": (eigenvalues.squared_norm(*products(sums(r)), counts), np.linalg.norm(r, 2) ** 2),
        "length": (eigenvalues.squared_length(sums(g), counts), g @ g),
        "solution": (
            eigenvalues.squared_length(sums(g), counts, matrices_Mkk=sums(h)),
            np.sum(np.linalg.solve(h, g) ** 2),
        ),
        "smallest": (eigenvalues.of_mean(sums(h), counts, False), 0.5),
        "largest": (eigenvalues.of_mean(sums(h), counts, True), 3.0),
    }
    for name, (figure, truth) in exact.items():
        assert [figure.value, figure.low, figure.high] == pytest.approx([truth] * 3), name


def test_squares_of_pure_noise_are_0_on_average():
    """The square of a mean of noise is not: it is the variance of the mean."""
    rng, norms, lengths, naive = np.random.default_rng(4), [], [], []
    for _ in range(200):
        r, g = rng.normal(size=(6, 200, 1)), rng.normal(size=(6, 3))
        norms.append(eigenvalues.squared_norm(*products(r), np.ones(6)).value)
        lengths.append(eigenvalues.squared_length(g, np.ones(6)).value)
        naive.append(float(np.sum(r.mean(0) ** 2)))
    assert np.mean(naive) > 30
    for found in (norms, lengths):
        assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(200)
    assert eigenvalues.root(Estimate(-1.0, -2.0, 4.0, 6)) == Estimate(0.0, 0.0, 2.0, 6)


def test_three_blocks_are_too_few():
    with pytest.raises(ValueError, match="at least 4 blocks, not 3"):
        eigenvalues.of_mean(np.ones((3, 2, 2)), np.ones(3), True)
