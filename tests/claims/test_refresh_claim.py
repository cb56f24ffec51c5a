"""C6: each condition decides alone, and what was not tried or not measured leaves it undecided."""

import dataclasses
import json
from typing import Any

import pytest

from mdrl_jax.claims.refresh import Refreshed, c6
from mdrl_jax.stats.estimate import Estimate


def figure(low: float, high: float) -> dict[str, Any]:
    return Estimate((low + high) / 2, low, high, 300, "").record()


def absent(reason: str) -> dict[str, Any]:
    return {"estimate": None, "ci95": None, "null": None, "n": 0, "unit": "", "reason": reason}


def subspace(low: float, high: float, half: int = 0) -> dict[str, Any]:
    return {"objective": "reward", "half": half, "stage": "cw", "k": 4, "faster": figure(low, high)}


GOOD = Refreshed(
    "refresh-math",
    "math",
    fraction=figure(0.7, 0.9),
    collateral=figure(0.5, 2.5),
    loss=figure(30.0, 40.0),
    steps=4,
    stage_steps=20,
    contraction=[subspace(-0.3, -0.1), subspace(-0.4, -0.2, 1)],
)


def judged(**changes: Any) -> dict[str, Any]:
    return c6([dataclasses.replace(GOOD, **changes)])


def test_all_conditions_together_support_it():
    record = judged()
    assert (record["id"], record["verdict"]) == ("C6", "supported")
    assert record["estimate"] == pytest.approx(0.8) and record["ci95"] == [0.7, 0.9]
    assert record["rows"][0]["share_of_steps"] == 0.2
    assert "20% of a stage's steps" in record["reason"] and "collateral" in record["reason"]
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({"fraction": figure(0.2, 0.4)}, "contradicted", "recovery fraction"),
        ({"fraction": figure(0.4, 0.9)}, "undecided", "undecided against 0.5"),
        ({"fraction": absent("undefined: the interval of the loss includes 0")}, "undecided", "the interval of the"),
        ({"collateral": figure(3.5, 6.0)}, "contradicted", "collateral in points"),
        ({"collateral": figure(1.0, 6.0)}, "undecided", "undecided against 3"),
        ({"contraction": [subspace(-0.3, -0.1), subspace(0.1, 0.2, 1)]}, "contradicted", "half 2"),
        ({"contraction": [subspace(-0.3, -0.1), subspace(-0.1, 0.2, 1)]}, "undecided", "half 2"),
        ({"contraction": []}, "undecided", "no conflict subspace was found"),
        ({"steps": 5}, "undecided", "not brief: 5 of 20 steps are 25%, above 20%"),
        # A refresh that took too long says nothing of brief ones, however badly it went.
        ({"steps": 5, "fraction": figure(0.2, 0.4)}, "undecided", "not brief"),
    ],
)
def test_each_condition_decides_alone(changes: dict[str, Any], verdict: str, words: str):
    record = judged(**changes)
    assert record["verdict"] == verdict and words in record["reason"]


def test_the_largest_loss_is_the_headline_and_all_are_listed():
    small = dataclasses.replace(GOOD, stage="refresh-qa", domain="qa", loss=figure(1.0, 3.0), fraction=figure(0.1, 0.2))
    unknown = dataclasses.replace(GOOD, stage="refresh-code", loss=absent("code was not evaluated"))
    record = c6([small, GOOD, unknown])
    assert record["verdict"] == "supported" and record["reason"].startswith("refresh-math: ")
    assert [(r["stage"], r["verdict"]) for r in record["rows"]] == [
        ("refresh-qa", "contradicted"),
        ("refresh-math", "supported"),
        ("refresh-code", "supported"),
    ]


def test_nothing_to_judge():
    assert c6([])["reason"] == "not measurable: no refresh was run"
    record = judged(loss=absent("math was not evaluated"))
    assert record["verdict"] == "undecided" and record["reason"] == "not measurable: no refresh has a measured loss"
