"""Coverage of the intervals that the report prints, at the sizes used, on simulated rewards and derivatives.

`python -m pytest -m slow tests/stats/test_coverage.py -s` prints the table of mdrl_jax/stats/README.md.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest

from mdrl_jax.recovery.planning.outcomes import clopper_pearson
from mdrl_jax.recovery.rollback.tradeoff import Outcome, at_equal_loss
from mdrl_jax.stats import bootstrap, cosines, overlap, tests
from mdrl_jax.stats import estimate as st
from tests.stats.test_stats_tests import nested

N = 1000  # samples of each case; the standard error of a coverage of 95 % is 0.7 %
LOW, HIGH = 0.92 - 0.009, 0.98 + 0.005  # what is required, with a standard error of that coverage
Sampler = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def shown(what: str, size: str, covered: list[bool], missing: int = 0) -> float:
    """Prints a row of the table; the share of intervals that hold the truth, of those that are defined."""
    share = float(np.mean(covered))
    print(f"| {what} | {size} | {100 * share:.1f} % | {f'{100 * missing / N:.0f} %' if missing else ''} |")
    return share


# --- Damage and shares over prompts -----------------------------------------------------------------------------------


def rewards(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean rewards of 4 samples before and after a stage: two in three prompts are saturated, one in four loses."""
    p = np.where(rng.random(n) < 2 / 3, 0.99, rng.beta(2.0, 1.0, n))
    q = p * np.where(rng.random(n) < 0.25, rng.beta(1.0, 1.5, n), 1.0)
    return rng.binomial(4, p) / 4, rng.binomial(4, q) / 4


def reward_fall(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    before, after = rewards(rng, n)
    return before - after, np.ones(n)


def reward_curvature(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A·(U² + W): 0 where all rewards of a prompt are equal (three in five), with a long tail elsewhere."""
    x = rng.gamma(0.7, 1.5, n) * np.exp(0.5 * rng.normal(size=n)) + 0.6 * rng.normal(size=n)
    return np.where(rng.random(n) < 0.4, x, 0.0), np.ones(n)


def nll_rise(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums over the successes of a prompt and their number; the rise differs between prompts by a factor of 6."""
    p = np.where(rng.random(n) < 0.6, 0.97, rng.beta(1.5, 1.0, n))
    count = rng.binomial(4, p)
    each = rng.lognormal(-1.0, 0.9, n)[:, None] * rng.lognormal(0.0, 0.7, (n, 4)) - 0.1
    return np.where(np.arange(4) < count[:, None], each, 0.0).sum(axis=1), count.astype(float)


def ratio_of(sampler: Sampler) -> float:
    part, count = sampler(np.random.default_rng(99), 400_000)
    return float(part.sum() / count.sum())


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [16, 48])
@pytest.mark.parametrize("sampler", [reward_fall, reward_curvature, nll_rise])
def test_figures_of_damage(sampler: Sampler, prompts: int) -> None:
    draws, rng, truth = bootstrap.Draws(prompts), np.random.default_rng(1), ratio_of(sampler)
    found = []
    for _ in range(N):
        part, count = sampler(rng, prompts)
        found.append(draws.interval(draws.total(part) / draws.total(count)).includes(truth))
    what = sampler.__name__.replace("_", " ")
    assert LOW < shown(f"damage, bootstrap-t: {what}", f"{prompts} prompts", found) < HIGH


def orders(rng: np.random.Generator, n: int, first: float, second: float) -> tuple[np.ndarray, np.ndarray]:
    """First and second order of the damage by prompt: the second has a long tail; a fifth of the prompts none."""
    on, z = rng.random(n) < 0.8, rng.lognormal(0.0, 0.8, n)
    return (
        np.where(on, np.sqrt(z) * (first + 1.5 * rng.normal(size=n)), 0.0),
        np.where(on, second * z * (1 + 0.5 * rng.normal(size=n)), 0.0),
    )


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [16, 48])
@pytest.mark.parametrize(("first", "second"), [(0.2, 1.0), (1.0, 0.3), (0.0, 0.5)])
def test_shares(first: float, second: float, prompts: int) -> None:
    """Shares that are undefined where the interval of the whole includes 0."""
    a, b = orders(np.random.default_rng(99), 400_000, first, second)
    draws, rng, truth, found = bootstrap.Draws(prompts), np.random.default_rng(2), b.mean() / (a + b).mean(), []
    count = draws.total(np.ones(prompts))
    for _ in range(N):
        a, b = orders(rng, prompts, first, second)
        e = draws.fieller(draws.total(b) / count, draws.total(a + b) / count)
        if e is not None:
            found.append(e.includes(truth))
    # The level of Fieller's set is exact for all samples together; among the bounded ones it may be above.
    share = shown(f"share of {truth:.2f}, Fieller", f"{prompts} prompts", found, N - len(found))
    assert LOW < share <= 1.0


# --- Scores, differences, recovery, equal loss ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [100, 300])
@pytest.mark.parametrize("mean", [0.5, 0.94, 0.986])
def test_scores(mean: float, prompts: int) -> None:
    rng = np.random.default_rng(3)
    p = rng.beta(0.4 * mean, 0.4 * (1 - mean), (4 * N, prompts))
    found = [st.score(row) for row in rng.binomial(4, p) / 4]
    covered = [e.includes(100 * mean) for e in found[:N]]
    assert LOW < shown(f"score {100 * mean:g}, Wilson", f"{prompts} × 4", covered) < HIGH
    covered = [st.independent_mean(found[i : i + 4]).includes(100 * mean) for i in range(0, 4 * N, 4)]
    assert LOW < shown(f"mean of four scores {100 * mean:g}", f"{prompts} × 4", covered) < HIGH


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [100, 300])
def test_differences_averages_and_recovery(prompts: int) -> None:
    rng, paired, averages, fractions, undefined = np.random.default_rng(4), [], [], [], 0
    truth = ratio_of(reward_fall)
    for _ in range(N):
        pairs = [rewards(rng, prompts) for _ in range(4)]
        found = [st.paired_difference(a, b) for a, b in pairs]
        paired.append(found[0].includes(truth))
        averages.append(st.independent_mean(found).includes(truth))
        before, after = pairs[0]
        back = after + (before - after) * (rng.random(prompts) < 0.6)
        e = st.ratio_of_means(back - after, before - after)
        undefined += e is None
        if e is not None:
            fractions.append(e.includes(0.6))
    assert LOW < shown("paired difference", f"{prompts} × 4", paired) < HIGH
    assert LOW < shown("mean over four domains", f"{prompts} × 4", averages) < HIGH
    assert LOW < shown("recovery fraction, Fieller", f"{prompts} × 4", fractions, undefined) < HIGH


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [50, 300])
def test_gain_at_equal_loss(prompts: int) -> None:
    """A set that gains 0.10 at a loss of 0.05, against a control whose four settings gain as much as they lose."""
    rng, found = np.random.default_rng(5), []

    def outcome(gain: float, loss: float, of_a: np.ndarray, of_b: np.ndarray) -> Outcome:
        return Outcome(*(m + 0.5 * x + 0.25 * rng.normal(size=prompts) for m, x in ((gain, of_a), (loss, of_b))))

    for _ in range(N):
        of_a, of_b = 0.5 * rng.normal(size=(2, prompts))
        control = [outcome(x, x, of_a, of_b) for x in (0.02, 0.04, 0.08, 0.16)]
        found.append(at_equal_loss(outcome(0.10, 0.05, of_a, of_b), [control])[0].low <= 5.0)
    # Noise raises the control's frontier, so intervals may be too low; they must not be too high.
    assert LOW < shown("gain at equal loss, lower end", f"{prompts} prompts", found) <= 1.0


# --- Gradients, routes, edits -----------------------------------------------------------------------------------------


def blocks(
    rng: np.random.Generator, n: int, cosine: float, rho: float, d: int, falloff: float
) -> tuple[cosines.Between, cosines.Within, cosines.Within]:
    """Moments of N samples of two unit gradients with this cosine and reliability; noise has a spectrum j^-falloff."""
    scale = rng.permutation(1 / np.arange(1, d + 1) ** (falloff / 2))
    scale /= np.linalg.norm(scale)
    means = np.zeros((2, d))
    means[0, 0], means[1, :2] = 1.0, (cosine, math.sqrt(1 - cosine**2))
    a, b = (m + math.sqrt((1 / rho - 1) * n) * scale * rng.normal(size=(N // 4, n, d)) for m in means)
    grams = (a @ b.swapaxes(1, 2), a @ a.swapaxes(1, 2), b @ b.swapaxes(1, 2))
    return cosines.between(grams[0]), cosines.within(grams[1]), cosines.within(grams[2])


@pytest.mark.slow
@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9, -0.9])
@pytest.mark.parametrize("n", [8, 16, 32])
def test_cosines(n: int, cosine: float) -> None:
    """Four kinds of noise, N/4 samples each: in 10 and in 300 directions, flat and steep, reliable and less so."""
    rng, clean, raw = np.random.default_rng(6), [], []
    for rho, d, falloff in ((0.7, 300, 0.0), (0.95, 300, 0.5), (0.95, 10, 0.0), (0.95, 30, 1.0)):
        ab, a, b = blocks(rng, n, cosine, rho, d, falloff)
        known = (cosines.half_cosine(a).low > 0) & (cosines.half_cosine(b).low > 0)
        for found, figure, truth in (
            (clean, cosines.disattenuated_cosine(ab, a, b), cosine),
            (raw, cosines.raw_cosine(ab, a, b), cosine * rho),
        ):
            inside = (figure.low <= truth) & (truth <= figure.high)
            found += (inside[known] if found is clean else inside).tolist()
    assert LOW < shown(f"disattenuated cosine {cosine:g}", f"{n} blocks", clean, N - len(clean)) <= 0.995
    assert LOW < shown(f"raw cosine {cosine:g}", f"{n} blocks", raw) <= 0.995


def routes(rng: np.random.Generator, noise: float) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """A source of scores of 4 × 384 neurons in 12 blocks of two domains, whose means have this relative noise."""
    base = rng.normal(size=(2, 4, 384))
    means = np.exp(0.8 * base[0]), np.exp(0.8 * (0.8 * base[0] + 0.6 * base[1]))
    shape = 1 / (noise**2 * 12)
    return lambda: tuple(m * rng.gamma(shape, 1 / shape, (12, 4, 384)) for m in means)  # type: ignore[return-value]


def route_interval(scores: tuple[np.ndarray, np.ndarray]) -> st.Estimate:
    def found(keep: np.ndarray) -> float:
        return overlap.jaccard(*(overlap.top_share(x[keep].mean(axis=0)) for x in scores))

    halves = [found(keep) for keep in overlap.half_sets(12)]
    return overlap.half_sampled(found(np.ones(12, bool)), halves, 12)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.05, 0.1, 0.3])
def test_overlap_of_routes(noise: float) -> None:
    """The truth is the mean overlap of routes from 12 blocks; that of noiseless routes is printed beside it."""
    rng = np.random.default_rng(7)
    draw = routes(rng, noise)
    found = [route_interval(draw()) for _ in range(N // 2)]
    truth = float(np.mean([e.value for e in found]))
    many = [draw() for _ in range(40)]
    noiseless = overlap.jaccard(*(overlap.top_share(np.mean([m[i] for m in many], axis=(0, 1))) for i in (0, 1)))
    what = f"overlap of routes {truth:.2f} (noiseless {noiseless:.2f}), half-sampling"
    assert LOW < shown(what, "12 blocks", [e.includes(truth) for e in found]) < HIGH


@pytest.mark.slow
def test_effects_over_blocks() -> None:
    """The first order −g_A·δ_B of 12 blocks of four prompts."""
    rng, truth = np.random.default_rng(8), float(orders(np.random.default_rng(99), 400_000, 0.2, 1.0)[0].mean())
    x = np.array([orders(rng, 48, 0.2, 1.0)[0].reshape(12, 4).mean(axis=1) for _ in range(N)])
    found = [st.clustered(row).includes(truth) for row in x]
    assert LOW < shown("effect on a route, Student's t", "12 blocks", found) < HIGH


# --- Agreement --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("n", [5, 6, 12, 48])
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_rank_correlations(n: int, rho: float) -> None:
    rng, r = np.random.default_rng(9), 2 * math.sin(math.pi * rho / 6)
    x = rng.normal(size=(N, n))
    y = r * x + math.sqrt(1 - r * r) * rng.normal(size=x.shape)
    found = [st.recorded(tests.rank_agreement(a, b)) for a, b in zip(x, y, strict=True)]
    share = shown(f"Spearman {rho:g}", f"{n} pairs", [e is not None and e.includes(rho) for e in found])
    assert LOW < share < (0.995 if n == 5 else 0.99)


@pytest.mark.slow
@pytest.mark.parametrize(("slope", "noise"), [(1.0, 0.3), (0.5, 0.3), (0.0, 1.0)])
@pytest.mark.parametrize("n", [6, 12])
def test_explained_variance(n: int, slope: float, noise: float) -> None:
    rng, truth = np.random.default_rng(10), 1 - ((1 - slope) ** 2 + noise**2)
    found = []
    for _ in range(N):
        m = rng.normal(size=n)
        e = tests.r_squared(slope * m + noise * rng.normal(size=n), m)
        found.append(e is not None and e.includes(truth))
    assert LOW - 0.02 < shown(f"R² {truth:.2f}, jackknife", f"{n} pairs", found) < HIGH


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [6, 10])
@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_agreement_of_a_plan(clusters: int, rho: float) -> None:
    truth = float(tests.spearman_rho(*nested(np.random.default_rng(99), 4000, rho)[:2]))
    rng, found = np.random.default_rng(11), []
    for _ in range(N):
        x, y, c = nested(rng, clusters, rho)
        e = st.recorded(tests.rank_agreement(x, y, c.tolist()))
        found.append(e is not None and e.includes(truth))
    actions = len(nested(rng, clusters, rho)[0])
    share = shown(f"Spearman {truth:.2f} of a plan", f"{actions} actions, {clusters} clusters", found)
    assert LOW - (0.02 if clusters < 10 else 0.0) < share < 0.99


@pytest.mark.slow
def test_calibration_of_a_plan() -> None:
    """Whether an interval holds its outcome, in ten clusters of nine actions that mostly agree with each other."""
    rng, found = np.random.default_rng(12), []
    p = rng.beta(1.0, 0.2, (N, 10))
    for held in rng.binomial(9, p).sum(axis=1):
        found.append(clopper_pearson(10 * held / 90, 10).includes(1 / 1.2))
    assert LOW < shown("calibration 0.83 of a plan", "90 actions, 10 clusters", found) <= 1.0


# --- Seeds and domains ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_seeds_and_domains() -> None:
    rng = np.random.default_rng(13)
    three = [st.over_seeds(v).includes(0.0) for v in rng.normal(size=(N, 3))]
    assert LOW < shown("mean over seeds, Student's t", "3 seeds", three) < HIGH
    for prompts in (0.0, 1.0):
        eight = []
        for _ in range(N):
            x = rng.normal(size=(8, 1)) + prompts * 10 * rng.normal(size=100) + 3 * rng.normal(size=(8, 100))
            drawn = x @ rng.multinomial(100, np.full(100, 0.01), 200).T / 100
            eight.append(bootstrap.hierarchical_bootstrap(x.mean(axis=1), drawn).includes(0.0))
        what = f"mean over seeds and prompts, sd of the prompts' mean {prompts:g} of that of seeds"
        assert LOW < shown(what, "8 seeds × 100 prompts", eight) < HIGH
    domains = []
    for effect in rng.normal(0.1, 0.02, (N, 4)):
        pairs = {(str(i), str(j)): [(effect[i] + effect[j]) / 2] for i in range(4) for j in range(i)}
        domains.append(overlap.mean_jaccard(pairs).includes(0.1))
    assert LOW < shown("mean Jaccard of edits, jackknife", "4 domains", domains) < HIGH


def test_route_intervals_have_the_width_of_the_spread() -> None:
    """In brief what the slow test shows: leaving out one block at a time makes them almost twice as wide."""
    draw = routes(np.random.default_rng(14), 0.1)
    found = [route_interval(draw()) for _ in range(40)]
    spread = float(np.std([e.value for e in found], ddof=1))
    assert 0.75 < np.mean([e.stderr for e in found]) / spread < 1.35


@pytest.mark.parametrize("cosine", [0.9, -0.9, 1.0])
def test_intervals_of_high_cosines_cover_with_noise_in_few_directions(cosine: float) -> None:
    """Without Fisher's z they cover 80 % at ±0.9. At 1 the interval ends at 1, and is not wide."""
    ab, a, b = blocks(np.random.default_rng(15), 32, cosine, 0.95, 3, 0.0)
    for figure, truth in (
        (cosines.disattenuated_cosine(ab, a, b), cosine),
        (cosines.raw_cosine(ab, a, b), 0.95 * cosine),
    ):
        assert np.mean((figure.low <= truth) & (truth <= figure.high)) > 0.9
        assert figure.low.min() >= -1 and figure.high.max() <= 1
        assert cosine < 1 or np.median(figure.high - figure.low) < 0.25
