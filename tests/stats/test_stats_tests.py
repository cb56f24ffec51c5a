"""Nulls, false discoveries and agreement against textbook values, scipy and simulated coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from mdrl_jax.stats import bootstrap, tests
from mdrl_jax.stats.estimate import recorded


def test_benjamini_hochberg_on_the_example_of_1995() -> None:
    """15 hypotheses of Benjamini and Hochberg (1995), section 3.2: four fall at q = 0.05."""
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528,
         0.7590, 1.0]  # fmt: skip
    order = np.random.default_rng(0).permutation(15)
    found = tests.benjamini_hochberg(np.array(p)[order])
    assert sorted(order[found]) == [0, 1, 2, 3]
    assert not tests.benjamini_hochberg(np.array(p) + 0.01).any()
    assert tests.benjamini_hochberg([]).shape == (0,)


def test_benjamini_hochberg_is_scipys_adjustment_and_works_by_rows() -> None:
    p = np.random.default_rng(1).beta(0.3, 2.0, (20, 40))
    found = tests.benjamini_hochberg(p, 0.1)
    np.testing.assert_array_equal(found, [stats.false_discovery_control(row) <= 0.1 for row in p])
    assert 0 < found.sum() < p.size


def test_false_discovery_rate_is_held() -> None:
    rng = np.random.default_rng(2)
    z = rng.normal(size=(2000, 60)) + 3.0 * (np.arange(60) < 15)
    found = tests.benjamini_hochberg(2 * stats.norm.sf(np.abs(z)), 0.1)
    rate = np.mean(found[:, 15:].sum(axis=1) / np.maximum(found.sum(axis=1), 1))
    assert rate == pytest.approx(0.1 * 45 / 60, abs=0.01)
    assert found[:, :15].mean() > 0.6


def test_permutation_p_is_uniform_under_the_null_and_never_zero() -> None:
    assert tests.permutation_p(5.0, [1.0, 2.0, 3.0]) == 0.25
    assert tests.permutation_p(2.0, [1.0, 2.0, 3.0]) == 0.75
    assert tests.permutation_p(5.0, [1.0, math.nan, 3.0]) == 0.5  # a draw that is not known may be as large
    with pytest.raises(ValueError, match="nan"):
        tests.permutation_p(math.nan, [1.0, 2.0, 3.0])
    draws = np.random.default_rng(3).normal(size=(2000, 100))
    p = np.array([tests.permutation_p(row[0], row[1:]) for row in draws])
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=0.015) and p.min() == 0.01


def test_null_record_is_the_central_95_percent() -> None:
    assert tests.null_record(np.arange(1001)) == pytest.approx({"mean": 500.0, "low": 25.0, "high": 975.0, "n": 1001})


def test_jackknife_of_a_mean_is_students_interval() -> None:
    x = np.array([1.0, 4.0, 2.0, 8.0])
    e = bootstrap.jackknife(x.mean(), [np.delete(x, i).mean() for i in range(4)])
    assert (e.stderr, e.high) == pytest.approx((x.std(ddof=1) / 2, x.mean() + 3.1824 * x.std(ddof=1) / 2), rel=1e-4)
    assert bootstrap.jackknife(1.0, [1.0]).high == math.inf


def test_rank_correlation_is_scipys_with_ties() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.integers(0, 5, 30).astype(float), rng.integers(0, 5, 30).astype(float)
    e = tests.spearman(x, y)
    assert e is not None and e.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert e.low < e.value < e.high and (e.n, e.unit) == (30, "point")
    assert tests.spearman(np.ones(5), np.arange(5.0)) is None
    two = tests.spearman([0.0, 1.0], [0.0, 1.0])
    assert two is not None and two.high == math.inf
    with pytest.raises(ValueError, match="one length"):
        tests.spearman([1.0, 2.0], [1.0])


def test_explained_variance_is_of_the_line_of_equality() -> None:
    measured = np.array([1.0, 2.0, 3.0, 6.0])
    full, mean, twice = (tests.r_squared(p, measured) for p in (measured, np.full(4, 3.0), 2 * measured))
    assert full is not None and full.value == 1.0
    five = tests.r_squared(np.arange(5.0), np.arange(5.0))
    assert five is not None and (five.value, five.low, five.high) == (1.0, 1.0, 1.0)
    assert mean is not None and mean.value == 0.0
    assert twice is not None and twice.value == pytest.approx(1 - 50 / 14)


def test_intervals_of_agreement_cover() -> None:
    """Points as units; then three seeds that each have an offset of their own, with the seed as the unit."""
    rng = np.random.default_rng(5)
    rho = 6 / math.pi * math.asin(0.35)  # Spearman's of a bivariate normal with correlation 0.7
    x = rng.normal(size=(400, 60))
    y = 0.7 * x + math.sqrt(0.51) * rng.normal(size=x.shape)
    for n in (6, 60):
        found = [tests.spearman(a[:n], b[:n]) for a, b in zip(x, y, strict=True)]
        assert 0.92 < np.mean([e is not None and e.includes(rho) for e in found]) < 0.99
        noise = [tests.r_squared(0.5 * a[:n] + b[:n], a[:n]) for a, b in zip(x, y - 0.7 * x, strict=True)]
        truth = 1 - (0.25 + 0.51)  # spread of measured − predicted over that of measured, which is 1
        assert 0.92 < np.mean([e is not None and e.includes(truth) for e in noise]) < 0.99
    seeds = np.repeat([0, 1, 2], 20)
    expected = float(np.mean([stats.spearmanr(a[:20], b[:20]).statistic for a, b in zip(x, y, strict=True)]))
    by_seed = [tests.spearman(a, b, seeds) for a, b in zip(x, y, strict=True)]
    assert 0.92 < np.mean([e is not None and e.includes(expected) for e in by_seed]) < 0.98
    assert by_seed[0] is not None and (by_seed[0].n, by_seed[0].unit) == (3, "seed")
    ends = [(e.low, e.high) for e in by_seed if e is not None]
    assert all(-1.0 <= low and high <= 1.0 for low, high in ends) and any(high == 1.0 for _, high in ends)


def test_a_seed_with_few_points_does_not_stop_the_agreement_over_many_seeds() -> None:
    """With two points a seed every resample of one of them would be constant; the seeds are the units."""
    x = np.arange(18.0)
    e = tests.spearman(x, x, np.repeat(np.arange(9), 2))
    assert e is not None and (e.value, e.low, e.high, e.n) == (1.0, 1.0, 1.0, 9)
    undefined = tests.spearman(np.where(np.arange(18) < 2, 0.0, x), x, np.repeat(np.arange(9), 2))
    assert undefined is None


def test_few_points_have_no_interval() -> None:
    four = tests.spearman(np.arange(4.0), np.arange(4.0))
    assert four is not None and (four.value, four.low, four.high) == (1.0, -math.inf, math.inf)
    fit = tests.r_squared(np.arange(4.0), np.arange(4.0) + 0.1)
    assert fit is not None and fit.low == -math.inf


def nested(rng: np.random.Generator, clusters: int, rho: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Forecasts and outcomes of the actions of a plan. The actions of one cluster share a direction, whose effects have
    the correlation `rho`, and differ in length: 4 refreshes, or 12 rollbacks that do less."""
    parts = []
    for c in range(clusters):
        a, e = rng.normal(size=2)
        size = np.arange(1, 5) / 4 if c % 10 < 4 else np.outer([0.05, 0.1, 0.2, 0.35, 0.6, 1.0], [0.5, 1.0]).ravel()
        mean = 1.0 if c % 10 < 4 else 0.3
        b = rho * a + math.sqrt(1 - rho**2) * e
        noise = rng.normal(size=(2, size.size)) * [[0.03], [0.15]]
        parts.append(np.stack([size * (a + mean), size * (b + mean), np.full(size.size, float(c))]))
        parts[-1][:2] += noise
    x, y, c = np.concatenate(parts, axis=1)
    return x, y, c


def test_agreement_of_nested_actions_covers_by_clusters_and_not_by_actions() -> None:
    truth = float(tests.spearman_rho(*nested(np.random.default_rng(7), 4000, 0.8)[:2]))
    rng = np.random.default_rng(8)
    plans = [nested(rng, 10, 0.8) for _ in range(200)]
    found = [recorded(tests.rank_agreement(x, y, c.tolist())) for x, y, c in plans]
    assert 0.92 < np.mean([e is not None and e.includes(truth) for e in found]) < 0.99
    naive = [recorded(tests.rank_agreement(x, y)) for x, y, _ in plans]
    assert np.mean([e is not None and e.includes(truth) for e in naive]) < 0.7
    x, y, c = plans[0]
    assert found[0] is not None and found[0].n == 10
    few = tests.rank_agreement(x[c < 5], y[c < 5], c[c < 5].tolist())
    assert few["ci95"] is None and few["estimate"] is not None and "5 independent groups" in few["reason"]


def test_the_reason_says_that_one_of_the_two_figures_is_constant() -> None:
    assert tests.rank_agreement(range(6), [1.0] * 6)["reason"] == "one of the two figures is the same for all pairs"
