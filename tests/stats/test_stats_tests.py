"""Nulls, false discoveries and agreement against textbook values, scipy and simulated coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from mdrl_jax.stats import bootstrap, tests


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
    assert full is not None and (full.value, full.low, full.high) == (1.0, 1.0, 1.0)
    assert mean is not None and mean.value == 0.0
    assert twice is not None and twice.value == pytest.approx(1 - 50 / 14)


def test_intervals_of_agreement_cover() -> None:
    """Points as units; then three seeds that each have an offset of their own, with the seed as the unit."""
    rng = np.random.default_rng(5)
    rho = 6 / math.pi * math.asin(0.35)  # Spearman's of a bivariate normal with correlation 0.7
    x = rng.normal(size=(150, 60))
    y = 0.7 * x + math.sqrt(0.51) * rng.normal(size=x.shape)
    found = [tests.spearman(a, b, n_resamples=200) for a, b in zip(x, y, strict=True)]
    assert 0.9 < np.mean([e is not None and e.includes(rho) for e in found]) <= 0.99
    noise = [tests.r_squared(a, 0.5 * a + b, n_resamples=200) for a, b in zip(x, y - 0.7 * x, strict=True)]
    truth = 1 - (0.25 + 0.51) / (0.25 + 0.51)  # spread of measured − predicted over that of measured
    assert 0.9 < np.mean([e is not None and e.includes(truth) for e in noise]) <= 0.99
    seeds = np.repeat([0, 1, 2], 20)
    expected = np.mean([stats.spearmanr(a[:20], b[:20]).statistic for a, b in zip(x, y, strict=True)])
    by_seed = [tests.spearman(a, b, seeds) for a, b in zip(x, y, strict=True)]
    assert 0.9 < np.mean([e is not None and e.includes(expected) for e in by_seed]) <= 0.99
    assert by_seed[0] is not None and (by_seed[0].n, by_seed[0].unit) == (3, "seed")


def test_from_eight_seeds_on_seeds_are_resampled() -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=90)
    y = x + 0.5 * rng.normal(size=90)
    e = tests.spearman(x, y, np.repeat(np.arange(9), 10))
    assert e is not None and e.n == 9 and e.low < e.value < e.high and e.stderr is None
    few = tests.spearman(x, y, np.repeat(np.arange(3), 30))
    assert few is not None and few.stderr is not None
    undefined = tests.spearman(np.where(np.arange(90) < 10, 0.0, x), y, np.repeat(np.arange(9), 10))
    assert undefined is None
