"""Figures of circuits of several blocks: the best ends, convergence, the null of an overlap, blocks as units."""

import numpy as np
import pytest

from mdrl_jax.analysis.circuits import figures

RNG = np.random.default_rng(0)


def test_a_block_has_the_end_with_the_least_loss_and_is_judged_with_that_of_the_block_before():
    ends = RNG.random((4, 3, 2, 5)) < 0.5
    loss = np.array([[3.0, 1, 2], [1, 1, 1], [2, 3, 1], [0, 1, -1]])
    best = figures.best(ends, loss)
    np.testing.assert_array_equal(best, np.stack([ends[0, 1], ends[1, 0], ends[2, 2], ends[3, 2]]))
    np.testing.assert_array_equal(figures.of_previous(best), np.stack([best[3], best[0], best[1], best[2]]))


def test_searches_have_converged_if_the_best_circuits_of_both_starts_agree_on_nine_of_ten_heads():
    low = np.zeros((4, 1, 2, 10), bool)
    high = low.copy()
    high[:, 0, 0, :2] = True  # 2 of 20 heads, in every block
    high[0, 0, 1, 9] = True
    loss = np.array([[1.0, 0.5]] * 4)

    def record(of_high):
        ends = np.concatenate([low, of_high], axis=1)
        return figures.search_record(ends.astype(float), ends, loss)

    many = record(high)
    assert many["open_share"] == pytest.approx(9 / 80) and not many["converged"]
    assert many["open"] == [[0, 0], [0, 1], [1, 9]] and many["size"] == 9 / 4
    assert many["m"][1][9] == 0.25
    high[0, 0, 1, 9] = False
    few = record(high)
    assert few["open_share"] == pytest.approx(0.1) and few["converged"]


def test_the_null_of_an_overlap_is_hypergeometric_where_all_blocks_have_one_circuit():
    """More blocks with the same heads are no more evidence."""
    base, other = (np.broadcast_to(np.arange(40).reshape(4, 10) < n, (6, 4, 10)) for n in (12, 8))
    record = figures.overlap(base, other)
    assert (record["base"], record["other"], record["shared"]) == (12, 8, 8)
    drawn = np.random.default_rng(1).hypergeometric(12, 28, 8, 100_000)
    assert record["null"]["mean"] == pytest.approx(12 * 8 / 40, abs=0.1)
    assert [record["null"]["low"], record["null"]["high"]] == np.quantile(drawn, [0.025, 0.975]).tolist()
    assert record["retention"] == pytest.approx(8 / 12) and record["chance"] == 0.2 and record["p"] < 0.01


@pytest.mark.parametrize("figure", ["share", "transfer"])
def test_more_pairs_that_repeat_those_of_their_block_do_not_narrow_an_interval(figure):
    whole = RNG.gamma(4.0, 1.0, (8, 4))
    part = whole * RNG.normal(0.8, 0.1, (8, 1))

    def width(times):
        a, b = np.repeat(part, times, axis=1), np.repeat(whole, times, axis=1)
        if figure == "share":
            record = figures.share(a, b, "F")
        else:
            record = figures.transfer_difference((a, b), (b, b))
        return record["n"], record["ci95"][1] - record["ci95"][0]

    n, once = width(1)
    assert n == 8 and width(5)[1] == pytest.approx(once)
