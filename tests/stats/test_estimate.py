"""Estimates against textbook values, exact identities and simulated coverage."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from mdrl_jax.claims import verdicts
from mdrl_jax.stats import bootstrap
from mdrl_jax.stats import estimate as st


def test_clustered_mean_takes_the_prompt_as_the_unit() -> None:
    # Perfectly correlated samples: repeating them must not shrink the error.
    once = np.array([[0.0], [1.0], [1.0], [0.0], [1.0]])
    mean, stderr = st.clustered_mean(np.repeat(once, 16, axis=1))
    assert mean == pytest.approx(0.6)
    assert stderr == pytest.approx(math.sqrt(0.3 / 5))
    assert st.clustered_mean([[1.0, 0.0]]) == (0.5, math.inf)


@pytest.mark.parametrize("bad", [[], [[]], [[1.0], [1.0, 0.0]]])
def test_clustered_mean_refuses_empty_and_ragged(bad: list[list[float]]) -> None:
    with pytest.raises(ValueError):
        st.clustered_mean(bad)


@pytest.mark.parametrize(("dof", "t"), [(1, 12.706), (2, 4.303), (9, 2.262), (1e9, 1.960)])
def test_t_quantile_is_the_printed_table(dof: float, t: float) -> None:
    assert st.t_quantile(dof) == pytest.approx(t, abs=5e-4)


def test_paired_difference_by_hand() -> None:
    # Differences 1, 2, 6: mean 3, variance 7 of them, 7/3 of the mean. Less their median −1, 0, 4, so two more prompts
    # of typical size, s² = (1 + 256)/17, add 2 · s² · 3 / (2 · 9). t(2) = 4.303.
    e = st.paired_difference([[5.0, 7.0], [4.0, 4.0], [12.0, 12.0]], [[5.0], [2.0], [6.0]])
    assert (e.value, e.n) == (3.0, 3)
    assert e.stderr == pytest.approx(math.sqrt(7 / 3 + 257 / 17 / 3))
    assert e.high - e.value == pytest.approx(4.3027 * e.stderr, rel=1e-4)
    # Groups {1, 2} and {6}: deviations from the mean add to −3 and 3, those from the median to −1 and 4.
    grouped = st.paired_difference([1.0, 2.0, 6.0], [0.0, 0.0, 0.0], [4, 4, 9])
    assert (grouped.n, grouped.stderr) == (2, pytest.approx(math.sqrt(4 + 4 * 257 / 17 / 9)))
    with pytest.raises(ValueError, match="same prompts: 2 against 3"):
        st.paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])


def test_a_sample_without_a_difference_has_a_width() -> None:
    same = np.ones((100, 4))
    e = st.paired_difference(same, same)
    # One of 4 samples may change in each of two prompts.
    assert (e.value, e.stderr) == (0.0, pytest.approx(math.sqrt(2 / 16 * 100 / 99) / 100))
    assert st.paired_difference(same, same[:, :2]).stderr == e.stderr
    assert st.paired_difference(same[:1], same[:1]).high == math.inf


@pytest.mark.parametrize("changed", [1, 2, 4])
def test_changes_that_a_sample_may_miss_are_covered(changed: int) -> None:
    """A few prompts in a hundred always lose one answer of four. Without the two prompts Student's t covers less."""
    rng = np.random.default_rng(11)
    lost = np.zeros(100)
    lost[:changed] = 0.25
    samples = lost[rng.integers(0, 100, (2000, 100))]
    found = [st.paired_difference(np.repeat(x[:, None], 4, 1), np.zeros((100, 4))) for x in samples]
    assert np.mean([e.includes(lost.mean()) for e in found]) > 0.94
    assert np.mean([st.clustered(x).includes(lost.mean()) for x in samples]) < 0.91


def _beta_rewards(rng: np.random.Generator, n: int, prompts: int, samples: int) -> np.ndarray:
    """(n, prompts, 2 conditions, samples) 0/1 rewards whose prompts share a difficulty."""
    p = rng.beta(2.0, 2.0, (n, prompts, 1, 1))
    shift = np.array([1.0, 0.8]).reshape(1, 1, 2, 1)
    return (rng.random((n, prompts, 2, samples)) < p * shift).astype(float)


def test_paired_interval_covers_95_percent() -> None:
    rewards = _beta_rewards(np.random.default_rng(0), 4000, 30, 4)
    found = [st.paired_difference(r[:, 0], r[:, 1]) for r in rewards]
    assert 0.93 < np.mean([e.includes(0.1) for e in found]) < 0.97  # 0.5 − 0.8 · 0.5


def test_over_seeds_covers_95_percent_with_three_seeds() -> None:
    values = np.random.default_rng(1).normal(60.0, 4.0, (6000, 3))
    assert 0.93 < np.mean([st.over_seeds(v).includes(60.0) for v in values]) < 0.97


def test_a_single_seed_has_no_interval_and_writes_null() -> None:
    e = st.over_seeds([61.5], "points")
    assert (e.value, e.low, e.high, e.n) == (61.5, -math.inf, math.inf, 1)
    assert json.loads(json.dumps(e.record(), allow_nan=False))["ci95"] is None
    assert st.over_seeds([1.0, 3.0]).record(null=[0, 1])["null"] == [0, 1]


def test_an_interval_over_seeds_stays_within_what_a_quantity_can_be() -> None:
    values = [0.9, 1.0, 0.4]
    plain, cut = st.over_seeds(values), st.over_seeds(values, "", (-1.0, 1.0))
    assert plain.high > 1.0 and cut.high == 1.0 and (cut.value, cut.low, cut.n) == (plain.value, plain.low, 3)
    assert st.over_seeds([0.5], "", (-1.0, 1.0)).low == -math.inf


def test_wilson_by_hand() -> None:
    low, high = st.wilson(0.0, 20)
    assert (low, high) == (0.0, pytest.approx(3.8415 / 23.8415, rel=1e-4))
    assert st.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    for share, n in itertools.product((0.0, 1.0), range(1, 400)):  # rounding puts no end on the wrong side
        low, high = st.wilson(share, n)
        assert low <= share <= high


def test_scores_near_100_points_cover_where_students_t_does_not() -> None:
    rng, mean = np.random.default_rng(9), 0.986
    x = rng.binomial(4, rng.beta(0.4 * mean, 0.4 * (1 - mean), (2000, 100))) / 4
    scores = [st.score(row) for row in x]
    assert 0.92 < np.mean([e.includes(100 * mean) for e in scores]) < 0.98
    assert np.mean([st.clustered(row).includes(mean) for row in x]) < 0.85
    assert all(0 <= e.low < e.value <= e.high <= 100 for e in scores)
    averages = [st.independent_mean(scores[i : i + 4]) for i in range(0, 2000, 4)]
    assert 0.92 < np.mean([e.includes(100 * mean) for e in averages]) < 0.99


def test_a_score_of_equal_rewards_is_wilsons_of_as_many_groups() -> None:
    t = st.t_quantile(9)
    assert st.score(np.ones((10, 4))).low == pytest.approx(100 / (1 + t**2 / 10))
    assert st.score(np.ones((20, 4)), np.arange(20) % 10).low == pytest.approx(100 / (1 + t**2 / 10))
    assert st.score(np.ones((10, 4))).high == 100 and st.score(np.zeros((10, 4))).low == 0
    # Binary rewards of one sample: Wilson's interval of 10 trials, but with t and the variance of a sample.
    share, t2 = 0.3, t**2 / 9
    middle, half = (share + t2 / 2) / (1 + t2), math.sqrt(share * (1 - share) * t2 + t2**2 / 4) / (1 + t2)
    e = st.score([1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    assert (e.low, e.high) == pytest.approx((100 * (middle - half), 100 * (middle + half)))
    assert st.score([0.5]).low == -math.inf
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], but their mean is 1.5"):
        st.score([1.0, 2.0])


def test_independent_mean_covers_and_reduces_to_one_term() -> None:
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(3000):
        small, large = rng.normal(1.0, 1.0, 6), rng.normal(3.0, 5.0, 25)
        terms = [st.clustered(x) for x in (small, large)]
        covered.append(st.independent_mean(terms).includes(2.0))
    assert 0.93 < np.mean(covered) < 0.97
    one = st.clustered([1.0, 2.0, 4.0])
    assert st.independent_mean([one]).high == pytest.approx(one.high)
    sure = st.student(1.0, 0.0, 3, 4)
    assert (st.independent_mean([sure, sure]).low, st.independent_mean([sure]).high) == (1.0, 1.0)


def test_fieller_covers_95_percent() -> None:
    rng = np.random.default_rng(3)
    n, prompts = 4000, 25
    den = rng.normal(1.0, 1.5, (n, prompts))
    num = 0.7 * den + rng.normal(0.0, 1.0, (n, prompts))
    found = [st.ratio_of_means(x, y) for x, y in zip(num, den, strict=True)]
    defined = [e for e in found if e is not None]
    assert len(defined) > 0.8 * n
    # The exact level holds for the acceptance set; where undefined, the set's own rule decides.
    covered = sum(e.includes(0.7) for e in defined)
    for x, y, e in zip(num, den, found, strict=True):
        if e is None:
            covered += st.clustered(x - 0.7 * y).includes(0.0)
    assert 0.93 < covered / n < 0.97


def test_fieller_ends_solve_its_equation_and_scale() -> None:
    num, den, vn, vd, cov, dof = 3.0, 5.0, 0.4, 0.3, 0.1, 11
    interval = st.fieller(num, den, vn, vd, cov, dof)
    assert interval is not None
    for r in interval:
        spread = st.t_quantile(dof) ** 2 * (vn - 2 * r * cov + r**2 * vd)
        assert (num - r * den) ** 2 == pytest.approx(spread)
    assert interval[0] < num / den < interval[1]
    assert st.fieller(-num, -den, vn, vd, cov, dof) == pytest.approx(interval)


def test_fieller_without_noise_below_is_the_t_interval() -> None:
    interval = st.fieller(3.0, 2.0, 0.25, 0.0, 0.0, 10)
    half = st.t_quantile(10) * 0.5
    assert interval == pytest.approx(((3.0 - half) / 2, (3.0 + half) / 2))


def test_fieller_is_undefined_exactly_where_the_denominator_includes_zero() -> None:
    t = st.t_quantile(10)
    assert st.fieller(1.0, t * 0.5 * 1.001, 0.2, 0.25, 0.0, 10) is not None
    assert st.fieller(1.0, t * 0.5 * 0.999, 0.2, 0.25, 0.0, 10) is None
    assert st.fieller(0.0, 0.0, 0.0, 0.0, 0.0, 10) is None
    assert st.fieller(1.0, 1.0, 0.1, 0.1, 0.0, 0) is None
    assert st.ratio_of_means([1.0], [1.0]) is None and st.ratio_of_means([], []) is None
    for num, den in (([1.0], [1.0, 2.0]), ([], [1.0]), ([1.0, 2.0, 3.0], [1.0])):
        with pytest.raises(ValueError, match=f"{len(num)} against {len(den)}"):
            st.ratio_of_means(num, den)
    with pytest.raises(ValueError, match="groups has shape"):
        st.ratio_of_means([1.0], [1.0], groups=[0, 1])


def test_fieller_agrees_with_the_bootstrap_on_easy_data() -> None:
    rng = np.random.default_rng(4)
    den = rng.normal(4.0, 1.0, 400)
    num = 0.5 * den + rng.normal(0.0, 1.0, 400)
    exact = st.ratio_of_means(num, den)
    boot = bootstrap.cluster_bootstrap(lambda a, b: a.mean() / b.mean(), [num, den])
    assert exact is not None
    assert boot.value == exact.value
    assert (boot.low, boot.high) == pytest.approx((exact.low, exact.high), abs=0.004)
    assert exact.high - exact.low > 0.04


def test_bootstrap_draws_whole_prompts_and_keeps_pairs() -> None:
    rng = np.random.default_rng(5)
    rewards = _beta_rewards(rng, 1, 200, 8)[0]
    a, b = rewards[:, 0], rewards[:, 1]
    exact = st.paired_difference(a, b)
    boot = bootstrap.cluster_bootstrap(lambda x, y: (x - y).mean(), [a, b], seed=1)
    assert boot == bootstrap.cluster_bootstrap(lambda x, y: (x - y).mean(), [a, b], seed=1)
    assert boot != bootstrap.cluster_bootstrap(lambda x, y: (x - y).mean(), [a, b], seed=2)
    assert boot.high - boot.low == pytest.approx(exact.high - exact.low, rel=0.1)
    with pytest.raises(ValueError, match="number of prompts"):
        bootstrap.cluster_bootstrap(lambda x, y: 0.0, [a, b[:-1]])


@pytest.mark.parametrize(("of_seeds", "of_prompts"), [(1.0, 0.0), (1.0, 1.0), (0.2, 1.0)])
def test_interval_over_eight_seeds_covers_if_they_share_their_prompts(of_seeds: float, of_prompts: float) -> None:
    """Figure of a seed = effect of the seed + mean effect of the prompts + noise, with these standard deviations."""
    rng, covered, alone = np.random.default_rng(6), [], []
    for _ in range(400):
        prompts_P, noise_NP = of_prompts * 5 * rng.normal(size=25), 1.5 * rng.normal(size=(8, 25))
        rewards_NP = of_seeds * rng.normal(size=(8, 1)) + prompts_P + noise_NP
        replicates_NR = rewards_NP @ rng.multinomial(25, np.full(25, 1 / 25), 100).T / 25
        e = bootstrap.hierarchical_bootstrap(rewards_NP.mean(axis=1), replicates_NR, "points")
        covered.append(e.includes(0.0))
        alone.append(st.over_seeds(rewards_NP.mean(axis=1)).includes(0.0))
    assert 0.92 < np.mean(covered) < 0.98
    assert of_prompts == 0 or np.mean(alone) < 0.7  # seeds alone take the prompts as given


def test_interval_over_eight_seeds_is_students_without_an_effect_of_shared_prompts() -> None:
    rng = np.random.default_rng(6)
    values = rng.normal(0.0, 3.0, 40)
    replicates = values[:, None] + rng.normal(0.0, 4.0, (40, 300))  # each seed has prompts of its own
    e, alone = bootstrap.hierarchical_bootstrap(values, replicates), st.over_seeds(values)
    assert (e.value, e.n) == (alone.value, 40)
    assert e.high - e.low == pytest.approx(alone.high - alone.low, rel=0.08)
    with pytest.raises(ValueError, match="replicates"):
        bootstrap.hierarchical_bootstrap(values, np.zeros((40, 0)))
    with pytest.raises(ValueError, match="39 figures of seeds, but replicates of 40"):
        bootstrap.hierarchical_bootstrap(values[1:], replicates)


def test_scaling_turns_with_the_sign() -> None:
    e = st.Estimate(0.2, 0.1, 0.4, 9, stderr=0.05).scaled(-100, "points")
    assert (e.low, e.value, e.high, e.stderr) == pytest.approx((-40, -20, -10, 5))
    assert (e.unit, e.n) == ("points", 9)


def _skewed_rewards(rng: np.random.Generator, prompts: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(prompts, n) mean rewards of 8 samples before (mean 0.25) and after a loss of 30 %; half the prompts near 0."""
    p = rng.beta(0.5, 1.5, (prompts, n))
    return rng.binomial(8, p) / 8, rng.binomial(8, 0.7 * p) / 8


def test_cluster_bootstrap_covers_95_percent_of_skewed_means_and_ratios() -> None:
    before, after = _skewed_rewards(np.random.default_rng(8), 100, 1200)
    kept = after - before
    for statistic, arrays, truth in (
        (lambda x: x.mean(axis=0), [before], 0.25),
        (lambda x, y: y.mean(axis=0) / x.mean(axis=0), [before, after], 0.7),
        (lambda x: x.mean(axis=0), [kept], -0.075),
    ):
        low, high = np.quantile(bootstrap.resamples(statistic, arrays, 600), [0.025, 0.975], axis=0)
        assert 0.93 < np.mean((low <= truth) & (truth <= high)) < 0.97


def test_paired_and_fieller_intervals_cover_95_percent_of_skewed_data() -> None:
    before, after = (x.T for x in _skewed_rewards(np.random.default_rng(9), 100, 2500))
    paired = [st.paired_difference(x, y).includes(0.075) for x, y in zip(before, after, strict=True)]
    assert 0.93 < np.mean(paired) < 0.97
    ratios = [st.ratio_of_means(y, x) for x, y in zip(before, after, strict=True)]
    assert 0.93 < np.mean([e is not None and e.includes(0.7) for e in ratios]) < 0.97


def test_resamples_are_the_draws_of_the_bootstrap() -> None:
    x = np.random.default_rng(10).normal(size=40)
    e = bootstrap.cluster_bootstrap(np.mean, [x], n_resamples=300, seed=3)
    tail = stats.norm.cdf(-math.sqrt(40 / 39) * stats.t.ppf(0.975, 39))
    draws = bootstrap.resamples(np.mean, [x], 300, seed=3)
    assert (e.low, e.high) == pytest.approx(np.quantile(draws, [tail, 1 - tail]))


def test_expanded_percentiles_of_a_normal_mean_are_students_interval() -> None:
    x = np.random.default_rng(11).normal(size=8)
    draws = bootstrap.resamples(np.mean, [x], 40_000)
    normal = x.mean() + np.sort(np.random.default_rng(12).normal(size=200_000)) * x.std() / math.sqrt(8)
    want = st.clustered(x)
    e = bootstrap.expanded_percentile(x.mean(), normal, 8)
    assert (e.low, e.high) == pytest.approx((want.low, want.high), abs=0.02)
    boot = bootstrap.expanded_percentile(x.mean(), draws, 8)
    assert boot.high - boot.low > 1.15 * np.diff(np.quantile(draws, [0.025, 0.975]))[0]
    assert bootstrap.expanded_percentile(1.0, [1.0], 1).high == math.inf


def test_totals_of_draws_are_those_of_the_weighted_prompts_with_and_without_each() -> None:
    rng = np.random.default_rng(13)
    draws, x = bootstrap.Draws(6), rng.normal(size=6)
    total, weights = draws.total(x), draws.weights_XP
    assert total[0] == pytest.approx(x.sum())
    np.testing.assert_allclose(draws.values(total), weights @ x)
    at, prompt = 7, int(np.flatnonzero(weights[7])[0])
    drawn = np.repeat(np.arange(6), weights[at].astype(int)).tolist()
    drawn.remove(prompt)
    assert total.reshape(-1, 7)[at, 1 + prompt] == pytest.approx(x[drawn].sum())


def test_errors_of_draws_are_the_jackknife_of_the_drawn_prompts() -> None:
    rng = np.random.default_rng(14)
    draws, (x, y) = bootstrap.Draws(9), rng.gamma(1.0, 1.0, (2, 9))
    ratio = draws.total(x) / draws.total(y)
    for at in (0, 3):
        rows = np.repeat(np.arange(9), draws.weights_XP[at].astype(int))
        without = [np.delete(x[rows], i).sum() / np.delete(y[rows], i).sum() for i in range(9)]
        assert draws.stderrs(ratio)[at] == pytest.approx(bootstrap.jackknife(0.0, without).stderr)
    mean = draws.total(x) / draws.total(np.ones(9))
    assert draws.stderrs(mean)[0] == pytest.approx(x.std(ddof=1) / 3)


def test_fieller_of_draws_is_that_of_the_means() -> None:
    rng = np.random.default_rng(15)
    draws, den = bootstrap.Draws(30), rng.normal(2.0, 1.0, 30)
    num = 0.4 * den + rng.normal(size=30)
    found, want = draws.fieller(draws.total(num), draws.total(den), "share"), st.ratio_of_means(num, den, "share")
    assert found is not None and want is not None
    # Sums and means have the same ratio. Leaving out a prompt changes sums by one more order, so means are compared.
    n = draws.total(np.ones(30))
    found = draws.fieller(draws.total(num) / n, draws.total(den) / n, "share")
    assert found is not None and (found.low, found.high) == pytest.approx((want.low, want.high), rel=1e-6)
    assert draws.fieller(draws.total(num) / n, draws.total(den - den.mean()) / n) is None
    assert bootstrap.Draws(1).fieller(np.ones(2), np.ones(2)) is None


def test_bootstrap_t_by_hand() -> None:
    # Distances (θ* − 2)/se* are −3, −1, 0, 1, 2 in equal shares: the interval is 2 − 0.5·2 to 2 + 0.5·3.
    value = np.concatenate([[2.0], np.repeat([-1.0, 1.0, 2.0, 3.0, 4.0], 20)])
    stderr = np.concatenate([[0.5], np.ones(100)])
    e = bootstrap.bootstrap_t(value, stderr, 9, "nats")
    assert (e.value, e.low, e.high, e.n, e.unit, e.stderr) == (2.0, 1.0, 3.5, 9, "nats", 0.5)
    # Draws of equal prompts: too many of them leave that end open; a figure without spread has no width.
    stderr[-30:] = 0.0
    assert bootstrap.bootstrap_t(value, stderr, 9).low == -math.inf
    same = bootstrap.bootstrap_t(np.full(5, 3.0), np.zeros(5), 9)
    assert (same.low, same.high) == (3.0, 3.0)
    open_ = bootstrap.bootstrap_t(np.full(5, 3.0), np.full(5, np.nan), 9)
    assert (open_.low, open_.high) == (-math.inf, math.inf)


def test_bootstrap_t_covers_skewed_means_of_sixteen_prompts_where_percentiles_do_not() -> None:
    """Two in five prompts have a curvature, with a long tail to the right."""
    rng, draws = np.random.default_rng(16), bootstrap.Draws(16)
    truth, studentized, percentiles = 0.4 * 1.05 * math.exp(0.125), [], []
    n = draws.total(np.ones(16))
    for _ in range(400):
        x = np.where(rng.random(16) < 0.4, rng.gamma(0.7, 1.5, 16) * np.exp(rng.normal(0, 0.5, 16)), 0.0)
        x += np.where(x > 0, rng.normal(0, 0.6, 16), 0.0)
        mean = draws.total(x) / n
        studentized.append(draws.interval(mean).includes(truth))
        percentiles.append(bootstrap.percentile(x.mean(), draws.values(mean)[1:], 16).includes(truth))
    assert 0.91 < np.mean(studentized) < 0.98
    assert np.mean(percentiles) < 0.88


def test_prompt_weights_hold_the_sample_and_then_draws_of_as_many_prompts() -> None:
    weights_RP = bootstrap.prompt_weights(12, np.random.default_rng(0))
    assert weights_RP.shape == (1 + bootstrap.N_RESAMPLES, 12) and weights_RP.dtype == float
    np.testing.assert_array_equal(weights_RP[0], 1)
    np.testing.assert_array_equal(weights_RP.sum(axis=1), 12)
    # A prompt's weight is binomial with n = 12 and p = 1/12; two prompts compete for the same 12 draws.
    drawn_RP = weights_RP[1:]
    np.testing.assert_allclose(drawn_RP.mean(axis=0), 1, atol=5 * math.sqrt(11 / 12 / bootstrap.N_RESAMPLES))
    assert drawn_RP.var() == pytest.approx(11 / 12, rel=0.05)
    assert np.cov(drawn_RP.T)[~np.eye(12, dtype=bool)].mean() == pytest.approx(-1 / 12, rel=0.05)
    np.testing.assert_array_equal(weights_RP, bootstrap.prompt_weights(12, np.random.default_rng(0)))


def test_a_band_is_the_central_95_percent() -> None:
    values = np.random.default_rng(0).permutation(2001)
    assert bootstrap.band(values) == pytest.approx([50, 1950])
    assert bootstrap.band(values[values > 0], "inverted_cdf") == [50, 1950]  # order statistics 50 and 1950 of 2,000


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.6, 0.9, "supported"), (0.1, 0.4, "contradicted"), (0.4, 0.6, "undecided"), (0.5, 0.6, "undecided"),
     (-math.inf, math.inf, "undecided")],
)  # fmt: skip
def test_verdicts_follow_where_the_interval_lies(low: float, high: float, verdict: str) -> None:
    e = st.Estimate(0.5, low, high, 9)
    assert verdicts.exceeds(e, 0.5) == verdict
    mirror = {"supported": "contradicted", "contradicted": "supported", "undecided": "undecided"}
    assert verdicts.below(e, 0.5) == mirror[verdict]
    assert verdicts.below(e.scaled(-1, ""), -0.5) == verdict


def test_joint_verdict_is_the_weakest() -> None:
    yes, no, open_ = "supported", "contradicted", "undecided"
    assert verdicts.both(yes, yes) == yes and verdicts.both(yes, open_) == open_ and verdicts.both(open_, no, yes) == no
    assert verdicts.both() == open_ and verdicts.exceeds(None, 0.0) == open_ == verdicts.below(None, 0.0)


def test_magnitude_starts_at_zero_where_the_sign_is_open() -> None:
    for low, high, want in ((-0.2, 0.1, (0.0, 0.2)), (-0.3, -0.1, (0.1, 0.3)), (0.1, 0.2, (0.1, 0.2))):
        e = st.magnitude(st.Estimate((low + high) / 2, low, high, 4))
        assert (e.low, e.high, e.value) == (*want, abs(low + high) / 2)


def test_intervals_as_text_take_the_sign_of_the_value_only() -> None:
    assert st.interval_text([0.5, -1.0], ".1f") == "[0.5, -1.0]"
    assert (st.interval_text(None, ".1f"), st.interval_text(None, ".1f", "none")) == ("–", "none")
    assert st.figure_text(2.0, (1.0, 3.0), "+.1f") == "+2.0 [1.0, 3.0]"
    assert (st.figure_text(2.0, None, ".1f"), st.figure_text(2.0, None, ".1f", "(open)")) == ("2.0", "2.0 (open)")
    assert st.figure_text(2.0, (1.0, 3.0), ".0f", number=lambda x, form: f"<{x:{form}}>") == "<2> [<1>, <3>]"


def test_a_record_gives_its_estimate_back() -> None:
    e = st.student(1.0, 0.5, 4, 5, "points")
    assert st.recorded(e.record()) == st.Estimate(e.value, e.low, e.high, 5, "points")
    alone = st.recorded(st.over_seeds([2.0]).record())
    assert alone is not None and (alone.low, alone.high) == (-math.inf, math.inf)
    assert st.recorded({"estimate": None, "reason": "no signal"}) is None


def _questions(rng: np.random.Generator, n: int, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, prompts, 4) rewards 0/1 of questions that share the difficulty of their text, and the text of each prompt."""
    groups = np.repeat(np.arange(sizes.size), sizes)
    texts = rng.normal(0.0, 1.0, (n, sizes.size))[:, groups]
    p = 1 / (1 + np.exp(-texts - rng.normal(0.0, 0.7, texts.shape)))
    return (rng.random((*p.shape, 4)) < p[..., None]).astype(float), groups


def test_intervals_over_groups_cover_where_those_over_prompts_do_not() -> None:
    rng = np.random.default_rng(6)
    rewards, groups = _questions(rng, 2000, rng.integers(1, 10, 30))
    found = {name: [st.clustered(r, groups=g) for r in rewards] for name, g in (("text", groups), ("prompt", None))}
    covered = {name: np.mean([e.includes(0.5) for e in es]) for name, es in found.items()}
    assert 0.92 < covered["text"] < 0.98
    assert covered["prompt"] < 0.8
    assert [e.value for e in found["text"]] == [e.value for e in found["prompt"]]
    assert (found["text"][0].n, found["prompt"][0].n) == (30, groups.size)


def test_ratios_over_groups_cover_where_those_over_prompts_do_not() -> None:
    rng = np.random.default_rng(7)
    den, groups = _questions(rng, 2000, rng.integers(1, 10, 30))
    gain, _ = _questions(rng, 2000, np.bincount(groups))
    pairs = [(x.mean(axis=1) - 0.2, y.mean(axis=1)) for x, y in zip(gain, den, strict=True)]  # the ratio is 0.3 / 0.5
    for by, low, high in ((groups, 0.92, 0.98), (None, 0.0, 0.8)):
        found = [st.ratio_of_means(x, y, groups=by) for x, y in pairs]
        assert low < np.mean([e is not None and e.includes(0.6) for e in found]) < high


def test_groups_of_one_prompt_change_nothing_and_copies_add_nothing() -> None:
    rng = np.random.default_rng(8)
    a, b = rng.random((2, 20, 4))
    alone = rng.permutation(20)
    for found, plain in (
        (st.clustered(a, groups=alone), st.clustered(a)),
        (st.paired_difference(a, b, alone), st.paired_difference(a, b)),
        (st.ratio_of_means(a[:, 0], b[:, 0], groups=alone), st.ratio_of_means(a[:, 0], b[:, 0])),
        # Five copies of each prompt are no news, if they are known to be one group.
        (st.clustered(np.tile(a, (5, 1)), groups=np.tile(alone, 5)), st.clustered(a)),
    ):
        assert found is not None and plain is not None
        assert (found.value, found.low, found.high) == pytest.approx((plain.value, plain.low, plain.high))
        assert found.n == plain.n == 20
    # By hand: deviations −1, 0 | 1 in two groups, stderr² = 2/1 · ((−1)² + 1²) / 3².
    mean, stderr = st.clustered_mean([1.0, 2.0, 3.0], [7, 7, 5])
    assert (mean, stderr) == (2.0, pytest.approx(math.sqrt(4 / 9)))
    assert st.clustered_mean([1.0, 0.0], [3, 3]) == (0.5, math.inf)
    with pytest.raises(ValueError, match="groups has shape"):
        st.clustered([1.0, 2.0, 3.0], groups=[0, 1])


def test_an_average_with_a_single_unit_has_no_interval() -> None:
    e = st.independent_mean([st.student(1.0, 0.1, 1, 1), st.student(2.0, 0.1, 9, 10)])
    assert (e.value, e.low, e.high) == (1.5, -math.inf, math.inf)
