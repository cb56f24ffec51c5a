"""Frontiers against linear programmes and one drawn by hand; differences at equal loss, and what intervals cover."""

import numpy as np
import pytest
import scipy.stats
from scipy.optimize import linprog

from mdrl_jax.recovery.rollback.tradeoff import Outcome, at_equal_loss, carriers, frontier, outcome


def made(gain: float, loss: float, n: int = 50) -> Outcome:
    """An outcome without spread."""
    return Outcome(np.full(n, gain), np.full(n, loss))


def heights(points: list[tuple[float, float]], at: list[float]) -> np.ndarray:
    """The frontier of (loss, gain) points at several losses."""
    loss, gain = np.array(points).T
    return frontier(np.tile(loss, (len(at), 1)), np.tile(gain, (len(at), 1)), np.array(at))


def test_a_frontier_drawn_by_hand():
    points = [(1.0, 2.0), (2.0, 3.0), (3.0, 1.0), (4.0, 4.0)]
    at = [-1.0, 0.0, 0.5, 1.0, 1.5, 3.0, 4.0, 10.0]
    np.testing.assert_allclose(heights(points, at), [0.0, 0.0, 1.0, 2.0, 2.5, 3.5, 4.0, 4.0])
    np.testing.assert_allclose(heights([(1.0, -3.0)], [2.0]), [0.0])  # nothing need be removed
    np.testing.assert_allclose(heights([(-1.0, 2.0), (2.0, 5.0)], [0.5]), [3.5])  # B may gain too


def test_a_frontier_is_the_best_mixture():
    """Of mixtures of settings and nothing with a mean loss within the bound, by a linear programme."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        loss, gain = rng.normal(1.0, 1.5, 4), rng.normal(1.0, 2.0, 4)
        at = float(rng.uniform(0, 4))
        best = linprog(
            -np.append(gain, 0.0), A_ub=[np.append(loss, 0.0)], b_ub=[at], A_eq=[np.ones(5)], b_eq=[1.0], method="highs"
        )
        assert heights(list(zip(loss, gain, strict=True)), [at])[0] == pytest.approx(-best.fun, abs=1e-9)


def test_carriers_are_what_the_frontier_rests_on():
    settings = [made(2.0, 1.0), made(3.0, 2.0), made(1.0, 3.0), made(4.0, 4.0)]
    assert sorted(carriers(settings, 3.0)) == [1, 3]
    assert carriers(settings, 2.0) == [1]
    assert carriers(settings, 9.0) == [3]
    assert carriers([made(-1.0, 1.0), made(-2.0, 3.0)], 2.6) == [1]
    assert carriers([], 1.0) == []


def test_outcomes_are_paired_by_prompt():
    rng = np.random.default_rng(1)
    before, after = ({d: rng.random((n, 2)) for d, n in (("math", 5), ("qa", 7))} for _ in range(2))
    found = outcome(before, after, "math", "qa")
    np.testing.assert_allclose(found.gain_P, (after["math"] - before["math"]).mean(1))
    np.testing.assert_allclose(found.loss_P, (before["qa"] - after["qa"]).mean(1))
    assert found.record()["loss"]["estimate"] == pytest.approx(100 * found.loss)
    assert found.record()["gain"]["n"] == 5 and found.record()["loss"]["n"] == 7


def test_a_loss_that_is_just_the_limit_is_within_it():
    loss_P = np.repeat([0.5, 0.0], [4, 96]).astype(np.float32)
    assert Outcome(loss_P, loss_P).affordable(2.0 / 100) and not Outcome(loss_P, loss_P).affordable(1.9 / 100)


def test_a_set_on_its_controls_frontier_differs_by_nothing_and_one_above_by_its_height():
    """Both cost B the same a prompt; half of the way along a control's chord is worth half of it."""
    rng = np.random.default_rng(2)
    gain_P, loss_P = rng.random(80), rng.random(90)
    control = [Outcome(gain_P, loss_P)]
    for extra in (0.0, 0.3):
        estimate, height = at_equal_loss(Outcome(0.5 * gain_P + extra, 0.5 * loss_P), [control])
        assert height == pytest.approx(50 * gain_P.mean())
        np.testing.assert_allclose([estimate.value, estimate.low, estimate.high], 100 * extra, atol=1e-9)
        assert estimate.n == 80 and estimate.unit == "points"
    free, _ = at_equal_loss(Outcome(gain_P, loss_P - 5.0), [[Outcome(gain_P + 9.0, loss_P)]])
    assert free.value == pytest.approx(100 * gain_P.mean())  # costs nothing: held against nothing


def drawn_control(rng: np.random.Generator, draws: int) -> tuple[Outcome, list[list[Outcome]]]:
    """A set and draws of a control that gain by 0.05 (standard deviation) more or less, far more than prompts tell."""
    shared = rng.normal(0, 0.05, (2, 200))
    control = [[Outcome(0.1 + rng.normal(0, 0.05) + shared[0], 0.05 + shared[1])] for _ in range(draws)]
    return Outcome(0.2 + shared[0], 0.05 + shared[1]), control


def test_the_luck_of_a_random_control_is_in_the_interval():
    ours, control = drawn_control(np.random.default_rng(4), 5)
    estimate, height = at_equal_loss(ours, control)
    alone = [at_equal_loss(ours, [c]) for c in control]
    assert height == pytest.approx(np.mean([h for _, h in alone]))
    luck = scipy.stats.t.ppf(0.975, 4) * np.std([e.value for e, _ in alone], ddof=1) / np.sqrt(5)
    # The differences of one draw vary little over prompts, so luck is nearly all of the width.
    assert all(e.high - e.low < 0.2 * luck for e, _ in alone)
    np.testing.assert_allclose([estimate.high - estimate.value, estimate.value - estimate.low], luck, rtol=0.02)
    with pytest.raises(ValueError, match="at least one draw"):
        at_equal_loss(ours, [])


@pytest.mark.slow
def test_the_interval_of_a_random_control_covers():
    """The true difference is 10 points. From one draw alone, under a third of the intervals cover."""
    rng, covered, alone = np.random.default_rng(4), 0, 0
    for _ in range(300):
        ours, control = drawn_control(rng, 5)
        covered += at_equal_loss(ours, control)[0].includes(10.0)
        alone += at_equal_loss(ours, control[:1])[0].includes(10.0)
    assert 0.92 < covered / 300 <= 0.98 and alone / 300 < 0.3


def test_the_interval_covers_and_errs_against_the_set():
    """Rewards of 80 prompts, noisy and correlated between settings; the true difference is 0.08."""
    rng = np.random.default_rng(3)
    truth = {"ours": (0.20, 0.03), "low": (0.10, 0.02), "high": (0.14, 0.04)}
    covered, above, n_runs = 0, 0, 200
    for _ in range(n_runs):
        shared = rng.normal(0, 1, (2, 80)) * np.array([[0.2], [0.06]])
        found = {
            name: Outcome(gain + shared[0] + rng.normal(0, 0.15, 80), loss + shared[1] + rng.normal(0, 0.05, 80))
            for name, (gain, loss) in truth.items()
        }
        estimate, _ = at_equal_loss(found["ours"], [[found["low"], found["high"]]])
        covered += estimate.low <= 8.0 <= estimate.high
        above += estimate.low > 8.0
    assert covered / n_runs > 0.88 and above / n_runs < 0.05
