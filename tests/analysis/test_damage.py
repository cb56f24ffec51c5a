"""Damage tables against functions whose derivatives are known, and against the sampling distribution of a mean."""

import numpy as np
import pytest

from mdrl_jax.analysis import damage
from mdrl_jax.analysis.expansion import Draws, breakdown, expansion, segment_records, segments_needed
from mdrl_jax.second_order.objectives import DirectionalDerivatives


def cubic(x: float) -> DirectionalDerivatives:
    """L(x) = Σ_p c_p (x + x²/2 + x³/6) along a path of length 1, by prompt: derivatives at x."""
    c_P = np.array([2.0, 3.0, 3.0, 4.0])
    return DirectionalDerivatives(c_P * (1 + x + x**2 / 2), c_P * (1 + x), np.ones(4))


def test_one_segment_is_the_taylor_polynomial_and_more_segments_approach_the_function():
    draws = Draws(4)
    orders = {j / 8: cubic(j / 8) for j in range(8)}
    measured_R = draws.ratio(np.array([2.0, 3.0, 3.0, 4.0]) * (1 + 1 / 2 + 1 / 6), np.ones(4))
    rows = segment_records(orders, (1, 2, 4, 8), measured_R, draws, "nats")
    assert rows[0]["predicted"]["estimate"] == pytest.approx(3 * 1.5)
    left = [row["remainder"]["estimate"] for row in rows]
    # Where one of the expansions cannot be measured, the sum cannot be.
    some = segment_records(orders, (1, 2, 4, 8), measured_R, draws, "nats", {0.0: "", 0.5: "blind", 0.25: ""})
    assert [r["predicted"]["estimate"] is None for r in some] == [False, True, True, True]
    assert some[0] == rows[0] and some[1]["predicted"]["reason"] == "blind" and segments_needed(some, 1e9) == 1
    # Of a cubic, n segments leave 1/n² of the third-order term.
    assert left == pytest.approx([3 / 6 / n**2 for n in (1, 2, 4, 8)])
    assert segments_needed(rows, 0.05) == 2 and segments_needed(rows, 0.001) is None


def test_an_expansion_scales_with_alpha():
    step = expansion(cubic(0.0), Draws(4), 0.5, None)
    assert step.first_R[0] == pytest.approx(3 * 0.5)
    assert step.second_R[0] == pytest.approx(3 * 0.5 * 0.25)
    record = step.record(Draws(4), "nats")
    assert record["predicted"]["estimate"] == pytest.approx(3 * 0.625)
    assert record["second_share"]["estimate"] == pytest.approx(0.125 / 0.625)
    assert "measured" not in record
    # All prompts have the same share, so Fieller's interval has no width. Without a measurable whole there is no share.
    assert record["second_share"]["ci95"] == pytest.approx([0.2, 0.2])
    noise = expansion(
        DirectionalDerivatives(np.array([-1.0, 0.0, 1.0, 0.1]), np.ones(4), np.ones(4)), Draws(4), 0.1, None
    )
    assert noise.record(Draws(4), "nats")["second_share"]["reason"] == "the interval of the denominator includes 0"


def test_a_remainder_without_bounds_is_no_breakdown():
    """Too few prompts differ: more than 2.5 % of the draws have no spread, and the interval is open."""
    part_P = np.r_[np.zeros(15), 1.0]
    draws = Draws(16)
    assert draws.figure(draws.ratio(part_P, np.ones(16)), "nats")["ci95"] is None
    steps = curve((0.3, (0.2, 0.4)), (0.3, (0.2, 0.4)))
    steps[-1]["remainder"]["ci95"] = None
    assert breakdown(steps) is None


def test_intervals_of_a_ratio_over_prompts_cover():
    """Prompts with different counts, as completions that succeeded: Σ part / Σ count."""
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(300):
        count_P = rng.integers(1, 5, 100).astype(float)
        part_P = count_P * (0.3 + rng.exponential(1.0, 100) - 1.0)
        draws = Draws(100)
        low, high = draws.figure(draws.ratio(part_P, count_P), "nats")["ci95"]
        hits += low <= 0.3 <= high
    assert 0.90 <= hits / 300 <= 0.985  # 95 % with the spread of 300 draws, and of a skewed mean of 100


def test_a_figure_without_successes_says_so():
    draws = Draws(3)
    record = draws.figure(draws.ratio(np.zeros(3), np.zeros(3)), "nats")
    assert record["estimate"] is None and "no completion succeeded" in record["reason"]
    assert draws.figure(np.ones(2001), "nats", "too few")["reason"] == "too few"


def curve(*remainders: tuple[float, tuple[float, float]]) -> list[dict]:
    """Steps of measured damage 1 with these remainders and intervals."""
    steps = []
    for j, (value, ci95) in enumerate(remainders, 1):
        figure = {"estimate": value, "ci95": list(ci95)}
        steps.append({"alpha": j / 4, "measured": {"estimate": 1.0, "ci95": [0.9, 1.1]}, "remainder": figure})
    return steps


def test_the_model_breaks_down_where_the_remainder_is_large_and_measurable_to_the_end():
    holds, noisy, fails = (0.1, (0.05, 0.15)), (0.3, (-0.1, 0.7)), (0.3, (0.2, 0.4))
    assert breakdown(curve(holds, holds, fails, fails)) == 0.75
    assert breakdown(curve(noisy, noisy, noisy, noisy)) is None
    assert breakdown(curve(fails, holds, holds, fails)) == 1.0
    assert breakdown(curve(fails, fails, fails, holds)) is None
    assert breakdown([]) is None


def test_every_objective_has_a_unit_and_what_is_measured_has_predictions():
    assert set(damage.MEASURED) <= set(damage.UNITS)
    assert set(damage.REWARD_ALPHAS) <= set(damage.ALPHAS)


def test_the_curvature_share_is_what_the_gradient_at_the_peak_leaves_of_the_prediction():
    draws = Draws(4)
    orders = {j / 8: cubic(j / 8) for j in range(8)}
    measured_R = draws.ratio(np.full(4, 5.0), np.ones(4))
    rows = segment_records(orders, (1, 8), measured_R, draws, "nats")
    # g·D is 3 of 4.5 in one segment, and nearly of 3·(1 + ½ + ⅙) in eight.
    assert rows[0]["curvature_share"]["estimate"] == pytest.approx(1 / 3)
    assert rows[1]["curvature_share"]["estimate"] == pytest.approx(1 - 1 / (1 + 1 / 2 + 1 / 6), abs=0.01)
    assert rows[1]["curvature_share"]["ci95"] == pytest.approx([rows[1]["curvature_share"]["estimate"]] * 2)
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    open_ = {a: DirectionalDerivatives(signs * o.first_P, o.second_P * signs, o.count_P) for a, o in orders.items()}
    (row,) = segment_records(open_, (1,), measured_R, draws, "nats")
    assert "includes 0" in row["curvature_share"]["reason"]
