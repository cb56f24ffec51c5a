"""C6 and C7 by their rules.

C6: each condition decides alone, and what was not tried or not measured leaves it undecided. C7: every control, the
pair that lost most, and what leaves the question open.
"""

import dataclasses
import json
from typing import Any

import pytest

from mdrl_jax.claims.recovery import INFORMED, RIVALS, Refreshed, c6, c7
from mdrl_jax.stats.estimate import Estimate

# --- C6 ------------------------------------------------------------------------------------------------------------


def interval(low: float, high: float) -> dict[str, Any]:
    return Estimate((low + high) / 2, low, high, 300, "").record()


def absent(reason: str) -> dict[str, Any]:
    return {"estimate": None, "ci95": None, "null": None, "n": 0, "unit": "", "reason": reason}


def subspace(low: float, high: float, half: int = 0, **figures: Any) -> dict[str, Any]:
    """An S in which ‖P_S e‖ shrinks by `low` to `high` a step, and contracts otherwise as C6 asks."""
    beats = interval(-0.2, -0.1)
    found = {"shrinks": interval(low, high), "than_random": beats, "toward": beats, "than_other": {"cw": beats}}
    head = {"objective": "reward", "half": half, "stage": "cw", "k": 4, "streams": 8, "faster": beats}
    return head | found | figures


GOOD = Refreshed(
    "refresh-math",
    "math",
    fraction=interval(0.7, 0.9),
    collateral=interval(0.5, 2.5),
    loss=interval(30.0, 40.0),
    steps=4,
    stage_steps=20,
    contraction=[subspace(-0.3, -0.1), subspace(-0.4, -0.2, 1)],
    path=0.7,
    rivals={name: interval(1.0, 3.0) for name in RIVALS},
)


def judged(**changes: Any) -> dict[str, Any]:
    return c6([dataclasses.replace(GOOD, **changes)])


def test_all_conditions_together_support_it():
    record = judged()
    assert (record["id"], record["verdict"]) == ("C6", "supported")
    assert record["estimate"] == pytest.approx(0.8) and record["ci95"] == [0.7, 0.9]
    assert record["rows"][0]["share_of_steps"] == 0.2
    assert "20% of a stage's steps and path length 0.7" in record["reason"] and "collateral" in record["reason"]
    assert [p["part"] for p in record["parts"]] == ["recovery", "contraction", "best average"]
    assert {p["verdict"] for p in record["parts"]} == {"supported"} and record["old_rule"]["verdict"] == "supported"
    fraction, collateral = record["parts"][0]["figures"]
    assert (fraction["estimate"], fraction["asked"], fraction["verdict"]) == (
        record["estimate"],
        "above 0.5",
        "supported",
    )
    assert (collateral["name"], collateral["asked"]) == ("collateral in points", "below 3")
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({"fraction": interval(0.2, 0.4)}, "contradicted", "recovery fraction"),
        ({"fraction": interval(0.4, 0.9)}, "undecided", "undecided against 0.5"),
        ({"fraction": absent("undefined: the interval of the loss includes 0")}, "undecided", "the interval of the"),
        ({"collateral": interval(3.5, 6.0)}, "contradicted", "collateral in points"),
        ({"collateral": interval(1.0, 6.0)}, "undecided", "undecided against 3"),
        ({"contraction": [subspace(-0.3, -0.1), subspace(0.1, 0.2, 1)]}, "contradicted", "half 2"),
        ({"contraction": [subspace(-0.3, -0.1), subspace(-0.1, 0.2, 1)]}, "undecided", "half 2"),
        ({"contraction": []}, "undecided", "no conflict subspace was found"),
        ({"contraction": [subspace(-0.3, -0.1, than_random=interval(-0.1, 0.1))]}, "undecided", "random subspaces"),
        ({"contraction": [subspace(-0.3, -0.1, than_random=interval(0.1, 0.2))]}, "contradicted", "random subspaces"),
        ({"contraction": [subspace(-0.3, -0.1, toward=interval(-0.2, 0.1))]}, "undecided", "along P_S e"),
        ({"contraction": [subspace(-0.3, -0.1, than_other={"qa": interval(-1, 1)})]}, "undecided", "a refresh of qa"),
        ({"contraction": [subspace(-0.3, -0.1, than_other={})]}, "undecided", "recover.streams is 1"),
        (
            {"contraction": [subspace(-0.3, -0.1, shrinks=absent("S has no converged vector"))]},
            "undecided",
            "converged",
        ),
        ({"rivals": GOOD.rivals | {"joint": interval(-3.0, -1.0)}}, "contradicted", "average minus that of joint"),
        ({"rivals": GOOD.rivals | {"ties": interval(-1.0, 1.0)}}, "undecided", "average minus that of ties"),
        ({"rivals": {"replay": interval(1.0, 3.0)}}, "undecided", "not run: joint, protect, pcgrad (see configs/cl"),
        ({"rivals": GOOD.rivals | {"replay": absent("no equal budget")}}, "undecided", "no equal budget"),
        ({"rivals": GOOD.rivals | {"kl": absent("no equal budget")}}, "supported", "average"),
        ({"variant": "it keeps qa"}, "undecided", "refresh-math is no plain refresh: it keeps qa"),
        ({"steps": 5}, "undecided", "not brief: 5 of 20 steps are 25%, above 20%"),
        # A refresh that took too long says nothing of brief ones, however badly it went.
        ({"steps": 5, "fraction": interval(0.2, 0.4)}, "undecided", "not brief"),
    ],
)
def test_each_condition_decides_alone(changes: dict[str, Any], verdict: str, words: str):
    record = judged(**changes)
    assert record["verdict"] == verdict and words in record["reason"]


def test_parts_are_told_apart_and_the_first_editions_verdict_stays_beside():
    """Four random sign steps: outside S the distance grows, which the first edition took for contraction in S."""
    noise = subspace(-0.1, 0.1, than_random=interval(-0.1, 0.1), toward=interval(-0.1, 0.1))
    record = judged(contraction=[noise])
    verdicts = {p["part"]: p["verdict"] for p in record["parts"]}
    assert verdicts == {"recovery": "supported", "contraction": "undecided", "best average": "supported"}
    assert (record["verdict"], record["old_rule"]["verdict"]) == ("undecided", "supported")
    assert "faster than ‖P_S⊥ e‖" in record["old_rule"]["rule"]
    assert record["rows"][0]["parts"] == record["parts"]


def test_a_variant_is_listed_and_never_decides():
    variant = dataclasses.replace(GOOD, stage="refresh-qa", variant="it keeps cw", loss=interval(90.0, 99.0))
    record = c6([dataclasses.replace(variant, fraction=interval(0.1, 0.2)), GOOD])
    assert record["verdict"] == "supported" and record["reason"].startswith("refresh-math: ")
    assert [(r["variant"], r["verdict"]) for r in record["rows"]] == [
        ("it keeps cw", "contradicted"),
        ("", "supported"),
    ]


def test_the_largest_loss_is_the_headline_and_all_are_listed():
    small = dataclasses.replace(
        GOOD, stage="refresh-qa", domain="qa", loss=interval(1.0, 3.0), fraction=interval(0.1, 0.2)
    )
    unknown = dataclasses.replace(GOOD, stage="refresh-code", loss=absent("code was not evaluated"))
    record = c6([small, GOOD, unknown])
    assert record["verdict"] == "supported" and record["reason"].startswith("refresh-math: ")
    assert [(r["stage"], r["verdict"]) for r in record["rows"]] == [
        ("refresh-qa", "contradicted"),
        ("refresh-math", "supported"),
        ("refresh-code", "supported"),
    ]


def test_no_refresh_to_judge():
    assert c6([])["reason"] == "not measurable: no refresh was run"
    record = judged(loss=absent("math was not evaluated"))
    assert record["verdict"] == "undecided" and record["reason"] == "not measurable: no refresh has a measured loss"


# --- C7 ------------------------------------------------------------------------------------------------------------


def figure(estimate: float, half: float = 1.0) -> dict[str, Any]:
    return {"estimate": estimate, "ci95": [estimate - half, estimate + half], "null": 0.0, "n": 300, "unit": "points"}


def rollback(lost: float = 30.0, donor: str = "qa", **differences: float) -> dict[str, Any]:
    """A rollback's record; differences to controls, each ± 1; those to `INFORMED` are 4 if not given."""
    differences = differences | {name: differences.get(name, 4.0) for name in INFORMED}
    test = {
        "lost": figure(lost),
        "gain": figure(12.0),
        "loss": figure(1.5),
        "at_equal_loss": {name: figure(x) | {"control_gain": 1.0, "settings": []} for name, x in differences.items()},
    }
    head = {"stage": f"rollback-math-{donor}", "domain": "math", "donor": donor, "limit": 2.0}
    return head | {"chosen": {"rule": "removing"}, "test": test}


NOTHING_CHOSEN = {"stage": "rollback-math-cw", "domain": "math", "donor": "cw", "limit": 2.0, "chosen": None}


@pytest.mark.parametrize(
    ("differences", "verdict", "figured"),
    [
        ({"random": 9.0, "matched": 6.0, "largest": 3.0}, "supported", 3.0),
        ({"random": 9.0, "matched": 6.0, "largest": 0.5}, "undecided", 0.5),
        ({"random": 9.0, "matched": -6.0, "largest": 0.5}, "contradicted", -6.0),
    ],
)
def test_every_control_has_to_be_beaten(differences: dict[str, float], verdict: str, figured: float):
    claim = c7([rollback(**differences)])
    assert (claim["id"], claim["verdict"], claim["estimate"]) == ("C7", verdict, figured)
    assert claim["reason"].startswith("math after qa: ") and "1.5 points of qa" in claim["reason"]
    assert claim["ci95"] == [figured - 1, figured + 1]
    assert set(claim["rows"][0]["at_equal_loss"]) == {*differences, *INFORMED}
    assert "settings" not in claim["rows"][0]["at_equal_loss"]["random"]


@pytest.mark.parametrize(("step", "verdict"), [(3.0, "supported"), (0.5, "undecided"), (-3.0, "contradicted")])
def test_a_set_that_only_beats_blind_controls_does_not_show_a_conflict_set(step: float, verdict: str):
    claim = c7([rollback(random=9.0, matched=6.0, largest=5.0, sign_step=step)])
    parts = {p["part"]: p["verdict"] for p in claim["parts"]}
    assert parts == {"against blind controls": "supported", "against A's gradient": verdict}
    assert claim["verdict"] == verdict and claim["old_rule"]["verdict"] == "supported"
    said = "supported against blind controls, not against A's gradient" in claim["reason"]
    assert said is (verdict != "supported")


def test_a_control_that_was_not_run_leaves_the_claim_undecided():
    record = rollback(random=9.0)
    del record["test"]["at_equal_loss"]["permuted"]
    claim = c7([record])
    assert (
        claim["verdict"] == "undecided" and "not compared with permuted: the record is of an earlier" in claim["reason"]
    )
    assert "no completion succeeded" in c7([record | {"left_out": "no completion succeeded"}])["reason"]


def test_the_verdict_is_of_the_pair_that_lost_most_and_the_others_are_rows():
    claim = c7([rollback(10.0, "cw", random=-9.0), NOTHING_CHOSEN, rollback(30.0, "qa", random=9.0)])
    assert claim["verdict"] == "supported" and "after qa" in claim["reason"]
    assert [row["verdict"] for row in claim["rows"]] == ["contradicted", "undecided", "supported"]


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "there is no rollback"),
        ([NOTHING_CHOSEN], "no set within 2 points of loss gains anything"),
        ([rollback(0.5, random=9.0)], "loss of math to win back"),
        ([rollback(-5.0, random=-9.0)], "loss of math to win back"),
    ],
)
def test_a_rollback_that_cannot_be_judged_is_undecided(records: list[dict[str, Any]], words: str):
    claim = c7(records)
    assert claim["verdict"] == "undecided" and words in claim["reason"]
