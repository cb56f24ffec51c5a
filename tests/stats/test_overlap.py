"""Sets of channels and their overlap against counting, permuting and simulated coverage."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from mdrl_jax.stats import overlap
from mdrl_jax.stats.estimate import recorded


def test_top_share_takes_the_largest_of_each_layer() -> None:
    scores = np.array([[0.1, 5.0, 0.3, 0.2, 4.0], [9.0, 8.0, 7.0, 6.0, 5.0]])
    assert overlap.top_share(scores, 0.4).tolist() == [[False, True, False, False, True], [True, True] + [False] * 3]
    assert np.argwhere(overlap.top_share_global(scores, 0.4)).tolist() == [[1, 0], [1, 1], [1, 2], [1, 3]]
    assert overlap.top_share(scores, 0.01).sum(axis=1).tolist() == [1, 1]
    random = np.random.default_rng(0).random((4, 384))
    assert overlap.top_share(random).sum(axis=1).tolist() == [38] * 4
    assert overlap.top_share_global(random).sum() == round(0.1 * 4 * 384)


def test_channels_that_did_not_change_are_never_at_the_top() -> None:
    """Two edits that leave almost everything alone do not overlap by their channels' index."""
    a, b = np.zeros((2, 1, 100))
    a[0, 7], b[0, 60] = 1.0, 1.0
    sets = overlap.top_share(a), overlap.top_share(b)
    assert [s.sum() for s in sets] == [1, 1] and overlap.overlap(*sets)["estimate"] == 0.0


def test_overlap_counts_and_its_chance_is_the_formula() -> None:
    rng = np.random.default_rng(1)
    a, b = (overlap.top_share(rng.random((6, 200)), 0.1) for _ in range(2))
    found = overlap.overlap(a, b, rng=rng)
    shared = int((a & b).sum())
    assert (found["shared"], found["estimate"]) == (shared, pytest.approx(shared / (240 - shared)))
    assert found["chance"] == pytest.approx(0.1 / 1.9) and (found["unit"], found["n"]) == ("channel", 1200)
    assert found["null"]["mean"] == pytest.approx(found["chance"], abs=0.002)
    json.dumps(found, allow_nan=False)
    same = overlap.overlap(a, a)
    assert same["estimate"] == 1.0 and same["p"] < 1e-3 and same["ci95"][0] > 0.9
    nothing = overlap.overlap(np.zeros((2, 5), bool), np.zeros((2, 5), bool))
    assert nothing["estimate"] is None and nothing["reason"]
    assert overlap.jaccard(a, b) == found["estimate"] and math.isnan(overlap.jaccard(a & ~a, a & ~a))
    with pytest.raises(ValueError, match=r"\[L, C\]"):
        overlap.overlap(a, b[:, :-1])


def test_null_is_that_of_permuting_within_layers() -> None:
    """Sets whose sizes differ by layer: permuting across layers would give another null."""
    rng = np.random.default_rng(2)
    a, b = np.arange(40)[None] < np.array([[2], [20], [0]]), np.arange(40)[None] < np.array([[4], [30], [5]])
    found = overlap.overlap(a, b, n_permutations=4000, rng=rng)
    draws = [overlap.jaccard(rng.permuted(a, axis=1), b) for _ in range(4000)]
    assert found["null"]["mean"] == pytest.approx(np.mean(draws), abs=0.005)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (found["null"]["low"], found["null"]["high"]) == pytest.approx((low, high), abs=0.03)
    anywhere = [overlap.jaccard(rng.permutation(a.ravel())[None], b.ravel()[None]) for _ in range(400)]
    assert abs(np.mean(anywhere) - np.mean(draws)) > 0.02


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_interval_covers_over_draws_of_channels(correlation: float) -> None:
    rng = np.random.default_rng(3)
    cut = stats.norm.isf(0.1)
    joint = stats.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]]).cdf([-cut, -cut])
    truth = joint / (0.2 - joint)
    covered = []
    for _ in range(800):
        a = rng.normal(size=(4, 300))
        b = correlation * a + math.sqrt(1 - correlation**2) * rng.normal(size=a.shape)
        e = recorded(overlap.overlap(overlap.top_share(a), overlap.top_share(b), 10, rng))
        covered.append(e is not None and e.includes(truth))
    assert 0.93 < np.mean(covered) <= 0.995


def test_p_is_uniform_at_most_for_random_sets() -> None:
    rng = np.random.default_rng(4)
    sets = overlap.top_share(rng.random((2000, 100))).reshape(2, 1000, 1, 100)
    p = np.array([overlap.overlap(a, b, 400, rng)["p"] for a, b in zip(*sets, strict=True)])
    assert np.mean(p < 0.05) < 0.065


def test_mean_over_pairs_by_seed_and_by_domain() -> None:
    domains = "code", "cw", "math", "qa"
    pairs = [(a, b) for i, a in enumerate(domains) for b in domains[i + 1 :]]
    values = np.random.default_rng(5).uniform(0.05, 0.2, (6, 3))
    by_seed = overlap.mean_jaccard(dict(zip(pairs, values.tolist(), strict=True)))
    assert (by_seed.value, by_seed.n, by_seed.unit) == (pytest.approx(values.mean()), 3, "seed")
    assert by_seed.stderr == pytest.approx(values.mean(axis=0).std(ddof=1) / math.sqrt(3))
    alone = overlap.mean_jaccard(dict(zip(pairs, values[:, :1].tolist(), strict=True)))
    assert (alone.n, alone.unit) == (4, "domain") and alone.low < alone.value < alone.high < math.inf
    assert overlap.mean_jaccard({("code", "math"): [0.1]}).high == math.inf
    with pytest.raises(ValueError, match="each seed"):
        overlap.mean_jaccard({})


def test_interval_over_domains_covers_when_pairs_share_their_domains() -> None:
    """Overlap of a pair = the effects of its two domains: a t interval over six pairs would cover too rarely."""
    rng = np.random.default_rng(6)
    covered = []
    for effect in rng.normal(0.1, 0.02, (1500, 4)):
        pairs = {(str(i), str(j)): [(effect[i] + effect[j]) / 2] for i in range(4) for j in range(i)}
        covered.append(overlap.mean_jaccard(pairs).includes(0.1))
    assert 0.93 < np.mean(covered) < 0.97


def test_of_equal_scores_the_lower_index_is_in_the_set() -> None:
    scores = np.array([[1.0, 2.0, 1.0, 1.0, 0.0], [np.nan, 3.0, np.nan, np.nan, -1.0]])
    assert overlap.top_share(scores, 0.6).tolist() == [[True, True, True, False, False], [False, True, *[False] * 3]]


def test_half_sampling_has_the_standard_error_of_a_mean() -> None:
    """The mean of half of the blocks varies between halves as the mean of all blocks does between samples."""
    x = np.random.default_rng(7).normal(size=12)
    keep = overlap.half_sets(12, 20_000)
    assert keep.shape == (20_000, 12) and (keep.sum(axis=1) == 6).all()
    e = overlap.half_sampled(x.mean(), [x[k].mean() for k in keep], 12, "block")
    stderr = x.std(ddof=1) / math.sqrt(12)
    assert e.stderr == pytest.approx(stderr, rel=0.02) and (e.n, e.unit) == (12, "block")
    assert e.high - e.value == pytest.approx(stats.t.ppf(0.975, 11) * stderr, rel=0.02)
    odd = overlap.half_sets(5)
    assert (odd.sum(axis=1) == 2).all()
    few = overlap.half_sampled(x[:5].mean(), [x[:5][k].mean() for k in overlap.half_sets(5, 20_000)], 5)
    assert few.stderr == pytest.approx(x[:5].std(ddof=1) / math.sqrt(5), rel=0.02)
    assert overlap.half_sampled(0.3, [0.3, math.nan], 12).high == math.inf == overlap.half_sampled(1.0, [1.0], 1).high
