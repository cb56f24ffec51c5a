"""Averages after a refresh against those of other methods, by hand, and methods of another budget."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mdrl_jax.report.tables import methods
from mdrl_jax.report.tables.rivals import rivals
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
    variance = np.sum(apart.var(axis=1, ddof=1) / apart.shape[1]) / 9
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
    assert found["estimate"] is None and "+26 steps against a sequence of 60" in found["reason"]
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
