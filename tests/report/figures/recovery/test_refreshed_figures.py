"""Figures of a refresh against a record written by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdrl_jax.report.figure import Figure, Table
from mdrl_jax.report.figures.recovery import refreshed
from mdrl_jax.report.folder import Absent, Records
from tests.report.figures.rendered import check, drawn, figure, texts

RANDOM = [[0.5, 1.0, 2.0], [0.4, 0.9, 1.0]]  # ratios 0.8, 0.9 and 0.5


def look(step: int, old: float, new: float, fraction: dict, subspaces: list[dict]) -> dict[str, Any]:
    """A step at which the domain that was lost scores `old`."""
    scores = {"songs": figure(new, 2.0), "sums": figure(old, 4.0)}
    average = figure((old + new) / 2, 3.0)
    return {"step": step, "scores": scores, "average": average, "fraction": fraction, "subspaces": subspaces}


def basis(half: int, within: float, **more: Any) -> dict[str, Any]:
    """A subspace at one step, or its rate."""
    return {"objective": "reward", "half": half, "stage": "songs", "k": 3, "within": within} | more


def record() -> dict[str, Any]:
    """A refresh of `sums` with two looks; the second subspace has no dimension."""
    found = [
        [basis(0, 2.0, route=4.0, outside=8.0, random=RANDOM[0]), basis(1, 0.0, route=4.0, outside=8.0, random=[])],
        [basis(0, 1.0, route=5.0, outside=8.0, random=RANDOM[1]), basis(1, 0.0, route=5.0, outside=8.0, random=[])],
    ]
    none = figure(None, reason="a norm is 0")
    rate = figure(0.5, 0.1, null={"mean": 0.7, "low": 0.5, "high": 0.9, "n": 3})
    rates = {"route": figure(1.25, 0.1), "outside": figure(1.0, 0.1), "faster": figure(-0.69, 0.2)}
    bound = {"factor": 0.99, "alpha": 0.1, "mu": 0.1, "alpha_top": 0.2}
    return {
        "stage": "refresh-sums",
        "domain": "sums",
        "settings": {"steps": 2},
        "steps": [
            look(0, 40.0, 90.0, figure(0.0, 0.0), found[0]),
            look(2, 70.0, 85.0, figure(0.75, 0.125), found[1]),
        ],
        "peak": [[0.5, 1.0], [0.7, 1.0]],
        "chosen": 2,
        "stopped": "the budget ended",
        "contraction": [
            basis(0, 0.0) | rates | {"within": rate, "bound": bound},
            basis(1, 0.0) | rates | {"within": none, "bound": {"factor": None, "reason": "not applicable"}},
        ],
    }


def folder(tmp_path: Path, *found: dict[str, Any]) -> Records:
    """A work folder with these refreshes."""
    (tmp_path / "recovery").mkdir(exist_ok=True)
    for one in found:
        (tmp_path / "recovery" / f"{one['stage']}.json").write_text(json.dumps(one))
    return Records(tmp_path)


def test_scores_fraction_peak_and_the_step_kept_are_the_records(tmp_path: Path):
    (made,) = refreshed.curves(folder(tmp_path, record()))
    spec = check(made)
    assert made.name == "refresh-sums"
    rows = {(r["step"], r["domain"]): r for r in made.rows}
    assert len(rows) == 6
    assert rows[2, "sums"] == {
        "step": 2, "domain": "sums", "score": 70.0, "score_low": 66.0, "score_high": 74.0,
        "fraction": 0.75, "fraction_low": 0.625, "fraction_high": 0.875,
    }  # fmt: skip
    assert rows[0, "songs"]["score"] == 90.0 and rows[0, "songs"]["fraction"] is None
    assert rows[2, "mean of all"]["score"] == 77.5
    marks = drawn(spec)
    assert [m["peak"] for m in marks if "peak" in m] == [pytest.approx(80.0)]
    assert {m["step"] for m in marks if m.get("shown") == "kept"} == {2}
    assert len(spec["vconcat"]) == 2 and "published, 0.949" in texts(spec)
    assert "0.75 [0.62, 0.88] of what sums had lost" in made.caption and "the budget ended" in made.caption


def test_a_refresh_without_a_peak_says_why_it_has_no_fraction(tmp_path: Path):
    one = record()
    del one["peak"]
    for row in one["steps"]:
        row["fraction"] = figure(None, reason="no stage on the way trained sums alone")
    (made,) = refreshed.curves(folder(tmp_path, one))
    spec = check(made)
    assert len(spec["vconcat"]) == 1 and not [m for m in drawn(spec) if "peak" in m]
    assert "not known: no stage on the way trained sums alone" in made.caption


def test_every_refresh_and_distillation_has_its_figure(tmp_path: Path):
    others = [record() | {"stage": name, "domain": "songs"} for name in ("refresh-songs", "distill-songs@full")]
    found = refreshed.curves(folder(tmp_path, record(), *others))
    assert [f.name for f in found] == ["refresh-songs", "refresh-sums", "distill-songs.full"]
    assert [f.title.split()[0] for f in found] == ["Refresh", "Refresh", "Distillation"]


def test_distances_are_relative_to_step_0_and_random_subspaces_to_their_own(tmp_path: Path):
    paths, factors = refreshed.contraction(folder(tmp_path, record()))
    assert isinstance(paths, Figure) and isinstance(factors, Table)
    spec = check(paths)
    found = {(r["subspace"], r["part"], r["step"]): r for r in paths.rows}
    assert {key[0] for key in found} == {"reward, half 1"}  # the other has no dimension
    ratios = {part: found["reward, half 1", part, 2]["ratio"] for part in refreshed.PARTS.values()}
    assert ratios == {"in S": 0.5, "on the route, not in S": 1.25, "everywhere but in S": 1.0}
    band = found["reward, half 1", "random subspaces", 2]
    np.testing.assert_allclose(band["ratio"], (0.8 + 0.9 + 0.5) / 3)
    # Linear between order statistics: 0.05 of the way from the ends to the middle.
    np.testing.assert_allclose([band["low"], band["high"]], [0.5 + 0.05 * 0.3, 0.9 - 0.05 * 0.1])
    assert all(found[s, p, 0]["ratio"] == 1.0 for s, p, step in found if step == 0)
    assert "everywhere but in S" in texts(spec)
    first, second = factors.rows
    assert first == (
        "reward, half 1", "3", "0.500 [0.400, 0.600]", "1.250 [1.150, 1.350]", "1.000 [0.900, 1.100]",
        "0.500 to 0.900", "−0.690 [−0.890, −0.490]", "1 − 1.0e-02",
    )  # fmt: skip
    assert second[2] == "a norm is 0" and second[5] == "–" and second[7] == "–"
    assert all(len(row) == len(factors.columns) for row in factors.rows)


def test_subspaces_of_several_stages_are_told_apart(tmp_path: Path):
    one = record()
    one["contraction"][1]["stage"] = "jokes"
    _, factors = refreshed.contraction(folder(tmp_path, one))
    assert isinstance(factors, Table)
    assert [row[0] for row in factors.rows] == ["reward, half 1, songs", "reward, half 2, jokes"]


def test_what_is_missing_is_said(tmp_path: Path):
    with pytest.raises(Absent, match="refresh-"):
        refreshed.curves(Records(tmp_path))
    bare = record() | {"contraction": []}
    bare["steps"] = [row | {"subspaces": []} for row in bare["steps"]]
    with pytest.raises(Absent, match="refresh-sums: no conflict subspaces .*analyze"):
        refreshed.contraction(folder(tmp_path, bare))
    flat = record()
    flat["contraction"] = flat["contraction"][1:]
    for row in flat["steps"]:
        row["subspaces"] = row["subspaces"][1:]
    with pytest.raises(Absent, match="no dimension"):
        refreshed.contraction(folder(tmp_path, flat))


def test_of_many_recoveries_those_that_had_lost_most_are_followed():
    found = [{"stage": f"refresh-{i}", "lost": figure(None if i == 3 else -float(i % 7))} for i in range(15)]
    kept = refreshed.largest(found, lambda r: r["lost"])
    assert [r["stage"] for r in kept] == [f"refresh-{i}" for i in range(15) if i not in (3, 7, 14)]
    assert refreshed.largest(found[:12], lambda r: r["lost"]) == found[:12]
