"""Claim C7 by its rule: every control, the pair that lost most, and what leaves the question open."""

from typing import Any

import pytest

from mdrl_jax.claims.rollback import c7


def figure(estimate: float, half: float = 1.0) -> dict[str, Any]:
    return {"estimate": estimate, "ci95": [estimate - half, estimate + half], "null": 0.0, "n": 300, "unit": "points"}


def record(lost: float = 30.0, donor: str = "qa", **differences: float) -> dict[str, Any]:
    """A rollback's record; differences to controls, each ± 1."""
    test = {
        "lost": figure(lost),
        "gain": figure(12.0),
        "loss": figure(1.5),
        "at_equal_loss": {name: figure(x) | {"control_gain": 1.0, "settings": []} for name, x in differences.items()},
    }
    head = {"stage": f"rollback-math-{donor}", "domain": "math", "donor": donor, "limit": 2.0}
    return head | {"chosen": {"rule": "removing"}, "test": test}


EMPTY = {"stage": "rollback-math-cw", "domain": "math", "donor": "cw", "limit": 2.0, "chosen": None}


@pytest.mark.parametrize(
    ("differences", "verdict", "figured"),
    [
        ({"random": 9.0, "matched": 6.0, "largest": 3.0}, "supported", 3.0),
        ({"random": 9.0, "matched": 6.0, "largest": 0.5}, "undecided", 0.5),
        ({"random": 9.0, "matched": -6.0, "largest": 0.5}, "contradicted", -6.0),
    ],
)
def test_every_control_has_to_be_beaten(differences: dict[str, float], verdict: str, figured: float):
    claim = c7([record(**differences)])
    assert (claim["id"], claim["verdict"], claim["estimate"]) == ("C7", verdict, figured)
    assert claim["reason"].startswith("math after qa: ") and "1.5 points of qa" in claim["reason"]
    assert claim["ci95"] == [figured - 1, figured + 1]
    assert set(claim["rows"][0]["at_equal_loss"]) == set(differences)
    assert "settings" not in claim["rows"][0]["at_equal_loss"]["random"]


def test_the_verdict_is_of_the_pair_that_lost_most_and_the_others_are_rows():
    claim = c7([record(10.0, "cw", random=-9.0), EMPTY, record(30.0, "qa", random=9.0)])
    assert claim["verdict"] == "supported" and "after qa" in claim["reason"]
    assert [row["verdict"] for row in claim["rows"]] == ["contradicted", "undecided", "supported"]


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "there is no rollback"),
        ([EMPTY], "no set within 2 points of loss gains anything"),
        ([record(0.5, random=9.0)], "loss of math to win back"),
        ([record(-5.0, random=-9.0)], "loss of math to win back"),
    ],
)
def test_what_cannot_be_asked_is_undecided(records: list[dict[str, Any]], words: str):
    claim = c7(records)
    assert claim["verdict"] == "undecided" and words in claim["reason"]
