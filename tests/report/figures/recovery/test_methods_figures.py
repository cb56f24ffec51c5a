"""Methods side by side in one run against figures worked out by hand from `POINTS` of the table's own tests."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mdrl_jax.records import write_json
from mdrl_jax.report.figures.recovery import methods
from mdrl_jax.report.folder import Absent, Records
from tests.report.figures.rendered import check, drawn, texts
from tests.report.tables.test_methods_table import write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Math 90 → 60, QA 80 → 78 in the plain sequence; what the others did stands in `POINTS`."""
    return write(tmp_path, 0, 0.0)


def test_gains_and_drops_are_against_the_end_of_the_plain_sequence(folder: Path):
    made = methods.frontier(Records(folder))
    spec = check(made)
    rows = {r["method"]: r for r in made.rows}
    gains = {name: (r["gain"], r["collateral"], r["worst"]) for name, r in rows.items()}
    expected = {
        "plain sequence": (0, 0, ""),
        "refresh-math": (26, 3, "qa"),
        "refresh-qa": (25, 6, "cw"),  # it starts from the refresh of Math, which does not matter here
        "rollback-math-cw": (10, 8, "cw"),
        "protect-cw": (24, 2, "cw"),
        "joint": (20, 2, "cw"),
        "reversed-math": (31, 28, "cw"),
        "average": (-10, 48, "cw"),
    }
    assert set(gains) == set(expected)
    for name, (gain, paid, worst) in expected.items():
        np.testing.assert_allclose(gains[name][:2], (gain, paid), atol=1e-9, err_msg=name)
        assert gains[name][2] == worst
    assert rows["refresh-math"]["gain_low"] < 26 < rows["refresh-math"]["gain_high"]
    assert rows["refresh-math"]["steps"] == 4 and rows["refresh-math"]["flops"] == 4e12
    assert {r["group"] for r in rows.values()} == {
        "plain sequence",
        "recovery",
        "prevention",
        "other training",
        "merge",
    }
    shown = texts(spec)
    assert all(name in shown for name in expected)
    assert [r["lost"] for r in drawn(spec) if "lost" in r] == [pytest.approx(30.0)]
    limit = json.loads((folder / "config.json").read_text())["config"]["recover"]["limit"]
    assert [r["limit"] for r in drawn(spec) if "limit" in r] == [limit]


def sized(spec: dict) -> list[str]:
    """The columns that give marks their size."""
    return [layer["encoding"]["size"]["field"] for layer in spec["layer"] if "size" in layer.get("encoding", {})]


def test_the_area_of_a_point_is_all_flops_that_led_there(folder: Path):
    made = methods.frontier(Records(folder))
    rows = {r["method"]: r["all_flops"] for r in made.rows}
    # 20 steps a stage and 1e12 a step; the refresh of QA comes after that of Math; a merge has three solo stages.
    assert rows["plain sequence"] == 60e12 and rows["refresh-math"] == 64e12 and rows["refresh-qa"] == 67e12
    assert rows["protect-cw"] == 64e12 and rows["joint"] == 66e12 and rows["average"] == 60e12
    assert "Area of a point" in made.caption and sized(made.spec()) == ["all_flops"]
    for cost in folder.glob("costs/*-joint.json"):
        cost.unlink()
    without = methods.frontier(Records(folder))
    assert sized(check(without)) == [] and "Area of a point" not in without.caption


def test_the_verdict_on_the_best_average_is_the_title_of_its_table(folder: Path):
    table = methods.best_average(Records(folder))
    assert table.title.startswith(("The refreshed sequence", "Whether the refreshed sequence"))
    rows = {row[0]: row for row in table.rows}
    assert rows["plain sequence"][2] == "refresh better" and rows["plain sequence"][1].startswith("+7.")
    assert set(rows) == {r["method"] for r in methods.frontier(Records(folder)).rows} - {"refresh-math"}
    assert "86.0 [" in table.caption and "Below it: " in table.caption


def test_names_stand_at_the_points_they_name(folder: Path):
    made = methods.frontier(Records(folder))
    labels = {r["method"]: r for r in drawn(made.spec()) if "from_x" in r}
    for row in made.rows:
        label = labels[row["method"]]
        assert (label["from_x"], label["from_y"]) == (row["collateral"], row["gain"])
    encoding = next(layer["encoding"] for layer in made.spec()["layer"] if {"x", "y"} <= set(layer["encoding"]))
    (left, right), (low, high) = (encoding[k]["scale"]["domain"] for k in ("x", "y"))

    def px(x: float, y: float) -> tuple[float, float]:
        start, at, stop = (np.sign(v) * np.log10(1 + abs(v)) for v in (left, x, right))  # symlog of constant 1
        return float(780 * (at - start) / (stop - start)), float(460 * (high - y) / (high - low))

    for name, label in labels.items():
        spot, centre = px(label["from_x"], label["from_y"]), px(label["x"], label["y"])
        assert 0 < centre[0] < 780 and 0 < centre[1] < 460
        near = math.dist(
            spot, (max(centre[0] - 3.15 * len(name), min(spot[0], centre[0] + 3.15 * len(name))), centre[1])
        )
        assert near < 60, name


def test_the_table_says_the_same(folder: Path):
    table = methods.comparison(Records(folder))
    assert table.columns == (
        "method", "average", "math", "worst collateral", "extra steps", "extra TFLOPs", "extra seconds",
    )  # fmt: skip
    rows = {row[0]: row for row in table.rows}
    assert rows["plain sequence"][3:] == ("–", "+0", "+0", "+0")
    assert rows["refresh-math"][1].startswith("86.0 [") and rows["refresh-math"][2].startswith("86.0 [")
    assert rows["refresh-math"][3].startswith("3.0 [") and rows["refresh-math"][3].endswith(" qa")
    assert rows["refresh-math"][4:] == ("+4", "+4", "+8")
    assert rows["joint"][4:] == ("+6", "+6", "+12")  # 66 steps against 60


def other_names(folder: Path, stages: dict[str, tuple[float, float]]) -> Records:
    """A folder of evaluations alone, of two domains that the package does not know."""
    for i, (stage, points) in enumerate(stages.items()):
        rewards = {
            d: [[p / 100 + off] for off in (-0.05, 0.0, 0.05)]
            for d, p in zip(("sums", "songs"), points, strict=True)
        }  # fmt: skip
        record = {"stage": stage, "index": i, "seed": 7, "rewards": rewards, "accuracy": rewards}
        write_json(folder / "evaluations" / f"{i:02d}-{stage}.json", record)
    return Records(folder)


def test_other_domains_and_a_folder_without_configuration_or_costs(tmp_path: Path):
    stages = {"base": (20, 20), "sums": (90, 30), "songs": (60, 80), "refresh-sums": (85, 79)}
    records = other_names(tmp_path, stages)
    made = methods.frontier(records)
    spec = check(made)
    (row,) = (r for r in made.rows if r["method"] == "refresh-sums")
    assert (row["gain"], row["collateral"], row["steps"]) == (pytest.approx(25), pytest.approx(1), None)
    assert not [r for r in drawn(spec) if "limit" in r]
    table = methods.comparison(records)
    assert table.rows[1][4:] == ("–", "–", "–") and table.columns[2] == "sums"


def test_what_is_missing_is_said(tmp_path: Path):
    with pytest.raises(Absent, match="evaluations"):
        methods.frontier(Records(tmp_path))
    plain = other_names(tmp_path / "plain", {"base": (20, 20), "sums": (90, 30), "songs": (60, 80)})
    for builder in (methods.frontier, methods.comparison):
        with pytest.raises(Absent, match="only the plain sequence"):
            builder(plain)
    with pytest.raises(Absent, match="no refresh was trained from the end"):
        methods.best_average(plain)
    stages = {"base": (20, 20), "sums": (60, 30), "songs": (60, 80), "refresh-sums": (65, 79)}
    whole = other_names(tmp_path / "whole", stages)
    with pytest.raises(Absent, match="nothing to win back"):
        methods.frontier(whole)
    assert methods.comparison(whole).columns[2] == "worst collateral"
