"""The warnings of a stage that learns little, in the very words."""

import pytest

from mdrl_jax.stages.health import Health


def told(*steps: tuple[int, float, float], first: int = 0, rewarded: bool = True) -> tuple[list[str], list[str]]:
    """Warnings at steps and at the end, of steps with 8 groups: (equal groups, mean reward, mean length of 64)."""
    health = Health("math", 64, rewarded, first)
    at_steps = [
        health.step(
            first + i, {"trained_groups": 8.0, "equal_groups": float(equal), "reward": r, "length": n, "ended": 0.25}
        )
        for i, (equal, r, n) in enumerate(steps, 1)
    ]
    return [text for text in at_steps if text], health.summary()


NOTHING = "the stage learned nothing from rewards; "
FILL = "a larger train.max_rounds, or train.filter, fills steps with groups whose rewards differ"


def test_a_healthy_stage_says_nothing():
    assert told((3, 0.5, 20.0), (3, 0.6, 57.0)) == ([], []) and told() == ([], [])


def test_the_first_step_without_a_reward_that_differs_is_told_at_once_and_the_others_at_the_end():
    early, late = told((8, 0.0, 20.0), (2, 0.5, 20.0), (8, 0.0, 20.0), first=4)
    assert early == ["math: no reward differed in 8 of 8 groups of step 5, so it learned nothing from rewards"]
    assert late == [
        f"math: no reward differed in 18 of 24 groups since step 4, and in no group of 2 of 3 steps; {FILL}"
    ]


@pytest.mark.parametrize(
    "reward, why",
    [
        (0.0, "every reward was 0, so train the model on demonstrations first (stage sft), or choose easier prompts"),
        (1.0, "every reward was 1, so nothing is left to learn from these prompts"),
        (0.5, FILL),
    ],
)
def test_a_stage_without_any_reward_that_differs_says_so_loudly(reward: float, why: str):
    assert told((8, reward, 20.0), (8, reward, 20.0))[1] == [
        f"math: no reward differed in 16 of 16 groups: {NOTHING}{why}"
    ]


def test_many_equal_groups_and_lengths_near_the_limit_are_told():
    assert told((4, 0.5, 20.0))[1] == [f"math: no reward differed in 4 of 8 groups; {FILL}"]
    assert told((0, 0.5, 60.0), (0, 0.5, 56.0))[1] == [
        "math: the mean length of completions was 58 of at most 64 tokens, and 75% were cut off; raise the last of "
        "rollout.completion_buckets"
    ]


def test_a_distillation_is_told_of_lengths_and_not_of_equal_rewards():
    early, late = told((8, 0.0, 60.0), (8, 0.0, 60.0), rewarded=False)
    assert early == [] and len(late) == 1 and "mean length" in late[0]
