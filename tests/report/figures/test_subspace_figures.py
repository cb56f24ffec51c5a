"""Figures of the conflict subspace against a record written by hand."""

from pathlib import Path
from typing import Any

import pytest

from mdrl_jax.records import write_json
from mdrl_jax.report.figures import subspace
from mdrl_jax.report.folder import Absent, Records
from tests.report import browser
from tests.report.figures.rendered import figure
from tests.report.figures.whole import whole

OPEN = "the interval of DᵀHD includes 0"


def pair(objective: str, unit: str, **more: Any) -> dict[str, Any]:
    """Math after CW: DᵀHD 0.4, of which the route holds 0.1 and S 0.08 inside."""
    rungs = {"route": (0.1, 0.06, 0.24), "S": (0.08, 0.04, 0.28)}
    return {
        "domain": "math",
        "stage": "cw",
        "objective": objective,
        "unit": unit,
        "halves": [
            {"eigenvalues": [0.9, 0.2, -0.1], "null_top_95": 0.3, "measured_dimension": 1},
            {"eigenvalues": [0.8, 0.4, 0.1], "null_top_95": 0.3, "measured_dimension": 2},
        ],
        "angles": {"angles": [0.2], "mean": figure(0.2) | {"null": [1.5, 1.6]}},
        "total": figure(0.4, 0.1),
        "ladder": [
            {"rung": name} | {k: figure(v, 0.02) for k, v in zip(("within", "cross", "outside"), x, strict=True)}
            for name, x in rungs.items()
        ],
        "captured": [{"k": k, "share": figure(c, 0.05)} for k, c in ((1, 0.1), (2, 0.2))],
        "k90": figure(None, reason="c is below 0.9 at k = 2"),
        "residual": figure(0.16, 0.02),
        "baselines": [
            {"name": "random subspaces", "k": 2, "n": 4, "band95": [-0.01, 0.03], "shares": [-0.01, 0.0, 0.02, 0.03]},
            {"name": "top coordinates", "shares": [{"k": k, "share": figure(0.01 * k, 0.002)} for k in (1, 2)]},
        ],
    } | more


def removed(space: str, undone: float, **more: Any) -> dict[str, Any]:
    """S of two dimensions undoes `undone` of the damage; random pieces next to nothing, the complement 0.1."""
    return {
        "space": space,
        "n_prompts": 40,
        "k": [2, 2],
        "share_of_norm": 0.005,
        "undone": figure(undone, 0.05),
        "margins": [
            {"name": "random", "n": 4, "shares": [-0.01, 0.0, 0.02, 0.03], "band95": [-0.01, 0.03]},
            {"name": "complement", "share": figure(0.1, 0.02)},
        ],
        "curve": [{"k": k, "left": figure(1 - undone * k / 2, 0.05)} for k in (1, 2)],
        "route": figure(0.5, 0.1),
    } | more


def write(folder: Path, pairs: list[dict[str, Any]]) -> Records:
    """A work folder with these pairs."""
    write_json(folder / "analysis" / "subspace.json", {"pairs": pairs})
    return Records(folder)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    """Both objectives; a Hessian of the success NLL has no advantages to permute."""
    halves = [{"eigenvalues": [0.5], "null_top_95": None, "measured_dimension": None}] * 2
    return write(tmp_path, [pair("reward", "reward"), pair("success_nll", "nats", halves=halves)])


def test_shares_of_s_and_of_what_it_is_held_against(records: Records):
    made = subspace.captured(records)
    whole(made)
    reward = [r for r in made.rows if r["objective"] == "reward"]
    assert [(r["subspace"], r["k"], r["estimate"], r["low"], r["high"]) for r in reward] == [
        ("S", 1, 0.1, pytest.approx(0.05), pytest.approx(0.15)),
        ("S", 2, 0.2, pytest.approx(0.15), 0.25),
        ("random subspaces", 2, pytest.approx(0.01), -0.01, 0.03),
        ("top coordinates", 1, 0.01, 0.008, 0.012),
        ("top coordinates", 2, 0.02, pytest.approx(0.018), pytest.approx(0.022)),
    ]
    assert "math after cw, mean reward: c is below 0.9 at k = 2" in made.caption


def test_spectrum_of_each_half_and_its_null_in_points(records: Records):
    made = subspace.spectrum(records)
    whole(made)
    rows = [(r["objective"], r["half"], r["rank"], r["eigenvalue"], r["null_95"], r["unit"]) for r in made.rows]
    assert rows[:3] == [
        ("reward", "half 1", 1, pytest.approx(90), pytest.approx(30), "points"),
        ("reward", "half 1", 2, pytest.approx(20), pytest.approx(30), "points"),
        ("reward", "half 1", 3, pytest.approx(-10), pytest.approx(30), "points"),
    ]
    assert rows[-1] == ("success_nll", "half 2", 1, 0.5, None, "nats")
    assert "mean reward: 1 and 2" in made.caption and "success NLL: None" not in made.caption
    assert "0.20 rad (random 1.50–1.60)" in made.caption


def test_the_rungs_of_the_ladder_add_up_to_half_of_dhd(records: Records):
    made = subspace.ladder(records)
    whole(made)
    nll = {r["term"]: r for r in made.rows if r["objective"] == "success_nll"}
    assert (nll["all"]["start"], nll["all"]["estimate"]) == (0, 0.2)
    for rung, sizes in (("route", (0.05, 0.03, 0.12)), ("S", (0.04, 0.02, 0.14))):
        terms = [nll[f"{rung}: {part}"] for part in ("inside", "cross", "outside")]
        assert [t["estimate"] for t in terms] == pytest.approx(sizes)
        assert [t["start"] for t in terms] == pytest.approx([0, sizes[0], sizes[0] + sizes[1]])
        assert terms[2]["start"] + terms[2]["estimate"] == pytest.approx(0.2)
    assert nll["S: inside"]["high"] == pytest.approx(0.05)
    reward = {r["term"]: r["estimate"] for r in made.rows if r["objective"] == "reward"}
    assert reward["all"] == pytest.approx(20)  # points
    assert "16.00 [14.00, 18.00] points" in made.caption


def test_damage_left_by_the_dimensions_removed(tmp_path: Path):
    wider = [removed("all parameters", 0.6), {"space": "heads", "reason": "no head is shared"}]
    records = write(tmp_path, [pair("success_nll", "nats", removal=removed("MLP neurons", 0.3, wider=wider))])
    made = subspace.removal(records)
    whole(made)
    rows = [
        (r["removed"], r["k"], r["estimate"], r["low"], r["high"]) for r in made.rows if r["space"] == "MLP neurons"
    ]
    assert rows == [
        ("part in S", "0", 100, None, None),
        ("part in S", "1", pytest.approx(85), pytest.approx(80), pytest.approx(90)),
        ("part in S", "2", pytest.approx(70), pytest.approx(65), pytest.approx(75)),
        ("random piece", "2", pytest.approx(99), pytest.approx(97), pytest.approx(101)),
        ("complement", "2", pytest.approx(90), pytest.approx(88), pytest.approx(92)),
        ("whole route", "route", pytest.approx(50), pytest.approx(40), pytest.approx(60)),
    ]
    assert {r["space"] for r in made.rows} == {"MLP neurons", "all parameters"}
    assert "S on MLP neurons: 30% [25%, 35%] with 0.5% of the squared norm" in made.caption
    missing = figure(None, reason="the interval of the damage includes 0")
    more = {"curve": [{"k": 1, "left": missing}], "route": missing, "undone": missing}
    margins = [{"name": "random", "n": 4, "shares": [], "band95": None}, {"name": "complement", "share": missing}]
    closed = removed("MLP neurons", 0.3, margins=margins) | more
    with pytest.raises(Absent, match="interval of the damage includes 0"):
        subspace.removal(write(tmp_path, [pair("success_nll", "nats", removal=closed)]))
    with pytest.raises(Absent, match="no removal test"):
        subspace.removal(write(tmp_path, [pair("success_nll", "nats")]))


def test_one_objective_is_enough_and_the_other_s_reason_is_told(tmp_path: Path):
    reason = {"domain": "math", "stage": "cw", "objective": "reward", "reason": "the two domains share no route"}
    records = write(tmp_path, [reason, pair("success_nll", "nats")])
    for build in (subspace.captured, subspace.spectrum, subspace.ladder):
        made = build(records)
        whole(made)
        assert {r["objective"] for r in made.rows} == {"success_nll"}
        assert "math after cw, mean reward: not measurable, the two domains share no route" in made.caption


def test_what_is_missing_is_said(tmp_path: Path):
    with pytest.raises(Absent, match="subspace.json is not there"):
        subspace.captured(Records(tmp_path))
    with pytest.raises(Absent, match="no stage measurably harmed"):
        subspace.spectrum(write(tmp_path, []))
    reason = {"domain": "a", "stage": "b", "objective": "reward", "reason": "one half has nothing"}
    with pytest.raises(Absent, match="a after b, mean reward: not measurable, one half has nothing"):
        subspace.ladder(write(tmp_path, [reason]))
    undefined = {"share": figure(None, reason=OPEN)}
    closed = pair("reward", "reward", captured=[{"k": 1} | undefined])
    closed["baselines"] = [
        {"name": "random subspaces", "k": 1, "n": 4, "band95": None, "shares": []},
        {"name": "top coordinates", "shares": [{"k": 1} | undefined]},
    ]
    records = write(tmp_path, [closed])
    with pytest.raises(Absent, match=OPEN):
        subspace.captured(records)
    whole(subspace.ladder(records))


@pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")
def test_the_browser_has_nothing_to_complain_of(records: Records, tmp_path: Path):
    more = {"name": "measured S", "within": figure(0.1), "cross": figure(0.1), "outside": figure(0.2)}
    pairs = records.json("analysis/subspace.json")["pairs"]
    pairs[0]["ladder"].append({"rung": more.pop("name")} | more)
    again = write(tmp_path / "more", pairs)
    figures = [made(again) for made in (subspace.captured, subspace.spectrum, subspace.ladder)]
    (tmp_path / "page.html").write_text(browser.page_of(figures))
    met = browser.look(tmp_path / "page.html", tmp_path)[browser.WIDE]
    assert met["errors"] == [] and [c["marks"] > 0 for c in met["charts"]] == [True] * 3
