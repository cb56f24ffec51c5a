"""Averages after a refresh against those of other methods, by hand, and methods of another budget; the verdict."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mdrl_jax.report.tables import methods
from mdrl_jax.report.tables.rivals import BETTER, UNDECIDED, UNEQUAL, WORSE, best_average, rivals, verdict_of
from mdrl_jax.report.tables.seeds import Line
from mdrl_jax.stats.estimate import Estimate, over_seeds
from tests.report.tables.test_methods_table import DOMAINS, POINTS, write


def test_averages_are_compared_at_equal_budget(tmp_path: Path):
    run = methods.load(write(tmp_path, 0, 0.0))
    found = rivals(run, "refresh-math")
    # 60 plain steps; the refresh took 4 more, joint 66, protect 44 for 40; a merge has three solo stages.
    assert set(found) == {methods.PLAIN, "protect", "joint", "average"}
    m = run.matrix
    ours, theirs = (m.rewards[m.stages.index(s)] for s in ("refresh-math", "joint"))
    apart = np.array([100 * (ours[d].mean(axis=1) - theirs[d].mean(axis=1)) for d in DOMAINS])
    assert found["joint"]["estimate"] == pytest.approx(apart.mean())
    assert found["joint"]["estimate"] == pytest.approx(
        np.mean(POINTS["refresh-math"]) - np.mean(POINTS["joint"]), abs=1
    )
    n, square = apart.shape[1], (apart - np.median(apart, axis=1, keepdims=True)) ** 2
    two_more = 2 * (square**2).sum(axis=1) / square.sum(axis=1) / (n * (n - 1))
    variance = np.sum(apart.var(axis=1, ddof=1) / n + two_more) / 9
    low, high = found["joint"]["ci95"]
    assert (high - low) / 2 == pytest.approx(2.0 * np.sqrt(variance), rel=0.1)
    assert {name: f["steps"] for name, f in found.items()} == {
        methods.PLAIN: -4,
        "protect": 0,
        "joint": 2,
        "average": -4,
    }


def test_another_budget_or_no_record_of_it_is_no_comparison(tmp_path: Path):
    run = methods.load(write(tmp_path, 0, 0.0))
    long = dataclasses.replace(run, costs={**run.costs, "joint": run.costs["joint"] | {"steps": 90}})
    found = rivals(long, "refresh-math")["joint"]
    assert found["estimate"] is None and "no equal number of steps: +26 against a sequence of 60" in found["reason"]
    lost = dataclasses.replace(run, costs={k: v for k, v in run.costs.items() if k != "joint"})
    assert rivals(lost, "refresh-math")["joint"]["reason"] == "its steps are not on record"


def test_without_a_plain_stage_there_is_no_budget_to_compare_at(tmp_path: Path):
    run = methods.load(write(tmp_path, 0, 0.0))
    kept = ("base", "joint", "refresh-math")
    rows = [run.matrix.stages.index(stage) for stage in kept]
    matrix = dataclasses.replace(run.matrix, stages=kept, rewards=tuple(run.matrix.rewards[s] for s in rows))
    found = rivals(dataclasses.replace(run, matrix=matrix), "refresh-math")
    assert set(found) == {methods.PLAIN, "joint"}
    assert {f["estimate"] for f in found.values()} == {None}
    assert {f["reason"] for f in found.values()} == {"no plain stage was trained before a refresh"}


def test_the_best_average_is_said_in_words(tmp_path: Path):
    """Averages by `POINTS`: refresh-math 86, its later refresh of QA 85.3, protect 85.7, joint 84.3, plain 78.7."""
    runs = [methods.load(write(tmp_path / str(seed), seed, 0.0)) for seed in range(3)]
    found = best_average(runs[:1])
    assert found is not None and (found.stage, found.over) == ("refresh-math", "prompts")
    names = [row.name for row in found.rows]
    assert names == [
        methods.PLAIN, "refresh-qa", "rollback-math-cw", "protect-cw", "joint", "reversed-math", "average",
    ]  # fmt: skip
    by_name = {row.name: row for row in found.rows}
    single = rivals(runs[0], "refresh-math")
    for name, key in (("joint", "joint"), ("protect-cw", "protect"), (methods.PLAIN, methods.PLAIN)):
        assert by_name[name].estimate is not None and by_name[name].estimate.value == single[key]["estimate"]
        assert [by_name[name].estimate.low, by_name[name].estimate.high] == single[key]["ci95"]
    assert set(found.methods(BETTER)) >= {methods.PLAIN, "rollback-math-cw", "reversed-math", "average"}
    assert found.methods(WORSE) == [] and "protect-cw" in found.methods(UNDECIDED)
    assert "best average is undecided" in found.verdict and "Not told apart from it: " in found.words
    three = best_average(runs)
    assert three is not None and three.over == "seeds"
    row = next(r for r in three.rows if r.name == "joint")
    assert row.estimate is not None and row.estimate.n == 3
    assert row.estimate == over_seeds([v for v in row.per_seed if v is not None], "points")
    assert "refresh better" in three.text() and three.record()["methods"][0]["null"] == 0.0


def test_a_method_above_the_refresh_decides_and_another_budget_does_not(tmp_path: Path):
    run = methods.load(write(tmp_path, 0, 0.0))
    m = run.matrix
    at = m.stages.index("joint")
    better = {d: np.minimum(x + 0.15, 1.0) for d, x in m.rewards[at].items()}
    above = dataclasses.replace(
        run, matrix=dataclasses.replace(m, rewards=(*m.rewards[:at], better, *m.rewards[at + 1 :]))
    )
    found = best_average([above])
    assert found is not None and found.methods(WORSE) == ["joint"]
    assert found.verdict == "The refreshed sequence does not give the best average: one method ends above it"
    long = dataclasses.replace(above, costs={**above.costs, "joint": above.costs["joint"] | {"steps": 90}})
    found = best_average([long])
    assert found is not None and found.methods(UNEQUAL) == ["joint"] and found.methods(WORSE) == []
    assert "another number of steps or a missing record: joint." in found.words
    assert "no equal number of steps" in found.text()


def test_flops_stand_beside_the_differences(tmp_path: Path):
    """1e12 a step: the refresh took 4 steps beyond the plain sequence, joint 66 for 60, protect 44 for 40."""
    runs = [methods.load(write(tmp_path / str(seed), seed, 0.0)) for seed in range(3)]
    for some in (runs[:1], runs):
        found = best_average(some)
        assert found is not None
        by_name = {row.name: line.estimate for row, line in zip(found.rows, found.flops, strict=True)}
        wanted = {methods.PLAIN: -4e12, "joint": 2e12, "protect-cw": 0.0}
        assert {n: e.value for n, e in by_name.items() if e and n in wanted} == wanted
        assert found.record()["methods"][0]["flops"]["estimate"] == -4e12
    (line,) = (x for x in found.text().splitlines() if x.strip().startswith("joint"))
    assert line.endswith("FLOPs +2e+12")


def test_the_refresh_is_the_plain_one_that_claim_c6_judges(tmp_path: Path):
    faster = {"learning_rate": 0.5}
    changes = {"refresh-math": faster, "refresh-math@plain": {}}
    found = best_average([methods.load(write(tmp_path / "a", 0, 0.0, **changes))])
    assert found is not None and (found.stage, found.variant) == ("refresh-math@plain", "")
    assert "refresh-math" in [row.name for row in found.rows]
    found = best_average([methods.load(write(tmp_path / "b", 0, 0.0, **changes, **{"refresh-math@2": faster}))])
    assert found is not None and found.stage == "refresh-math@plain"
    found = best_average([methods.load(write(tmp_path / "c", 0, 0.0, **{"refresh-math": faster}))])
    assert found is not None and found.stage == "refresh-math" and "learning rate is 0.5" in found.variant
    assert found.words.startswith("refresh-math is no plain refresh: its learning rate is 0.5")


def test_intervals_over_many_seeds_are_over_prompts_too(tmp_path: Path):
    """Runs that differ in nothing but how their prompts fell would else have an interval that is far too short."""
    runs = [methods.load(write(tmp_path / str(seed), seed, 0.0)) for seed in range(8)]
    found = best_average(runs)
    assert found is not None and found.over == "seeds and prompts"
    row = next(r for r in found.rows if r.name == "joint")
    alone = over_seeds([v for v in row.per_seed if v is not None], "points")
    assert row.estimate is not None and row.estimate.value == pytest.approx(alone.value)
    assert row.estimate.high - row.estimate.low > 2 * (alone.high - alone.low)


def test_an_interval_without_a_width_decides_nothing():
    assert verdict_of(Line("joint", Estimate(3.0, 3.0, 3.0, 2, "points"), (3.0, 3.0))) == UNDECIDED
    assert verdict_of(Line("joint", Estimate(3.0, 2.9, 3.1, 2, "points"), (3.0, 3.0))) == BETTER


def test_without_a_refresh_there_is_no_best_average(tmp_path: Path):
    run = methods.load(write(tmp_path, 0, 0.0))
    kept = [s for s in run.matrix.stages if not s.startswith("refresh-")]
    rows = [run.matrix.stages.index(stage) for stage in kept]
    matrix = dataclasses.replace(run.matrix, stages=tuple(kept), rewards=tuple(run.matrix.rewards[s] for s in rows))
    assert best_average([dataclasses.replace(run, matrix=matrix)]) is None
