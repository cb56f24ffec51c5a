"""Figures of gradients against records written by hand: two domains at the base and at the first one's peak."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from mdrl_jax.records import write_json
from mdrl_jax.report.figures import gradients
from mdrl_jax.report.folder import Absent, Records
from tests.report.figures.rendered import figure, texts
from tests.report.figures.whole import whole

# The stage of math has another name than its domain.
STAGES = [{"name": "math1", "domain": "math"}, {"name": "qa", "domain": "qa"}, {"name": "cw", "domain": "cw"}]
NOISE = "two halves of A's blocks do not agree: the interval of their cosine includes 0 or less"


def tensor(name: str, kind: str, layer: int | None, cosine: float | None, p: float) -> dict[str, Any]:
    inner = None if cosine is None else 10 * cosine
    found = {"cosine": figure(cosine), "inner": figure(inner)}
    return {"name": name, "kind": kind, "layer": layer, "p": p} | found


def pair(cosine: float, clean: float | None, a: str = "math", b: str = "qa") -> dict[str, Any]:
    """Gate conflicts in layer 1, the norm is synergistic, nothing is known of the rest."""
    null = {"mean": 0.0, "low": -0.1, "high": 0.2, "n": 400}
    corrected = figure(None, reason=NOISE) if clean is None else figure(clean, 0.1)
    return {
        "domains": [a, b],
        "model": {"cosine": figure(cosine, 0.05) | {"null": null}, "disattenuated": corrected},
        "tensors": [
            tensor("layers/gate/kernel[0]", "gate", 0, 0.1, 0.5),
            tensor("layers/gate/kernel[1]", "gate", 1, -0.8, 0.001),
            tensor("layers/q/kernel[0]", "q", 0, None, 1.0),
            tensor("norm/scale", "norm", None, 0.6, 0.002),
        ],
        "conflicting": {"tensors": ["layers/gate/kernel[1]"]},
        "synergistic": {"tensors": ["norm/scale"]},
        "cancellation": {"positive": figure(3.0, 1.0), "negative": figure(-4.0, 1.0), "net": figure(-1.0, 2.0)},
    }


def write(folder: Path, points: dict[str, Any]) -> Records:
    write_json(folder / "analysis" / "gradients.json", points)
    write_json(folder / "analysis" / "settings.json", {"stages": STAGES})
    return Records(folder)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return write(tmp_path, {"base": {"math-qa": pair(-0.3, -0.4)}, "math1": {"math-qa": pair(0.01, None)}})


def test_cosines_plain_and_corrected_at_both_places(records: Records):
    made = gradients.cosines(records)
    spec = whole(made)
    assert [(r["place"], r["figure"], r["estimate"]) for r in made.rows] == [
        ("at the base", "plain", -0.3),
        ("at the base", "corrected for noise", -0.4),
        ("at the earlier domain's peak", "plain", 0.01),
        ("at the earlier domain's peak", "corrected for noise", None),
    ]
    first = made.rows[0]
    assert (first["low"], first["null_low"], first["null_high"]) == pytest.approx((-0.35, -0.1, 0.2))
    assert made.rows[3]["reason"] == NOISE.replace("A's", "math's")
    assert texts(spec).count("not measurable") == 1


def test_modules_with_the_sign_of_those_that_were_called(records: Records):
    made = gradients.modules(records)
    spec = whole(made)
    base = [(r["kind"], r["layer"], r["cosine"], r["called"]) for r in made.rows if r["place"] == "at the base"]
    assert base == [
        ("gate", "0", 0.1, ""),
        ("gate", "1", -0.8, "−"),
        ("q", "0", None, ""),
        ("norm", "–", 0.6, "+"),
    ]
    assert "4 of 8" in made.caption
    shown = texts(spec)
    assert shown.count("−") >= 2 and "q gate norm" in shown  # kinds in the order of a layer
    scale = spec["vconcat"][0]["spec"]["layer"][0]["encoding"]["color"]["scale"]
    assert (scale["scheme"], scale["domain"]) == ("blueorange", [-0.8, 0.8])


def test_sums_by_sign_and_their_net(records: Records):
    made = gradients.cancellation(records)
    whole(made)
    base = [(r["sum"], r["estimate"], r["low"], r["high"]) for r in made.rows if r["place"] == "at the base"]
    assert base == [("positive", 3, 2, 4), ("negative", -4, -5, -3), ("net", -1, -3, 1)]


def test_at_a_peak_only_pairs_of_its_domain_count(tmp_path: Path):
    points = {"math1": {"math-qa": pair(0.1, 0.1), "qa-cw": pair(0.7, 0.7, "qa", "cw")}}
    for build in (gradients.cosines, gradients.modules, gradients.cancellation):
        made = build(write(tmp_path, points))
        whole(made)
        assert {(r["place"], r["pair"]) for r in made.rows} == {("at the earlier domain's peak", "math – qa")}


def test_many_layers_have_marks_that_fit(tmp_path: Path):
    """36 layers of many pairs with long names: no text in the cells, and the chart is no wider than a page."""
    names = ["reasoning", "code", "science", "dialogue", "writing", "tools"]
    pairs = [pair(0.1, 0.1, a, b) for a, b in itertools.combinations(names, 2)]
    for one in pairs:
        one["tensors"] = [tensor(f"layers/gate/kernel[{i}]", "gate", i, 0.1, 0.01) for i in range(36)]
        one |= {"synergistic": {"tensors": ["layers/gate/kernel[7]"]}, "conflicting": {"tensors": []}}
    made = gradients.modules(write(tmp_path, {"base": {"-".join(one["domains"]): one for one in pairs}}))
    assert "+" not in texts(whole(made))
    assert [r["layer"] for r in made.rows if r["called"]] == ["7"] * 15


def test_what_is_missing_is_said(tmp_path: Path):
    for build in (gradients.cosines, gradients.modules, gradients.cancellation):
        with pytest.raises(Absent, match="gradients.json is not there"):
            build(Records(tmp_path))
    empty = write(tmp_path, {"base": {}})
    for build in (gradients.cosines, gradients.modules, gradients.cancellation):
        with pytest.raises(Absent, match="fewer than two"):
            build(empty)
