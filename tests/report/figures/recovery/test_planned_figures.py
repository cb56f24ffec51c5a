"""Figures of a plan, of what its actions did, and of orders, against records written by hand."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from mdrl_jax.report.figures.recovery import planned
from mdrl_jax.report.folder import Absent, Records
from tests.report.figures.rendered import check, drawn, figure, texts

NOTHING = {"kind": "nothing", "domain": "", "steps": 0, "donor": "", "rule": "", "fraction": 0.0, "strength": 0.0}
ROLLBACK = {"kind": "rollback", "domain": "sums", "donor": "songs", "rule": "removing", "steps": 0}


def action(name: str, mean: float, rank: int, allowed: bool = True, other: float = -1.0, **more: Any) -> dict[str, Any]:
    """An action of a plan: a refresh of `sums` unless told otherwise."""
    fields = NOTHING | {"kind": "refresh", "domain": "sums", "steps": rank} | more
    worst = {"domain": "songs", "change": figure(other, 2.0)}
    return fields | {
        "name": name, "rank": rank, "allowed": allowed, "risk": 0.25, "average_change": figure(mean, 1.0),
        "collateral": worst,
    }  # fmt: skip


def plan() -> dict[str, Any]:
    """Fifteen actions; two with the largest means go over the limit, one of the ranked ones is picked."""
    found = [action(f"refresh-sums-{i}", 10.0 - i, i) for i in range(1, 13)]
    found.append(action("nothing", 0.0, 13, kind="nothing", domain=""))
    found.append(action("rollback-a", 20.0, 14, False, -5.0, **ROLLBACK, fraction=0.003, strength=0.5))
    found.append(action("rollback-b", 15.0, 15, False, -4.0, **ROLLBACK, fraction=0.1, strength=1.0))
    return {"actions": found, "limit": 2.0, "pick": "refresh-sums-1", "reason": "Because it is best."}


def write(tmp_path: Path, name: str, record: dict[str, Any]) -> Records:
    """A work folder with one record of the planner."""
    (tmp_path / "recovery").mkdir(exist_ok=True)
    (tmp_path / "recovery" / f"{name}.json").write_text(json.dumps(record))
    return Records(tmp_path)


def test_the_best_actions_the_pick_and_nothing_are_shown_by_expected_mean(tmp_path: Path):
    made = planned.plan(write(tmp_path, "plan", plan()))
    spec = check(made)
    names = [r["name"] for r in made.rows]
    assert names == ["rollback-a", "rollback-b", *(f"refresh-sums-{i}" for i in range(1, 11)), "nothing"]
    rows = {r["name"]: r for r in made.rows}
    first = rows["rollback-a"]
    assert first["action"] == "roll 0.3 % of songs back for sums (removing, strength 0.5)"
    assert rows["rollback-b"]["action"] == "roll 10 % of songs back for sums (removing)"
    assert rows["refresh-sums-1"]["action"] == "refresh sums, 1 step"
    assert (first["mean"], first["mean_low"], first["other"], first["other_high"]) == (20, 19, -5, -3)
    assert {r["name"] for r in made.rows if r["verdict"] == "over the limit"} == {"rollback-a", "rollback-b"}
    assert [r["name"] for r in made.rows if r["picked"]] == ["refresh-sums-1"]
    assert {r["mark"] for r in drawn(spec) if "mark" in r} == {-2.0, 0.0}
    assert made.caption.startswith("Because it is best.") and "Of 15 actions the 12 best" in made.caption


def test_a_pick_that_is_not_among_the_best_is_shown_too(tmp_path: Path):
    made = planned.plan(write(tmp_path, "plan", plan() | {"pick": "refresh-sums-12"}))
    assert [r["name"] for r in made.rows if r["picked"]] == ["refresh-sums-12"] and len(made.rows) == 14


def test_a_run_of_one_domain_has_no_other(tmp_path: Path):
    found = plan()
    for one in found["actions"]:
        one["collateral"] = None
    assert len(check(planned.plan(write(tmp_path, "plan", found)))["hconcat"]) == 1


def tried(name: str, forecast: float, measured: float) -> dict[str, Any]:
    """An action that was tried; `sums` moves by twice the mean, `songs` not at all."""
    both = {"forecast": figure(forecast, 1.0), "measured": figure(measured, 0.5)}
    twice = {"forecast": figure(2 * forecast, 1.0), "measured": figure(2 * measured, 0.5)}
    still = {"forecast": figure(0.0), "measured": figure(0.0, 0.5)}
    return {"name": name, "average_change": both, "changes": {"songs": still, "sums": twice}}


def outcomes(**more: Any) -> dict[str, Any]:
    """Three actions, one of them nothing."""
    share = {"held": figure(0.9, 0.05), "held_with_error": figure(1.0, 0.0)}
    return {
        "actions": [tried("refresh-sums-2", 5, 4), tried("rollback-sums-songs", 3, 6), tried("nothing", 0, 0)],
        "spearman": figure(0.5, 0.25, n=2),
        "calibration": {"average": share, "domain": share},
        "regret": figure(2.0, 1.0, pick="refresh-sums-2", best="rollback-sums-songs"),
    } | more


def test_forecasts_stand_against_outcomes(tmp_path: Path):
    made = planned.outcomes(write(tmp_path, "outcomes", outcomes()))
    spec = check(made)
    found = {(r["action"], r["domain"]): (r["forecast"], r["measured"], r["kind"], r["mark"]) for r in made.rows}
    assert len(found) == 9
    assert found["refresh-sums-2", "mean"] == (5, 4, "refresh", "picked")
    assert found["rollback-sums-songs", "sums"] == (6, 12, "rollback", "best")
    assert found["nothing", "songs"] == (0, 0, "nothing", "")
    assert "Spearman 0.50 [0.25, 0.75]" in made.caption and "in 90% [85%, 95%] of means" in made.caption
    assert "rollback-sums-songs, did 2.00 [1.00, 3.00] points better than the pick" in made.caption
    line = [r["at"] for r in drawn(spec) if "at" in r]
    assert len(line) == 4 and min(line) < 0 and max(line) > 12
    assert "picked" in texts(spec) and "best" in texts(spec)


def test_a_pick_that_nothing_beat_or_that_was_not_tried(tmp_path: Path):
    found = figure(0.0, 0.0, pick="nothing", best="nothing")
    made = planned.outcomes(write(tmp_path, "outcomes", outcomes(regret=found)))
    assert "No action within the limit did better" in made.caption
    made = planned.outcomes(write(tmp_path, "outcomes", outcomes(regret=None)))
    check(made)
    assert made.caption.endswith("of single domains.") and not any(r["mark"] for r in made.rows)


def test_domains_have_the_order_of_the_run_where_it_is_known(tmp_path: Path):
    records = write(tmp_path, "outcomes", outcomes())
    assert 'domain": ["songs", "sums"]' in json.dumps(planned.outcomes(records).spec())
    (tmp_path / "evaluations").mkdir()
    rewards = {"sums": [[1.0]], "songs": [[0.0]]}
    record = {"stage": "base", "index": 0, "seed": 0, "rewards": rewards, "accuracy": rewards}
    (tmp_path / "evaluations" / "00-base.json").write_text(json.dumps(record))
    assert 'domain": ["sums", "songs"]' in json.dumps(planned.outcomes(records).spec())


def orders(domains: tuple[str, ...], unit: str = "points", reason: str = "") -> dict[str, Any]:
    """All orders, with damage growing by rank; the first and the middle one were run."""
    rows = []
    for rank, order in enumerate(itertools.permutations(domains), 1):
        total = figure(None, reason=reason, unit=unit) if reason else figure(float(rank), 0.5, unit)
        rows.append({"rank": rank, "order": list(order), "total": total, "damage": {domains[0]: total}})
    run = [rows[0], rows[len(rows) // 2]]
    checked = [r | {"total": {"forecast": r["total"], "measured": figure(7.0, 1.0)}} for r in run]
    return {"orders": rows, "checked": {"runs": checked, "spearman": figure(None, reason="3 pairs are too few")}}


def test_orders_are_ranked_and_those_run_have_what_was_measured(tmp_path: Path):
    record = {"reward": orders(("a", "b", "c")), "success_nll": orders(("a", "b", "c"), "nats")}
    reward, nll = planned.orders(write(tmp_path, "orders", record))
    assert (reward.name, nll.name) == ("orders", "orders-success-nll")
    spec = check(reward)
    assert [r["order"] for r in reward.rows][:2] == ["a → b → c", "a → c → b"] and len(reward.rows) == 6
    first = reward.rows[0]
    assert (first["forecast"], first["forecast_low"], first["measured"], first["measured_high"]) == (1, 0.5, 7, 8)
    assert [r["rank"] for r in reward.rows if r["state"] == "was run"] == [1, 4]
    assert "lost 7.0 [6.0, 8.0] points" in texts(spec) and "not known (3 pairs are too few" in reward.caption
    # Measured damage is in points: no diamond among forecasts in nats.
    diamonds = [json.dumps(f.spec()).count('"shape": "diamond"') for f in (reward, nll)]
    assert diamonds == [1, 0] and "lost 7.0" in texts(check(nll))


def test_of_many_orders_the_ends_and_those_run_are_shown(tmp_path: Path):
    (made,) = planned.orders(write(tmp_path, "orders", {"reward": orders(("a", "b", "c", "d", "e"))}))
    check(made)
    assert [r["rank"] for r in made.rows] == [*range(1, 13), 61, *range(109, 121)]
    assert "120 orders" in made.caption


def test_domains_left_out_are_named_and_objectives_without_a_forecast_left(tmp_path: Path):
    record = orders(("a", "b"))
    for row in record["orders"]:
        row["damage"]["b"] = figure(None, reason="all rewards are equal")
    blind = orders(("a", "b"), "nats", "no domain's expansion is measurable")
    (made,) = planned.orders(write(tmp_path, "orders", {"reward": record, "success_nll": blind}))
    assert "Not in the forecast: b, all rewards are equal." in made.caption
    with pytest.raises(Absent, match="no order has a forecast: no domain's expansion is measurable"):
        planned.orders(write(tmp_path, "orders", {"reward": blind}))


def test_a_run_without_a_planner_says_what_makes_each(tmp_path: Path):
    for builder, stage in ((planned.plan, "plan"), (planned.outcomes, "trials"), (planned.orders, "orders")):
        with pytest.raises(Absent, match=f"stage `{stage}`"):
            builder(Records(tmp_path))
    with pytest.raises(Absent, match="holds no action"):
        planned.outcomes(write(tmp_path, "outcomes", outcomes(actions=[])))
