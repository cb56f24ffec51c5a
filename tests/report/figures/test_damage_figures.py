"""Figures of damage against a record written by hand: terms add up, every prediction meets its measurement."""

import re
from pathlib import Path
from typing import Any

import pytest

from mdrl_jax.records import write_json
from mdrl_jax.report.figures import damage
from mdrl_jax.report.folder import Absent, Records
from tests.report.figures.rendered import figure, texts
from tests.report.figures.whole import whole

FEW = "only 10% of the prompts have completions with different rewards"


def step(alpha: float, predicted: float | None, measured: float) -> dict[str, Any]:
    """A step of a curve; of the prediction two thirds are first order."""
    if predicted is None:
        return {"alpha": alpha, "measured": figure(measured, 0.02)} | {
            name: figure(None, reason=FEW) for name in ("first", "second", "predicted", "remainder")
        }
    return {
        "alpha": alpha,
        "first": figure(2 * predicted / 3, 0.05),
        "second": figure(predicted / 3, 0.01),
        "predicted": figure(predicted, 0.06),
        "measured": figure(measured, 0.02),
        "remainder": figure(measured - predicted, 0.03),
    }


def objective(predicted: float | None, measured: float, breaks_at: float | None = None) -> dict[str, Any]:
    """An objective with a curve of two steps and segments of 1 and 2 on fewer prompts."""
    half = None if predicted is None else predicted / 2
    steps = [step(0.5, half, measured / 2), step(1.0, predicted, measured)]
    segments = [
        {"segments": n, "predicted": figure(p, 0.1, n=8) | {"n": 8}, "measured": figure(measured, 0.1) | {"n": 8}}
        for n, p in ((1, predicted), (2, measured))
        if p is not None
    ]
    return steps[-1] | {"curve": steps, "breaks_at": breaks_at, "segments": segments}


def write(folder: Path, pairs: list[dict[str, Any]]) -> Records:
    """A work folder with these pairs."""
    write_json(folder / "analysis" / "damage.json", {"pairs": pairs})
    return Records(folder)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    """Math after QA: 15 of 20 points and 0.3 of 0.9 nats predicted; QA after CW: the reward is not measurable."""
    both = {"reward": objective(0.15, 0.2), "success_nll": objective(0.3, 0.9, 0.5)}
    blind = {"reward": objective(None, 0.01), "success_nll": objective(0.06, 0.05)}
    return write(
        tmp_path,
        [
            {"domain": "math", "stage": "qa", "objectives": both},
            {"domain": "qa", "stage": "cw", "objectives": blind},
        ],
    )


def test_terms_start_where_the_one_before_ended_and_reach_the_measured_damage(records: Records):
    reward, nll = damage.waterfall(records)
    assert (reward.name, nll.name) == ("damage-reward", "damage-success-nll")
    for made, first, second, remainder in ((reward, 10.0, 5.0, 5.0), (nll, 0.2, 0.1, 0.6)):
        whole(made)
        own = {r["term"]: r for r in made.rows if r["pair"] == "math after qa"}
        assert list(own) == ["first order", "second order", "remainder", "measured"]
        starts = [own[t]["start"] for t in own]
        sizes = [own[t]["estimate"] for t in own]
        assert starts == pytest.approx([0, first, first + second, 0])
        assert sizes == pytest.approx([first, second, remainder, first + second + remainder])
    assert [own[t]["high"] - own[t]["estimate"] for t in own] == pytest.approx([0.05, 0.01, 0.03, 0.02])


def test_a_term_that_was_not_measured_says_so_and_its_measurement_stays(records: Records):
    made = damage.waterfall(records)[0]
    own = {r["term"]: r for r in made.rows if r["pair"] == "qa after cw"}
    assert [own[t]["estimate"] for t in own] == [None, None, None, pytest.approx(1.0)]
    assert own["second order"]["start"] is None and own["second order"]["reason"] == FEW
    assert texts(made.spec()).count("not measurable") == 3
    assert f"qa after cw ({FEW})" in made.caption


def test_agreement_has_a_point_a_pair_and_number_of_segments(records: Records):
    made = damage.agreement(records)
    whole(made)
    points = {(r["pair"], r["objective"], r["expansion"]): (r["predicted"], r["measured"]) for r in made.rows}
    expected = {
        ("math after qa", "reward", "1 segment (n = 40)"): (15, 20),
        ("math after qa", "reward", "1 segment (n = 8)"): (15, 20),
        ("math after qa", "reward", "2 segments (n = 8)"): (20, 20),
        ("qa after cw", "reward", "2 segments (n = 8)"): (1, 1),
        ("math after qa", "success_nll", "1 segment (n = 40)"): (0.3, 0.9),
        ("math after qa", "success_nll", "1 segment (n = 8)"): (0.3, 0.9),
        ("math after qa", "success_nll", "2 segments (n = 8)"): (0.9, 0.9),
        ("qa after cw", "success_nll", "1 segment (n = 40)"): (0.06, 0.05),
        ("qa after cw", "success_nll", "1 segment (n = 8)"): (0.06, 0.05),
        ("qa after cw", "success_nll", "2 segments (n = 8)"): (0.05, 0.05),
    }
    assert set(points) == set(expected)
    for key, value in expected.items():
        assert points[key] == pytest.approx(value), key
    first = made.rows[0]
    assert (first["predicted_low"], first["measured_high"]) == pytest.approx((9, 22))
    assert "too few pairs (2)" in made.caption


def test_agreement_counts_as_the_analysis_does(tmp_path: Path):
    """Five pairs in perfect order and on the line: Spearman 1, R² 1."""
    pairs = [
        {"domain": "a", "stage": f"b{i}", "objectives": {"success_nll": step(1.0, 0.1 * i, 0.1 * i)}}
        for i in range(1, 6)
    ]
    made = damage.agreement(write(tmp_path, pairs))
    whole(made)
    assert "Spearman 1.00" in made.caption and "R² 1.00" in made.caption


def test_an_interval_that_says_little_does_not_press_the_points_into_a_corner(tmp_path: Path):
    pairs = [
        {"domain": "a", "stage": f"b{i}", "objectives": {"success_nll": step(1.0, 0.1 * i, 0.2 * i)}} for i in range(3)
    ]
    near = damage.agreement(write(tmp_path, pairs))
    pairs[1]["objectives"]["success_nll"]["predicted"]["ci95"] = [-0.1, 900.0]
    far = damage.agreement(write(tmp_path, pairs))
    whole(far)
    assert "goes on" in far.caption and "goes on" not in near.caption
    assert far.rows[1]["predicted_high"] == 900.0
    ends = {tuple(p) for p in re.findall(r'"x": {[^}]*"scale": {"domain": \[([-0-9.e]+), ([0-9.e]+)\]', far.json())}
    assert ends and all(0.4 <= float(high) <= 0.81 for _, high in ends), ends


def test_a_path_on_all_prompts_counts_each_pair_once(tmp_path: Path):
    """Then the one-segment expansion is on record twice: as the analysis of the pair and as the path's first."""
    pairs = []
    for i in range(1, 5):
        found = objective(0.1 * i, 0.1 * i)
        n = found["measured"]["n"]
        for row in found["segments"]:
            row["predicted"]["n"] = row["measured"]["n"] = n
        pairs.append({"domain": "a", "stage": f"b{i}", "objectives": {"success_nll": found}})
    made = damage.agreement(write(tmp_path, pairs))
    whole(made)
    keys = [(r["pair"], r["segments"], r["n"]) for r in made.rows]
    assert len(keys) == len(set(keys)) == 4 * 2


def test_curves_and_where_the_model_breaks_down(records: Records):
    made = damage.alphas(records)
    whole(made)
    nll = [r for r in made.rows if r["pair"] == "math after qa" and r["objective"] == "success_nll"]
    assert [(r["alpha"], r["what"], r["estimate"]) for r in nll] == [
        (0.5, "predicted", pytest.approx(0.15)),
        (0.5, "measured", pytest.approx(0.45)),
        (1.0, "predicted", pytest.approx(0.3)),
        (1.0, "measured", pytest.approx(0.9)),
    ]
    assert [r["alpha"] for r in made.rows if r["breaks"]] == [0.5, 0.5]


def of_height(spec: Any) -> list[dict[str, Any]]:
    """The scales of all encodings `y` of a chart that have a domain."""
    if isinstance(spec, list):
        return [scale for part in spec for scale in of_height(part)]
    if not isinstance(spec, dict):
        return []
    own = spec.get("y", {}).get("scale", {}) if isinstance(spec.get("y"), dict) else {}
    return [own] * ("domain" in own) + [scale for part in spec.values() for scale in of_height(part)]


def test_a_band_that_is_hardly_determined_does_not_flatten_the_curves(tmp_path: Path):
    """With few prompts an interval may end hundreds of nats away from estimates below 1."""
    curve = [{"alpha": a, "predicted": figure(0.3 * a), "measured": figure(0.9 * a, 300.0 * a)} for a in (0.5, 1.0)]
    found = step(1.0, 0.1, 0.2) | {"curve": curve}
    made = damage.alphas(write(tmp_path, [{"domain": "a", "stage": "b", "objectives": {"success_nll": found}}]))
    whole(made)
    heights = {tuple(scale["domain"]) for scale in of_height(made.chart.to_dict())}
    ((low, high),) = heights
    assert low <= 0 and 0.9 < high < 3 and max(r["high"] or 0.0 for r in made.rows) > 300.0
    assert "A band that reaches the edge of its chart goes on" in made.caption


def test_one_pair_with_one_objective_is_enough(tmp_path: Path):
    one = {"domain": "a", "stage": "b", "objectives": {"success_nll": step(1.0, 0.1, 0.2)}}
    records = write(tmp_path, [one])
    (only,) = damage.waterfall(records)
    for made in (only, damage.agreement(records)):
        whole(made)
    with pytest.raises(Absent, match="no curves"):
        damage.alphas(records)


def test_what_is_missing_is_said(tmp_path: Path):
    with pytest.raises(Absent, match="damage.json is not there"):
        damage.waterfall(Records(tmp_path))
    with pytest.raises(Absent, match="no stage followed"):
        damage.agreement(write(tmp_path, []))
    with pytest.raises(Absent, match="neither of reward, success_nll"):
        damage.alphas(write(tmp_path, [{"domain": "a", "stage": "b", "objectives": {}}]))
    blind = {"domain": "a", "stage": "b", "objectives": {"reward": step(1.0, None, 0.1)}}
    with pytest.raises(Absent, match="both a prediction and a measured damage"):
        damage.agreement(write(tmp_path, [blind]))
