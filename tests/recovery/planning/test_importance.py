"""Forecasts by importance weights: against a policy whose scores are known exactly, before and after any change."""

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from mdrl_jax.recovery.planning.forecast import log_odds
from mdrl_jax.recovery.planning.importance import ENOUGH, reweighted

PROMPTS, CHOICES = 400, 6
EVERY = np.arange(PROMPTS)
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(PROMPTS, CHOICES))
GOOD = RNG.binomial(1, 0.4, (PROMPTS, CHOICES)).astype(float)
CHANGE = 0.5 * RNG.normal(size=(PROMPTS, CHOICES)) + 0.5 * GOOD


def policy(strength: float) -> np.ndarray:
    """Probabilities of each prompt's completions, `strength` along the change."""
    weight = np.exp(LOGITS + strength * CHANGE)
    return weight / weight.sum(axis=1, keepdims=True)


def drawn(rng: Any, group: int, prompts: np.ndarray = EVERY) -> tuple[np.ndarray, np.ndarray]:
    """Completions [P, G] of prompts at strength 0, and their rewards."""
    uniform = rng.random((len(prompts), group, 1))
    choice = (uniform > np.cumsum(policy(0), axis=1)[prompts, None]).sum(axis=-1).clip(max=CHOICES - 1)
    return choice, GOOD[prompts[:, None], choice]


def ratio(choice: np.ndarray, strength: float, prompts: np.ndarray = EVERY) -> np.ndarray:
    logs = np.log(policy(strength)) - np.log(policy(0))
    return logs[prompts[:, None], choice]


def truth(strength: float) -> float:
    """The exact change of the log-odds of the mean reward."""
    means = [(policy(s) * GOOD).sum(axis=1).mean() for s in (strength, 0.0)]
    return math.log(means[0] / (1 - means[0])) - math.log(means[1] / (1 - means[1]))


@pytest.mark.parametrize("strength", [-2.0, 0.3, 1.0, 3.0])
def test_the_shift_is_that_of_the_changed_policy_wherever_it_ends(strength: float):
    choice, rewards = drawn(np.random.default_rng(1), 400)
    found = reweighted(ratio(choice, strength), rewards)
    assert found.shift is not None
    assert found.shift.value == pytest.approx(truth(strength), abs=0.02)
    slope = truth(1e-4) / 1e-4 * strength
    assert abs(strength) < 2 or abs(slope - truth(strength)) > 0.06  # where it goes straight on


@pytest.mark.parametrize("strength", [0.5, 1.5])
def test_its_interval_holds_what_it_says(strength: float):
    """Over samples of few completions of prompts that are drawn themselves."""
    rng, held, runs = np.random.default_rng(2), 0, 400
    for _ in range(runs):
        prompts = rng.integers(0, PROMPTS, 96)
        choice, rewards = drawn(rng, 4, prompts)
        found = reweighted(ratio(choice, strength, prompts), rewards)
        assert found.shift is not None
        held += abs(found.shift.value - truth(strength)) <= 1.985 * found.shift.stderr
    assert 0.9 < held / runs and binomtest(held, runs, 0.95).pvalue > 1e-4, held


def test_equal_weights_change_nothing_and_count_all():
    _, rewards = drawn(np.random.default_rng(3), 4)
    found = reweighted(np.full(rewards.shape, -3.0), rewards)  # a factor of all weights is no change
    assert found.effective == pytest.approx(rewards.size)
    assert found.shift is not None and found.shift.value == pytest.approx(0) and found.shift.stderr == pytest.approx(0)


def test_what_succeeded_becoming_certain_is_finite():
    _, rewards = drawn(np.random.default_rng(4), 4)
    found = reweighted(np.where(rewards > 0, 0.0, -800.0), rewards)
    assert found.shift is not None
    assert found.shift.value == pytest.approx(log_odds(np.ones(rewards.shape)) - log_odds(rewards))


def test_few_completions_that_count_say_nothing():
    rewards = np.ones((50, 4))
    rewards[::2] = 0
    ratio_PG = np.full((50, 4), -900.0)
    ratio_PG.ravel()[: int(ENOUGH) - 1] = 0.0
    found = reweighted(ratio_PG, rewards)
    assert found.effective == pytest.approx(ENOUGH - 1) and found.shift is None
    ratio_PG.ravel()[: int(ENOUGH)] = 0.0
    assert reweighted(ratio_PG, rewards).shift is not None


@pytest.mark.parametrize("shape", [(50, 1), (1, 4), (50,), (4, 50)])
def test_rewards_of_other_completions_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"log-ratios of shape \(50, 4\), but rewards of shape"):
        reweighted(np.zeros((50, 4)), np.ones(shape))
