"""More completions where the comparison of a rollback is undecided: which are sampled, and how often it errs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mdrl_jax.config import RecoverSection
from mdrl_jax.recovery.rollback.comparison import LOOKS, Control, _Contest, on_test
from mdrl_jax.recovery.rollback.sweep import Trial
from mdrl_jax.recovery.rollback.tradeoff import Outcome, Rewards, at_equal_loss
from tests.claims.recovery_worlds import rewards
from tests.told import Told

P, K, TOKENS = 100, 2, 1000  # prompts of a domain, completions of each, tokens of one scoring of a domain
START = {"math": 0.5, "qa": 0.76}
NOW, PEAK, OURS = (0.0, 0.0), (44.0, 0.0), (20.0, 2.0)  # gain of Math and loss of QA, in points


class World(Trial):
    """A rollback whose parameters are the pair (gain of A, loss of B) in points that they have in expectation."""

    def moved(self, mask: Any, strength: float, edit: Any = None) -> Any:
        return mask


class Scores:
    """Draws of rewards, by parameters and number of the draw; it keeps them and counts tokens."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.hard = {d: 0.25 * self.rng.normal(size=P) for d in START}
        self.kept: dict[tuple[str, tuple[float, float], int], np.ndarray] = {}
        self.drawn: dict[tuple[str, int], np.ndarray] = {}
        self.spent = 0

    def __call__(self, params: tuple[float, float], domains: Sequence[str], again: int = 0) -> Rewards:
        found = {}
        for d in domains:
            self.spent += TOKENS
            mean = START[d] + (params[0] if d == "math" else -params[1]) / 100
            if (d, params, again) not in self.kept:
                like = self.drawn.setdefault((d, again), self.rng.random((P, K)))
                self.kept[d, params, again] = rewards(self.rng, mean, (self.hard[d], like))
            found[d] = self.kept[d, params, again]
        return found

    def all_of(self, params: tuple[float, float], times: int) -> Outcome:
        """The outcome over the first `times` draws of K completions, from all rewards at once."""

        def of(domain: str, at: tuple[float, float]) -> np.ndarray:
            return np.concatenate([self.kept[domain, at, again] for again in range(times)], axis=1).mean(axis=1)

        return Outcome(of("math", params) - of("math", NOW), of("qa", NOW) - of("qa", params))


def settings_of(gain: float) -> list[tuple[float, float]]:
    """A control that gains `gain` points at QA's loss of 2 points, with settings on either side."""
    return [(gain * min(x, 1.15), 2.0 * x) for x in (0.5, 1.0, 1.6)]


def judged(seed: int, gains: dict[str, float], **settings: Any) -> tuple[Scores, dict[str, Any]]:
    """(the draws, the record) of a comparison with controls of these gains at the loss of the chosen set."""
    scores = Scores(seed)
    trial = World(
        domain="math",
        donor="qa",
        others=(),
        now=NOW,
        edit=None,
        places={},
        scores={},
        n=1,
        gradient=None,
        settings=RecoverSection(samples=K, **settings),
        validation=scores,
        held_out=scores,
        tokens=lambda: scores.spent,
        track=Told(),
    )
    kept = {}
    for name, gain in gains.items():
        points = settings_of(gain)
        kept[name] = (Control(lambda s, _, of=points: (of[round(s) - 1], 1.0), 1, 3, 1), [1.0, 2.0, 3.0], 3.0)
    return scores, on_test(trial, OURS, 1.0, PEAK, kept)


def test_the_undecided_comparison_alone_is_sampled_on_and_holds_all_completions():
    scores, test = judged(0, {"far": 8.0, "near": 20.0}, control_tokens=1e9, control_half_width=0.0)
    far, near = (test["at_equal_loss"][name] for name in ("far", "near"))
    times = 2 ** (LOOKS - 1)
    assert (far["completions"], near["completions"]) == (K, times * K) and test["unsettled"] == ["near"]
    for found, n, gain in ((far, 1, 8.0), (near, times, 20.0)):
        outcomes = [scores.all_of(s, n) for s in settings_of(gain)]
        wanted, height = at_equal_loss(scores.all_of(OURS, n), [outcomes])
        assert (found["estimate"], *found["ci95"]) == pytest.approx((wanted.value, wanted.low, wanted.high), abs=1e-9)
        assert found["control_gain"] == pytest.approx(height)
        gains = [100 * o.gain for o in outcomes]
        assert [s["gain"]["estimate"] for s in found["settings"]] == pytest.approx(gains)
    assert all(again == 0 for _, params, again in scores.kept if params in (PEAK, *settings_of(8.0)))
    once = judged(0, {"far": 8.0, "near": 20.0})[1]
    assert "unsettled" not in once and once["at_equal_loss"]["far"] == far
    assert {k: test[k] for k in ("gain", "loss", "lost", "recovery")} == {
        k: once[k] for k in ("gain", "loss", "lost", "recovery")
    }
    width = np.diff(near["ci95"])
    assert width < 0.7 * np.diff(once["at_equal_loss"]["near"]["ci95"])


def test_a_difference_is_settled_by_its_width_or_at_the_level_of_four_looks():
    spread = np.random.default_rng(0).normal(size=P)
    spread = (spread - spread.mean()) / spread.std(ddof=1)
    nothing = Outcome(np.zeros(P), np.zeros(P))
    for errors, low_is_above, settled in ((1.0, False, False), (2.25, True, False), (3.0, True, True)):
        ours = Outcome(0.1 * (spread + errors / np.sqrt(P)), np.zeros(P))
        for mirrored in (False, True):  # the control gains what the set gains, and the set nothing
            contest = _Contest(Control(lambda s, _: (None, 1.0), 1, 1, 1), [1.0], [[ours if mirrored else nothing]])
            first = nothing if mirrored else ours
            low, high = contest.record(first, K)["ci95"]
            assert (high < 0 if mirrored else low > 0) is low_is_above
            assert contest.settled(first, 0.0) is settled and contest.settled(first, 0.51 * (high - low))


def test_sampling_ends_at_the_width_asked_for_or_with_the_budget():
    once, _ = judged(0, {"near": 20.0})
    for half_width, budget, completions in ((50.0, 1e9, K), (0.0, 10 * TOKENS, 2 * K), (0.0, 30 * TOKENS - 1, 2 * K)):
        scores, test = judged(0, {"near": 20.0}, control_tokens=budget, control_half_width=half_width)
        assert test["at_equal_loss"]["near"]["completions"] == completions
        assert test["unsettled"] == ([] if half_width else ["near"])
        # Five sets of parameters are scored on two domains for each further draw: θ_T, the chosen set, three settings.
        assert scores.spent - once.spent == (completions // K - 1) * 10 * TOKENS <= budget
    short, test = judged(0, {"near": 20.0}, control_tokens=10 * TOKENS * 0.9, control_half_width=0.0)
    assert short.spent == once.spent and test["unsettled"] == ["near"]


@pytest.mark.slow  # 60 s
def test_looking_again_seldom_finds_a_difference_that_is_not_there_and_finds_more_of_those_that_are():
    """One control, with the chosen set level with it or 3 points above; prints the shares of draws."""
    draws, found = 200, {}
    for gain in (20.0, 17.0):
        for tokens in (0.0, 1e9):
            lows = []
            for seed in range(draws):
                _, test = judged(seed, {"one": gain}, control_tokens=tokens, control_half_width=1.0)
                lows.append(test["at_equal_loss"]["one"]["ci95"])
            lows = np.array(lows)
            found[gain, tokens] = (lows[:, 0] > 0).mean(), (lows[:, 1] < 0).mean()
            above, below = found[gain, tokens]
            print(f"difference {20 - gain:g}, budget {tokens:g}: above {above:.3f}, below {below:.3f}")
    noise = 3 * np.sqrt(0.05 * 0.95 / draws)
    assert found[20.0, 1e9][0] <= 0.05 + noise
    assert found[17.0, 1e9][0] > found[17.0, 0.0][0] + 0.1
